"""Intervals over seeds and examples, by simulation and against what can be computed otherwise."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import matthews_corrcoef

from deltaw.experiments.engine import two_level, verdicts
from deltaw.experiments.engine.two_level import drawn, half_widths, precision, resampled


def code(values):
    """A record of `code_lm` with values by row, (seeds, blocks) each."""
    rows = []
    for row, each in values.items():
        rows.append({"row": row, "phase": "coarse", "rate": 1e-3, "seed": 100, "stopped": "", "tune/loss": 1.0})
        rows += [{"row": row, "phase": "report", "rate": 1e-3, "seed": seed, "stopped": "", "report/loss": losses.mean(),
                  "report/blocks": " ".join(f"{loss:.9f}" for loss in losses)} for seed, losses in enumerate(each)]
    return pd.DataFrame(rows).assign(task="code_lm", scale="")


def crossed(random, mean, seeds=10, blocks=32, of_seeds=0.02, of_blocks=0.05, of_both=0.1):
    """(seeds, blocks), with parts of a seed, of a block and of both."""
    return (mean + random.normal(0, of_seeds, (seeds, 1)) + random.normal(0, of_blocks, (1, blocks))
            + random.normal(0, of_both, (seeds, blocks)))


def labelled(task, predicted, labels):
    """A record of a classifier."""
    rows = []
    for row, each in predicted.items():
        tuned = {"row": row, "rate": 1e-3, "stopped": "", "tune/accuracy": 0.5, "tune/matthews": 0.5, "tune/loss": 1.0}
        rows.append({**tuned, "phase": "coarse", "seed": 100})
        rows += [{**tuned, "phase": "report", "seed": seed, "report/predicted": "".join(map(str, classes)),
                  "report/labels": "".join(map(str, labels)), "report/accuracy": (classes == labels).mean(),
                  "report/matthews": matthews_corrcoef(labels, classes)} for seed, classes in enumerate(each)]
    return pd.DataFrame(rows).assign(task=task, scale="")


@pytest.mark.parametrize("task", ["cola", "sst2"])
def test_the_values_are_those_that_were_recorded(task):
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 200)
    predicted = {row: np.where(random.random((4, 200)) < skill, labels, 1 - labels)
                 for row, skill in (("a", 0.7), ("b", 0.8))}
    predicted["constant"] = np.ones((4, 200), int)  # of which there is no correlation: 0
    table = labelled(task, predicted, labels)
    found = resampled(table, draws=500)
    recorded = verdicts.by_seed(table, f"report/{verdicts.measure_of(task)}").mean()
    assert found.rows == ["a", "b", "constant"] and found.value == pytest.approx(recorded.to_numpy())
    assert (found.seeds, found.examples) == (4, 200)
    assert found.both.mean(axis=0) == pytest.approx(found.value, abs=0.01)
    weighted = two_level._statistic(two_level._examples(table[table["row"] == "a"][1:], verdicts.measure_of(task)),
                                    np.arange(200.0)[None], verdicts.measure_of(task))  # any weights
    score = {"cola": matthews_corrcoef, "sst2": lambda y, p, sample_weight: np.average(y == p, weights=sample_weight)}[task]
    assert weighted[0] == pytest.approx([score(labels, each, sample_weight=np.arange(200.0)) for each in predicted["a"]])


def test_what_varies_with_seeds_alone_has_student_s_interval():
    random = np.random.default_rng(0)
    values = {row: np.repeat(random.normal(1, 0.1, (10, 1)), 32, axis=1) for row in "ab"}
    found = two_level.compare(resampled(code(values)), [("a", "b")], 0.01).iloc[0]
    low, mean, high = verdicts.student(values["a"][:, 0] - values["b"][:, 0])
    assert found["difference"] == pytest.approx(mean)
    assert found["high"] - found["low"] == pytest.approx(high - low, rel=0.05)


def test_the_parts_of_the_variance():
    """The bootstrap of both counts what seeds and examples have together three times; the variance counts it once."""
    random = np.random.default_rng(1)
    many = [drawn({"a": crossed(random, 0, of_seeds=0, of_blocks=0, of_both=1.0)}, 10, "loss", draws=300) for _ in range(60)]
    mean = [np.mean([getattr(each, name)[:, 0].var() * 320 for each in many]) for name in ("by_seed", "by_example", "both")]
    assert mean == pytest.approx([1, 1, 3], rel=0.15)


def test_intervals_cover_other_seeds_and_other_examples(monkeypatch):
    monkeypatch.setattr(two_level, "DRAWS", 500)
    random, hits, runs = np.random.default_rng(2), [], 400
    means = {"ref": 1.0, "same": 1.0, **{f"other {i}": 1.0 for i in range(4)}, "margin": 1.02}
    for _ in range(runs):
        block = random.normal(0, 0.3, (1, 32))  # hard for all rows, and so of no matter to a difference
        new = drawn({row: block + crossed(random, mean, of_blocks=0.03) for row, mean in means.items()}, 10, "loss")
        found = two_level.compare(new, [(row, "ref") for row in list(means)[1:-1]], 0.02)
        edge = two_level.compare(new, [("margin", "ref")], 0.02).iloc[0]
        own = half_widths(new).iloc[0]
        hits.append((found["low"][0] <= 0 <= found["high"][0], ((found["low_all"] <= 0) & (found["high_all"] >= 0)).all(),
                     (found["p_holm"] > 0.05).all(), edge["verdict"] == "equivalent",
                     abs(own["value"] - 1) <= own["half_width_all"]))
    single, family, holm, equivalent, alone = np.mean(hits, axis=0)
    assert 0.92 < single < 0.98 and 0.92 < family < 0.98 and 0.92 < holm and 0.92 < alone < 0.98  # 0.02 are two deviations
    assert equivalent < 0.08


def test_seeds_are_paired_and_so_are_examples():
    random = np.random.default_rng(3)
    hard, lucky = random.normal(0, 1, (1, 32)), random.normal(0, 1, (10, 1))
    means = {"a": -0.1, "b": 0.0, "c": 0.0}
    values = {row: 2 + hard + lucky + random.normal(mean, 1e-3, (10, 32)) for row, mean in means.items()}
    new = resampled(code(values))
    found = two_level.compare(new, [("a", "b"), ("c", "b")], 0.01, less_is_better=True).set_index("row")
    assert found["verdict"].to_dict() == {"a": "better", "c": "equivalent"}
    assert (found["high"] - found["low"]).max() < 0.01 and (half_widths(new)["half_width_all"] > 0.3).all()
    swapped = two_level.compare(new, [("b", "a")], 0.01, less_is_better=True).iloc[0]
    assert swapped["verdict"] == "worse" and swapped["difference"] == -found.loc["a", "difference"]
    shuffled = code({"a": values["a"], "b": values["b"][:, ::-1]})  # other examples beside each other
    assert np.ptp(two_level.compare(resampled(shuffled), [("a", "b")], 0.01)[["low", "high"]].to_numpy()) > 0.3


def test_simultaneous_intervals_are_wider_and_a_family_of_one_is_not():
    random = np.random.default_rng(4)
    new = resampled(code({row: crossed(random, 1) for row in "abcdef"}))
    pairs = [(row, "a") for row in "bcdef"]
    found = two_level.compare(new, pairs, 0.01)
    assert (found["low_all"] < found["low"]).all() and (found["high_all"] > found["high"]).all()
    one = two_level.compare(new, pairs[:1], 0.01).iloc[0]
    assert one[["low_all", "high_all"]].tolist() == one[["low", "high"]].tolist()
    of = precision(new, np.eye(6))
    assert (9 <= of.freedom).all() and (of.freedom < 9 + 31 + 1).all()


def test_a_run_that_was_stopped_leaves_the_others_as_they_are():
    random = np.random.default_rng(5)
    values = {row: crossed(random, 1) for row in "abc"}
    table = code(values)
    broken = table.copy()
    at = broken.index[(broken["row"] == "c") & (broken["seed"] == 3)][0]
    broken.loc[at, "stopped"], broken.loc[at, ["report/loss", "report/blocks"]] = "the loss is nan", None
    found = two_level.compare(resampled(broken), [("b", "a"), ("c", "a"), ("missing", "a")], 0.01)
    assert found["verdict"].tolist()[1:] == ["stopped", "stopped"]
    assert found["difference"].isna().tolist() == [False, True, True]
    alone = two_level.compare(resampled(table), [("b", "a")], 0.01).iloc[0]
    assert found.iloc[0][["difference", "low", "high", "p_holm"]].tolist() == pytest.approx(
        alone[["difference", "low", "high", "p_holm"]].tolist(), rel=1e-9)


def test_what_cannot_be_compared_is_refused():
    table = code({row: crossed(np.random.default_rng(6), 1) for row in "ab"})
    for pairs, margin in (([], 0.01), ([("a", "b")], 0.0)):
        with pytest.raises(ValueError, match="pair and a positive margin"):
            two_level.compare(resampled(table), pairs, margin)
    with pytest.raises(ValueError, match="same seeds"):
        resampled(table.drop(table.index[-1]))
    labels = np.array([0, 1, 1, 0])
    one, other = (labelled("sst2", {row: np.tile(labels, (2, 1))}, labels if row == "a" else 1 - labels) for row in "ab")
    with pytest.raises(ValueError, match="labels differ"):
        resampled(pd.concat([one, other]))
    with pytest.raises(ValueError, match="two classes"):
        resampled(labelled("cola", {"a": np.tile(labels * 2, (2, 1))}, labels))


def test_the_same_runs_are_resampled_once():
    random = np.random.default_rng(4)
    values = {"a": crossed(random, 1.0), "b": crossed(random, 1.0)}
    first = drawn(values, 10, "loss", draws=50)
    assert drawn({row: each.copy() for row, each in values.items()}, 10, "loss", draws=50) is first
    others = [drawn({**values, "b": values["b"] + 1e-12}, 10, "loss", draws=50), drawn(values, 10, "loss", draws=51),
              drawn(values, 10, "loss", draws=50, seed=1), drawn({**values, "b": None}, 10, "loss", draws=50),
              drawn({"a": values["a"], "c": values["b"]}, 10, "loss", draws=50)]
    assert all(each is not first for each in others) and len(two_level._kept) <= two_level.KEPT
    for _ in range(two_level.KEPT):
        drawn({"a": crossed(random, 1.0)}, 10, "loss", draws=50)
    again = drawn(values, 10, "loss", draws=50)
    assert again is not first and all(np.array_equal(a, b) for a, b in zip(again[3:], first[3:]))
