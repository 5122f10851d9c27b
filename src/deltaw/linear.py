"""The one kernel of the library, and the module that calls it.

Every variant of low-rank adaptation is the same formula with other small factors:

    y = g ⊙ (x Wᵀ + (x downᵀ) upᵀ) + b

`down` (r × in) and `up` (out × r) come from the adapter, already scaled; the gain `g` (out) is there for
DoRA alone. All token-sized work happens in this file. The factors are small, so what makes them
(`adapters/`) is left to autograd.
"""

import contextlib
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import fused


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    gain: Tensor | None = None,
    dropout: float | Tensor = 0.0,
) -> Tensor:
    """y = g ⊙ (x Wᵀ + (D(x) downᵀ) upᵀ) + b.

    Args:
        x: `(..., in)`. With K adapters at once, the first axis is `(K · batch)`, adapter by adapter.
        weight: `(out, in)`, frozen as a rule; if it (or `bias`) is trained, a plain-torch path is taken.
        bias: `(out,)` or None; it is not multiplied by the gain.
        down: `(*K, r, in)`.
        up: `(*K, out, r)`, with the adapter's scale in it.
        gain: `(*K, out)` or None. It stays in its own precision, fp32: in bf16, 0.9985 would be 1.
        dropout: probability of dropping an entry of x on the adapter's path; where the K adapters have one each,
            a tensor `(K, 1, 1)`.

    Returns:
        `(..., out)`, in autocast's dtype where that is on, else in x's. `down` and `up` are cast down to
        it; x is never cast up.

    Raises:
        ValueError: if the first axis of x does not split into K adapters.
    """
    dtype = x.dtype
    if dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    drops = isinstance(dropout, Tensor) or dropout > 0
    if drops:
        up = up / (1.0 - dropout)  # out × r numbers instead of tokens × in

    trained_base = weight.requires_grad or (bias is not None and bias.requires_grad)
    *batch, in_features = x.shape
    slots = math.prod(down.shape[:-2])
    if down.dim() > 2:
        if not batch or batch[0] % slots:
            raise ValueError(
                f"{slots} adapters share this layer, so the first axis of x must be a multiple of {slots}; "
                f"x has shape {(*batch, in_features)}"
            )
        down, up = down.flatten(0, -3), up.flatten(0, -3)  # (K, r, in), (K, out, r)
        gain = None if gain is None else gain.flatten(0, -2)  # (K, out)
    if gain is None and not drops and not trained_base and fused.usable(x, weight, down):
        one = down.dim() == 2
        return fused.fused_linear(x, weight, bias, down[None] if one else down, up[None] if one else up)

    x = x.reshape(*down.shape[:-2], -1, in_features)  # (*K, n, in)
    keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout) if drops else None  # (*K, n, in)
    function = _plain if trained_base else _AdaptedLinear.apply
    return function(x, weight, bias, down, up, gain, keep).reshape(*batch, weight.shape[0])


def _plain(x, weight, bias, down, up, gain, keep):
    """The formula as it is read, differentiable in everything: for a trained base, and as the tests' reference."""
    down, up = down.to(x.dtype), up.to(x.dtype)
    z = F.linear(x, weight)  # (*K, n, out)
    z = z + ((x if keep is None else x * keep) @ down.mT) @ up.mT
    if gain is not None:
        z = (z * gain.unsqueeze(-2)).to(x.dtype)
    return z if bias is None else z + bias


