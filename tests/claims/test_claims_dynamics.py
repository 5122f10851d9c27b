"""A wrong exponent, threshold or sign makes a claim about the dynamics fail; the helpers do what they are called."""

import math
from itertools import pairwise

import pytest
import torch

from deltaw.claims import ClaimFailed
from deltaw.claims import dynamics as dyn
from deltaw.claims.dynamics import GAMMAS, STARTS, Start

# The helpers


@pytest.mark.parametrize("name", STARTS)
def test_a_start_has_the_variance_it_says(name):
    start, width = STARTS[name], 4000
    given = dyn.layer(start, width)
    random, zero = (given.a, given.b) if start.random == "A" else (given.b, given.a)
    assert not zero.any()
    assert given.a.shape == (dyn.RANK, width) and given.b.shape == (width, dyn.RANK)
    assert random.square().mean().item() == pytest.approx(width ** (2 * start.spread), rel=0.05)


def test_what_is_drawn_is_not_changed_by_who_uses_it():
    before = dyn.layer(STARTS["Init[A]"], 9).a.clone()
    list(dyn.trained(dyn.layer(STARTS["Init[A]"], 9), (0.1, 0.1), 3))
    torch.testing.assert_close(dyn.layer(STARTS["Init[A]"], 9).a, before, rtol=0, atol=0)


def test_sign_descent_moves_every_entry_by_its_rate():
    given = dyn.layer(STARTS["Init[B], 1/r"], 12)
    _, first, second = dyn.trained(given, (0.1, 0.03), 2)
    assert torch.equal(first.b, given.b), "B has no gradient while A is zero"
    torch.testing.assert_close((second.b - first.b).abs(), torch.full_like(given.b, 0.03))


def test_the_scale_does_not_change_sign_descent():
    given = dyn.layer(STARTS["Init[A]"], 8)
    for one, other in zip(dyn.trained(given, (0.1, 0.1), 4), dyn.trained(given, (0.1, 0.1), 4, scale=3.0), strict=True):
        torch.testing.assert_close(one.z_b, other.z_b)


@pytest.mark.parametrize("name", STARTS)
def test_the_three_parts_are_the_change(name):
    states = list(dyn.trained(dyn.layer(STARTS[name], 10), (0.1, 0.2), 4))
    for before, after in pairwise(states):
        torch.testing.assert_close(sum(dyn.parts(before, after).values()), after.z_b - before.z_b)


def test_the_largest_exponent_of_a_sum_wins():
    for start in STARTS.values():
        for gamma in GAMMAS:
            found = dyn.exponents(start, gamma)
            assert found["Z_B"] == max(found["δ¹"], found["δ²"], found["δ³"])
            assert found["seen"] <= found["Z_B"]


def test_one_rate_is_two_equal_rates():
    for start in STARTS.values():
        assert dyn.exponents(start, -0.75) == dyn.exponents(start, -0.75, -0.75)


@pytest.mark.parametrize("spread, expected", [(0.0, -1.0), (-0.25, -0.75), (-0.5, -0.5), (-0.75, -0.5)])
def test_the_threshold_of_init_b_is_its_variance(spread, expected):
    assert dyn.threshold(Start("B", spread)) == expected


def test_the_experiment_expects_the_same():
    """Two derivations: the experiment's goes through the steps one by one."""
    init_width = pytest.importorskip("deltaw.experiments.init_width")
    arms = {"Init[A]": "A", "Init[B], 1/r": "B, 1/r", "Init[B], 1/n": "B, 1/n"}
    names = {"Z_A": "z_a", "Z_B": "z_b", "δ¹": "delta1", "δ²": "delta2", "δ³": "delta3"}
    for name, arm in arms.items():
        for gamma in GAMMAS:
            expected = init_width.theory(arm, gamma)
            found = dyn.exponents(STARTS[name], gamma)
            assert {key: found[key] for key in names} == {key: expected[other] for key, other in names.items()}
        assert dyn.threshold(STARTS[name]) == init_width.threshold(arm)
        for readout, at_most in dyn.READOUTS.items():
            assert dyn.threshold(STARTS[name], "seen", at_most) == init_width.threshold(arm, readout)


