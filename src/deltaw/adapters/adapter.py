"""The contract of a family: a spec says what to build, an adapter says what `down`, `up` and the gain are."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from . import inits


class Layer(NamedTuple):
    """What a family may know of a layer it is to adapt.

    Attributes:
        name: the module's name in the model.
        weight: `(out, in)`, also for `Conv1D`; it may be on the meta device.
    """

    name: str
    weight: Tensor

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the adapter's parameters: fp32 whatever the base's, float64 on a float64 base."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def new(self, tensor: Tensor) -> Tensor:
        """`tensor` on the layer's device in the adapters' dtype."""
        return tensor.detach().to(self.weight.device, self.dtype, copy=True, memory_format=torch.contiguous_format)


class Adapter(nn.Module):
    """What one layer learns. A subclass is a family.

    What is trained is a parameter, what is fixed is a buffer: nothing else has to be said about it. Every
    tensor may have leading axes `*K`, so that K adapters stack into one (`bank.py`); hence whatever may
    differ between them, the scale included, is a tensor too.

    Attributes:
        up_parameters: names of the parameters on the side of `up` (LoRA's B), which LoRA+ gives a larger step.
        dropout: probability of dropping an entry of x on the adapter's path while training.
    """

    up_parameters: ClassVar[tuple[str, ...]] = ()
    dropout: float = 0.0

    def factors(self) -> tuple[Tensor, Tensor]:
        """`down` of `(*K, r, in)` and `up` of `(*K, out, r)`, the scale in `up`; ΔW = up · down. Autocast is off here."""
        raise NotImplementedError

    def gain(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor | None:
        """The factor of each output, `(*K, out)`, or None where there is none.

        Args:
            weight: the base's, `(out, in)`.
            down: as `factors` gave it, and `up` likewise.
        """
        return None

    def weight_changed(self, weight: Tensor) -> None:
        """Derive anew what was derived from the base's weight `(out, in)`, if anything was: it has been loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """`model.half()` and the like change the base's dtype; what an adapter holds stays fp32 or better."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.itemsize < min(tensor.itemsize, 4)
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(keep_precision, recurse)


@dataclass(frozen=True)
class Spec:
    """What to build: a family and its settings, checked when made. A subclass is a family's face."""

    families: ClassVar[dict[str, type["Spec"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Spec.families[cls.__name__] = cls  # a file names its family by this

    def build(self, layers: Mapping[str, Layer], generator: Generator) -> dict[str, Adapter]:
        """One adapter for each layer. All layers come at once, so that a family may share what it likes.

        Args:
            layers: by name.
            generator: on the CPU, so that a seed gives the same start on every device.
        """
        raise NotImplementedError

    def resuming(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> "Spec":
        """The same spec for adapters whose tensors are known, by layer: a start that is costly to draw is not drawn."""
        return self

    def to_dict(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The settings as JSON can hold them; a tensor is put into `tensors` under a new name, a callable is "custom"."""

        def plain(value: Any) -> Any:
            if isinstance(value, Spec):
                return value.to_dict(tensors)
            if isinstance(value, Tensor):
                tensors[f"spec/{len(tensors)}"] = value
                return {"tensor": f"spec/{len(tensors) - 1}"}
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            return "custom" if callable(value) else value

        values = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"family": type(self).__name__, **values}

    @staticmethod
    def from_dict(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Spec":
        """The inverse of `to_dict`; what was a callable comes back as the family's default.

        Raises:
            ValueError: on a family or a setting that is not known, or whose value is not allowed.
        """
        values = dict(values)
        name = values.pop("family", None)
        if name not in Spec.families:
            raise ValueError(f"unknown family {name!r}; known: {sorted(Spec.families)}")
        family = Spec.families[name]
        unknown = set(values) - {f.name for f in dataclasses.fields(family)}
        if unknown:
            raise ValueError(f"{name} has no settings {sorted(unknown)}")

        def rich(value: Any) -> Any:
            if isinstance(value, Mapping) and "family" in value:
                return Spec.from_dict(value, tensors)
            if isinstance(value, Mapping) and "tensor" in value:
                return tensors[value["tensor"]]
            return tuple(rich(item) for item in value) if isinstance(value, list) else value

        return family(**{key: rich(value) for key, value in values.items() if value != "custom"})


@dataclass(frozen=True)
class LowRankSpec(Spec):
    """The settings that LoRA, MoSLoRA and LoRA-XS have in common.

    Attributes:
        rank: r ≥ 1, the width of `down` and `up`.
        alpha: the scale is s = alpha / rank; None means s = 1.
        scaling: "standard", or "rslora" for s = alpha / √rank (arXiv 2312.03732, section 3).
        dropout: on the adapter's path, in [0, 1).
        rank_pattern: ranks of layers that differ, by a regular expression for the end of the layer's name.
        alpha_pattern: likewise for alpha.
    """

    rank: int = 8
    alpha: float | None = None
    _: dataclasses.KW_ONLY
    scaling: str = "standard"
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_dropout(self.dropout)
        check_one_of("scaling", self.scaling, ("standard", "rslora"))
        check_patterns("rank_pattern", self.rank_pattern, check_rank)
        check_patterns("alpha_pattern", self.alpha_pattern, check_positive)
        if self.alpha is not None:
            check_positive("alpha", self.alpha)
        elif self.scaling == "rslora":
            raise ValueError("scaling='rslora' means s = alpha / √rank, so it needs an alpha; alpha is None (s = 1)")

    def rank_of(self, name: str) -> int:
        """The rank of the layer of that name."""
        return matching(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """s of the layer of that name."""
        alpha, rank = matching(self.alpha_pattern, name, self.alpha), self.rank_of(name)
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.scaling == "rslora" else alpha / rank

    def build(self, layers: Mapping[str, Layer], generator: Generator) -> dict[str, Adapter]:
        """One adapter for each layer, independent of the others."""
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not any(matching({pattern: True}, name, False) for name in layers):
                raise ValueError(f"the pattern {pattern!r} matches none of the adapted layers {shortened(layers)}")
        adapters = {}
        for name, layer in layers.items():
            adapters[name] = self.build_layer(layer, self.rank_of(name), self.scale_of(name), generator)
            adapters[name].dropout = self.dropout
        return adapters

    def resuming(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Spec:
        if not hasattr(self, "init"):
            return self

        def start(layer: Layer, *_: Any) -> tuple[Tensor, Tensor]:
            known = tensors[layer.name]
            return (known["A0"], known["B0"]) if "A0" in known else (known["A"], torch.zeros_like(known["B"]))

        return dataclasses.replace(self, init=start)

    def build_layer(self, layer: Layer, rank: int, scale: float, generator: Generator) -> Adapter:
        """The adapter of one layer."""
        raise NotImplementedError


class LowRankAdapter(Adapter):
    """Two factors A and B from a start, and what both trained and fixed ones need.

    Where the start's product is not zero it is subtracted, never taken out of the base, so that the model
    begins as the base and the base stays what it was: with B₀ and A₀ the start,

        up = s · [B − B₀, B₀],    down = [A; A − A₀],    up · down = s · (B A − B₀ A₀).

    The differences are taken in the parameters' precision: [B, −B₀] [A; A₀] would lose small steps in bf16.
    """

    def __init__(self, layer: Layer, scale: float):
        super().__init__()
        self.register_buffer("scale", layer.new(torch.tensor(scale, dtype=torch.float64)), persistent=False)  # ()
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)

    def keep_start(self, a: Tensor, b: Tensor) -> None:
        """Remember the start A₀ `(r, in)`, B₀ `(out, r)` unless their product is zero because one of them is."""
        if not a.is_meta and a.any() and b.any():
            self.A0, self.B0 = a.detach().clone(), b.detach().clone()

    def since_start(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`down` and `up` for s · (b a − B₀ A₀); rank r, or 2r where there is a start to subtract."""
        if self.A0 is not None:
            a, b = torch.cat([a, a - self.A0], -2), torch.cat([b - self.B0, self.B0], -1)  # (2r, in), (out, 2r)
        return a, self.scale[..., None, None] * b


def draw_start(init: str | Callable, layer: Layer, rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """A `(rank, in)` and B `(out, rank)` by a named or a given init, on the layer's device.

    Raises:
        ValueError: if `init` gives other shapes, or numbers that are not finite.
    """
    a, b = inits.INITS.get(init, init)(layer, rank, scale, generator)
    for name, tensor, shape in (("A", a, (rank, layer.in_features)), ("B", b, (layer.out_features, rank))):
        if tensor.shape != shape:
            raise ValueError(f"init gave {name} of shape {tuple(tensor.shape)} for layer {layer.name!r}; it must be {shape}")
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"init gave {name} numbers that are not finite for layer {layer.name!r}")
    return layer.new(a), layer.new(b)


def matching(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `name`, from a dot on; else `default`."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


def shortened(names: Any, most: int = 8) -> str:
    """A list of names for an error message, cut where it gets long."""
    names = [repr(name) for name in names]
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def check_rank(what: str, value: Any) -> None:
    """Raises unless `value` is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")


def check_positive(what: str, value: Any) -> None:
    """Raises unless `value` is a finite number above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a finite number above 0, not {value!r}")


def check_dropout(value: Any) -> None:
    """Raises unless `value` is in [0, 1)."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"dropout must be a number in [0, 1), not {value!r}")


def check_one_of(what: str, value: Any, allowed: Any) -> None:
    """Raises unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{what} must be one of {shortened(allowed, 20)}, not {value!r}")


def check_patterns(what: str, patterns: Any, check: Callable) -> None:
    """Raises unless `patterns` maps regular expressions to values that pass `check`."""
    if not isinstance(patterns, Mapping):
        raise TypeError(f"{what} must map patterns to values, such as {{'query': …}}, not {patterns!r}")
    for key, value in patterns.items():
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"{what} has the key {key!r}, which is not a regular expression: {error}") from None
        check(f"{what}[{key!r}]", value)


def check_init(init: Any) -> None:
    """Raises unless `init` is the name of one of `inits` or a callable of their form."""
    if not callable(init):
        check_one_of("init (unless it is a callable)", init, inits.INITS)
