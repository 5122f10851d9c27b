"""A wrong sign, factor or condition makes a claim about initialization fail; the helpers do what they are called."""

import pytest
import torch

from deltaw.claims import ClaimFailed
from deltaw.claims import initialization as init
from deltaw.claims.initialization import IN, NO_A, NO_B, OUT, RANK

A, At, B, Bt, D, eta, s = init.A, init.At, init.B, init.Bt, init.D, init.eta, init.s

# The helpers


def test_a_start_is_subtracted_and_what_is_put_is_not():
    given, a, b = init.problem(), init.some_a(), init.some_b()
    started, placed = init.adapted(given.weight, a, b), init.put(init.adapted(given.weight, a, NO_B), a, b)
    assert not started[0].delta_weight().any()
    torch.testing.assert_close(placed[0].delta_weight(), b @ a)
    for one, other in zip(init.gradients(started, given), init.gradients(started, given)):
        torch.testing.assert_close(one, other)


def test_put_refuses_an_adapter_that_subtracts():
    model = init.adapted(init.problem().weight, init.some_a(), init.some_b())
    with pytest.raises(ClaimFailed, match="subtracts"):
        init.put(model, NO_A, NO_B)


def test_the_scale_is_the_librarys():
    model = init.put(init.adapted(init.problem().weight, NO_A, NO_B, scale=2.5), init.some_a(), init.some_b())
    torch.testing.assert_close(model[0].delta_weight(), 2.5 * init.some_b() @ init.some_a())


def test_rows_orthogonal_to_the_inputs():
    x = init.problem().x
    rows = init.orthogonal_to_inputs(x)
    assert rows.shape == (RANK, IN)
    assert (x @ rows.mT).abs().max() < 1e-14
    torch.testing.assert_close(rows @ rows.mT, torch.eye(RANK, dtype=torch.float64))


@pytest.mark.parametrize("variance", ["1/(3 width)", "1/(3 r)"])
@pytest.mark.parametrize("which", ["A", "B"])
def test_a_start_with_another_variance(which, variance):
    rank, out, into = 8, 3000, 2000
    a, b = init.start(init.with_variance(which, variance), rank, out, into)
    random, zero = (a, b) if which == "A" else (b, a)
    width = rank if variance == "1/(3 r)" else into if which == "A" else out
    assert not zero.any()
    assert random.var().item() == pytest.approx(1 / (3 * width), rel=0.03)


# What a claim does when it is wrong

WRONG_GRADIENTS = [
    {"A": -s * Bt * D, "B": s * D * At},
    {"A": s * Bt * D, "B": -s * D * At},
    {"A": s * Bt * D, "B": D * At},
    {"A": s * D * Bt, "B": s * D * At},
    {"A": s * B * D, "B": s * D * A},
]
WRONG_IN_THE_NOTE = [{"A": D * Bt, "B": At * D * 2}, {"A": -D * Bt, "B": At * D}, {"A": Bt * D, "B": D * At}]
WRONG_STEPS = [
    {"A": eta * s**2 * D * At * A, "B": -eta * s**2 * B * Bt * D},
    {"A": -eta * s**2 * D * At * A, "B": -eta * s * B * Bt * D},
    {"A": -eta * s**2 * D * A * At, "B": -eta * s**2 * B * Bt * D},
]

WRONG = [
    *(pytest.param(init.check_gradients, (wrong,), id=f"gradients-{i}") for i, wrong in enumerate(WRONG_GRADIENTS)),
    *(pytest.param(init.check_note_gradients, (wrong,), id=f"note-{i}") for i, wrong in enumerate(WRONG_IN_THE_NOTE)),
    *(pytest.param(init.first_step, (wrong,), id=f"first-step-{i}") for i, wrong in enumerate(WRONG_STEPS)),
    pytest.param(init.begins_as_base, (1e-9 * init.some_b(),), id="begins-as-base"),
    pytest.param(init.gaussian, ("gaussian",), id="gaussian-default"),
    pytest.param(init.b_gradient, (lambda x: torch.linalg.svd(x).Vh[:RANK],), id="b-gradient-of-what-inputs-reach"),
    pytest.param(init.a_zero, (lambda a, b: a,), id="a-zero-decided-by-a"),
    pytest.param(init.a_zero, (lambda a, b: a and b,), id="a-zero-decided-by-both"),
    pytest.param(init.both_zero, (1e-12,), id="both-nearly-zero"),
    pytest.param(init.saddle, (0.05, lambda step: 1 - step), id="saddle-shrinks"),
    pytest.param(init.saddle, (0.05, lambda step: 1 + 2 * step), id="saddle-twice-as-fast"),
    pytest.param(init.zero_product, (1,), id="zero-product-overlapping"),
    pytest.param(init.zero_mixer, ((),), id="zero-mixer-not-zero"),
    pytest.param(init.twice_the_rank, (1,), id="once-the-rank"),
    pytest.param(init.transposition, (0.4,), id="transposition-other-variance"),
    pytest.param(init.not_mirrored, (1 / (3 * OUT),), id="mirror-of-the-wrong-side"),
    pytest.param(init.unseen, ("A",), id="unseen-init-a"),
    pytest.param(init.first_step_size, ((4 / (3 * 24), 4 / 3), 500), id="first-step-size-b"),
    pytest.param(init.first_step_size, ((1 / 24, 1 / 3), 500), id="first-step-size-a"),
    pytest.param(init.first_output, (True,), id="first-output-swapped"),
    pytest.param(init.two_numbers, ((1, 1),), id="two-numbers-sgd"),
    pytest.param(init.two_numbers, ((2, 2),), id="two-numbers-adam"),
    pytest.param(init.alpha_is_a_rate, (1.0,), id="alpha-start-divided-by-s"),
    pytest.param(init.variance_is_a_ratio, (1,), id="variance-is-c"),
    pytest.param(init.abrupt, (2.0,), id="abrupt-small-is-large"),
    pytest.param(init.abrupt, (0.03, 0.03), id="abrupt-large-is-small"),
    pytest.param(init.one_rate, (1.0, 1.0), id="one-rate-same-variance"),
    pytest.param(init.which_is_zero, (("1/(3 r)", "1/(3 r)"),), id="which-is-zero-same-variance"),
    pytest.param(init.subtracted, (("A",),), id="subtracted-zero"),
    pytest.param(init.pissa_eckart_young, (RANK + 1,), id="eckart-young-other-rank"),
    pytest.param(init.pissa_principal, (1.0,), id="pissa-first-order"),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)


@pytest.mark.parametrize("name", ["A", "B"])
def test_an_optimizer_that_tells_the_sides_apart_sees_the_exchange(name):
    """LoRA+ gives B a larger step: then Init[A] and Init[B] on the transposed layer are different runs."""

    def plus(parameters):
        first, second = parameters  # A, B
        faster = {"A": (0.04, 0.01), "B": (0.01, 0.04)}[name]
        return torch.optim.SGD([{"params": [first], "lr": faster[0]}, {"params": [second], "lr": faster[1]}])

    assert init.transposed_runs(plus, 0.5, 0.5) > 1e-2
