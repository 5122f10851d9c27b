"""MoSLoRA: its mixers, and what they do to LoRA. Shapes: A r × in, B out × r, M r × r, ΔW = s B M A."""

import math

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.adapters import Layer
from deltaw.adapters.moslora import two_subspace


def layer(spec, dtype=torch.float64, seed=0):
    torch.manual_seed(0)
    return dw.attach(nn.Sequential(nn.Linear(24, 32)).to(dtype), spec, seed=seed)[0]


def built(spec, out=32, in_=24, seed=0):
    layers = {"name": Layer("name", torch.randn(out, in_, dtype=torch.float64))}
    return spec.build(layers, torch.Generator().manual_seed(seed))["name"]


def nudged(adapter, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapter


# --- the mixers ------------------------------------------------------------------------------------------


def test_the_kaiming_mixers_variance():
    """Uniform with variance 1 / (3 r)."""
    rank = 256
    mixer = built(dw.MoSLoRA(rank)).M
    assert abs(mixer.var() * 3 * rank - 1) < 0.02
    assert mixer.abs().max() <= 1 / math.sqrt(rank) and abs(mixer.mean()) < 5 / math.sqrt(3 * rank) / rank


def test_the_orthogonal_mixer():
    mixer = built(dw.MoSLoRA(16, mixer="orthogonal")).M
    torch.testing.assert_close(mixer @ mixer.mT, torch.eye(16, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_two_subspace_mixer_halves_the_rank():
    """[[I, I], [I, I]] has rank r/2, hence so has every ΔW: B M A = (B₁ + B₂)(A₁ + A₂)."""
    adapter = nudged(built(dw.MoSLoRA(8, mixer="two-subspace", train_mixer=False)))
    assert torch.linalg.matrix_rank(adapter.M) == 4 and torch.equal(adapter.M, two_subspace(8).double())
    down, up = adapter.factors()
    assert torch.linalg.matrix_rank(up @ down) == 4
    (a1, a2), (b1, b2) = adapter.A.chunk(2), adapter.B.chunk(2, dim=1)
    torch.testing.assert_close(up @ down, (b1 + b2) @ (a1 + a2))


def test_a_given_mixer_is_copied():
    mixer = torch.randn(4, 4)
    adapter = built(dw.MoSLoRA(4, mixer=mixer))
    mixer += 1
    torch.testing.assert_close(adapter.M.float() + 1, mixer)


@pytest.mark.parametrize("train", [True, False])
def test_a_fixed_mixer_is_no_parameter(train):
    adapter = built(dw.MoSLoRA(4, train_mixer=train))
    assert set(dict(adapter.named_parameters())) == ({"A", "B", "M"} if train else {"A", "B"})
    assert "M" in adapter.state_dict()  # and is saved either way
    assert adapter.up_parameters == ("B",)


REFUSED = {
    "name": (dict(mixer="hadamard"), "mixer .* must be one of 'kaiming'.*not 'hadamard'"),
    "zero": (dict(mixer=torch.zeros(8, 8)), "zeros lets no gradient through"),
    "vector": (dict(mixer=torch.ones(8)), r"has shape \(8,\)"),
    "nan": (dict(mixer=torch.full((8, 8), math.nan)), "must be a finite"),
    "odd": (dict(rank=5, mixer="two-subspace"), "needs an even rank, not 5"),
    "odd in a pattern": (dict(mixer="two-subspace", rank_pattern={"q": 3}), "needs an even rank, not 3"),
    "train_mixer": (dict(train_mixer=1), "train_mixer must be True or False, not 1"),
}


@pytest.mark.parametrize("settings, match", REFUSED.values(), ids=REFUSED)
def test_mixers_that_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        dw.MoSLoRA(**settings)


def test_a_mixer_of_another_rank():
    with pytest.raises(ValueError, match=r"mixer has shape \(4, 4\); layer 'name' has rank 8"):
        built(dw.MoSLoRA(8, mixer=torch.eye(4)))


# --- beside LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["A", "B", "gaussian", "orthogonal-pair"])
def test_a_fixed_identity_is_lora_bit_for_bit(init):
    x, g = torch.randn(5, 24), torch.randn(5, 32)
    results = []
    for spec in (dw.LoRA(8, 16, init=init), dw.MoSLoRA(8, 16, init=init, mixer="identity", train_mixer=False)):
        adapted = layer(spec, torch.float32)
        nudged(adapted.adapter)
        y = adapted(x)
        results.append([y, *torch.autograd.grad((y * g).sum(), [adapted.adapter.A, adapted.adapter.B])])
    assert all(torch.equal(ours, lora) for ours, lora in zip(*results))


def test_two_subspaces_are_lora_of_half_the_rank_at_twice_the_rate():
    """Under SGD: A₁ and A₂ get the same gradient as A = A₁ + A₂ would, so their sum moves twice as far."""
    mixed = layer(dw.MoSLoRA(8, mixer="two-subspace", train_mixer=False))
    a0 = sum(mixed.adapter.A.detach().chunk(2))
    lora = layer(dw.LoRA(4, init=lambda *_: (a0, torch.zeros(32, 4))))
    for adapted, rate in ((mixed, 0.01), (lora, 0.02)):
        optimizer = torch.optim.SGD(adapted.adapter.parameters(), lr=rate)
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            x = torch.randn(16, 24, generator=generator, dtype=torch.float64)
            target = torch.randn(16, 32, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (adapted(x) - target).square().mean(0).sum().backward()
            optimizer.step()
    assert lora.delta_weight().norm() > 0.1
    torch.testing.assert_close(mixed.delta_weight(), lora.delta_weight(), rtol=1e-11, atol=1e-12)


def test_the_kaiming_mixer_makes_bs_first_gradient_sqrt_3_smaller():
    """∂L/∂B = s Δ Aᵀ Mᵀ, and E ‖v Mᵀ‖² = ‖v‖² / 3; an orthogonal mixer changes nothing in size."""
    rank, delta = 64, torch.randn(32, 24, dtype=torch.float64)

    def size(spec, seed):
        adapter = built(spec, seed=seed)
        down, up = adapter.factors()
        (grad,) = torch.autograd.grad((up @ down * delta).sum(), adapter.B)
        return grad.norm()

    def ratio(mixer):
        pairs = [(size(dw.LoRA(rank), seed), size(dw.MoSLoRA(rank, mixer=mixer), seed)) for seed in range(10)]
        return sum(lora / mixed for lora, mixed in pairs) / len(pairs)

    assert abs(ratio("kaiming") / math.sqrt(3) - 1) < 0.03
    assert abs(ratio("orthogonal") - 1) < 1e-6


def test_a_trained_mixers_first_gradient_is_zero_while_b_is():
    adapter = built(dw.MoSLoRA(8))
    down, up = adapter.factors()
    grads = torch.autograd.grad((up @ down).sum(), [adapter.A, adapter.B, adapter.M])
    assert [bool(grad.any()) for grad in grads] == [False, True, False]


@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal"])
def test_a_start_that_is_not_zero_is_the_base_under_autocast_too(mixer):
    """B M is not rounded to bf16 before its start is subtracted."""
    adapted = layer(dw.MoSLoRA(8, mixer=mixer, init="pissa"), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(5, 24)
        assert torch.equal(adapted(x), adapted.base(x))
