"""Put adapters into a model, switch them, merge them, take them out, count them."""

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters.adapter import Adapter, Layer, Spec, shortened
from .linear import AdaptedLinear, is_conv1d
from .targets import check_also, check_apart, check_target, find_also, find_targets, weight_readers
from .wrappers import TrainedCopy, named_wrappers, replace, uncompiled, wrappers

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Attachment:
    """What was attached under one name: all that a file has to say besides the tensors."""

    spec: Spec
    targets: tuple[str, ...]
    train_also: tuple[str, ...]
    seed: int


@dataclass
class State:
    """What `attach` remembers on the model, as `model._deltaw`."""

    attachments: dict[str, Attachment] = field(default_factory=dict)
    active: str | None = None
    merged: bool = False
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of the base's parameters, as they were


def attach(
    model: nn.Module,
    spec: Spec,
    targets: str | Iterable[str] = "all-linear",
    name: str = "default",
    seed: int = 0,
    train_also: str | Iterable[str] = (),
    reset_also: bool = False,
) -> nn.Module:
    """Put an adapter into every target layer, freeze everything else, and make this adapter the active one.

    Args:
        model: any module with `nn.Linear` or GPT-2 `Conv1D` layers inside. It is changed in place: a target
            becomes an `AdaptedLinear` around it, so the model's `state_dict` gains one level, `….base.…` (write
            files with `save`, or merge permanently before transformers' `save_pretrained`). On the meta device
            adapters can be counted, but not be filled later: attach to a model that has its weights.
        spec: what to build, for example `LoRA(rank=8)`.
        targets: "all-linear" (every linear layer but the output embedding and what is in `train_also`), or
            names: each matches a layer that is called so, from a dot on ("query", "layer.0.attention.query"),
            or, as a regular expression, the whole name.
        name: to tell several adapters on one model apart; letters, digits, '_' and '-'.
        seed: of everything that is drawn at random here.
        train_also: modules to train in full, such as a new head, matched like targets; each adapter has its
            own copy of them.
        reset_also: draw those copies anew from the seed (by their `reset_parameters`) instead of copying the base's.

    Returns:
        The model.

    Raises:
        TypeError: if `spec` is not a spec. ValueError: if `name` is taken, if the model is merged, if a target
            matches nothing or something that cannot be adapted. The model is then as it was.
    """
    if isinstance(spec, type) and issubclass(spec, Spec):
        raise TypeError(f"attach needs a spec, such as {spec.__name__}(...), not the class {spec.__name__} itself")
    if not isinstance(spec, Spec):
        raise TypeError(f"attach needs a spec, such as LoRA(rank=8), not {spec!r}")
    also = find_also(model, train_also)
    return attach_to(model, spec, find_targets(model, targets, also), also, name, seed, reset_also)


def attach_to(
    model: nn.Module,
    spec: Spec,
    layers: dict[str, nn.Module],
    also: dict[str, nn.Module],
    name: str,
    seed: int = 0,
    reset_also: bool = False,
) -> nn.Module:
    """`attach` once the modules are found: by their names, the layers to adapt and the modules to train in full."""
    root = uncompiled(model)
    state = getattr(root, "_deltaw", None) or State()
    _check_name(name, state, {key for wrapper in wrappers(root) for key in wrapper.adapters})
    if state.merged:
        raise ValueError("the model is merged; unmerge it before attaching another adapter")
    if not isinstance(seed, Integral):
        raise ValueError(f"seed must be a whole number, not {seed!r}")
    seed = int(seed)
    check_apart(layers, also)
    readers = weight_readers(root)
    for layer, module in layers.items():
        check_target(layer, module, readers.get(module))
    for key, module in also.items():
        check_also(key, module)
    adapters, copies = build(spec, layers, also, seed, reset_also)

    # Nothing has been changed up to here, and nothing below fails.
    if not state.attachments:
        state.requires_grad = {key: p.requires_grad for key, p in root.named_parameters(remove_duplicate=False)}
    root.requires_grad_(False)
    wrapped = {module: _wrapper(module, AdaptedLinear) for module in layers.values()}
    wrapped |= {module: _wrapper(module, TrainedCopy) for module in also.values()}
    replace(root, wrapped)
    for layer, module in layers.items():
        wrapped[module].adapters[name] = adapters[layer].train(root.training)
    for key, module in also.items():
        wrapped[module].adapters[name] = copies[key]
    state.attachments[name] = Attachment(spec, tuple(layers), tuple(also), seed)
    root._deltaw = state
    use(root, name)
    return model


