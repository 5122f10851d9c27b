"""The fused products against the formula: the kernels on a GPU that has them, what is put around them anywhere."""

import pytest
import torch
from test_bank import Toy
from torch import nn

import deltaw as dw
from deltaw import fused
from deltaw.linear import _plain, adapted_linear

on_hopper = pytest.mark.skipif(
    not (fused.HAS_TRITON and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)),
    reason="needs Triton and a Hopper GPU",
)
# slots, tokens of a slot, in, out, rank: blocks that are full, cut, shared; ranks on either side of the padding
SHAPES = [(1, 64, 64, 64, 1), (2, 100, 48, 40, 3), (3, 520, 96, 72, 16), (1, 2048, 384, 1536, 8), (4, 256, 1536, 384, 8),
          (2, 192, 128, 136, 20), (2, 300, 256, 1024, 64)]


def draw(shape, dtype, seed=0):
    """x, weight, bias, down, up and a gradient of the output."""
    slots, tokens, inputs, outputs, rank = shape
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, device="cuda", generator=generator)

    x, grad = normal(slots, tokens, inputs).to(dtype), normal(slots, tokens, outputs).to(dtype)
    weight, bias = (normal(outputs, inputs) / inputs**0.5).to(dtype), normal(outputs).to(dtype)
    return x, weight, bias, normal(slots, rank, inputs) / inputs**0.5, normal(slots, outputs, rank), grad


def gradients(function, x, weight, bias, down, up, grad):
    x, down, up = (tensor.detach().requires_grad_() for tensor in (x, down, up))
    y = function(x, weight, bias, down, up)
    return [y.detach(), *torch.autograd.grad(y, (x, down, up), grad)]


def exact(x, weight, bias, down, up, grad):
    tensors = [None if t is None else t.double() for t in (x, weight, bias, down, up, grad)]
    return gradients(lambda *args: _plain(*args, None, None), *tensors)


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula_and_its_gradients(shape, dtype):
    drawn = draw(shape, dtype)
    with fused.enabled():
        assert fused.usable(drawn[0], drawn[1], drawn[3])
    ours, reference = gradients(fused.fused_linear, *drawn), exact(*drawn)
    for value, expected, name in zip(ours, reference, ("y", "x", "down", "up")):
        assert error(value, expected) < (5e-3 if dtype == torch.bfloat16 else 7e-4), name
    assert ours[2].dtype == ours[3].dtype == torch.float32


@on_hopper
def test_without_bias_and_with_strided_tensors():
    x, weight, _, down, up, grad = draw((2, 128, 64, 96, 4), torch.bfloat16)
    x, grad = (tensor.mT.contiguous().mT for tensor in (x, grad))
    drawn = x, weight.mT.contiguous().mT, None, down, up, grad
    for value, expected in zip(gradients(fused.fused_linear, *drawn), exact(*drawn)):
        assert error(value, expected) < 5e-3


@on_hopper
def test_a_gradient_that_is_one_number_expanded():
    *drawn, _ = draw((2, 128, 64, 96, 4), torch.bfloat16)
    grad = torch.ones(1, 1, 1, device="cuda", dtype=torch.bfloat16).expand(2, 128, 96)
    for value, expected in zip(gradients(fused.fused_linear, *drawn, grad), exact(*drawn, grad)):
        assert error(value, expected) < 5e-3


@on_hopper
def test_only_the_factors_get_a_gradient_where_x_needs_none():
    x, weight, bias, down, up, grad = draw((3, 200, 64, 96, 8), torch.bfloat16)
    _, _, *expected = exact(x, weight, bias, down, up, grad)
    down, up = down.requires_grad_(), up.requires_grad_()
    found = torch.autograd.grad(fused.fused_linear(x, weight, bias, down, up), (down, up), grad)
    for value, reference in zip(found, expected):
        assert error(value, reference) < 5e-3


@on_hopper
@pytest.mark.parametrize("tokens", [100, 512])
def test_a_slot_that_is_not_finite_does_not_reach_the_others(tokens):
    drawn = draw((3, tokens, 64, 96, 5), torch.bfloat16)
    before = gradients(fused.fused_linear, *drawn)
    for tensor in (drawn[0], drawn[3], drawn[4], drawn[5]):
        tensor[1] = float("nan")
    for value, reference in zip(gradients(fused.fused_linear, *drawn), before):
        assert torch.equal(value[[0, 2]], reference[[0, 2]]) and not value[1].isfinite().all()


@pytest.fixture
def enabled():
    with fused.enabled():
        yield


