"""The quick run, and an analysis that tells a method from chance, and layers from checkpoints."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from deltaw.experiments import dora_directions
from deltaw.experiments.dora_directions import (
    ALL,
    FULL,
    FULL_RANK,
    METHODS,
    PAPER,
    QUICK,
    QV,
    SAME_RANK,
    TRAINED,
    Settings,
    beyond_chance,
    by_run,
    contrasts,
    correlations,
    points,
    primary,
    reported,
)

VIEWS = ["pooled", "within layer", "within checkpoint"]


@pytest.fixture(scope="module")
def record(quick, minilm_folder):
    return quick("dora_directions")


def test_the_full_record_is_large_enough():
    full = Settings()
    assert len(full.report_seeds) >= 5 and len(full.coarse) >= 5 and len(full.at) == 4 and full.at[-1] == full.steps
    assert dora_directions.cells(full) == [{"task": task, "targets": targets} for task in ("cola", "sst2") for targets in (ALL, QV)]
    assert [row.name for row in dora_directions.rows(full)] == list(METHODS)
    assert {method for method, _ in PAPER} <= METHODS.keys()


def test_checkpoints_have_to_divide_the_run():
    with pytest.raises(ValueError, match="divide steps=500, not 3"):
        Settings(checkpoints=3)


def test_the_quick_run_has_every_method_at_every_checkpoint(record):
    runs, matrices = (record[record["what"] == what] for what in ("run", "matrix"))
    assert set(runs["method"]) == set(METHODS) and (runs["stopped"] == "").all()
    chosen = runs[runs["phase"] == "report"]
    assert chosen.groupby("method").size().eq(2).all() and chosen.groupby("method")["rate"].nunique().eq(1).all()
    counts = matrices.groupby(["method", "change"]).size().to_dict()
    each = 2 * 2 * 12  # seeds, checkpoints, matrices
    assert counts == {(method, change): each for method in METHODS for change in (TRAINED, SAME_RANK, FULL_RANK)
                      if (method, change) != (FULL, SAME_RANK)}
    trained = matrices[matrices["change"] == TRAINED]
    assert (trained[["ΔM", "ΔD", "size", "along", "loss"]] > 0).all(axis=None) and set(trained["kind"]) == {"query", "value"}
    assert sorted(set(trained["step"])) == QUICK.at and sorted(set(trained["layer"])) == list(range(6))


def test_at_the_start_dora_s_two_gradients_are_nearly_one_and_only_they_move_lengths_alone(record):
    last = record[(record["change"] == TRAINED) & (record["step"] == QUICK.steps)].groupby("method")["along"].mean()
    assert last["DoRA"] == pytest.approx(last["DoRA, exact gradient"], rel=0.2)
    assert last["DoRA"] > 5 * last["LoRA"]


def test_the_analysis_takes_the_quick_record(record):
    assert len(reported(record)) == 4 and len(correlations(record)) == 4 * 3 and len(contrasts(record, "value")) == 4 * 3
    assert len(beyond_chance(record)) == 4
    assert correlations(record)[["correlation", "low", "null", "difference", "slope"]].notna().all(axis=None)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis, on tables of our own making


def table(made, tasks=("cola",), seeds=5, targets=QV, noise=0.0):
    """A record in which `made[method, change](layer, step)` gives (ΔD, ΔM), with independent noise."""
    random, rows = np.random.default_rng(0), []
    for task in tasks:
        for (method, change), point in made.items():
            for seed in range(seeds):
                for layer in range(6):
                    for step in range(1, 5):
                        turned, moved = np.array(point(layer, step), dtype=float) + noise * random.normal(size=2)
                        rows.append({"what": "matrix", "task": task, "targets": targets, "method": method, "seed": seed,
                                     "step": step, "layer": layer, "kind": "query", "change": change, "ΔD": turned,
                                     "ΔM": moved, "along": 1.0 if change == TRAINED else None})
    return pd.DataFrame(rows)


LINE = {("LoRA", TRAINED): lambda layer, step: (layer + step, 2 * (layer + step)),
        ("LoRA", SAME_RANK): lambda layer, step: (layer + step, 3 * (layer + step)),
        ("LoRA", FULL_RANK): lambda layer, step: (layer + step, -(layer + step))}


def test_points_on_a_line_correlate_in_every_view():
    found = correlations(table(LINE)).set_index("view")
    assert list(found.index) == VIEWS
    assert found["correlation"].tolist() == pytest.approx([1] * 3) and found["slope"].tolist() == pytest.approx([2] * 3)
    assert found["null"].tolist() == pytest.approx([1] * 3) and found["null_slope"].tolist() == pytest.approx([3] * 3)
    assert found["null_full_rank"].tolist() == pytest.approx([-1] * 3) and (found["runs"] == 5).all()
    assert found["difference"].abs().max() < 1e-12 and found.loc["pooled", "paper"] == 0.83 and found["paper"].isna().sum() == 2


def test_layers_that_differ_do_not_hide_what_happens_within_them():
    """Within a layer ΔM falls as ΔD rises; layers differ by more, and in proportion."""
    both = {("LoRA", change): lambda layer, step: (10 * layer + step, 10 * layer - step) for change in (TRAINED, SAME_RANK, FULL_RANK)}
    found = correlations(table(both)).set_index("view")["correlation"]
    assert found["within layer"] == pytest.approx(-1) and found["within checkpoint"] == pytest.approx(1)
    x, y = np.array([(10 * layer + step, 10 * layer - step) for layer in range(6) for step in range(1, 5)]).T
    assert found["pooled"] == pytest.approx(np.corrcoef(x, y)[0, 1]) and found["pooled"] > 0.9


def test_a_correlation_is_a_run_s_and_intervals_are_of_the_mean_over_runs():
    noisy = table(LINE, seeds=5, noise=2.0)
    runs = by_run(noisy).query(f"change == '{TRAINED}' and view == 'pooled'")["correlation"].to_numpy()
    one = noisy[(noisy["change"] == TRAINED) & (noisy["seed"] == 3)]
    assert runs[3] == pytest.approx(np.corrcoef(one["ΔD"], one["ΔM"])[0, 1])
    found = correlations(noisy).set_index("view").loc["pooled"]
    assert found["correlation"] == pytest.approx(runs.mean()) and (found["least"], found["largest"]) == (runs.min(), runs.max())
    low, high = stats.t.interval(0.95, 4, runs.mean(), stats.sem(runs))
    assert found["high"] - found["low"] == pytest.approx(high - low, rel=0.06)
    assert (found["low"] + found["high"]) / 2 == pytest.approx(runs.mean())


def test_full_fine_tuning_s_null_is_of_full_rank_and_the_paper_s_figure_stands_beside_its_own_setting():
    made = {(FULL, TRAINED): lambda layer, step: (layer + step, -(layer + step)),
            (FULL, FULL_RANK): lambda layer, step: (layer + step, layer + step)}
    found = correlations(table(made, targets=ALL)).set_index("view")
    assert found["null"].tolist() == pytest.approx([1] * 3) and found["difference"].tolist() == pytest.approx([-2] * 3)
    assert found.loc["pooled", "paper"] == -0.62
    assert correlations(table(made, targets=QV))["paper"].isna().all()


def test_the_primary_endpoint_has_three_verdicts():
    chance = {("LoRA", change): lambda layer, step: (layer + step, layer + step) for change in (TRAINED, SAME_RANK, FULL_RANK)}
    full = {(FULL, TRAINED): lambda layer, step: (layer + step, -(layer + step)),
            (FULL, FULL_RANK): lambda layer, step: (layer + step, layer + step)}
    tasks = ["cola", "sst2"]
    both = pd.concat([table(chance, tasks), table(full, tasks, targets=ALL), table(chance, tasks, targets=ALL)])
    found = primary(both)
    assert (found["task"] == "mean").all() and sorted(found["paper"]) == [-0.62, 0.83]
    assert found.set_index("method")["verdict"].to_dict() == {"LoRA": "as chance", FULL: "other than chance"}
    assert list(primary(table(LINE, seeds=3, noise=5.0))["verdict"]) == ["not resolved"]


def test_several_tasks_have_a_mean():
    some = pd.concat([table(LINE, ["cola"]), table({key: lambda layer, step: (layer + step, -(layer + step)) for key in LINE}, ["sst2"])])
    found = correlations(some).set_index(["task", "view"])["correlation"]
    assert [found[task, "pooled"] for task in ("cola", "sst2", "mean")] == pytest.approx([1, -1, 0])
    missing = some[~((some["task"] == "sst2") & (some["seed"] > 1))]  # runs that were stopped
    assert correlations(missing).set_index(["task", "view"]).loc[("mean", "pooled"), "runs"] == 2


def test_methods_are_compared_run_by_run_also_beyond_their_nulls():
    made = LINE | {(FULL, TRAINED): lambda layer, step: (layer + step, -(layer + step)),
                   (FULL, FULL_RANK): lambda layer, step: (layer + step, layer + step)}
    found = contrasts(table(made))
    assert list(zip(found["method"], found["reference"])) == [("LoRA", FULL)] * 3  # the other pairs are not there
    assert found["difference"].tolist() == pytest.approx([2] * 3) and found["beyond"].tolist() == pytest.approx([2] * 3)


def test_beyond_chance_is_a_ratio_to_the_random_change():
    made = {("DoRA", TRAINED): lambda layer, step: (0.5 * step, 30.0 * step), ("DoRA", SAME_RANK): lambda layer, step: (step, 10.0 * step),
            ("DoRA", FULL_RANK): lambda layer, step: (step, step)}
    found = beyond_chance(table(made)).iloc[0]
    assert found[["along", "longer", "turned"]].tolist() == pytest.approx([1, 3, 0.5])
    assert found[["longer_low", "longer_high"]].tolist() == pytest.approx([3, 3])


def test_a_kind_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of \['query'\] or None, not 'key'"):
        points(table(LINE), "key")
    assert len(points(table(LINE), None)) == len(table(LINE))
