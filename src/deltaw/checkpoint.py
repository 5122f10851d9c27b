"""Save and load adapters as safetensors, and convert them to plain LoRA.

What PEFT has is written as PEFT writes it (`peft_layout.py`), so that either reads the other's files. What it
has not goes into a layout of our own, `deltaw_config.json` and `deltaw_model.safetensors`.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import peft_layout
from .adapters import LoRA, Spec, VeRA
from .adapters.adapter import Layer, shortened
from .adapters.lora import LoRAAdapter
from .attach import adapted_layers, attach_to, attached, detach, known, trained_copies, use
from .linear import is_conv1d
from .peft_layout import Snapshot, most_common_rank
from .wrappers import base_modules

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
OWN_FILES = ("deltaw_config.json", "deltaw_model.safetensors")
OWN_FORMAT = 1


def save(
    model: nn.Module, path: str | os.PathLike, name: str | None = None, as_lora: bool = False, projections: bool = False
) -> Path:
    """Write an adapter, and what was trained beside it, into the folder `path`.

    LoRA, DoRA over LoRA, and VeRA are written in PEFT's layout; other families, and starts that are subtracted
    (PiSSA), in our own, from which training can go on.

    Args:
        model: a model with an adapter attached.
        path: a folder; it is made if there is none, and files of this layout in it are replaced.
        name: which adapter; the active one if None.
        as_lora: write it as the plain LoRA that computes the same, in PEFT's layout, for serving.
        projections: store VeRA's A and B, too, instead of the seed alone.

    Returns:
        The folder.

    Raises:
        ValueError: if no adapter is attached, or none of that name; if a tensor is not finite; if `as_lora`
            cannot be exact; if the folder holds an adapter in the other layout. Nothing is written then.
    """
    name = _known(model, name)
    layers = adapted_layers(model, name)
    if as_lora:
        spec, factors = _as_lora(model, name)
        tensors = {layer: {"A": down, "B": up} for layer, (down, up) in factors.items()}
    else:
        spec = attached(model).attachments[name].spec
        tensors = {layer: module.adapters[name].state_dict() for layer, module in layers.items()}
    snapshot = Snapshot(spec, tensors, {key: module.state_dict() for key, module in trained_copies(model, name).items()})

    if peft_layout.can_hold(snapshot):
        files, others = PEFT_FILES, OWN_FILES
        conv1d = any(is_conv1d(module.base) for module in layers.values())
        base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
        projection = None
        if isinstance(spec, VeRA) and (projections or spec.projection is not None):
            shared = next(iter(layers.values())).adapters[name].projection
            projection = (shared.A, shared.B)
        config, flat = peft_layout.encode(snapshot, _target_modules(model, list(layers)), conv1d, base, projection)
    else:
        files, others = OWN_FILES, PEFT_FILES
        config, flat = _encode(snapshot)
    flat = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in flat.items()}
    if bad := _not_finite(flat):
        raise ValueError(f"adapter {name!r} holds numbers that are not finite, in {shortened(bad)}")
    path = Path(path)
    if any((path / other).exists() for other in others):
        raise ValueError(f"{path} holds an adapter in another layout ({others[0]}); save into another folder")
    _write(path, files, config, flat)
    return path


def load(model: nn.Module, path: str | os.PathLike, name: str = "default") -> nn.Module:
    """Attach the adapter that a folder holds, in PEFT's layout or our own, and make it the active one.

    Args:
        model: the base model the adapter was trained on, with or without other adapters.
        path: the folder.
        name: to attach it under.

    Raises:
        FileNotFoundError: if there is no adapter in the folder.
        ValueError: if the files are malformed (not safetensors, cut short, pickled; tensors missing, too many,
            of another shape or rank, not finite), of an unknown kind, or another model's. The model is then as
            it was.
    """
    path = Path(path)
    own, peft = ((path / files[0]).exists() for files in (OWN_FILES, PEFT_FILES))
    if own and peft:
        raise ValueError(f"{path} holds two adapters, {OWN_FILES[0]} and {PEFT_FILES[0]}; keep one")
    if not (own or peft):
        raise FileNotFoundError(f"{path} holds no adapter: there is neither {PEFT_FILES[0]} (PEFT's layout) nor {OWN_FILES[0]}")
    config, tensors = _read(path, OWN_FILES if own else PEFT_FILES)
    with _naming(path):
        _install(model, _decode(config, tensors) if own else peft_layout.decode(config, tensors), name)
    return model


def convert(model: nn.Module, to: type[Spec] = LoRA, name: str | None = None) -> nn.Module:
    """Turn an adapter into a plain LoRA that computes the same: A = down, B = up, s = 1.

    Args:
        model: a model with an adapter attached, not merged.
        to: `LoRA`, the one family that every adapter without a gain is a case of.
        name: which adapter; the active one if None.

    Raises:
        ValueError: if the family has a gain (DoRA): it rescales rows of W, so ΔW has full rank. The message says
            what error the best LoRA of the same rank would make. The model is then as it was.
    """
    if to is not LoRA:
        raise ValueError(f"adapters can be converted to LoRA (the class), not to {to!r}")
    name = _known(model, name)
    state = attached(model)
    if state.merged:
        raise ValueError("the model is merged; unmerge it before converting")
    spec, factors = _as_lora(model, name)
    for layer, module in adapted_layers(model, name).items():
        old = module.adapters[name]
        new = LoRAAdapter(Layer(layer, module.weight), *factors[layer], 1.0)
        new.dropout = old.dropout
        module.adapters[name] = new.train(old.training)
    state.attachments[name] = dataclasses.replace(state.attachments[name], spec=spec)
    return use(model, state.active)


def _known(model: nn.Module, name: str | None) -> str:
    state = attached(model)
    return known(state, state.active if name is None else name)


@torch.no_grad()
def _as_lora(model: nn.Module, name: str) -> tuple[LoRA, dict[str, tuple[Tensor, Tensor]]]:
    """The LoRA spec and each layer's (down, up), if no layer has a gain."""
    factors = {}
    for layer, module in adapted_layers(model, name).items():
        adapter = module.adapters[name]
        down, up, gain = module.factors(adapter)  # (r, in), (out, r)
        if gain is not None:
            raise ValueError(f"adapter {name!r} rescales rows of W, which no LoRA does exactly; {_lora_error(model, name)}")
        factors[layer] = (down.clone(), up.clone())
    rank, pattern = most_common_rank({layer: down.shape[0] for layer, (down, _) in factors.items()})
    return LoRA(rank=rank, rank_pattern=pattern, dropout=adapter.dropout), factors


