"""Which layers to adapt and which modules to train in full: found by name, and refused where it would not work."""

import re
from collections.abc import Iterable

from torch import nn

from .adapters.adapter import shortened
from .linear import AdaptedLinear, is_conv1d
from .wrappers import TrainedCopy, base_modules


def find_also(model: nn.Module, train_also: str | Iterable[str]) -> dict[str, nn.Module]:
    """The modules of `train_also` by name, outermost ones: the base's own or the wrapper that is there already."""
    modules = {key: module for key, module in base_modules(model) if key}
    found = {}
    for pattern in _patterns("train_also", train_also):
        matched = {key: module for key, module in modules.items() if _matches(pattern, key)}
        if not matched:
            children = [key for key, _ in model.named_children()]
            raise ValueError(f"train_also names {pattern!r}, which matches no module; the model has {shortened(children)}")
        found |= matched
    inside = {inner for module in found.values() for inner in module.modules() if inner is not module}
    return {key: module for key, module in found.items() if module not in inside}


def find_targets(
    model: nn.Module, targets: str | Iterable[str], also: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The layers to adapt by name, each one that can be."""
    modules = dict(base_modules(model))
    linear = {key: module for key, module in modules.items() if _is_linear(module)}
    trained = {id(inner) for module in also.values() for inner in module.modules()}
    if isinstance(targets, str) and targets == "all-linear":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        tied = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
        found = {
            key: module
            for key, module in linear.items()
            if module is not output and id(_own_weight(module)) not in tied and id(module) not in trained
        }
        if not found:
            raise ValueError(f"targets='all-linear' finds no nn.Linear or Conv1D to adapt in this {type(model).__name__}")
    else:
        found = {}
        patterns = _patterns("targets", targets)
        for pattern in patterns:
            matched = {key: module for key, module in modules.items() if key and _matches(pattern, key)}
            if not matched:
                last = sorted({key.rpartition(".")[2] for key in linear})
                raise ValueError(f"targets has {pattern!r}, which matches no module; linear layers here are called {shortened(last, 20)}")
            for key, module in matched.items():
                if key not in linear:
                    raise ValueError(f"targets has {pattern!r}, which matches {key!r}, a {type(module).__name__}; "
                                     "adapters go on nn.Linear and Conv1D")
            found |= matched
        if not found:
            raise ValueError("targets is empty; name layers, or say 'all-linear'")
    return found


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _patterns(what: str, value: str | Iterable[str]) -> list[str]:
    patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [None]
    if not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"{what} must be names of modules, not {value!r}")
    return patterns


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | AdaptedLinear) or is_conv1d(module)


def _own_weight(module: nn.Module) -> nn.Parameter:
    return module.base.weight if isinstance(module, AdaptedLinear) else module.weight


def check_apart(layers: dict[str, nn.Module], also: dict[str, nn.Module]) -> None:
    """Raises if something would be adapted, or trained in full, and be inside what is trained in full as well."""
    for key, module in also.items():
        inside = set(module.modules())
        for other, inner in [*layers.items(), *also.items()]:
            if inner in inside and other != key:
                raise ValueError(f"{other!r} is inside {key!r}, which is in train_also and trained in full already")
            if inner in inside and key in layers:
                raise ValueError(f"{key!r} is in targets and in train_also; it can be one of them")


def check_also(name: str, module: nn.Module) -> None:
    """Raises where a copy could not be trained, or would silently do nothing."""
    if isinstance(module, TrainedCopy):
        return
    if any(isinstance(inner, AdaptedLinear) for inner in module.modules()):
        raise ValueError(f"train_also names {name!r}, which has an adapter; it cannot be trained in full as well")
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise ValueError(f"train_also names {name!r}, a {type(module).__name__}, which is never called itself; "
                         "name what is in it")
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if not dtypes:
        raise ValueError(f"train_also names {name!r}, a {type(module).__name__}, which has no parameters to train")
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(f"train_also names {name!r}, which has parameters of {shortened(dtypes)}; they cannot be trained")


def weight_readers(model: nn.Module) -> dict[nn.Module, str]:
    """The modules whose owner goes past them to their weight, with the owner's type."""
    return {
        child: type(owner).__name__
        for owner in model.modules()
        if isinstance(owner, nn.MultiheadAttention | nn.TransformerEncoderLayer) or "_orig_mod" in owner._modules
        for child in owner.children()
    }


def check_target(name: str, module: nn.Module, reader: str | None) -> None:
    """Raises where an adapter could not work, or would silently do nothing."""
    if not name:
        raise ValueError(f"the model itself is a {type(module).__name__}; put it into an nn.Sequential to adapt it")
    if isinstance(module, AdaptedLinear):
        return
    if nn.parameter.is_lazy(module.weight):
        raise ValueError(f"{name!r} is a {type(module).__name__} without a shape yet; call the model once before attaching")
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    # accelerate's `_hf_hook` puts a forward on the instance, too; it only moves tensors to the device.
    own_forward |= "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if own_forward or "weight" not in module._parameters:  # no parameter: parametrized, pruned, weight-normed
        raise ValueError(f"{name!r} is a {type(module).__name__}, which computes its output in a way of its own; "
                         "adapters go on plain nn.Linear and Conv1D")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(f"{name!r} has hooks, which an adapter would bypass; attach first, then hook the layer that is there")
    if not module.weight.is_floating_point() or module.weight.itemsize < 2:
        raise ValueError(f"{name!r} has a weight of {module.weight.dtype}; adapters go on float64, float32, bfloat16 and float16")
    if reader is not None:
        raise ValueError(f"{name!r} belongs to an {reader}, which reads the weight itself instead of calling the layer: "
                         "an adapter on it would silently do nothing. Name other targets")
