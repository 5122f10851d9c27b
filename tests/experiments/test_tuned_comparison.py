"""What is run, on the digits at QUICK's size; and the analysis of records whose answers are known."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

import deltaw as dw
from deltaw import results
from deltaw.experiments import tuned_comparison as compared
from deltaw.experiments.engine import harness
from deltaw.experiments.tuned_comparison import CODE, FULL, HEAD, LORA, QUICK, Settings

MAIN = [HEAD, LORA, "Init[B]", "PiSSA", "LoRA+", "MoSLoRA, trained", "MoSLoRA, orthogonal", "LoRA-XS", "DoRA",
        "DoRA(MoSLoRA)", "VeRA", "DVoRA", FULL]


# ---------------------------------------------------------------------------------------------------------------------
# What is run


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    settings = dataclasses.replace(QUICK, tasks=("digits",))
    harness.run("tuned_comparison", quick=True, settings=settings, device="cpu", out=out, progress=False)
    return results.load("tuned_comparison-quick", folder=out)


def test_every_row_is_tuned_on_every_task_with_one_budget():
    full = Settings()
    cells = compared.cells(full)
    assert list(dict.fromkeys(cell["task"] for cell in cells)) == [CODE, "cola", "sst2", "trec", "subj", "digits"]
    for task in full.tasks:
        names = [row.name for cell in cells if cell["task"] == task for row in compared.rows(task, cell["group"], full)]
        ranks = (4, 16, 64, 256) if task == CODE else (16,)
        assert sorted(names) == sorted(MAIN + [f"{name} {rank}" for name in (LORA, "rsLoRA") for rank in ranks])
        budget = full.of(task)
        assert budget.coarse[0] <= 1e-4 and budget.coarse[-1] >= 1e-1 and (budget.fine, budget.spacing) == (5, 2**0.5)
        assert len(budget.tune_seeds) == 3 and len(budget.report_seeds) == 10
    assert full.of(CODE).code_blocks == 32 and full.of(CODE).code_size == "45m"
    with pytest.raises(ValueError, match="everywhere .* not 8"):
        Settings(everywhere=8)


def test_a_new_head_has_one_rate_beside_all_rows():
    full = Settings()
    for cell in compared.cells(full):
        rate = {CODE: None, "digits": 0.01}.get(cell["task"], 0.005)
        for row in compared.rows(cell["task"], cell["group"], full):
            assert row.recipe.get("head_learning_rate") == (None if row.name == HEAD else rate)


def test_the_rows_are_what_they_are_called():
    rows = {row.name: row for group in compared.groups(Settings()).values() for row in group}
    assert rows[LORA].spec(0) == dw.LoRA(8) and rows["Init[B]"].spec(0) == dw.LoRA(8, init="B")
    assert rows["LoRA+"].recipe == {"lora_plus_ratio": 16} and rows["LoRA+"].spec(0) == dw.LoRA(8)
    assert rows["VeRA"].spec(3) == rows["DVoRA"].spec(3).inner == dw.VeRA(256, 0.1, projection_seed=3)
    assert rows["MoSLoRA, orthogonal"].spec(0) == dw.MoSLoRA(8, mixer="orthogonal", train_mixer=False)
    assert rows["DoRA(MoSLoRA)"].spec(0) == dw.DoRA(dw.MoSLoRA(8)) and rows["LoRA-XS"].spec(0).rank == 16
    layer = dw.attach(dw.tasks.digits(base_steps=1).model(), rows["rsLoRA 16"].spec(0)).hidden1.adapters["default"]
    assert layer.scale == pytest.approx(2) and rows["rsLoRA 16"].scale == "s = 2 (α = 8)"
    assert rows["LoRA 64"].scale == "s = 0.125 (α = 8)"


def test_the_quick_run_has_every_row_with_its_counts(record):
    assert sorted(record["row"].unique()) == sorted([*MAIN, "LoRA 4", "rsLoRA 4"])
    assert (record.groupby("row")["phase"].agg(set).map({"coarse", "report"}.__eq__)).all()
    counts = compared.reported(record).set_index("row")[["parameters", "with_head"]]
    head, r, wide, out = 10 * 129, 2, 64 + 3 * 128, 2 * 128
    expected = {HEAD: 0, FULL: 64 * 128 + 128 * 128, LORA: r * wide, "MoSLoRA, trained": r * wide + 2 * r * r,
                "LoRA-XS": 2 * r * r, "DoRA": r * wide + out, "VeRA": 2 * 8 + out, "DVoRA": 2 * 8 + 2 * out,
                "rsLoRA 4": 4 * wide}
    assert counts["parameters"][list(expected)].to_dict() == expected
    assert (counts["with_head"] - counts["parameters"] == head).all()
    assert record["report/labels"].nunique() == 1 and record.attrs["manifest"]["data"].keys() == {"digits"}


def test_cells_share_the_seeds_heads_and_batches(record):
    """At the start no adapter changes the base: with the head and the batch the same, so is the first loss."""
    task = dw.tasks.digits(base_steps=30)
    rows = [row for group in compared.groups(QUICK).values() for row in group]
    banks = [dw.Bank(task.model(), [(row.spec(5), dw.Recipe(steps=1, seed=5, **row.recipe))], train_also=["classifier"],
                     reset_also=True) for row in rows]
    losses = [bank.fit(task, device="cpu", progress=False)[0].loss[0] for bank in banks]
    assert losses == pytest.approx([losses[0]] * len(rows), rel=1e-5)


def test_the_analysis_takes_the_quick_record(record):
    assert len(compared.against_lora(record)) == len(MAIN) - 1 and len(compared.every_pair(record)) == 13 * 12 / 2
    assert compared.headroom(record)["task"].tolist() == ["digits"] and len(compared.by_rank(record)) == 1
    assert len(compared.sensitivity(record)) == 15 and compared.rate_powers(record).empty
    assert compared.resolution(record)["rows"].tolist() == [15]


# ---------------------------------------------------------------------------------------------------------------------
# The analysis


RATES = tuple(float(f"{1e-4 * 2**k:.3g}") for k in range(11))
TASKS = {"sst2": {HEAD: (1.6e-3, 0.7), FULL: (2e-4, 0.9), LORA: (1.6e-3, 0.85), "twin": (3.2e-3, 0.85),
                  "good": (1.6e-3, 0.95)},
         CODE: {HEAD: (1.6e-3, 2.0), FULL: (2e-4, 1.5), LORA: (1.6e-3, 1.6), "twin": (3.2e-3, 1.601), "good": (1.6e-3, 1.55),
                "untuned": (1e-4, 1.55), "LoRA 4": (8e-4, 1.61), "rsLoRA 4": (1.6e-3, 1.61), "LoRA 16": (3.2e-3, 1.6),
                "rsLoRA 16": (1.6e-3, 1.6), "LoRA 64": (1.28e-2, 1.65), "rsLoRA 64": (1.6e-3, 1.55)}}


def run(task, row, phase, rate, seed, score, random, labels):
    """One run; `score` is what it measures in the mean."""
    found = {"task": task, "group": "one", "row": row, "phase": phase, "rate": rate, "seed": seed, "scale": "s = 1",
             "parameters": 10, "with_head": 12, "stopped": ""}
    if task == CODE:
        found |= {"tune/loss": score, "report/loss": score}
        if phase == "report":
            blocks = score + np.linspace(-0.5, 0.5, 32) + random.normal(0, 0.005, 32)
            found |= {"report/blocks": " ".join(map(str, blocks)), "report/loss": blocks.mean()}
    else:
        found |= {"tune/accuracy": score, "report/accuracy": score, "tune/loss": 1 - score, "report/loss": 1 - score}
        if phase == "report":  # hard examples are so for all
            predicted = np.where(np.linspace(0, 1, 2000) + random.normal(0, 0.002, 2000) < score, labels, 1 - labels)
            found |= {"report/predicted": "".join(map(str, predicted)), "report/labels": "".join(map(str, labels)),
                      "report/accuracy": (predicted == labels).mean()}
    return found


@pytest.fixture(scope="module")
def table():
    """Costs that rise by 0.02 for each doubling off the best rate; "untuned" is best at the least rate that was tried."""
    random = np.random.default_rng(0)
    labels, rows = random.integers(0, 2, 2000), []
    for task, known in TASKS.items():
        sign = 1 if task == CODE else -1
        for row, (best, score) in known.items():
            for rate in RATES:
                cost = 0.02 * abs(np.log2(rate / best))
                off = score + sign * cost
                rows += [run(task, row, "coarse", rate, 100 + seed, off, random, labels) for seed in range(3)]
            rows += [run(task, row, "report", best, seed, score, random, labels) for seed in range(10)]
    return pd.DataFrame(rows)


def test_verdicts_against_lora(table):
    found = compared.against_lora(table).set_index(["task", "row"])
    assert found["verdict"].to_dict() == {
        ("sst2", HEAD): "worse", ("sst2", FULL): "better", ("sst2", "twin"): "equivalent", ("sst2", "good"): "better",
        (CODE, HEAD): "worse", (CODE, FULL): "better", (CODE, "twin"): "equivalent", (CODE, "good"): "better",
        (CODE, "untuned"): "not tuned"}
    assert found.loc[(CODE, "good"), "difference"] == pytest.approx(-0.05, abs=2e-3)
    assert (found["low"] <= found["high"]).all() and (found["low_all"] <= found["low"]).all()
    assert found[["low_seeds", "high_seeds"]].notna().all(axis=None)
    pairs = compared.every_pair(table)
    assert len(pairs[pairs["task"] == "sst2"]) == 10 and len(pairs[pairs["task"] == CODE]) == 15


def test_a_task_without_headroom_cannot_rank(table):
    room = compared.headroom(table).set_index("task")
    assert room["gain"].to_dict() == pytest.approx({"sst2": 0.2, CODE: 0.5}, abs=5e-3) and room["can_rank"].all()
    flat, columns = table.copy(), ["report/blocks", "report/loss"]
    head, full = ((flat["task"] == CODE) & (flat["row"] == row) & (flat["phase"] == "report") for row in (HEAD, FULL))
    flat.loc[head, columns] = flat.loc[full, columns].to_numpy()
    assert compared.headroom(flat).set_index("task")["can_rank"].to_dict() == {"sst2": True, CODE: False}
    verdict = compared.against_lora(flat).set_index(["task", "row"])["verdict"]
    assert set(verdict[CODE]) == {"cannot rank", "not tuned"} and verdict["sst2", "good"] == "better"


def test_half_widths_of_both_kinds(table):
    found = compared.reported(table).set_index(["task", "row"])
    assert (found["half_width_all"] > found["half_width"]).all()
    seeds = found.loc[(CODE, LORA), "half_width"]
    assert 0.0003 < seeds < 0.0015  # 0.005 / √32, of ten seeds
    assert found.loc[(CODE, LORA), "half_width_all"] == pytest.approx(2 * 0.3 / 32**0.5, rel=0.2)
    assert found.loc[(CODE, "untuned"), "at_edge"] and found["at_edge"].sum() == 1
    assert found.loc[("sst2", FULL), ["rate", "parameters", "with_head"]].tolist() == [2e-4, 10, 12]
    widths = compared.resolution(table).set_index("task")
    assert widths["rows"].to_dict() == {"sst2": 5, CODE: 12} and widths["at_edge"].to_dict() == {"sst2": 0, CODE: 1}
    assert (widths["most_over_seeds"] >= widths["over_seeds"]).all() and (widths["over_both"] > widths["over_seeds"]).all()


def test_rank_and_scaling(table):
    found = compared.by_rank(table).set_index("rank")
    assert found["verdict"].to_dict() == {4: "equivalent", 16: "equivalent", 64: "better"} and set(found["task"]) == {CODE}
    assert found["rate_reference"].to_dict() == {4: 8e-4, 16: 3.2e-3, 64: 1.28e-2} and set(found["rate"]) == {1.6e-3}
    powers = compared.rate_powers(table).set_index("scaling")
    assert powers["exponent"].to_dict() == pytest.approx({LORA: 1.0, "rsLoRA": 0.0}, abs=1e-3)  # rates are of three digits
    assert powers["ranks"].to_dict() == {LORA: 4, "rsLoRA": 3}


def test_what_a_rate_that_is_off_costs(table):
    found = compared.sensitivity(table).set_index(["task", "row"])
    for task in TASKS:
        assert found.loc[(task, LORA), ["quarter", "half", "double", "fourfold"]].tolist() == pytest.approx(
            [0.04, 0.02, 0.02, 0.04], abs=1e-3)
        assert found.loc[(task, LORA), ["lowest", "highest"]].tolist() == pytest.approx(
            [1.6e-3 / 2**0.5, 1.6e-3 * 2**0.5], rel=0.01)
    untuned = found.loc[(CODE, "untuned")]
    assert untuned[["quarter", "half"]].isna().all() and untuned["lowest"] == pytest.approx(1e-4)
    broken = table.copy()
    broken.loc[(broken["row"] == LORA) & (broken["rate"] == 3.2e-3) & (broken["seed"] == 101), "stopped"] = "too large"
    cost = compared.sensitivity(broken).set_index(["task", "row"]).loc[(CODE, LORA)]
    assert cost["double"] == np.inf and cost["highest"] == pytest.approx(1.6e-3)
    assert cost["half"] == pytest.approx(0.02, abs=1e-3)
