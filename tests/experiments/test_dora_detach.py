"""The quick run, and an analysis of paired losses and of times in rounds."""

import numpy as np
import pandas as pd
import pytest

from deltaw.experiments import dora_detach
from deltaw.experiments.dora_detach import QUICK, Settings, cost, curves, detach_differences, reported, saved
from deltaw.experiments.engine.dora_step import DETACHED, EXACT, FORMED, FORMED_EXACT, arms
from deltaw.experiments.engine.step import BASE, SHAPES


@pytest.fixture(scope="module")
def record(quick, minilm_folder):
    return quick("dora_detach")


def test_the_full_record_is_large_enough():
    full = Settings()
    cells = dora_detach.cells(full)
    assert len(full.report_seeds) >= 5 and dora_detach.TIMED
    assert [(cell["task"], cell["steps"]) for cell in cells if cell["part"] == "loss"] == [
        ("cola", 500), ("digits", 120), ("digits", 1200)]
    costs = [(cell["shape"], cell["compiled"]) for cell in cells if cell["part"] == "cost"]
    assert {("Llama-2-7B, 4 × 2048", True), ("Llama-2-7B, 4 × 2048", False), ("MiniLM, 2048 × 64", True)} < set(costs)
    llama = SHAPES["Llama-2-7B, 4 × 2048"]
    assert (llama.width, llama.inner, llama.layers) == (4096, 11008, 1)


def test_a_shape_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"shapes must be of .*'small llama'.*, not \['GPT-4'\]"):
        Settings(shapes=("GPT-4",))


def test_the_quick_run_has_both_gradients_and_every_arm(record):
    runs = record[record["part"] == "loss"]
    counts = runs.groupby(["task", "row", "phase"]).size().to_dict()
    for task in ("docstrings", "digits"):
        for row in (DETACHED, EXACT):
            assert (counts[task, row, "coarse"], counts[task, row, "report"]) == (2, 2)
    assert (runs["stopped"] == "").all() and runs[["report/loss", "report/accuracy"]].notna().all(axis=None)
    assert "report/predicted" not in record and runs.groupby("task")["parameters"].nunique().eq(1).all()
    timed = record[record["part"] == "cost"]
    for shape, rows in timed.groupby("shape"):
        assert set(rows["arm"]) == set(arms(SHAPES[shape], False)) and rows.groupby("arm").size().eq(QUICK.rounds).all()
    assert (timed["ms"] > 0).all() and (timed["graphs"] == 0).all()


def test_the_analysis_takes_the_quick_record(record):
    names = ["docstrings", "digits, 10 steps"]
    assert list(detach_differences(record)["task"].unique()) == list(reported(record)["task"].unique()) == names
    assert len(detach_differences(record)) == 4 == len(detach_differences(record, at_one_rate=True))
    assert len(curves(record)) == 8 and len(cost(record)) == 6 + 8 and len(saved(record)) == 1 + 2
    base = cost(record).query(f"arm == '{BASE}'")
    assert base[["ratio", "least", "largest"]].to_numpy().tolist() == [[1, 1, 1]] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The analysis, on tables of our own making


def losses(detached, exact, seeds=10):
    """A record of one task: each gradient's accuracy by rate; the loss is one minus it. The exact one's best is 0.01."""
    random, rows = np.random.default_rng(0), []
    for row, values in ((DETACHED, detached), (EXACT, exact)):
        best = max(values, key=values.get)
        for rate, value in values.items():
            runs = [("coarse", 100 + seed) for seed in range(3)]
            runs += [("report" if rate == best else "shared", seed) for seed in range(seeds) if rate in (best, 0.01)]
            for phase, seed in runs:
                accuracy = value + 0.1 * np.sin(seed) + random.normal(0, 1e-3)  # seeds differ by more than gradients do
                rows.append({"part": "loss", "task": "digits", "steps": 120, "row": row, "phase": phase, "rate": rate, "seed": seed,
                             "scale": "s = 1", "stopped": "", "shape": None, **{
                                 f"{part}/{name}": accuracy if name == "accuracy" else 1 - accuracy
                                 for part in ("tune", "report") for name in ("accuracy", "loss")}})
    return pd.DataFrame(rows)


