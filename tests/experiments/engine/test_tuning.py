"""The search on runs that are made up, its trainer on small ones, and the statistics by simulation."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import deltaw as dw
from deltaw.experiments.engine import trained, verdicts
from deltaw.experiments.engine.ends import FullLinear, HeadOnly
from deltaw.experiments.engine.subjects import Subject
from deltaw.experiments.engine.trained import Size, out_of_memory, parts, tuned
from deltaw.experiments.engine.tuning import Budget, Budgets, Row, choices, measure_of, search
from deltaw.tasks import digits
from deltaw.train import Recipe, fit

PLAN = Budget(coarse=(1e-4, 1e-3, 1e-2, 1e-1), fine=3, spacing=2.0, further=2, tune_seeds=(100, 101), report_seeds=(0, 1, 2))


def row(name):
    return Row(name, lambda seed: dw.LoRA(2))


def trainer(best, limit=math.inf, calls=None):
    """Runs whose measure falls with the distance from each row's best rate, stopped beyond `limit`."""

    def train(runs):
        if calls is not None:
            calls.append([(each.name, rate, seed) for each, rate, seed in runs])
        return [{"stopped": "too large"} if rate > limit else
                {"stopped": "", **{f"{part}/{name}": sign * (1 - abs(math.log10(rate / best[each.name]))) + seed / 1e6
                                   for part in ("tune", "report") for name, sign in (("accuracy", 1), ("loss", -1))}}
                for each, rate, seed in runs]

    return train


def searched(best, plan=PLAN, measure="accuracy", **options):
    found = search([row(name) for name in best], trainer(best, options.pop("limit", math.inf)), plan, measure, **options)
    return pd.DataFrame(found)


# ---------------------------------------------------------------------------------------------------------------------
# The search


def test_coarse_then_fine_then_report():
    table = searched({"a": 2e-3, "b": 1e-2})
    rates = {phase: part.groupby("row")["rate"].unique().map(sorted).to_dict() for phase, part in table.groupby("phase")}
    assert rates["coarse"] == {"a": list(PLAN.coarse), "b": list(PLAN.coarse)}
    # b's best is in the middle; a's is at the end of its first fine grid, which one further rate brackets
    assert rates["fine"] == {"a": [5e-4, 2e-3, 4e-3], "b": [5e-3, 2e-2]}
    assert rates["report"] == {"a": [2e-3], "b": [1e-2]} and "shared" not in rates
    seeds = table.groupby("phase")["seed"].unique().map(sorted).to_dict()
    assert seeds == {"coarse": [100, 101], "fine": [100, 101], "report": [0, 1, 2]}
    assert not table.duplicated(["row", "rate", "seed"]).any()


@pytest.mark.parametrize(("best", "found"), [(1e-9, 1.25e-7), (1e9, 80.0)])
def test_a_grid_is_extended_so_often_and_no_oftener(best, found):
    table = searched({"a": best}).assign(task="sst2", scale="")
    assert choices(table, "accuracy") == {"a": found}  # further: 2 coarse rates, the fine grid, 2 fine rates
    assert verdicts.reported(table)["at_edge"].tolist() == [True]
    assert not verdicts.reported(searched({"a": 2e-3}).assign(task="sst2", scale=""))["at_edge"].any()


def test_every_row_is_reported_at_the_reference_s_rate_too():
    table = searched({"a": 2e-3, "b": 1e-2, "c": 2e-3}, reference="a")
    shared = table[table["phase"] == "shared"]
    assert set(shared["row"]) == {"b"} and set(shared["rate"]) == {2e-3}  # c's own rate is that one
    at = verdicts.by_seed(table.assign(task="sst2"), "report/accuracy", at="a")
    assert list(at) == ["a", "b", "c"] and np.allclose(at["b"] - at["c"], -math.log10(5))


