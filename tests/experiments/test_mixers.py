"""The quick run, and an analysis that tells a mixer from its learning rate."""

import numpy as np
import pandas as pd
import pytest

from deltaw.adapters import MoSLoRA
from deltaw.experiments import mixers
from deltaw.experiments.mixers import LORA, QUICK, Settings, name


@pytest.fixture(scope="module")
def record(quick, minilm_folder):
    return quick("mixers")


def test_the_full_record_is_large_enough():
    full = Settings()
    assert len(full.coarse) >= 8 and len(full.tune_seeds) >= 5 and len(full.report_seeds) >= 10 and full.fine == 1
    rows = {row.name: row.spec(0) for row in mixers.rows(full)}
    assert len(rows) == 1 + 2 * 4 and mixers.cells(full) == [{"task": "cola"}, {"task": "code_lm"}]
    assert len(full.code_coarse) >= 8 and full.of("code_lm").coarse == full.code_coarse
    assert all(isinstance(spec, MoSLoRA) != (row == LORA) for row, spec in rows.items())
    assert rows[name("orthogonal", False)] == MoSLoRA(8, mixer="orthogonal", train_mixer=False)


def test_the_fixed_identity_is_lora_to_the_last_bit(record):
    assert mixers.identity_gap(record) == 0
    shifted = record.copy()
    shifted.loc[shifted["row"] == LORA, "report/loss"] += 1e-3
    assert mixers.identity_gap(shifted) == pytest.approx(1e-3)


def test_the_quick_run_has_every_row_at_every_rate(record):
    grid = record[record["phase"] == "coarse"]
    assert len(grid) == 2 * 5 * 2 and set(grid["rate"]) == set(QUICK.coarse) == set(QUICK.code_coarse)
    own = record[record["phase"] == "report"].groupby(["task", "row"])["seed"].unique().map(tuple)
    assert len(own) == 2 * 5 and set(own) == {QUICK.report_seeds}
    counts = record.groupby(["task", "row"])[["parameters", "with_head"]].first()
    for task, lora, layers, head in (("docstrings", 165888, 36, 385 * 8), ("code_lm", 10240, 14, 0)):
        assert counts.loc[task, "parameters"].to_dict() == {
            LORA: lora, **{name(m, each): lora + layers * 16 * each for m in QUICK.mixers for each in (False, True)}}
        assert set(counts.loc[task, "with_head"] - counts.loc[task, "parameters"]) == {head}
        measured = ["report/loss", "tune/loss", *(["python/loss"] if task == "code_lm" else ["report/accuracy"])]
        assert np.isfinite(record.loc[record["task"] == task, measured]).all(axis=None)
    assert record.attrs["manifest"]["data"] == mixers.data(QUICK)


def test_the_analysis_takes_the_quick_record(record):
    assert len(mixers.curves(record)) == 20 and len(mixers.chosen(record)) == 10 and len(mixers.confound(record)) == 10
    assert len(mixers.differences(record)) == len(mixers.differences_at_one_rate(record)) == 8
    both = mixers.differences_over_examples(record)
    assert both["difference"].to_numpy() == pytest.approx(mixers.differences(record)["difference"].to_numpy(), abs=1e-5)


def test_blocks_of_the_reported_loss_are_kept(record):
    code = record[record["task"] == "code_lm"]
    assert code.loc[code["phase"] == "coarse", "report/blocks"].isna().all()
    for _, run in code[code["phase"] != "coarse"].iterrows():
        blocks = np.array(run["report/blocks"].split(), float)
        assert len(blocks) == QUICK.code_blocks and blocks.mean() == pytest.approx(run["report/loss"], abs=1e-6)
    others = record[record["task"] == "docstrings"]
    assert (others["report/predicted"].notna() == (others["phase"] != "coarse")).all()


def table(seeds=10):
    """A record where Kaiming is as good as LoRA at twice the rate, and worse at LoRA's."""
    random, rows = np.random.default_rng(0), []
    values = {LORA: (0.1, 0.3, 0.2), "kaiming, trained": (0.05, 0.2, 0.3)}
    for row, means in values.items():
        for rate, mean in zip((1e-3, 2e-3, 4e-3), means):
            runs = [("coarse", 100 + seed) for seed in range(5)]
            runs += [("report" if mean == 0.3 else "shared", seed) for seed in range(seeds) if mean == 0.3 or rate == 2e-3]
            rows += [{"task": "cola", "row": row, "phase": phase, "rate": rate, "seed": seed, "scale": "s = 1",
                      "stopped": "", **{f"{part}/{measure}": mean + random.normal(0, 1e-3)
                                        for part in ("tune", "report") for measure in ("loss", "matthews")}}
                     for phase, seed in runs]
    return pd.DataFrame(rows)


def test_a_mixer_is_told_from_its_learning_rate():
    found = mixers.confound(table()).set_index("row")
    assert found["rate"].to_dict() == {LORA: 2e-3, "kaiming, trained": 4e-3} and set(found["rate_of_lora"]) == {2e-3}
    assert found.loc[LORA, ["gain", "low", "high"]].tolist() == [0, 0, 0]
    assert found.loc["kaiming, trained", "gain"] == pytest.approx(0.1, abs=0.005)
    assert mixers.differences(table())["verdict"].tolist() == ["equivalent"]
    assert mixers.differences_at_one_rate(table())["verdict"].tolist() == ["worse"]
    orthogonal = table().replace({"row": {"kaiming, trained": name("orthogonal", False)}})
    assert mixers.primary(orthogonal)["verdict"].tolist() == ["equivalent"]
    assert not mixers.chosen(table()).set_index("row").loc[LORA, "at_edge"]
