"""The claims about mixers fail for other mixers and wrong laws; the helpers do what they are called."""

import math

import pandas as pd
import pytest
import torch

from deltaw.adapters import moslora as library
from deltaw.claims import ClaimFailed, moslora
from deltaw.claims import moslora_training as training
from deltaw.claims.measure import draw
from deltaw.claims.two_forms import orthogonal, signed_permutation

TWO_SUBSPACES = torch.eye(2).repeat(2, 2).double()  # (4, 4)

# The helpers


@pytest.mark.parametrize("mixer", [torch.eye(4).double(), signed_permutation()])
def test_a_mixer_that_moves_entries_has_loras_parts(mixer):
    assert moslora.parts(mixer, draw(0, 4)) == pytest.approx((1, 1, 1))


def test_two_subspaces_double_the_common_part():
    found = moslora.parts(TWO_SUBSPACES, draw(0, 4))
    assert found.common == found.turned == pytest.approx(2)


def test_parts_are_proportional_to_the_mixer_and_turns_raise_the_common_one():
    for seed in range(20):
        one, three = (moslora.parts(scale * draw(seed, 4, 4), draw(100 + seed, 4)) for scale in (1, 3))
        assert three == pytest.approx([3 * part for part in one])
        assert one.turned >= one.common - 1e-12
    assert moslora.parts(orthogonal(), draw(0, 4)).common <= 1, "‖Qᵀc‖₁ is at most √r ‖c‖ = r"


@pytest.mark.parametrize("k", [1, 3])
def test_effective_rank_counts_equal_directions(k):
    matrix = torch.zeros(5, 6)
    matrix[:k, :k] = 2 * torch.eye(k)
    assert moslora.effective_rank(matrix) == pytest.approx(k)


def test_a_weak_direction_hardly_counts():
    assert 1 < moslora.effective_rank(torch.diag(torch.tensor([1.0, 0.1]))) < 1.03


def test_the_same_loss_is_found_at_a_shifted_rate():
    """Of a mixer that does at 1.5 η what LoRA does at η, the factor is 1.5; above its best rate nothing is compared."""
    rates = [0.001 * 2**k for k in range(6)]

    def loss(rate):
        return rate**-0.5 if rate < 0.02 else 1e3

    table = pd.DataFrame([("LoRA", rate, seed, loss(rate)) for rate in rates for seed in (0, 1)]
                         + [("mixer", rate, seed, loss(rate / 1.5)) for rate in rates for seed in (0, 1)],
                         columns=["name", "rate", "seed", "loss"])  # fmt: skip
    found = moslora.same_loss(table, "mixer", "LoRA")
    assert list(found.index) == rates[:4] and found.to_numpy() == pytest.approx(1.5)


def test_by_seed_the_interval_of_a_shifted_rate_is_about_the_shift():
    rates = [0.001 * 2**k for k in range(5)]
    shifts = (1.4, 1.5, 1.6)
    rows = [("LoRA", rate, seed, rate**-0.5) for rate in rates for seed in range(3)]
    rows += [("mixer", rate, seed, (rate / shift) ** -0.5) for rate in rates for seed, shift in enumerate(shifts)]
    found = moslora.same_loss_by_seed(pd.DataFrame(rows, columns=["name", "rate", "seed", "loss"]), "mixer", "LoRA")
    assert found["mean"].to_numpy() == pytest.approx(1.5)
    reach = 4.3027 * 0.1 / 3**0.5  # Student's t of two degrees of freedom
    assert (found["high"] - 1.5).to_numpy() == pytest.approx(reach, rel=1e-4)


def test_each_at_its_own_rate():
    """The rate is chosen by the mean loss; the differences are paired by seed."""
    table = pd.DataFrame([("LoRA", 0.1, 0, 2.0, 0.5), ("LoRA", 0.1, 1, 4.0, 0.6), ("LoRA", 0.2, 0, 9.0, 0.9),
                          ("LoRA", 0.2, 1, 9.0, 0.9), ("mixer", 0.1, 0, 8.0, 0.1), ("mixer", 0.1, 1, 8.0, 0.1),
                          ("mixer", 0.2, 0, 1.0, 0.7), ("mixer", 0.2, 1, 3.0, 0.8)],
                         columns=["name", "rate", "seed", "last", "accuracy"])  # fmt: skip
    found = moslora.at_own_rates(table)
    assert found.rate.to_dict() == {"LoRA": 0.1, "mixer": 0.2}
    assert found.loc["mixer", ["last, low", "last, difference", "last, high"]].tolist() == pytest.approx([-1, -1, -1])
    assert found.loc["mixer", "accuracy, difference"] == pytest.approx(0.2)


def test_a_larger_and_a_rotated_start():
    from deltaw import Layer, LoRA

    def a_of(init):
        built = LoRA(4, init=init).build({"layer": Layer("layer", torch.empty(5, 6))}, torch.Generator().manual_seed(0))
        assert not built["layer"].B.any()
        return built["layer"].A.detach()

    usual, larger, rotated = (a_of(init) for init in ("A", moslora.start(4), moslora.start(rotate=True)))
    torch.testing.assert_close(larger, 4 * usual)
    torch.testing.assert_close(rotated.mT @ rotated, usual.mT @ usual)
    assert not torch.allclose(rotated, usual)


