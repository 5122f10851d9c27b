"""The kernel alone: against its plain form, in every dtype, shape and mode."""

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.linear import _plain, adapted_linear


def tensors(dtype=torch.float64, slots=(), gain=True, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    batch = 3 * (slots[0] if slots else 1) * (slots[1] if len(slots) > 1 else 1)
    x = make(batch, 5, 12).requires_grad_(True)
    weight, b = make(16, 12), make(16) if bias else None
    down, up = make(*slots, 4, 12).requires_grad_(True), make(*slots, 16, 4).requires_grad_(True)
    g = (1 + 0.1 * make(*slots, 16)).requires_grad_(True) if gain else None
    return x, weight, b, down, up, g


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slots", [(), (2,), (2, 3)])
def test_it_is_the_formula(slots, gain, bias):
    x, weight, b, down, up, g = tensors(slots=slots, gain=gain, bias=bias)
    y = adapted_linear(x, weight, b, down, up, g)
    n = 1 if not slots else torch.Size(slots).numel()
    per_slot = zip(x.chunk(n), down.reshape(n, 4, 12), up.reshape(n, 16, 4), g.reshape(n, 16) if gain else [None] * n)
    expected = torch.cat([_plain(x, weight, b, d, u, g, None) for x, d, u, g in per_slot])
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    inputs = [t for t in (x, down, up, g) if t is not None]
    weights = torch.randn_like(y)
    for ours, reference in zip(
        torch.autograd.grad((y * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs)
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 12), (2, 3, 4, 12), (0, 12)])
def test_any_leading_shape(shape):
    _, weight, b, down, up, g = tensors()
    x = torch.randn(shape, dtype=torch.float64)
    expected = _plain(x.reshape(-1, 12), weight, b, down, up, g, None).reshape(*shape[:-1], 16)
    torch.testing.assert_close(adapted_linear(x, weight, b, down, up, g), expected)


def test_what_is_kept_for_the_backward_pass():
    """x only if `down` is trained, h only if `up` is, one output only for a trained gain; never out × in."""

    def kept(**frozen):
        x, weight, b, down, up, g = tensors(gain=frozen.pop("gain", False))
        down.requires_grad_(frozen.pop("down", True))
        y = adapted_linear(x, weight, b, down, up, g)
        fixed = {t.untyped_storage().data_ptr() for t in (weight, down, up, g) if t is not None}
        saved = [t for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None]
        return sorted(tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in fixed)

    assert kept() == [(15, 4), (15, 12)]  # h and x
    assert kept(down=False) == [(15, 4)]  # h
    assert kept(gain=True) == [(15, 4), (15, 12), (15, 16)]  # and one output


def test_gradients_that_are_not_asked_for_are_not_computed():
    x, weight, b, down, up, g = tensors()
    down.requires_grad_(False), g.requires_grad_(False)
    adapted_linear(x.detach(), weight, b, down, up, g).sum().backward()
    assert up.grad is not None and down.grad is None and g.grad is None and weight.grad is None


def test_a_frozen_gain_and_up_let_gradients_through():
    x, weight, b, down, up, g = tensors()
    up.requires_grad_(False), g.requires_grad_(False)
    grads = torch.autograd.grad(adapted_linear(x, weight, b, down, up, g).sum(), (x, down))
    expected = torch.autograd.grad(_plain(x, weight, b, down, up, g, None).sum(), (x, down))
    assert all(torch.allclose(ours, reference) for ours, reference in zip(grads, expected))


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("slots", [(), (2,)])
def test_no_tokens_have_gradients_of_zero(slots, gain):
    x, weight, b, down, up, g = tensors(slots=slots, gain=gain)
    adapted_linear(x[:0], weight, b, down, up, g).sum().backward()
    assert all(not t.grad.any() for t in (down, up, g) if t is not None)


