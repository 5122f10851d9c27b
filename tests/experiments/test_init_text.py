"""The quick run, and an analysis that chooses on the one set and reports on the other."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from deltaw.experiments import init_text
from deltaw.experiments.init_text import QUICK, Settings, chosen, curves, differences

RATES = (1e-4, 1e-3, 1e-2, 1e-1)


@pytest.fixture(scope="module")
def record(quick, minilm_folder):
    return quick("init_text")


def test_the_full_record_is_large_enough():
    full = Settings()
    assert init_text.cells(full) == [{"task": task} for task in ("cola", "sst2", "trec", "subj")]
    assert full.starts == ("A", "B") and len(full.rates) >= 9 and len(full.seeds) >= 5
    assert max(high / low for low, high in itertools.pairwise(full.rates)) <= math.sqrt(10) + 1e-9  # half-decades or finer


def test_the_quick_run_has_a_row_for_each_start_rate_and_seed(record):
    table, manifest = record, record.attrs["manifest"]
    assert list(table.columns[:5]) == ["task", "start", "rate", "seed", "stopped"]
    runs = table[["start", "rate", "seed"]].itertuples(index=False, name=None)
    assert list(runs) == list(itertools.product(QUICK.starts, QUICK.rates, QUICK.seeds))
    measured = table[[f"{part}/{name}" for part in ("tune", "report") for name in ("loss", "accuracy")]]
    assert np.isfinite(measured).all(axis=None) and (table["stopped"] == "").all()
    assert manifest["data"] == init_text.data(QUICK) and manifest["complete"]


def test_both_starts_begin_as_the_same_model_on_the_same_examples(record):
    first = record.pivot_table("train_loss_1", ["seed", "rate"], "start")  # a tenth of the run is its first step
    np.testing.assert_allclose(first["A"], first["B"], rtol=1e-4)
    assert (first.groupby("seed").std() < 1e-4).all(axis=None)  # whatever the rate
    assert abs(first.loc[0] - first.loc[1]).min(axis=None) > 1e-3  # but the seed tells
    last = record.pivot_table("train_loss_10", ["seed", "rate"], "start")
    assert (abs(last["A"] - last["B"]) > 1e-4).all()


def test_the_analysis_takes_the_quick_record(record):
    assert len(curves(record)) == 2 * 2 * 3 and len(chosen(record)) == 2
    assert list(differences(record)["task"]) == ["docstrings", "mean"]


# ---------------------------------------------------------------------------------------------------------------------
# The analysis, on tables of our own making


def table(tune, report, task="sst2", noise=0.0, seeds=5, draw=None):
    """A record in which start s measures tune[s][rate] and report[s][rate], with independent noise."""
    draw = draw or np.random.default_rng(0)
    rows = [{"task": task, "start": start, "rate": rate, "seed": seed, "stopped": "", "tune/loss": 1.0, "report/loss": 1.0,
             **{f"{part}/{name}": values[start][i] + noise * draw.normal()
                for part, values in (("tune", tune), ("report", report)) for name in ("accuracy", "matthews")}}
            for start in "AB" for i, rate in enumerate(RATES) for seed in range(seeds)]
    return pd.DataFrame(rows)


TUNE = {"A": [0.5, 0.6, 0.9, 0.5], "B": [0.5, 0.8, 0.6, 0.5]}
REPORT = {"A": [0.5, 0.99, 0.85, 0.5], "B": [0.5, 0.7, 0.99, 0.99]}


def test_the_rate_is_chosen_on_the_one_set_and_reported_on_the_other():
    found = chosen(table(TUNE, REPORT)).set_index("start")
    assert found["rate"].to_dict() == {"A": 1e-2, "B": 1e-3} and not found["at_edge"].any()
    assert found["report"].to_dict() == pytest.approx({"A": 0.85, "B": 0.7})
    both = differences(table(TUNE, REPORT)).set_index("task")
    assert both.loc["sst2", "difference"] == pytest.approx(0.15) and both.loc["sst2", "decades"] == pytest.approx(1)
    assert both.loc["sst2", ["low", "high"]].tolist() == pytest.approx([0.15, 0.15]) and both.loc["sst2", "verdict"] == "A"


@pytest.mark.parametrize("edge", [0, 3])
def test_a_choice_at_the_grid_s_edge_is_flagged(edge):
    tune = {"A": [0.9 if i == edge else 0.5 for i in range(4)], "B": TUNE["B"]}
    assert chosen(table(tune, REPORT)).set_index("start")["at_edge"].to_dict() == {"A": True, "B": False}


def test_of_equals_the_lower_loss_is_chosen():
    record = table({"A": [0.5, 0.7, 0.7, 0.7], "B": TUNE["B"]}, REPORT)
    record.loc[(record["start"] == "A") & (record["rate"] == 1e-2), "tune/loss"] = 0.5
    assert chosen(record).set_index("start").loc["A", "rate"] == 1e-2


def test_a_rate_at_which_a_run_was_stopped_is_not_chosen():
    record = table(TUNE, REPORT, noise=0.01)
    record.loc[(record["rate"] == 1e-2) & (record["seed"] == 3), [c for c in record if "/" in c]] = np.nan
    found = chosen(record).set_index("start")
    assert found.loc["A", ["rate", "rate_low", "rate_high"]].tolist() == pytest.approx([1e-3] * 3)  # in every resample
    assert np.isfinite(found[["report", "low", "high"]]).all(axis=None)


def test_cola_is_judged_by_matthews_correlation_and_the_others_by_accuracy():
    record = pd.concat([table(TUNE, REPORT, task) for task in ("cola", "subj")])
    better = {"tune/matthews": 2.0, "tune/accuracy": 2.0}
    for (column, value), rate in zip(better.items(), (1e-4, 1e-1)):
        record.loc[record["rate"] == rate, column] = value
    assert chosen(record).groupby("task")["rate"].unique().to_dict() == {"cola": [1e-4], "subj": [1e-1]}


def test_the_mean_is_of_the_tasks_and_verdicts_follow_the_interval():
    swapped = [{"A": values["B"], "B": values["A"]} for values in (TUNE, REPORT)]
    record = pd.concat([table(TUNE, REPORT, "sst2", 0.01), table(*swapped, "subj", 0.01), table(TUNE, TUNE, "trec", 0.5)])
    found = differences(record).set_index("task")
    assert found["verdict"].to_dict() == {"sst2": "A", "subj": "B", "trec": "not separated", "mean": "not separated"}
    assert found.loc["mean", "difference"] == pytest.approx(found["difference"][:3].mean())
    assert found.loc["mean", "decades"] == pytest.approx(found["decades"][:3].mean())
    assert (found["low"] <= found["difference"]).all() and (found["difference"] <= found["high"]).all()


def test_the_order_of_the_rows_does_not_matter():
    record = table(TUNE, REPORT, noise=0.05)
    shuffled = record.sample(frac=1, random_state=0)
    for analysis in (curves, chosen, differences):
        pd.testing.assert_frame_equal(analysis(record), analysis(shuffled))


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_as_often_as_they_say(monkeypatch, seeds):
    monkeypatch.setattr(init_text, "DRAWS", 1000)
    draw, hits = np.random.default_rng(1), []
    for _ in range(400):
        record = table(TUNE, REPORT, noise=0.02, seeds=seeds, draw=draw)
        low, high = differences(record).set_index("task").loc["sst2", ["low", "high"]]
        hits.append(low <= 0.15 <= high)
    assert 0.92 < np.mean(hits) < 0.98


def test_where_the_choice_is_clear_the_interval_is_that_of_paired_differences():
    record = table(TUNE, REPORT, noise=0.01)
    at = record.set_index(["start", "rate", "seed"])["report/accuracy"]
    pairs = (at["A", 1e-2] - at["B", 1e-3]).to_numpy()  # (seeds,)
    expected = stats.t.interval(0.95, 4, pairs.mean(), stats.sem(pairs))
    found = differences(record).set_index("task").loc["sst2"]
    assert found[["low", "high"]].tolist() == pytest.approx(expected, rel=0.02)


def test_where_the_choice_is_not_clear_the_interval_is_wider():
    even = {"A": [0.5, 0.9, 0.9, 0.5], "B": TUNE["B"]}  # and at these two, "report" is 0.99 and 0.85
    widths = [np.ptp(differences(table(tune, REPORT, noise=0.01)).loc[0, ["low", "high"]]) for tune in (TUNE, even)]
    assert widths[1] > 2 * widths[0]


def test_curves_have_mean_and_range():
    found = curves(table(TUNE, REPORT)).set_index(["set", "start", "rate"])
    assert found.loc[("tune", "A", 1e-2), ["mean", "min", "max"]].tolist() == pytest.approx([0.9, 0.9, 0.9])
    assert found.loc[("report", "B", 1e-1), "mean"] == pytest.approx(0.99)
