"""The quick run: a base, what each method makes of it, cells that do not depend on each other; and the analysis."""

import numpy as np
import pandas as pd
import pytest

from deltaw.experiments import code_lm
from deltaw.experiments.code_lm import METHODS, QUICK, Settings, adapted
from deltaw.experiments.engine import harness
from deltaw.tasks.code_base import SHAPES
from deltaw.tasks.code_tokens import STREAMS

TIMES = ["seconds", "tokens_per_second", "plain_tokens_per_second"]


@pytest.fixture(scope="module")
def record(quick):
    return quick("code_lm")


def test_the_full_record_has_every_base_and_method():
    full = Settings()
    assert full.sizes == ("45m", "10m") and set(full.methods) == set(METHODS) and {"full", "head"} < set(METHODS)
    cells = code_lm.cells(full)
    assert len(cells) == 1 + 2 * (1 + 2 * len(METHODS))
    assert [cell["stage"] for cell in cells[:3]] == ["corpus", "base", "short"]
    assert len(full.rates) >= 4 and len(full.seeds) >= 2 and full.long >= 4 * full.short
    assert {*full.sizes, *QUICK.sizes} <= SHAPES.keys()


def test_the_record_has_the_corpus(record):
    kept = record[record["row"] == "kept"].set_index("name")
    assert tuple(kept.index) == STREAMS and (kept[["files", "bytes", "tokens", "units"]] > 0).all(axis=None)
    assert (record[record["row"] == "removed"]["files"] > 0).all()
    assert record.attrs["manifest"]["data"] == code_lm.data(QUICK) and set(STREAMS) < set(code_lm.data(QUICK))


def test_the_record_has_the_base(record):
    base = record[record["stage"] == "base"]
    curve, [(_, summary)] = base[base["row"] == "curve"], base[base["row"] == "summary"].iterrows()
    assert curve["step"].iloc[-1] == QUICK.base_steps and curve["train_loss"].iloc[-1] < curve["train_loss"].iloc[0] - 0.3
    evaluations = base[base["row"] == "evaluation"]
    assert evaluations["step"].iloc[[0, -1]].tolist() == [0, QUICK.base_steps]
    assert evaluations["python/loss"].iloc[-1] == pytest.approx(summary["python/loss"], abs=0.2)  # of fewer windows
    assert summary["tokens"] == QUICK.base_steps * QUICK.base_batch * QUICK.length and (summary[TIMES] > 0).all()
    assert record["base"].dropna().nunique() == 1 and len(record["base"].iloc[-1]) == 12


def test_the_record_has_every_run(record):
    runs = record[record["row"] == "run"]
    count = len(QUICK.rates) * len(QUICK.seeds)
    sizes = runs.groupby(["stage", "method"]).size()
    assert set(sizes) == {count} and len(sizes) == 2 * len(QUICK.methods)
    assert np.isfinite(runs[["tune/loss", "target/loss", "python/loss", "train_loss_10"]]).all(axis=None)
    assert (runs["stopped"] == "").all()
    trained = runs.groupby("method")["trained"].first()
    assert trained["full"] == record.loc[record["row"] == "summary", "trained"].item()
    assert trained["head"] == QUICK.vocabulary * SHAPES["tiny"].width and trained["VeRA r256"] < trained["LoRA r8"]


def test_a_cell_alone_gives_the_same_rows(record):
    code_lm.code_lm.__globals__["_pretrained"].cache_clear()  # as in a process that begins with it
    for method in ("LoRA r8", "full"):
        cell = {"size": "tiny", "stage": "short", "method": method}
        again = pd.DataFrame(code_lm.measure(cell, QUICK, "cpu"))
        before = record[(record["stage"] == "short") & (record["method"] == method)].reset_index(drop=True)
        pd.testing.assert_frame_equal(again, before[again.columns], check_dtype=False)


def test_a_run_that_diverges_is_told_and_kept_out(record):
    settings = Settings(**{**harness.plain(QUICK), **{name: getattr(QUICK, name) for name in ("packages", "headers")},
                           "rates": (1e-2, 1e30), "seeds": (0,)})
    for method in ("full", "LoRA r8"):
        rows = code_lm.measure({"size": "tiny", "stage": "long", "method": method}, settings, "cpu")
        assert rows[0]["stopped"] == "" and "not" not in rows[0]["stopped"]
        assert "loss" in rows[1]["stopped"] or not np.isfinite(rows[1]["target/loss"])


def table(losses, sizes=("45m",)):
    """A record in which a method has the target losses losses[method][rate], and "tune" the same."""
    rows = [{"row": "summary", "size": size, "stage": "base", "method": "-", "target/loss": 2.0, "python/loss": 1.0}
            for size in sizes]
    rows += [{"row": "run", "size": size, "stage": "long", "method": method, "rate": rate, "seed": seed, "trained": 7,
              "tune/loss": loss, "target/loss": loss + 0.01 * seed, "python/loss": 1.5}
             for size in sizes for method, by_rate in losses.items() for rate, loss in by_rate.items() for seed in (0, 1)]
    return pd.DataFrame(rows)


def test_the_rate_is_chosen_on_tune_and_edges_are_told():
    found = adapted(table({"a": {1e-3: 1.9, 1e-2: 1.5, 1e-1: 1.6}, "b": {1e-3: 1.4, 1e-2: 1.5, 1e-1: np.nan}}))
    found = found.set_index("method")
    assert found["rate"].to_dict() == {"a": 1e-2, "b": 1e-3} and found["at_edge"].to_dict() == {"a": False, "b": True}
    assert found.loc["a", ["target", "gained", "forgotten"]].tolist() == pytest.approx([1.505, 0.495, 0.5])
    assert found["place"].to_dict() == {"a": 2, "b": 1}


def test_a_rate_at_which_one_run_was_stopped_is_not_chosen():
    record = table({"a": {1e-3: 1.9, 1e-2: 1.5, 1e-1: 1.6}})
    record.loc[(record["rate"] == 1e-2) & (record["seed"] == 1), ["tune/loss", "target/loss", "python/loss"]] = np.nan
    assert adapted(record)["rate"].tolist() == [1e-1]


def test_the_quick_record_can_be_read(record):
    found = adapted(record)
    assert len(found) == 2 * len(QUICK.methods) and np.isfinite(found["gained"]).all()
    assert sorted(found.loc[found["stage"] == "long", "place"]) == [1, 2, 3, 4]
    assert (found.loc[found["method"].isin(["full", "head"]) & (found["stage"] == "long"), "gained"] > 0.05).all()