def test_a_rate_at_which_a_run_was_stopped_is_not_chosen():
    assert choices(searched({"a": 1e-2}, limit=4e-3), "accuracy") == {"a": 4e-3}
    hopeless = searched({"a": 1e-3, "b": 1e-3}, limit=0)
    assert choices(hopeless, "accuracy") == {"a": None, "b": None} and set(hopeless["phase"]) == {"coarse"}
    assert hopeless["rate"].min() == pytest.approx(1e-6)  # it was looked for further down
    table = hopeless.assign(task="sst2", scale="", **{"report/accuracy": np.nan, "report/loss": np.nan})
    assert verdicts.reported(table)["at_edge"].all()
    assert verdicts.against(table, "a", 0.01)["verdict"].tolist() == ["stopped"]


def test_of_equals_the_lower_loss_is_chosen_and_of_a_loss_less_is_better():
    rows = [{"row": "a", "phase": "coarse", "rate": rate, "seed": 0, "tune/accuracy": 0.5, "tune/loss": loss}
            for rate, loss in ((1e-3, 2.0), (1e-2, 1.0), (1e-1, 3.0))]
    assert choices(pd.DataFrame(rows), "accuracy") == choices(pd.DataFrame(rows), "loss") == {"a": 1e-2}
    assert [measure_of(task) for task in ("cola", "sst2", "code_lm")] == ["matthews", "accuracy", "loss"]
    assert choices(searched({"a": 2e-3}, measure="loss"), "loss") == {"a": 2e-3}


def test_without_a_fine_pass_the_grid_is_all():
    table = searched({"a": 2e-3}, dataclasses.replace(PLAN, fine=1))
    assert set(table["phase"]) == {"coarse", "report"} and choices(table, "accuracy") == {"a": 1e-3}


def test_each_kind_of_task_has_its_budget():
    budgets = Budgets(coarse=(1e-3, 1e-2), steps=7, warmup_steps=1, digits_steps=5, digits_warmup_steps=2, code_length=64)
    digits_own, code, text = (budgets.of(task) for task in ("digits", "code_lm", "sst2"))
    assert text == budgets and (text.steps, text.length) == (7, 32)
    assert (digits_own.steps, digits_own.warmup_steps, digits_own.length, digits_own.coarse) == (5, 2, 1, (1e-3, 1e-2))
    assert (code.steps, code.length, code.share, code.coarse) == (200, 64, 0.06, Budget.coarse)
    assert code.report_seeds == text.report_seeds and code.of("code_lm") == code


@pytest.mark.parametrize("settings", [
    {"coarse": (1e-3,)}, {"coarse": (1e-2, 1e-3)}, {"coarse": (1e-3, 0.01234)}, {"fine": 4}, {"spacing": 1.0},
    {"further": -1}, {"report_seeds": (100, 1)}, {"report_seeds": (1,)}])
def test_what_is_no_budget(settings):
    with pytest.raises(ValueError, match="must be|must report"):
        dataclasses.replace(PLAN, **settings)


def test_rows_are_told_apart_by_their_names():
    for rows, reference in (([row("a"), row("a")], None), ([row("a")], "b")):
        with pytest.raises(ValueError, match="names that differ"):
            search(rows, trainer({}), PLAN, "accuracy", reference)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer


def test_rows_are_grouped_by_rank_and_gain_and_one_rate_and_seed_stay_together(monkeypatch):
    monkeypatch.setattr(trained, "SLOTS", 5)
    small, large, gain = Size(1, 1, 8, 1, False), Size(1, 1, 64, 1, False), Size(1, 1, 8, 1, True)
    runs = [(size, 1e-3, seed) for size in (small, small, large, gain) for seed in range(4)]
    found = parts(runs, Subject(None, PLAN, "accuracy"), "cpu")
    assert sorted(i for part in found for i in part) == list(range(16))
    assert sorted(map(len, found)) == [4, 4, 4, 4]
    assert all(len({runs[i][0].group for i in part}) == 1 for part in found)
    places = {i: place for place, part in enumerate(found) for i in part}
    assert all(places[seed] == places[4 + seed] for seed in range(4))