def test_differences_are_paired_and_each_gradient_has_its_own_rate():
    table = losses({0.001: 0.5, 0.01: 0.6, 0.1: 0.7}, {0.001: 0.5, 0.01: 0.8, 0.1: 0.6})
    found = detach_differences(table).set_index("quantity")
    assert list(found["task"]) == ["digits, 120 steps"] * 2
    assert found.loc["accuracy", "difference"] == pytest.approx(-0.1, abs=0.002)
    assert found.loc["accuracy", "detached"] - found.loc["accuracy", "exact"] == pytest.approx(found.loc["accuracy", "difference"])
    assert found.loc["accuracy", "high"] - found.loc["accuracy", "low"] < 0.005 and (found["verdict"] == "worse").all()
    assert found.loc["loss", "difference"] == pytest.approx(0.1, abs=0.002)
    at_one = detach_differences(table, at_one_rate=True).set_index("quantity")
    assert at_one.loc["accuracy", "difference"] == pytest.approx(-0.2, abs=0.002)


def test_a_small_difference_is_equivalent():
    table = losses({0.001: 0.5, 0.01: 0.799, 0.1: 0.6}, {0.001: 0.5, 0.01: 0.8, 0.1: 0.6})
    assert (detach_differences(table)["verdict"] == "equivalent").all()
    assert (detach_differences(table, margin=1e-4, loss_margin=1e-4)["verdict"] != "equivalent").all()


def test_runs_that_were_stopped_are_said_to_be():
    table = losses({0.001: 0.5, 0.01: 0.6, 0.1: 0.7}, {0.001: 0.5, 0.01: 0.8, 0.1: 0.6})
    stopped = (table["row"] == DETACHED) & (table["phase"] == "report") & (table["seed"] == 3)
    table.loc[stopped, [column for column in table if "/" in column]] = np.nan
    assert (detach_differences(table)["verdict"] == "stopped").all()


def timed(ms, peak, graphs=()):
    """A record of one cell: `ms[arm]` a round; a round of `graphs` had something to compile."""
    return pd.DataFrame([{"part": "cost", "shape": "Llama", "compiled": True, "arm": arm, "round": i, "ms": value,
                          "graphs": int((arm, i) in graphs), "kept_gib": peak[arm] - 1, "peak_gib": peak[arm]}
                         for arm, values in ms.items() for i, value in enumerate(values)])


MS = {BASE: [10, 20, 10], DETACHED: [12, 24, 13], EXACT: [18, 30, 19.5], FORMED: [30, 40, 30], FORMED_EXACT: [33, 48, 33]}
PEAK = {BASE: 2.0, DETACHED: 2.5, EXACT: 2.6, FORMED: 3.0, FORMED_EXACT: 4.0}


def test_ratios_are_taken_within_a_round():
    found = cost(timed(MS, PEAK)).set_index("arm")
    assert list(found.index) == list(MS)
    assert found.loc[DETACHED, ["ms", "ratio", "least", "largest"]].tolist() == pytest.approx([13, 1.2, 1.2, 1.3])
    assert found.loc[EXACT, ["kept_gib", "peak_gib", "above_base_gib"]].tolist() == pytest.approx([1.6, 2.6, 0.6])


def test_a_round_in_which_something_was_compiled_does_not_count():
    found = cost(timed(MS, PEAK, graphs={(EXACT, 2)})).set_index("arm")
    assert found.loc[DETACHED, "largest"] == pytest.approx(1.2) and found.loc[EXACT, "ms"] == 24


def test_what_detaching_saves():
    found = saved(timed(MS, PEAK)).set_index("norm")
    assert found.loc["factored", ["kept_gib", "peak_gib", "share"]].tolist() == pytest.approx([0.1, 0.1, 0.1 / 2.6])
    assert found.loc["formed", ["kept_gib", "peak_gib", "share"]].tolist() == pytest.approx([1, 1, 0.25])
    assert found.loc["formed", ["slower", "least", "largest"]].tolist() == pytest.approx([1.1, 1.1, 1.2])
    without = saved(timed({arm: MS[arm] for arm in (BASE, DETACHED, EXACT)}, PEAK))
    assert list(without["norm"]) == ["factored"]