def test_the_same_loss_is_found_at_a_rate_of_the_other_start(monkeypatch):
    """Of a start that does at η what the other does at 3η, the factor is 3."""
    import pandas as pd

    rates, loss = [2.0**k for k in range(-8, 0)], {}
    for rate in rates:
        loss["A", rate], loss["B", rate] = -math.log(rate), -math.log(3 * rate)
    index = pd.MultiIndex.from_product([["one"], range(5)], names=["task", "seed"])
    columns = pd.MultiIndex.from_tuples(loss, names=["start", "rate"])
    frame = pd.DataFrame([list(loss.values())] * 5, index=index, columns=columns)
    monkeypatch.setattr(dyn, "trained_loss", lambda: frame)
    factors = dyn.same_loss(at_most=2.0**-4)
    assert len(factors) == 5 and factors.to_numpy() == pytest.approx(3)


def test_at_one_rate_is_the_mean_of_the_tasks_measures():
    from deltaw.experiments import init_text

    curves = init_text.curves(dyn.text_record())
    means = curves[curves.set == "report"].groupby(["start", "rate"])["mean"].mean()
    found = dyn.at_one_rate()["mean"]
    assert 0.008 not in found.index, "a run was stopped there"
    assert found.to_numpy() == pytest.approx((means["A"] - means["B"])[found.index].to_numpy(), abs=6e-4)


def test_on_code_the_families_are_the_experiments():
    from deltaw import results
    from deltaw.experiments import tuned_further

    new, found = results.load("tuned_further"), dyn.on_code()
    assert found.index.is_unique and set(tuned_further.wanted(new)) <= set(found.index)
    assert {row for row in new.row.unique() if row not in ("LoRA", tuned_further.BASE)} <= set(found.index.get_level_values("row"))
    assert dyn.rates_on_code()["LoRA"] in new.rate.unique()


# What a claim does when it is wrong


def without_alignment(start, rate_a, rate_b=None):
    """As if the signs of a step of A were independent of z."""
    return dyn.exponents(start, rate_a - 0.5, rate_a if rate_b is None else rate_b)


def with_aligned_b(start, rate_a, rate_b=None):
    """As if a readout saw all of what a random B adds."""
    found = dyn.exponents(start, rate_a, rate_b)
    return found | {"seen": found["Z_B"]}


