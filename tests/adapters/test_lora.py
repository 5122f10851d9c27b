"""LoRA: its first gradients, and starts whose product is not zero."""

import pytest
import torch
from torch import nn

import deltaw as dw


def layer(spec, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return dw.attach(nn.Sequential(nn.Linear(12, 16)).to(dtype), spec)[0]


def gradients(layer, x, g):
    """Of the sum of g ⊙ y, so that ∂L/∂ΔW = gᵀ x."""
    return torch.autograd.grad((layer(x) * g).sum(), [layer.adapter.A, layer.adapter.B])


def given(a, b):
    return lambda *_: (a, b)


A, B = torch.arange(48.0).sin().view(4, 12), torch.arange(64.0).cos().view(16, 4)
NO_A, NO_B = torch.zeros(4, 12), torch.zeros(16, 4)


@pytest.mark.parametrize("a, b", [(A, B), (A, NO_B), (NO_A, B), (NO_A, NO_B)], ids=["both", "B zero", "A zero", "both zero"])
def test_the_first_gradients(a, b):
    """∂L/∂A = s Bᵀ Δ and ∂L/∂B = s Δ Aᵀ with Δ = ∂L/∂ΔW: each is zero exactly when the other factor is, and
    where both are zero nothing ever moves."""
    adapted = layer(dw.LoRA(4, 8, init=given(a, b)))
    x, g = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    delta, s = g.mT @ x, 2
    grad_a, grad_b = gradients(adapted, x, g)
    torch.testing.assert_close(grad_a, s * b.double().mT @ delta)
    torch.testing.assert_close(grad_b, s * delta @ a.double().mT)
    assert grad_a.any() == b.any() and grad_b.any() == a.any()


def test_what_is_trained():
    adapter = layer(dw.LoRA(4)).adapter
    assert {key: tuple(p.shape) for key, p in adapter.named_parameters()} == {"A": (4, 12), "B": (16, 4)}
    assert adapter.up_parameters == ("B",)


def test_a_rank_above_both_sides_is_allowed():
    down, up = layer(dw.LoRA(20)).adapter.factors()
    assert down.shape == (20, 12) and up.shape == (16, 20)


@pytest.mark.parametrize("init", ["pissa", "orthogonal-pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_start_that_is_not_zero_begins_exactly_as_the_base(init, dtype):
    adapted = layer(dw.LoRA(4, 8, init=init), dtype)
    assert (adapted.adapter.B @ adapted.adapter.A).abs().max() > 0.01
    x = torch.randn(5, 12).to(dtype)
    assert torch.equal(adapted(x), adapted.base(x))


def test_small_steps_from_such_a_start_survive_bf16():
    """[B − B₀, B₀][A; A − A₀] keeps a step of a thousandth; [B, −B₀][A; A₀], cast down, mostly loses it."""
    adapted = layer(dw.LoRA(4, init="pissa"), torch.bfloat16)
    adapter = adapted.adapter
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 1e-3 * parameter.abs().mean() * torch.randn_like(parameter)
    exact = adapter.B.double() @ adapter.A.double() - adapter.B0.double() @ adapter.A0.double()

    def error(down, up):
        return ((up.bfloat16().double() @ down.bfloat16().double() - exact).norm() / exact.norm()).item()

    assert error(*adapter.factors()) < 0.01
    assert error(torch.cat([adapter.A, adapter.A0]), torch.cat([adapter.B, -adapter.B0], 1)) > 0.5