def build(
    spec: Spec, layers: dict[str, nn.Module], also: dict[str, nn.Module], seed: int, reset_also: bool
) -> tuple[dict[str, Adapter], dict[str, nn.Module]]:
    """A start of `spec`, in no model yet.

    Args:
        spec, seed, reset_also: as in `attach`.
        layers, also: the modules to adapt and those to train in full, by their names; they may be adapted already.

    Returns:
        An adapter for each layer, in the layer's dtype and on its device, and a copy of each module in `also`.

    Raises:
        TypeError, ValueError: if the family's `build` does not keep the contract, or a module cannot be drawn anew.
    """
    described = {layer: Layer(layer, _weight(module)) for layer, module in layers.items()}
    adapters = spec.build(described, torch.Generator().manual_seed(seed))
    _check_built(spec, adapters, described)
    copies = {key: _copy(key, module, seed if reset_also else None) for key, module in also.items()}
    return {layer: adapters[layer].to(module.weight.device) for layer, module in layers.items()}, copies


def use(model: nn.Module, name: str) -> nn.Module:
    """Make adapter `name` the active one: the model computes with it, and it alone is trained.

    Raises:
        ValueError: if there is no adapter of that name, or the model is merged.
    """
    state = attached(model)
    known(state, name)
    if state.merged:
        raise ValueError(f"the model is merged with {state.active!r}; unmerge it before using another adapter")
    state.active = name
    for wrapper in wrappers(model):
        wrapper.use(name)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is the frozen base, merged or not.

    Raises:
        ValueError: if no adapter is attached.
    """
    state = attached(model)
    name, merged, all_wrappers = state.active, state.merged, list(wrappers(model))
    before = [wrapper.active for wrapper in all_wrappers]
    if merged:
        unmerge(model)
    for wrapper in all_wrappers:
        wrapper.active = None
    try:
        yield model
    finally:
        for wrapper, active in zip(all_wrappers, before):
            wrapper.active = active
        if state.active != name:  # another one was chosen within the block
            use(model, state.active)
        elif merged:
            merge(model)


def merge(model: nn.Module, permanently: bool = False) -> nn.Module:
    """Add the active adapter into the weights, so that the model costs what the base costs.

    Args:
        model: a model with an adapter attached.
        permanently: leave plain modules with the merged weights and nothing else: all adapters are gone, and
            parameters are trainable or not as they were before `attach`. Otherwise the base's own weights are
            kept aside for `unmerge`.

    Raises:
        ValueError: if no adapter is attached, or it is `disabled`, or a merged weight would not be finite in the
            base's dtype. The model is then as it was.
    """
    state = attached(model)
    if not state.merged:
        if all(wrapper.active is None for wrapper in wrappers(model)):
            raise ValueError("the adapters are disabled here; merge outside of the block")
        done = []
        try:
            for layer, wrapper in named_wrappers(model):
                wrapper.merge()
                done.append(wrapper)
        except BaseException as error:  # also where the memory runs out
            for wrapper in done:
                wrapper.unmerge()
            if not isinstance(error, ValueError):
                raise
            raise ValueError(f"adapter {state.active!r} cannot be merged into layer {layer!r}: {error}") from None
        state.merged = True
    if permanently:
        _unwrap(model, state, keep_merged=True)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Put the base's own weights back, bit for bit, and let the adapter compute again.

    Raises:
        ValueError: if no adapter is attached. A model that is not merged is left as it is.
    """
    state = attached(model)
    for wrapper in wrappers(model):
        wrapper.unmerge()
    state.merged = False
    return model


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take the adapters out: the base's own module objects are back in place, trainable as they were.

    Args:
        model: a model with an adapter attached.
        name: take out this adapter only; if it was the active one, the one attached last among the others is.

    Raises:
        ValueError: if no adapter is attached, or none of that name.
    """
    state = attached(model)
    if name is not None:
        known(state, name)
    if name is None or len(state.attachments) == 1:
        unmerge(model)
        _unwrap(model, state, keep_merged=False)
        return model
    if state.merged and name == state.active:
        unmerge(model)
    del state.attachments[name]
    for wrapper in wrappers(model):
        if name in wrapper.adapters:
            del wrapper.adapters[name]
    replace(model, {wrapper: wrapper.base for wrapper in wrappers(model) if not wrapper.adapters})
    if state.active == name:
        use(model, list(state.attachments)[-1])
    return model


def count(model: nn.Module) -> "pandas.DataFrame":
    """Numbers held by each adapted layer, by everything else, and by the whole model.

    Returns:
        A DataFrame with one row for each adapted layer, module of `train_also`, "(everything else)" and
        "(total)", and the columns `trainable` (parameters that get a gradient), `fixed` (the active adapter's
        buffers: frozen factors and the like) and `frozen` (the base's). What two layers share is counted at the
        first of them. For a model without adapters there are the last two rows alone.
    """
    import pandas

    seen: set[int] = set()

    def sizes(module: nn.Module | None) -> tuple[int, int, int]:
        trainable = fixed = frozen = 0
        if module is None:
            return trainable, fixed, frozen
        for tensor in [*module.parameters(), *module.buffers()]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if tensor.requires_grad:
                trainable += tensor.numel()
            elif isinstance(tensor, nn.Parameter):
                frozen += tensor.numel()
            else:
                fixed += tensor.numel()
        return trainable, fixed, frozen

    rows = {}
    for name, wrapper in named_wrappers(model):
        seen.add(id(getattr(wrapper, "original", None)))  # kept aside while the merged weight stands in for it
        active = wrapper.adapters[wrapper.active] if wrapper.active is not None else None
        trainable, fixed, _ = sizes(active)
        rows[name] = (trainable, fixed, sizes(wrapper.base)[2])
        for module in wrapper.adapters.values():
            sizes(module)  # the other adapters are no part of the model as it computes now
    trainable, _, frozen = sizes(model)
    rows["(everything else)"] = (trainable, 0, frozen)
    table = pandas.DataFrame.from_dict(rows, orient="index", columns=["trainable", "fixed", "frozen"])
    table.loc["(total)"] = table.sum()
    return table.rename_axis("layer")


def attached(model: nn.Module) -> State:
    """What is attached to the model.

    Raises:
        ValueError: if nothing is.
    """
    state = getattr(model, "_deltaw", None)
    if state is None:
        raise ValueError(f"no adapter is attached to this {type(model).__name__}; attach(model, LoRA(rank=8)) puts one in")
    return state


def known(state: State, name: str) -> str:
    """`name`, if an adapter is attached under it.

    Raises:
        ValueError: if none is; the message names those there are.
    """
    if name not in state.attachments:
        raise ValueError(f"there is no adapter {name!r}; there are {shortened(state.attachments)}")
    return name


def adapted_layers(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLinear]:
    """The `AdaptedLinear`s that hold adapter `name` (default: the active one), by their names in the model."""
    name = attached(model).active if name is None else name
    return {
        key: module
        for key, module in named_wrappers(model)
        if isinstance(module, AdaptedLinear) and name in module.adapters
    }


def trained_copies(model: nn.Module, name: str | None = None) -> dict[str, nn.Module]:
    """The modules trained in full with adapter `name` (default: the active one), by their names in the model."""
    name = attached(model).active if name is None else name
    return {
        key: module.adapters[name]
        for key, module in named_wrappers(model)
        if isinstance(module, TrainedCopy) and name in module.adapters
    }


def _weight(module: nn.Module) -> torch.Tensor:
    """`(out, in)` of a linear layer, adapted already or not."""
    return module.weight.mT if is_conv1d(module) else module.weight


def _check_name(name: Any, state: State, held: set[str]) -> None:
    """Raises unless an adapter can be called so, and the adapters that the model's layers hold are its own."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(f"an adapter's name must be of letters, digits, '_' and '-', and no method's name, not {name!r}")
    if name in state.attachments:
        raise ValueError(f"there is an adapter {name!r} already; names taken: {shortened(state.attachments)}")
    if held - state.attachments.keys():
        raise ValueError(f"layers here hold the adapters {shortened(sorted(held))}, attached to a part of this model, or to a "
                         "model it is a part of; attach to that module, or detach them there")


def _check_built(spec: Spec, adapters: Any, layers: dict[str, Layer]) -> None:
    """Raises if a family's `build` does not keep the contract."""
    if not isinstance(adapters, dict) or set(adapters) != set(layers):
        raise ValueError(f"{type(spec).__name__}.build must give one adapter for each of {shortened(layers)}")
    for name, layer in layers.items():
        if not isinstance(adapters[name], Adapter):
            raise TypeError(f"{type(spec).__name__}.build gave {adapters[name]!r} for {name!r}; it must be an Adapter")
        with torch.no_grad():
            down, up = adapters[name].factors()
        rank = down.shape[-2]
        if down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
            raise ValueError(
                f"{type(spec).__name__} gives down of {tuple(down.shape)} and up of {tuple(up.shape)} for layer {name!r}; "
                f"they must be (r, {layer.in_features}) and ({layer.out_features}, r)"
            )


def _copy(name: str, module: nn.Module, seed: int | None) -> nn.Module:
    """A trainable copy of the base's module, drawn anew if there is a seed."""
    module = copy.deepcopy(module.base if isinstance(module, TrainedCopy) else module)
    if seed is None:
        return module
    for inner in module.modules():
        if list(inner.parameters(recurse=False)) and not hasattr(inner, "reset_parameters"):
            raise ValueError(f"reset_also cannot draw {name!r} anew: {type(inner).__name__} has no reset_parameters")
    device = next(module.parameters()).device
    if device.type != "meta":
        module.cpu()  # so that a seed means the same numbers on every device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for inner in module.modules():
            if hasattr(inner, "reset_parameters"):
                inner.reset_parameters()
    return module.to(device)


def _wrapper(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A wrapper around `module`, unless it is one already."""
    if isinstance(module, kind):
        return module
    wrapper = kind(module)
    wrapper.training = wrapper.adapters.training = module.training
    return wrapper


def _unwrap(model: nn.Module, state: State, keep_merged: bool) -> None:
    """Plain modules again: the base's, or the merged ones."""
    model = uncompiled(model)
    replace(model, {
        wrapper: wrapper.current if keep_merged and isinstance(wrapper, TrainedCopy) else wrapper.base
        for wrapper in wrappers(model)
    })
    del model._deltaw
    for key, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(state.requires_grad.get(key, parameter.requires_grad))
