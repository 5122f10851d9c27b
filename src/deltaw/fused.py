"""The kernel's two products as one, on a GPU: x is read once, y is written once.

    h = x downᵀ            y = x Wᵀ + h upᵀ + b

A block of y needs its rows of x from the first column to the last. While they pass by for x Wᵀ they are multiplied by
`down` as well, at the price of r columns beside the block's 128; h upᵀ is then one small product more before the block
is written. The gradient for x is the same formula with other letters, so the same kernel computes it.

They are for CUDA graphs (`enabled`): launched one at a time, such a kernel costs the CPU some 0.2 ms, more than it saves
the GPU. Triton comes with PyTorch for CUDA. Without it, and wherever `usable` says no, `linear.py` takes PyTorch's own
products.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_RANK = 64  # wider factors are no small addition to a block's columns
MIN_TOKENS = 64  # a slot's; fewer do not fill a block
MAX_WIDTH = 2048  # measured up to 1536; the wider the layer, the less there is to save beside its own product


def _has_triton() -> bool:
    """Triton 3.4 or newer (tensor descriptors), without importing it."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        return tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 4)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return False


HAS_TRITON = _has_triton()
_enabled = False


@contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """Within, and if `on`, `adapted_linear` takes the fused products wherever they are usable."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def usable(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether `adapted_linear` is to take the fused products: enabled, a 16-bit x `(…, in)`, a Hopper GPU or newer."""
    return (
        _enabled
        and HAS_TRITON
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and 0 < down.shape[-2] <= MAX_RANK
        and x.numel() >= MIN_TOKENS * x.shape[-1] * (down.shape[0] if down.dim() > 2 else 1)
        and all(size % 8 == 0 and size <= MAX_WIDTH for size in weight.shape)  # rows begin at multiples of 16 bytes
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
    )


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
    """x Wᵀ + (x downᵀ) upᵀ + b.

    Args:
        x: `(…, in)`, the first axis adapter by adapter; weight: `(out, in)` and bias: `(out,)`, frozen, of x's dtype.
        down: `(K, r, in)`; up: `(K, out, r)`; in a wider dtype or the same. Their gradients are not rounded to x's.

    Returns:
        `(…, out)`.
    """
    return _FusedLinear.apply(x, weight, bias, down, up)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up):
        p, q = _padded(down, x.dtype), _padded(up.mT, x.dtype)  # (K, R, in), (K, R, out)
        y, h = two_products(x, weight, p, q, bias)  # (…, out), (K, n, R)
        ctx.rank, ctx.factor_dtype = down.shape[-2], up.dtype
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, p, q, h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (…, out)
        x, weight, p, q, h = ctx.saved_tensors
        x_grad, _, _, down_grad, up_grad = ctx.needs_input_grad
        grad_x = grad_h = grad_down = grad_up = None
        if up_grad:
            grad_up = sum_over_tokens(h, grad)[:, : ctx.rank].mT.to(ctx.factor_dtype)  # (K, out, r)
        if x_grad:
            grad_x, grad_h = two_products(grad, weight.mT, q, p, None)  # (…, in), (K, n, R)
        elif down_grad:
            grad_h = grad.reshape(len(q), -1, q.shape[-1]) @ q.mT  # (K, n, R)
        if down_grad:
            grad_down = sum_over_tokens(grad_h, x)[:, : ctx.rank].to(ctx.factor_dtype)  # (K, r, in)
        return grad_x, None, None, grad_down, grad_up


def _padded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`(K, r, c)` with rows of zeros to the power of two that the kernels need, `(K, R, c)`, contiguous."""
    rank = factor.shape[1]
    return F.pad(factor.to(dtype), (0, 0, 0, max(16, 1 << (rank - 1).bit_length()) - rank)).contiguous()


@torch.library.custom_op("deltaw::two_products", mutates_args=())
def two_products(x: Tensor, w: Tensor, p: Tensor, q: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """h = x pᵀ and y = x wᵀ + h q + bias.

    Args:
        x: `(…, in)`; w: `(out, in)`; p: `(K, R, in)`; q: `(K, R, out)`; bias: `(out,)`. All of one 16-bit dtype.

    Returns:
        y: `(…, out)`; h: `(K, n, R)`, the slots' tokens in one axis.
    """
    from . import triton_kernels

    y, h = _empty_products(x, w, p, q, bias)
    slots = len(p)
    x = x.contiguous().view(slots, -1, x.shape[-1])  # (K, n, in)
    triton_kernels.two_products(x, w, p, q, bias, y.view(slots, -1, y.shape[-1]), h)
    return y, h


@two_products.register_fake
def _empty_products(x, w, p, q, bias):
    tokens = x.numel() // (x.shape[-1] * p.shape[0])
    return x.new_empty(*x.shape[:-1], q.shape[2]), x.new_empty(p.shape[0], tokens, p.shape[1])


@torch.library.custom_op("deltaw::sum_over_tokens", mutates_args=())
def sum_over_tokens(h: Tensor, x: Tensor) -> Tensor:
    """hᵀ x in fp32.

    Args:
        h: `(K, n, R)`, as `two_products` returns it; x: `(…, c)` of its dtype, n tokens a slot.

    Returns:
        `(K, R, c)`.
    """
    from . import triton_kernels

    return triton_kernels.sum_over_tokens(h.contiguous(), x.contiguous().view(*h.shape[:2], x.shape[-1]))


@sum_over_tokens.register_fake
def _(h, x):
    return x.new_empty(h.shape[0], h.shape[2], x.shape[-1], dtype=torch.float32)