WRONG = [
    pytest.param(dyn.signs_align, (1.0,), id="signs-align-share-of-one-over-n"),
    pytest.param(dyn.exact, (-1.0,), id="closed-form-sign-of-the-common-term"),
    pytest.param(dyn.exact, (0.5,), id="closed-form-half-the-common-term"),
    pytest.param(dyn.rules, (without_alignment,), id="exponents-without-alignment"),
    pytest.param(dyn.rules, (with_aligned_b,), id="exponents-all-seen"),
    pytest.param(dyn.adam, (torch.optim.SGD,), id="adam-is-sgd"),
    pytest.param(dyn.stable_a, (-0.25,), id="stable-a-at-a-larger-rate"),
    pytest.param(dyn.stable_a, (-1.0,), id="stable-a-only-at-a-smaller-rate"),
    pytest.param(dyn.stable_b, ((-0.5, -0.5),), id="stable-b-whatever-the-variance"),
    pytest.param(dyn.stable_b, ((-1.0, -1.0),), id="stable-b-contrast-with-equal-variance"),
    pytest.param(dyn.larger_rates, ("Init[B], 1/r",), id="larger-rates-no-contrast"),
    pytest.param(dyn.contrast_is_a_ratio, (0.5,), id="ratio-of-another-variance"),
    pytest.param(dyn.internal, ("Init[B], 1/r",), id="internal-instability-of-init-b"),
    pytest.param(dyn.undertrained, ("Init[A]",), id="undertrained-b-of-init-a"),
    pytest.param(dyn.undertrained, ("Init[B], 1/n",), id="undertrained-b-of-the-other-variance"),
    pytest.param(dyn.one_rate, (0.5,), id="one-rate-with-z-a-growing"),
    pytest.param(dyn.lora_plus, (0.5,), id="lora-plus-ratio-of-the-root"),
    pytest.param(dyn.gaussian_start, (1.0,), id="gaussian-start-at-another-rate"),
    pytest.param(dyn.seen, ({"1/n": (-0.5, -1.0, -0.5)},), id="seen-as-z-b"),
    pytest.param(dyn.seen, ({"1/√n": (-0.5, -1.0, -0.5)},), id="seen-whatever-the-readout"),
    pytest.param(dyn.note_efficient, (-1.0,), id="note-efficient-at-a-small-rate"),
    pytest.param(dyn.note_unstable, (("Init[B], 1/r", "Init[A]"),), id="note-unstable-the-other-way-round"),
    pytest.param(dyn.note_b_stable, (-1.0,), id="note-b-unstable-at-a-small-rate"),
    pytest.param(dyn.note_b_not_optimal, (-1.0,), id="note-b-two-equal-rates"),
    pytest.param(dyn.record_exponents, (("1/√n", "1/n"),), id="record-exponents-readouts-swapped"),
    pytest.param(dyn.best_rate, ("output",), id="record-best-rate-other-theory"),
    pytest.param(dyn.best_rate_seen, ("paper",), id="record-best-rate-seen-other-theory"),
    pytest.param(dyn.best_rate_seen, ("output", "edge"), id="record-best-rate-seen-of-the-edge"),
    pytest.param(dyn.edge, ({"1/√n": -0.5, "1/n": -0.5},), id="record-edge-whatever-the-readout"),
    pytest.param(dyn.larger_rate, ("B, 1/n",), id="record-larger-rate-same-variance"),
    pytest.param(dyn.better, ("B, 1/r", "A"), id="record-better-the-other-way-round"),
    pytest.param(dyn.record_variance, ("B, 1/r",), id="record-variance-other-variance"),
    pytest.param(dyn.norms, ("B, 1/n",), id="record-norms-other-variance"),
    pytest.param(dyn.record_lora_plus, ("B, 1/n",), id="record-lora-plus-is-another-arm"),
    pytest.param(dyn.text_better, ("B", "A"), id="text-better-the-other-way-round"),
    pytest.param(dyn.text_better, ("A", "B", (0.0005, 0.001)), id="text-better-at-a-small-rate"),
    pytest.param(dyn.text_larger_rate, ("cola",), id="text-larger-rate-in-a-single-task"),
    pytest.param(dyn.text_larger_rate, ("mean", 0.5), id="text-larger-rate-of-the-other-start"),
    pytest.param(dyn.text_same_rate, ("B", "A"), id="text-same-rate-the-other-way-round"),
    pytest.param(dyn.text_same_rate, ("A", "B", 0.002), id="text-same-rate-at-a-large-rate"),
    pytest.param(dyn.code_variance, ("Init[B]", "Init[B], 1/n"), id="code-variance-the-other-way-round"),
    pytest.param(dyn.code_variance, ("rsLoRA 8",), id="code-variance-of-another-equivalent-row"),
]


def test_lora_plus_is_counted_among_the_exponents(monkeypatch):
    """Were its powers the theory's, the claim that six of them are not would fail."""
    table = dyn.fitted()
    plus = table.start == dyn.PLUS_ARM
    assert plus.sum() == 2 * 3 * 6
    monkeypatch.setattr(dyn, "fitted", lambda: table.assign(exponent=table.exponent.where(~plus, table.theory)))
    with pytest.raises(ClaimFailed, match="LoRA"):
        dyn.record_exponents()


@pytest.mark.parametrize("column, value", [("difference", -0.05), ("verdict", "worse")])
def test_a_start_between_the_two_on_code_is_found(monkeypatch, column, value):
    table = dyn.on_code().copy()
    table.loc[("Init[B], 1/n", "LoRA"), column] = value
    monkeypatch.setattr(dyn, "on_code", lambda: table)
    with pytest.raises(ClaimFailed):
        dyn.code_variance()


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)


def test_growth_is_measured_between_finite_widths():
    """A slope that is off by less than what a claim tells apart."""
    found = dyn.growth(STARTS["Init[A]"], -0.75)
    assert 0 < abs(found["Z_B"] + 0.5) < dyn.SLACK < 0.125
    assert math.isclose(dyn.growth(STARTS["Init[B], 1/n"], -0.5)["Z_A"], 0.5, abs_tol=0.01)