class _AdaptedLinear(torch.autograd.Function):
    """The formula with the additions inside the matrix products, and little kept for the backward pass.

    Kept: the r-wide h if `up` or the gain is trained, x if `down` is (VeRA and LoRA-XS: no), the base's output if
    the gain is, one bool an entry for dropout. No out × in matrix is formed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, gain, keep):
        exact_up = up
        down, up = down.to(x.dtype), up.to(x.dtype)
        h = (x if keep is None else x * keep) @ down.mT  # (*K, n, r)
        if gain is None:
            y = z = F.linear(x, weight, bias)  # (*K, n, out)
            _add_product(y, h, up.mT)
        else:  # g ⊙ z + (h (g ⊙ up)ᵀ + b): in bf16, one rounding fewer than g ⊙ (z + h upᵀ) + b
            z = F.linear(x, weight)  # (*K, n, out)
            scaled = (gain[..., None] * exact_up).to(x.dtype)  # (*K, out, r)
            y = h @ scaled.mT if bias is None else _product_plus(bias, h, scaled.mT)
            y.addcmul_(z, gain.unsqueeze(-2))
        x_grad, _, _, down_grad, up_grad, gain_grad, _ = ctx.needs_input_grad
        ctx.factor_dtype = exact_up.dtype
        ctx.save_for_backward(
            x if down_grad else None,
            weight,
            down,
            up,
            gain,
            keep if x_grad or down_grad else None,
            h if up_grad or gain_grad else None,
            z if gain_grad else None,
        )
        # PyTorch 2.11 compiles an output that was written to in place without its gradient.
        return y.view_as(y) if torch.compiler.is_compiling() else y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (*K, n, out)
        x, weight, down, up, gain, keep, h, z = ctx.saved_tensors
        x_grad, _, _, down_grad, up_grad, gain_grad, _ = ctx.needs_input_grad
        grad_x = grad_down = grad_up = grad_gain = None
        if up_grad or gain_grad:
            grad_up = _product(grad.mT, h, ctx.factor_dtype)  # (*K, out, r)
        if gain_grad:
            grad_gain = _sum_of_products(grad, z, gain.dtype) + (grad_up * up).sum(-1)  # (*K, out)
        if gain is not None:
            grad_up = gain[..., None] * grad_up if up_grad else None
            grad = torch.mul(grad, gain.unsqueeze(-2), out=torch.empty_like(grad))  # no fp32 copy of a bf16 one
        if x_grad or down_grad:
            grad_h = grad @ up  # (*K, n, r)
        if x_grad:
            grad_x = grad @ weight  # (*K, n, in)
            if keep is None:
                _add_product(grad_x, grad_h, down)
            else:
                grad_x += (grad_h @ down).mul_(keep)
        if down_grad:
            grad_down = _product(grad_h.mT, x if keep is None else x * keep, ctx.factor_dtype)  # (*K, r, in)
        return grad_x, None, None, grad_down, grad_up, grad_gain, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in the epilogue of the product; 2-D, or 3-D for K adapters."""
    (total.addmm_ if total.dim() == 2 else total.baddbmm_)(a, b)


def _product_plus(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a b + c, likewise; c is one row, `(out,)`."""
    return torch.addmm(c, a, b) if a.dim() == 2 else torch.baddbmm(c, a, b)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, which may be wider than theirs: the gradients of fp32 factors are not rounded to bf16."""
    if a.dtype == dtype:
        return a @ b
    if not a.is_cuda:
        return (a.to(dtype) @ b.to(dtype)).to(dtype)
    try:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=dtype)
    except TypeError:  # before PyTorch 2.8
        return (a @ b).to(dtype)


def _sum_of_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Σₙ aₙ ⊙ bₙ over the tokens in `dtype`: `(*K, out)`.

    A stretch of tokens at a time, so that in bf16 neither is a product rounded nor a token-sized fp32 tensor made.
    """
    stretch = max(1, 2**22 * a.shape[-2] // max(1, a.numel()))
    return sum((p.to(dtype) * q).sum(-2) for p, q in zip(a.split(stretch, -2), b.split(stretch, -2)))


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Within, small matrices (where `tensor` is) are multiplied in their own precision, also under autocast."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def is_conv1d(module: nn.Module) -> bool:
    """Is this GPT-2's `Conv1D`, a linear layer that stores its weight as in × out?"""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # if never imported, there is none
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def _weight_loaded(layer: "AdaptedLinear", _: object) -> None:
    """After `load_state_dict`: what an adapter derived from the base's weight is no longer true of it."""
    for adapter in layer.adapters.values():
        adapter.weight_changed(layer._base_weight())


