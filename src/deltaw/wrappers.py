"""A model with adapters in it, walked through: what wraps what, under which name."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .linear import AdaptedLinear


class TrainedCopy(nn.Module):
    """A module that is trained in full beside the adapters, such as a new head: the base and one copy an adapter.

    Attributes that are not its own are those of the copy in use.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    @property
    def current(self) -> nn.Module:
        return self.base if self.active is None else self.adapters[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "adapters", "active", "current"):  # not made yet: copy and pickle ask early
                raise
            return getattr(self.current, name)

    def use(self, name: str | None) -> None:
        """As `AdaptedLinear.use`."""
        self.active = name if name in self.adapters else None
        for other, module in self.adapters.items():
            module.requires_grad_(other == self.active)

    def merge(self) -> None:
        """Nothing to add up: the copy is in the base's place already."""
        self.adapters.requires_grad_(False)

    def unmerge(self) -> None:
        self.use(self.active)


def wrappers(model: nn.Module) -> Iterator[AdaptedLinear | TrainedCopy]:
    """The modules that hold adapters."""
    return (module for _, module in named_wrappers(model))


def named_wrappers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear | TrainedCopy]]:
    return ((key, module) for key, module in base_modules(model) if isinstance(module, AdaptedLinear | TrainedCopy))


def base_modules(model: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` as it is without adapters: what is inside a wrapper is left out. A shared module comes once."""
    seen = set() if seen is None else seen
    model = uncompiled(model)  # so that a compiled model's names are the plain one's
    if id(model) in seen:
        return
    seen.add(id(model))
    yield prefix, model
    if isinstance(model, AdaptedLinear | TrainedCopy):
        return
    for key, child in model.named_children():
        yield from base_modules(child, f"{prefix}.{key}" if prefix else key, seen)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside, if `torch.compile` made this one."""
    return model._modules.get("_orig_mod", model)


def replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put the new modules wherever the old ones, the keys, stand: one that has two places is replaced in both."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]