def test_the_paired_interval_is_of_the_differences():
    table = pd.DataFrame({"name": list("aaabbb"), "seed": [0, 1, 2] * 2, "x": [1.0, 5.0, 9.0, 0.0, 4.0, 8.0]})
    assert moslora.paired(table, "a", "b", "x") == pytest.approx((1, 1, 1))


def test_a_mixer_is_trained_by_gradient_descent_with_three_rates():
    import deltaw as dw

    start = {"A": draw(1, 4, 12), "M": draw(2, 4, 4), "B": draw(3, 10, 4)}
    model, loss, rates = moslora.layer(dw.MoSLoRA(4), **start), training.Loss(), training.Rates(0.1, 0.2, 0.3)
    loss(training.weight_of(model)).backward()
    expected = {name: start[name] - rate * getattr(model[0].adapter, name).grad for name, rate in zip("AMB", rates)}
    training.descend(model, loss, rates, 1)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(model[0].adapter, name).detach(), value)


def test_the_flow_of_two_factors_has_a_closed_form():
    """At a unit pull b = a₀ sinh(m t) and a = a₀ cosh(m t) beside a fixed m."""
    a, times = 0.6, (0.3, 1.0, 1.7)
    for m in (1.0, 0.5):
        expected = [m * a * a * math.sinh(m * t) * math.cosh(m * t) for t in times]
        assert training.rise(lambda p: 1.0, a, m, False, times) == pytest.approx(expected, rel=1e-9)


def test_the_flow_of_three_factors_has_a_closed_form_and_is_never_behind():
    """At a unit pull and from a = m = ½: a² = m² = ¼ + b², so b = ½ tan(t/2)."""
    times = (0.5, 1.5, 2.5)
    b = [math.tan(t / 2) / 2 for t in times]
    assert training.rise(lambda p: 1.0, 0.5, 0.5, True, times) == pytest.approx([x * (0.25 + x * x) for x in b], rel=1e-6)
    fixed, trained = (training.rise(lambda p: 1 - p, 0.5, 0.8, how, (0.5, 1, 2, 4)) for how in (False, True))
    assert all(t > f for t, f in zip(trained, fixed))


# What a claim does when it is wrong


@pytest.mark.parametrize(
    "claim, mixer, other",
    [
        (moslora.two_subspace_rank, "two-subspace", "identity"),
        (moslora.two_subspace_rate, "two-subspace", "identity"),
        (moslora.kaiming_slow, "kaiming", "orthogonal"),
        (moslora.kaiming_slow, "orthogonal", "kaiming"),
        (moslora.identity_is_lora, "identity", "kaiming"),
    ],
)
def test_another_mixer_makes_the_claim_fail(claim, mixer, other, monkeypatch):
    monkeypatch.setitem(library.MIXERS, mixer, library.MIXERS[other])
    with pytest.raises(ClaimFailed):
        claim()


def test_expressivity_fails_where_conversion_changes_the_outputs(monkeypatch):
    import deltaw as dw

    def convert(model, family):
        with torch.no_grad():
            model[0].adapter.B.mul_(1.001)

    monkeypatch.setattr(dw, "convert", convert)
    with pytest.raises(ClaimFailed, match="outputs differ"):
        moslora.no_expressivity()


def test_the_layout_fails_for_a_transposed_mixer(monkeypatch):
    def factors(self):
        return self.since_start(self.A, self.B @ self.M.mT)

    monkeypatch.setattr(library.MoSLoRAAdapter, "factors", factors)
    with pytest.raises(ClaimFailed, match="with W for Wᵀ"):
        moslora.official_layout()


WRONG = [
    pytest.param(moslora.two_subspace_trained, (0.3,), id="two-subspace-trained-from-a-noisy-start"),
    pytest.param(moslora.no_directions, (TWO_SUBSPACES,), id="directions-of-a-singular-mixer"),
    pytest.param(moslora.sign_descent, (0.5,), id="sign-descent-half-the-common-term"),
    pytest.param(moslora.kaiming_rate, (("orthogonal", "kaiming"),), id="kaiming-rate-mixers-swapped"),
    pytest.param(moslora.orthogonal_under_adam, ("LoRA",), id="orthogonal-adam-of-lora"),
    pytest.param(training.three_terms, (0.0,), id="three-terms-without-the-mixers"),
    pytest.param(training.three_terms, (-1.0,), id="three-terms-sign-of-the-mixers"),
    pytest.param(training.onset, (2,), id="onset-of-the-second-order"),
    pytest.param(training.balance, (0.0,), id="balance-without-the-rates"),
    pytest.param(training.balance, (-1.0,), id="balance-rates-inverted"),
    pytest.param(training.speeds, (0.5,), id="speed-crossing-elsewhere"),
    pytest.param(training.growth, ("SGD",), id="growth-under-sgd-is-not-adams"),
    pytest.param(training.mixer_rate, (2.0,), id="mixer-rate-squared-under-adam"),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)