def test_sizes():
    model, head = digits(base_steps=1).model(), 1290
    expected = {dw.LoRA(4): (64 * 4 + 3 * 128 * 4, 4), HeadOnly(): (0, 1), FullLinear(): (64 * 128 + 128 * 128, 128),
                dw.VeRA(32): (2 * (32 + 128), 32)}
    for spec, (parameters, rank) in expected.items():
        size = Size.of(model, spec, ["classifier"])
        assert (size.parameters, size.with_head, size.rank, size.gain) == (parameters, parameters + head, rank, False)
    assert Size.of(model, dw.DoRA(dw.LoRA(4)), ()).gain
    assert not hasattr(model, "_deltaw")


SMALL = Budgets(coarse=(1e-3, 1e-2), fine=1, further=0, tune_seeds=(100,), report_seeds=(0, 1, 2), digits_steps=4,
                digits_warmup_steps=1)
ROWS = [Row("LoRA", lambda seed: dw.LoRA(2)), Row("MoSLoRA", lambda seed: dw.MoSLoRA(4), scale="s = 1")]


@pytest.fixture(scope="module")
def small():
    return pd.DataFrame(tuned(ROWS, "digits", SMALL, "cpu"))


def test_examples_are_kept_of_the_reporting_runs_and_say_what_was_measured(small):
    kept = small[small["phase"] == "report"]
    assert len(kept) == 6 and small.loc[small["phase"] == "coarse", "report/predicted"].isna().all()
    for _, run in kept.iterrows():
        right = np.mean([a == b for a, b in zip(run["report/predicted"], run["report/labels"], strict=True)])
        assert right == pytest.approx(run["report/accuracy"]) and len(run["report/labels"]) == 500
    assert kept["report/labels"].nunique() == 1 and kept["report/predicted"].nunique() > 1


def test_where_memory_ends_a_part_is_halved_and_no_run_is_lost(small, monkeypatch):
    fitted, fit_bank = [], dw.Bank.fit

    def fit_at_most_two(bank, *args, **options):
        fitted.append(len(bank.slots))
        if len(bank.slots) > 2:
            try:
                raise torch.OutOfMemoryError("for five slots there is none")
            except RuntimeError:
                raise RuntimeError("capture failed")  # as the end of a recording does
        return fit_bank(bank, *args, **options)

    monkeypatch.setattr(dw.Bank, "fit", fit_at_most_two)
    again = pd.DataFrame(tuned(ROWS, "digits", SMALL, "cpu"))
    assert fitted[:3] == [4, 2, 2]
    pd.testing.assert_frame_equal(again.drop(columns="report/predicted"), small.drop(columns="report/predicted"), rtol=1e-3)