@on_hopper
def test_adapted_linear_takes_it_where_it_may_and_agrees_where_not(enabled, monkeypatch):
    x, weight, bias, down, up, _ = draw((2, 256, 64, 96, 4), torch.bfloat16)
    x = x.view(8, 64, 64)  # (K · batch, length, in)
    calls = []
    one = fused.fused_linear
    monkeypatch.setattr(fused, "fused_linear", lambda *args: calls.append(args) or one(*args))
    fast = adapted_linear(x, weight, bias, down, up)
    assert len(calls) == 1 and fast.shape == (8, 64, 96)
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    slow = adapted_linear(x, weight, bias, down, up)
    assert len(calls) == 1 and error(fast, slow.double()) < 5e-3
    monkeypatch.setattr(fused, "HAS_TRITON", True)
    adapted_linear(x, weight, bias, down, up, dropout=0.1)
    adapted_linear(x, weight, bias, down, up, gain=torch.ones(2, 96, device="cuda"))
    adapted_linear(x.float(), weight.float(), bias.float(), down, up)
    adapted_linear(x[:, :2], weight, bias, down, up)
    with fused.enabled(False):
        adapted_linear(x, weight, bias, down, up)
    assert len(calls) == 1
    adapted_linear(x, weight, bias, down[0], up[0])
    assert len(calls) == 2


@on_hopper
def test_compiled_is_the_same():
    drawn = draw((2, 256, 64, 96, 4), torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(fused.fused_linear, fullgraph=True)
    for value, reference in zip(gradients(compiled, *drawn), gradients(fused.fused_linear, *drawn)):
        assert torch.equal(value, reference)


@on_hopper
def test_a_banks_graph_takes_it_and_nothing_else_does(monkeypatch):
    calls, one = [], fused.two_products
    monkeypatch.setattr(fused, "two_products", lambda *args: calls.append(args) or one(*args))
    task = Toy(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.float32, (16,), 192)
    task.predict = lambda model, batch: model(batch["x"])
    slots = [(dw.LoRA(4), dw.Recipe(steps=6, batch_size=96, precision="bf16"))] * 2
    for graph in (True, False):
        dw.Bank(task.model(), slots).fit(task, cuda_graph=graph, progress=False)
        assert bool(calls) == graph
        calls.clear()


@on_hopper
def test_the_operators_pass_torch_s_own_check():
    x, weight, bias, down, up, _ = draw((2, 128, 64, 96, 4), torch.bfloat16)
    p, q = fused._padded(down, x.dtype), fused._padded(up.mT, x.dtype)
    torch.library.opcheck(fused.two_products, (x, weight, p, q, bias))
    _, h = fused.two_products(x, weight, p, q, bias)
    torch.library.opcheck(fused.sum_over_tokens, (h, x))


def in_plain_torch(monkeypatch):
    """The two operators, written out."""

    def two_products(x, w, p, q, bias):
        slots = len(p)
        h = x.reshape(slots, -1, x.shape[-1]) @ p.mT  # (K, n, R)
        y = x.reshape(slots, -1, x.shape[-1]) @ w.T + h @ q  # (K, n, out)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1), h

    monkeypatch.setattr(fused, "two_products", two_products)
    monkeypatch.setattr(fused, "sum_over_tokens", lambda h, x: h.mT @ x.reshape(*h.shape[:2], -1))


@pytest.mark.parametrize("slots, rank", [(1, 3), (3, 8), (2, 20)])
@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward_and_backward_put_the_operators_together_rightly(monkeypatch, slots, rank, x_grad, with_bias):
    in_plain_torch(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    sizes = [(4 * slots, 5, 12), (16, 12), (16,), (slots, rank, 12), (slots, 16, rank), (4 * slots, 5, 16)]
    x, weight, bias, down, up, grad = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    bias = bias if with_bias else None
    trained = [tensor.requires_grad_() for tensor in ((x, down, up) if x_grad else (down, up))]
    y = fused.fused_linear(x, weight, bias, down, up)
    expected = _plain(x.reshape(slots, -1, 12), weight, bias, down, up, None, None).reshape(y.shape)
    torch.testing.assert_close(y, expected)
    for ours, reference in zip(torch.autograd.grad(y, trained, grad), torch.autograd.grad(expected, trained, grad)):
        torch.testing.assert_close(ours, reference)


def test_off_unless_enabled_and_never_on_a_cpu(monkeypatch):
    x, weight, down = torch.zeros(2, 64, 64, dtype=torch.bfloat16), torch.zeros(64, 64), torch.zeros(2, 8, 64)
    with fused.enabled():
        assert fused._enabled and not fused.usable(x, weight, down)
        with fused.enabled(False):
            assert not fused._enabled
        assert fused._enabled
    assert not fused._enabled
    with pytest.raises(KeyError), fused.enabled():
        raise KeyError
    assert not fused._enabled