class AdaptedLinear(nn.Module):
    """A frozen `nn.Linear` or GPT-2 `Conv1D` with adapters, of which at most one is active.

    `base` is the module that was there; an attached model's `state_dict` therefore names its weight
    `….base.weight`, and an adapter's tensors `….adapters.<name>.…`.

    Attributes:
        weight: the base weight as `(out, in)`, whichever way the base stores it.
        bias: `(out,)` or None.
        active: name of the active adapter, or None for the base alone.
        merged: whether the base now holds the merged weight.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.register_parameter("original", None)  # the base's own weight while a merged one stands in for it
        self.register_load_state_dict_post_hook(_weight_loaded)

    @property
    def weight(self) -> Tensor:
        return self.base.weight.mT if is_conv1d(self.base) else self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def adapter(self) -> nn.Module | None:
        """The active adapter, or None."""
        return None if self.active is None else self.adapters[self.active]

    @property
    def merged(self) -> bool:
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        adapter = self.adapter
        if adapter is None or self.merged:
            return self.base(x)
        dropout = adapter.dropout if self.training else 0.0
        return adapted_linear(x, self.weight, self.bias, *self.factors(adapter), dropout)

    def factors(self, adapter: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        """`down` `(*K, r, in)`, `up` `(*K, out, r)` and gain `(*K, out)` or None of one of the layer's adapters.

        They are made in the adapter's own precision, also under autocast.
        """
        weight = self._base_weight()
        with without_autocast(weight):
            down, up = adapter.factors()
            return down, up, adapter.gain(weight, down, up)

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW of the active adapter, `(*K, out, in)`: what it adds to the base's weight.

        With a gain that is (g − 1) ⊙ W + g ⊙ (up down). Computed in the adapter's precision and returned in
        `dtype` (default: the weight's).

        Raises:
            ValueError: if no adapter is active.
        """
        if self.adapter is None:
            raise ValueError("no adapter is active on this layer, so there is no ΔW")
        weight = self._base_weight()
        down, up, gain = self.factors(self.adapter)
        with without_autocast(up):
            delta = up @ down  # (*K, out, in)
        if gain is not None:
            gain = gain[..., None]  # (*K, out, 1)
            delta = (gain - 1) * weight + gain * delta
        return delta.to(dtype or weight.dtype)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """W′ = W + ΔW, `(*K, out, in)`, added in the adapter's precision; errors as `delta_weight`."""
        weight = self._base_weight()
        exact = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(exact) + self.delta_weight(exact)).to(dtype or weight.dtype)

    def _base_weight(self) -> Tensor:
        """The base's own weight as `(out, in)`, also while merged."""
        weight = self.base.weight if self.original is None else self.original
        return weight.mT if is_conv1d(self.base) else weight

    def merge(self) -> None:
        """Let the base compute with the merged weight; its own parameter is kept aside, untouched.

        A new parameter is put in its place, so that a weight which another module shares (tied embeddings)
        is not changed there. Where no adapter is active, there is nothing to add.

        Raises:
            ValueError: if the merged weight would not be finite.
        """
        if self.merged or self.adapter is None:
            return
        merged = self.merged_weight()  # (out, in)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the merged weight is not finite in {merged.dtype}")
        self.original = self.base._parameters["weight"]
        merged = merged.mT.contiguous() if is_conv1d(self.base) else merged
        self.base.weight = nn.Parameter(merged, requires_grad=False)
        self.adapters.requires_grad_(False)

    def unmerge(self) -> None:
        """Put the base's own parameter back: bit for bit what it was."""
        if self.merged:
            self.base.weight, self.original = self.original, None
            self.use(self.active)

    def use(self, name: str | None) -> None:
        """Make adapter `name` (None: none) the active one, and the only one that is trained."""
        self.active = name if name in self.adapters else None
        for other, adapter in self.adapters.items():
            adapter.requires_grad_(other == self.active)

    def extra_repr(self) -> str:
        return f"active={self.active!r}" + (", merged" if self.merged else "")