def _lora_error(model: nn.Module, name: str) -> str:
    """What the best LoRA of the same rank would miss: ‖ΔW − (its best rank-r part)‖ / ‖ΔW‖ by layers."""
    errors = {}
    for layer, module in adapted_layers(model, name).items():
        active, module.active = module.active, name
        delta = module.delta_weight(torch.promote_types(module.weight.dtype, torch.float32))  # (out, in)
        module.active = active
        rank = module.adapters[name].factors()[0].shape[0]
        energy = torch.linalg.svdvals(delta).square()  # (min(out, in),)
        errors[layer] = (energy[rank:].sum() / energy.sum().clamp_min(1e-30)).sqrt().item()
    worst = max(errors, key=errors.get)
    median = sorted(errors.values())[len(errors) // 2]
    return (f"the best LoRA of rank {rank} would miss {errors[worst]:.3g} of ‖ΔW‖ on layer {worst!r} "
            f"and {median:.3g} on the median layer")


def _install(model: nn.Module, snapshot: Snapshot, name: str) -> None:
    """Attach a snapshot, or raise and leave the model as it was."""
    modules = dict(base_modules(model))
    unknown = [key for key in (*snapshot.layers, *snapshot.also) if key not in modules]
    if unknown:
        raise ValueError(f"the adapter is for modules that this {type(model).__name__} does not have: {shortened(unknown)}")
    state = getattr(model, "_deltaw", None)
    before = state.active if state else None
    layers = {key: modules[key] for key in snapshot.layers}
    not_linear = [key for key, module in layers.items() if not hasattr(module, "weight") or module.weight.dim() != 2]
    if not_linear:
        raise ValueError(f"the adapter is for linear layers; here these are others: {shortened(not_linear)}")
    attach_to(model, snapshot.spec.resuming(snapshot.layers), layers, {key: modules[key] for key in snapshot.also}, name)
    try:
        for layer, module in adapted_layers(model, name).items():
            _fill(layer, module.adapters[name], snapshot.layers[layer])
        for key, module in trained_copies(model, name).items():
            _fill(key, module, snapshot.also[key])
    except ValueError:
        detach(model, name)
        if before is not None:
            use(model, before)
        raise
    attachments = attached(model).attachments
    attachments[name] = dataclasses.replace(attachments[name], spec=snapshot.spec)


def _fill(where: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a module's tensors, all of them and no others."""
    own = module.state_dict()
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    if missing or extra:
        raise ValueError(f"{where!r} lacks the tensors {sorted(missing)} and has {sorted(extra)} too many")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{key!r} of {where!r} has shape {tuple(tensor.shape)}; it must be {tuple(own[key].shape)}")
    module.load_state_dict(tensors)


def _target_modules(model: nn.Module, layers: list[str]) -> list[str] | str:
    """PEFT's `target_modules` for exactly these layers: their last names if those say it, else their full names."""
    names = [key for key, _ in base_modules(model) if key]

    def matched(targets: set[str]) -> set[str]:
        return {key for key in names if any(key == target or key.endswith("." + target) for target in targets)}

    for targets in ({key.rpartition(".")[2] for key in layers}, set(layers)):
        if matched(targets) == set(layers):
            return sorted(targets)
    return "|".join(key.replace(".", r"\.") for key in layers)  # a string is a regular expression to PEFT


def _encode(snapshot: Snapshot) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our own layout: the spec, and each tensor as `adapters/<layer>/<tensor>` or `also/<module>/<tensor>`."""
    flat: dict[str, Tensor] = {}
    config = {"format": OWN_FORMAT, "spec": snapshot.spec.to_dict(flat)}
    config |= {"targets": list(snapshot.layers), "train_also": list(snapshot.also)}
    for kind, group in (("adapters", snapshot.layers), ("also", snapshot.also)):
        flat |= {f"{kind}/{where}/{key}": tensor for where, known in group.items() for key, tensor in known.items()}
    return config, flat


def _decode(config: dict[str, Any], tensors: dict[str, Tensor]) -> Snapshot:
    if config.get("format") != OWN_FORMAT:
        raise ValueError(f"the layout's format is {config.get('format')!r}; {OWN_FORMAT} can be read")
    try:
        groups = {"adapters": {key: {} for key in config["targets"]}, "also": {key: {} for key in config["train_also"]}}
        spec = Spec.from_dict(config["spec"], tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the config is malformed: {error!r}") from None
    for flat, tensor in tensors.items():
        kind, _, rest = flat.partition("/")
        where, _, key = rest.rpartition("/")
        if kind in groups and where in groups[kind]:
            groups[kind][where][key] = tensor
        elif kind != "spec":
            raise ValueError(f"unexpected tensor {flat!r}")
    return Snapshot(spec, groups["adapters"], groups["also"])


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors in what the files hold say which folder it was."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: a tensor {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _write(path: Path, files: tuple[str, str], config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files, or neither: written beside, then renamed into place."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    partial = [path / (file + ".partial") for file in files]
    try:
        partial[0].write_text(json.dumps(config, indent=2, default=lambda scalar: scalar.item()) + "\n")
        save_file(tensors, partial[1], metadata={"format": "pt"})
        for part, file in zip(partial, files):
            part.replace(path / file)
    finally:
        for part in partial:
            part.unlink(missing_ok=True)


def _read(path: Path, files: tuple[str, str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_file, tensor_file = (path / file for file in files)
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{config_file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object")
    if not tensor_file.exists():
        if (path / "adapter_model.bin").exists():
            raise ValueError(f"{path} holds adapter_model.bin alone: a pickle can run code when it is read, so only "
                             "safetensors are; load it with PEFT and save it again")
        raise FileNotFoundError(f"{tensor_file} is missing")
    try:
        tensors = load_file(tensor_file)
    except SafetensorError as error:
        raise ValueError(f"{tensor_file} is not a whole safetensors file: {error}") from None
    if bad := _not_finite(tensors):
        raise ValueError(f"{tensor_file} holds numbers that are not finite, in {shortened(bad)}")
    return config, tensors


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