def test_a_trained_base_gets_its_gradient():
    x, weight, b, down, up, g = tensors()
    weight.requires_grad_(True), b.requires_grad_(True)
    assert torch.autograd.gradcheck(adapted_linear, (x, weight, b, down, up, g))


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weight, b, down, up, g = tensors()
    (grad,) = torch.autograd.grad(adapted_linear(x, weight, b, down, up, g).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("slots", [(), (2,)])
@pytest.mark.parametrize("gain", [False, True])
def test_dropout_acts_on_the_adapters_path_alone(slots, gain):
    x, weight, b, down, up, g = tensors(slots=slots, gain=gain)
    torch.manual_seed(0)
    y = adapted_linear(x, weight, b, down, up, g, dropout=0.4)
    torch.manual_seed(0)
    n = slots[0] if slots else 1
    keep = torch.empty((n, x.numel() // 12 // n, 12) if slots else (15, 12), dtype=torch.bool).bernoulli_(0.6)
    chunks = zip(x.chunk(n), keep.reshape(n, 3, 5, 12), down.reshape(n, 4, 12), up.reshape(n, 16, 4),
                 g.reshape(n, 16) if gain else [None] * n)  # fmt: skip
    expected = torch.cat([_plain(x, weight, b, d, u / 0.6, g, k) for x, k, d, u, g in chunks])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = [t for t in (x, down, up, g) if t is not None]
    for ours, reference in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-11, atol=1e-11)


def test_dropout_keeps_the_mean():
    x, weight, b, down, up, g = (None if t is None else t.detach() for t in tensors())
    mean = torch.stack([adapted_linear(x, weight, b, down, up, g, dropout=0.3) for _ in range(4000)]).mean(0)
    expected = adapted_linear(x, weight, b, down, up, g)
    spread = (expected - (x @ weight.mT * g + b)).abs().max()
    assert (mean - expected).abs().max() < 0.15 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [False, True])
def test_low_precision(dtype, gain):
    """Within a few roundings of float64, factors and gain kept in fp32."""
    x, weight, b, down, up, g = tensors(dtype, gain=gain)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, b, down, up, g)]
    down, up = down.detach().float().requires_grad_(True), up.detach().float().requires_grad_(True)
    g = None if g is None else g.detach().float().requires_grad_(True)
    y, reference = adapted_linear(x, weight, b, down, up, g), adapted_linear(*exact)
    assert y.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    assert (y - reference).norm() < tolerance * reference.norm()
    y.sum().backward()
    reference.sum().backward()
    for ours, theirs in zip((x, down, up, g), (exact[0], *exact[3:])):
        if ours is not None:
            assert ours.grad.dtype == ours.dtype
            assert (ours.grad - theirs.grad).norm() < tolerance * theirs.grad.norm()


def test_the_gain_is_not_rounded_to_bf16():
    """Its rounding would add to the output's: with the gain in fp32 only the output's is left."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 64, generator=g).bfloat16(), torch.randn(256, 64, generator=g).bfloat16()
    down, up, gain = torch.zeros(4, 64), torch.zeros(256, 4), 1 + 0.1 * torch.randn(256, generator=g)
    exact = adapted_linear(x.double(), weight.double(), None, down, up, gain.double())
    fp32, bf16 = (adapted_linear(x, weight, None, down, up, factor).double() for factor in (gain, gain.bfloat16().float()))
    assert (fp32 - exact).norm() < 0.9 * (bf16 - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_down_and_leaves_float64(dtype):
    x, weight, b, down, up, g = tensors(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted_linear(x, weight, b, down, up, g)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    y.sum().backward()
    assert x.grad.dtype == down.grad.dtype == up.grad.dtype == g.grad.dtype == dtype


def test_slots_that_do_not_split_the_batch():
    x, weight, b, down, up, g = tensors(slots=(2,))
    with pytest.raises(ValueError, match=r"multiple of 2; x has shape \(5, 5, 12\)"):
        adapted_linear(x[:5], weight, b, down, up, g)


@pytest.mark.parametrize("spec", [dw.LoRA(4), dw.DoRA(dw.LoRA(4)), dw.VeRA(16), dw.DoRA(dw.MoSLoRA(4), detach_norm=False)],
                         ids=lambda spec: type(spec).__name__)  # fmt: skip
def test_torch_compile_takes_it_whole(spec):
    torch.manual_seed(0)
    model = dw.attach(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)), spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 12)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    for ours, reference in zip(torch.autograd.grad(y.square().sum(), parameters), expected):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    model = dw.attach(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)), dw.LoRA(4, dropout=0.3)).train()
    x, grads = torch.randn(6, 12), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(run(x).square().sum(), [p for p in model.parameters() if p.requires_grad]))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_weights_seen_from_outside():
    model = dw.attach(nn.Sequential(nn.Linear(12, 16)), dw.LoRA(4))
    layer = model[0]
    with torch.no_grad():
        layer.adapter.B += 1
    assert (layer.in_features, layer.out_features) == (12, 16)
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    down, up = layer.adapter.factors()
    torch.testing.assert_close(layer.delta_weight(), up @ down)
    torch.testing.assert_close(layer.merged_weight(torch.float64), layer.weight.double() + (up @ down).double())
    assert layer.delta_weight(torch.bfloat16).dtype == torch.bfloat16
    dw.merge(model)
    torch.testing.assert_close(layer.delta_weight(), up @ down)  # of the base's own weight, also while merged
