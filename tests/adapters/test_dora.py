"""DoRA: its norm without an out × in matrix, both gradients of the paper, and rows without a direction."""

import copy
import math

import peft
import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.adapters.dora import merged_norm

INNER = [dw.LoRA(4, 8), dw.LoRA(4, init="pissa"), dw.MoSLoRA(4), dw.VeRA(16), dw.LoRAXS(4)]


def layer(spec=dw.DoRA(dw.LoRA(4, 8)), dtype=torch.float64, weight=None, size=0.1):
    """An adapted layer away from its start."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(12, 16)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, 12, generator=generator) if weight is None else weight)
    adapted = dw.attach(nn.Sequential(linear).to(dtype), spec)[0]
    with torch.no_grad():
        for parameter in adapted.adapter.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return adapted


def norms(adapted):
    """The norm in use, and the explicit one in float64."""
    down, up = adapted.adapter.factors()
    explicit = (adapted.weight.double() + up.double() @ down.double()).norm(dim=1)
    return merged_norm(adapted.weight, adapted.adapter.weight_norm, down, up), explicit


# --- the norm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER, ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
def test_the_norm_is_that_of_every_merged_row(inner, dtype, tolerance):
    adapted = layer(dw.DoRA(inner), dtype, size=0.3)
    norm, explicit = norms(adapted)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (explicit / adapted.weight.double().norm(dim=1) - 1).abs().max() > 0.02  # it is another one than at the start
    assert (norm / explicit - 1).abs().max() < tolerance


def test_autocast_does_not_round_the_gain():
    adapted = layer(dtype=torch.float32)
    plain = adapted.merged_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted.merged_weight(), plain)


def test_large_rows_survive_half_precision():
    """The square of a norm above 256 is not finite in fp16."""
    adapted = layer(dtype=torch.float32, weight=100 * torch.randn(16, 12)).half()
    norm, explicit = norms(adapted)
    assert explicit.max() > 256 and (norm / explicit - 1).abs().max() < 3e-3


@pytest.mark.parametrize("inner", INNER, ids=lambda spec: type(spec).__name__)
def test_the_magnitude_begins_as_the_norm_of_the_rows(inner):
    adapter = layer(dw.DoRA(inner), size=0).adapter
    linear = layer(size=0).base
    assert torch.equal(adapter.magnitude, linear.weight.norm(dim=1))
    assert torch.equal(adapter.gain(linear.weight, *adapter.factors()), torch.ones(16, dtype=torch.float64))


def test_of_a_conv1d_the_outputs_are_normed():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(16, 12)  # 16 out, 12 in, stored as in × out
    adapter = dw.attach(nn.Sequential(conv), dw.DoRA(dw.LoRA(4)))[0].adapter
    torch.testing.assert_close(adapter.magnitude, conv.weight.norm(dim=0))


def test_loading_another_base_takes_its_norm():
    """‖W‖ is not in the state dict; it follows the weight that is."""
    first, second = layer(), layer(weight=3 * torch.randn(16, 12))
    second.load_state_dict(first.state_dict())
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.equal(second(x), first(x))


def test_a_weight_that_is_trained_is_refused():
    adapted = layer()
    adapted.base.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="W has to stay frozen"):
        adapted(torch.randn(5, 12, dtype=torch.float64))


# --- the gradients of the paper --------------------------------------------------------------------------


def paper(adapted, x, g, detached):
    """Equations 6 (11 if detached) and 7 for ∂L/∂W′ = gᵀ x, and the chain rule on V′ = W + s B A."""
    lora = adapted.adapter.inner
    v = adapted.weight + 2 * lora.B @ lora.A
    c, m, grad = v.norm(dim=1, keepdim=True), adapted.adapter.magnitude[:, None], g.mT @ x
    grad_v = m / c * (grad if detached else grad - (grad * v).sum(1, keepdim=True) * v / c**2)
    return {"magnitude": (grad * v / c).sum(1), "A": 2 * lora.B.mT @ grad_v, "B": 2 * grad_v @ lora.A.mT}


@pytest.mark.parametrize("detached", [True, False])
def test_the_gradients_of_the_paper(detached):
    adapted = layer(dw.DoRA(dw.LoRA(4, 8), detach_norm=detached))
    x, g = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    (adapted(x) * g).sum().backward()
    expected = paper(adapted, x, g, detached)
    adapter = adapted.adapter
    for ours, key in ((adapter.magnitude, "magnitude"), (adapter.inner.A, "A"), (adapter.inner.B, "B")):
        torch.testing.assert_close(ours.grad, expected[key], rtol=1e-10, atol=1e-10)
    assert (expected["B"] - paper(adapted, x, g, not detached)["B"]).norm() > 0.01 * expected["B"].norm()


# --- rows without a direction ----------------------------------------------------------------------------


def zero_rows(size):
    weight = torch.randn(16, 12)
    weight[3] = 0
    weight[5] = size
    return weight


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("moved", [0, 0.1])
def test_zero_rows_are_adapted_by_the_inner_family_alone(detached, dtype, moved):
    adapted = layer(dw.DoRA(dw.LoRA(4, 8), detach_norm=detached), dtype, zero_rows(1e-14), moved)
    adapter = adapted.adapter
    down, up = adapter.factors()
    gain = adapter.gain(adapted.weight, down, up)
    assert torch.equal(gain[[3, 5]], torch.ones(2, dtype=gain.dtype))
    merged = adapted.merged_weight(torch.float64)
    torch.testing.assert_close(merged[[3, 5]], (up @ down)[[3, 5]].double(), rtol=1e-6, atol=1e-6)
    y = adapted(torch.randn(5, 12).to(dtype))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
    assert not adapter.magnitude.grad[[3, 5]].any() and adapter.magnitude.grad[0]  # their m is not used


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_that_the_adapter_takes_to_zero_stays_finite(detached, dtype):
    """ΔW = −W on one row: its norm would round to zero, or its square below."""
    weight = torch.randn(16, 12)
    start = (weight[:1].clone(), torch.zeros(16, 1))
    adapted = layer(dw.DoRA(dw.LoRA(1, init=lambda *_: start), detach_norm=detached), dtype, weight, size=0)
    with torch.no_grad():
        adapted.adapter.inner.B[0] = -1
    y = adapted(torch.randn(5, 12, dtype=dtype))
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(adapted.merged_weight()).all()
    assert all(torch.isfinite(p.grad).all() for p in adapted.adapter.parameters())


@pytest.mark.filterwarnings("ignore")
def test_peft_beside_us_on_a_zero_row():
    model = nn.Sequential(nn.Linear(12, 16))
    with torch.no_grad():
        model[0].weight.copy_(zero_rows(0.0))
    x = torch.randn(5, 12)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["0"], use_dora=True))
    torch.testing.assert_close(dw.attach(copy.deepcopy(model), dw.DoRA(dw.LoRA(4)))(x), model(x))
    if torch.isfinite(theirs(x)).all():
        pytest.skip("PEFT is finite on a row of zeros now: say so where the book says that it is not")
    assert torch.isnan(theirs(x)[:, [3, 5]]).all()


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner, error, match",
    [
        (dw.LoRA, TypeError, "DoRA wraps a spec such as"),
        (8, TypeError, "not 8"),
        (dw.DoRA(dw.LoRA(4)), ValueError, "DoRA of DoRA"),
    ],
)
def test_what_it_cannot_wrap(inner, error, match):
    with pytest.raises(error, match=match):
        dw.DoRA(inner)


def test_detach_norm_is_a_bool():
    with pytest.raises(ValueError, match="detach_norm must be True or False, not 0"):
        dw.DoRA(dw.LoRA(4), detach_norm=0)


def test_a_sum_of_squares_that_no_row_loses():
    """The documented floor: a millionth of ‖W‖, and 1 for a row of zeros."""
    weight = torch.zeros(2, 3)
    weight[1, 0] = 2
    down, up = torch.eye(3), -weight  # ΔW = −W
    norm = merged_norm(weight, weight.norm(dim=1), down, up)
    assert norm[0] == 1 and math.isclose(norm[1], 2e-6, rel_tol=1e-5)