def test_an_error_that_is_not_of_memory_is_raised(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(dw.Bank, "fit", fail)
    with pytest.raises(RuntimeError, match="something else"):
        tuned(ROWS, "digits", SMALL, "cpu")
    assert out_of_memory(torch.OutOfMemoryError()) and not out_of_memory(RuntimeError()) and not out_of_memory(None)


@pytest.mark.parametrize(("spec", "trained_layers"), [(HeadOnly(), []), (FullLinear(), ["hidden1", "hidden2"])])
def test_the_ends_are_what_fit_makes_of_the_plain_model(spec, trained_layers):
    task, how = digits(base_steps=50), Recipe(steps=20, learning_rate=3e-3, seed=3)
    bank = dw.Bank(task.model(), [(dw.LoRA(4), how), (spec, how)], train_also=["classifier"])
    histories = bank.fit(task, device="cpu", progress=False)
    plain = task.model().requires_grad_(False)
    plain.classifier.requires_grad_(True)
    for name in trained_layers:
        getattr(plain, name).weight.requires_grad_(True)
    alone = fit(plain, task, how, device="cpu", progress=False)
    np.testing.assert_allclose(histories[1].loss, alone.loss, rtol=2e-4)
    slot = bank.adapter(1)
    for name in ("hidden1", "hidden2"):
        torch.testing.assert_close(getattr(slot, name).merged_weight(), getattr(plain, name).weight, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The statistics


def sample(random, means, n=10, deviation=0.02, shared=0.05):
    """Rows whose seeds share something: only differences within seeds tell them apart."""
    noise = random.normal(0, shared, (n, 1)) + random.normal(0, deviation, (n, len(means)))
    return pd.DataFrame(np.array(list(means.values())) + noise, columns=list(means))


def test_intervals_and_tests_of_one_pair_are_scipy_s():
    values = sample(np.random.default_rng(0), {"a": 0.02, "b": 0.0})
    found = verdicts.compare(values, [("a", "b")], 0.05).iloc[0]
    test = stats.ttest_rel(values["a"], values["b"])
    assert found["p"] == found["p_holm"] == pytest.approx(test.pvalue)
    assert found[["low", "high"]].tolist() == pytest.approx(test.confidence_interval(0.95))
    assert found[["low_all", "high_all"]].tolist() == found[["low", "high"]].tolist()  # a family of one
    sides = [stats.ttest_1samp(values["a"] - values["b"], bound, alternative=side).pvalue
             for bound, side in ((-0.05, "greater"), (0.05, "less"))]
    assert found["p_equivalent"] == pytest.approx(max(sides))


def test_holm():
    assert verdicts.holm(np.array([0.01, 0.04, np.nan, 0.03]))[[0, 1, 3]].tolist() == pytest.approx([0.03, 0.06, 0.06])


def test_verdicts():
    random = np.random.default_rng(0)
    values = sample(random, {"ref": 0.0, "up": 0.1, "down": -0.1, "same": 0.0, "slightly up": 0.02}, n=40, deviation=0.005)
    values = values.assign(broken=np.nan, itself=values["ref"], noisy=values["ref"] + random.normal(0, 0.3, 40))
    pairs = [(name, "ref") for name in (*values.columns.drop("ref"), "missing")]
    found = verdicts.compare(values, pairs, 0.05).set_index("row")
    assert found["verdict"].to_dict() == {
        "up": "better", "down": "worse", "same": "equivalent", "slightly up": "equivalent", "broken": "stopped",
        "itself": "equivalent", "noisy": "not separable", "missing": "stopped"}
    assert found.loc["slightly up", "p_holm"] < 0.05 and found.loc["itself", "p"] == 1  # equivalent, if separated
    there = found[found["verdict"] != "stopped"]
    assert (there["low_all"] <= there["low"]).all() and (there["high_all"] >= there["high"]).all()
    less = verdicts.compare(values, pairs[:2], 0.05, less_is_better=True)
    assert less["verdict"].tolist() == ["worse", "better"]
    for wrong in ((values, [], 0.05), (values, pairs, 0.0), (values[:1], pairs, 0.05)):
        with pytest.raises(ValueError, match="compare needs"):
            verdicts.compare(*wrong)


def test_intervals_cover_and_tests_err_as_often_as_they_say(monkeypatch):
    monkeypatch.setattr(verdicts, "DRAWS", 1000)
    random, hits, runs = np.random.default_rng(1), [], 400
    names = [f"row {i}" for i in range(8)]
    equal = dict.fromkeys(["ref", *names], 0.5)
    for _ in range(runs):
        found = verdicts.compare(sample(random, equal), [(name, "ref") for name in names], margin=0.01)
        alone = verdicts.compare(sample(random, {"a": 0.01, "b": 0.0}), [("a", "b")], margin=0.01)  # just not equivalent
        one = found.iloc[0]
        hits.append(((one["low"] <= 0 <= one["high"]), ((found["low_all"] <= 0) & (found["high_all"] >= 0)).all(),
                     (found["p_holm"] > 0.05).all(), alone["p_equivalent"][0] <= 0.05,
                     verdicts.student(sample(random, {"a": 0.3})["a"].to_numpy())))
    single, family, holm, equivalent, means = zip(*hits)
    assert 0.92 < np.mean(single) < 0.98  # two standard deviations are 0.02
    assert 0.92 < np.mean(family) < 0.98
    assert 0.92 < np.mean(holm) <= 1
    assert np.mean(equivalent) < 0.07
    assert 0.92 < np.mean([low <= 0.3 <= high for low, _, high in means]) < 0.98
