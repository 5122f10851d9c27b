"""PEFT's files, both ways: what LoRA, DoRA and VeRA are called there.

Pure functions between a `Snapshot` (what was attached, with its tensors) and PEFT's `adapter_config.json` and
tensors. Nothing here touches a model or a file.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .adapters import DoRA, LoRA, Spec, VeRA
from .adapters.adapter import matching, shortened

PREFIX = "base_model.model."

# What PEFT calls an adapter's tensors, and what we call them.
LORA = {"lora_A.weight": "A", "lora_B.weight": "B"}
DORA = {"lora_A.weight": "inner.A", "lora_B.weight": "inner.B", "lora_magnitude_vector": "magnitude"}
VERA = {"vera_lambda_b": "b", "vera_lambda_d": "d"}

# Settings of PEFT's that change what is computed, and that no family here has.
UNSUPPORTED = (
    "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config", "megatron_config",
)
# Starts of PEFT's that leave the base as it is; the others put a part of it into the adapter.
HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass
class Snapshot:
    """What a file holds: the spec, each layer's tensors, and those of the modules trained in full."""

    spec: Spec
    layers: dict[str, dict[str, Tensor]]
    also: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def can_hold(snapshot: Snapshot) -> bool:
    """Does PEFT have this family, with these settings? Not with a start to subtract, nor an exact DoRA gradient."""
    spec = snapshot.spec
    if isinstance(spec, DoRA):
        spec = spec.inner if spec.detach_norm and isinstance(spec.inner, LoRA) else None
    if isinstance(spec, VeRA):
        return spec.fan_in == "shared"
    return isinstance(spec, LoRA) and not any(key.endswith("A0") for known in snapshot.layers.values() for key in known)


def encode(
    snapshot: Snapshot, target_modules: list[str] | str, conv1d: bool, base: str | None, projection: tuple[Tensor, Tensor] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A snapshot that PEFT `can_hold` as `adapter_config.json` and tensors.

    Args:
        snapshot: the adapter.
        target_modules: PEFT's names for the layers.
        conv1d: whether the layers store their weights as in × out.
        base: the base model's name, for PEFT to load it by.
        projection: VeRA's shared A and B if they are to be stored.
    """
    spec = snapshot.spec
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "modules_to_save": list(snapshot.also) or None,
        "target_modules": target_modules,
    }
    if isinstance(spec, VeRA):
        names = VERA
        config |= {
            "peft_type": "VERA",
            "r": spec.rank,
            "d_initial": spec.d_init,
            "projection_prng_key": spec.projection_seed,
            "save_projection": projection is not None,
            "vera_dropout": spec.dropout,
        }
    else:
        names = DORA if isinstance(spec, DoRA) else LORA
        lora = spec.inner if isinstance(spec, DoRA) else spec
        alphas = dict(lora.alpha_pattern)
        if lora.alpha is None:  # s = 1 is alpha = r, layer by layer
            for key, rank in lora.rank_pattern.items():
                alphas.setdefault(key, rank)
        config |= {
            "peft_type": "LORA",
            "r": lora.rank,
            "lora_alpha": lora.rank if lora.alpha is None else lora.alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.scaling == "rslora",
            "use_dora": isinstance(spec, DoRA),
            "rank_pattern": dict(lora.rank_pattern),
            "alpha_pattern": alphas,
            "init_lora_weights": True,
        }
    tensors = {f"{PREFIX}{layer}.{theirs}": known[ours] for layer, known in snapshot.layers.items() for theirs, ours in names.items()}
    tensors |= {f"{PREFIX}{module}.{key}": tensor for module, known in snapshot.also.items() for key, tensor in known.items()}
    if isinstance(spec, VeRA) and projection is not None:
        tensors |= {"base_model.vera_A": projection[0], "base_model.vera_B": projection[1]}
    return config, tensors


def decode(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
    """PEFT's config and tensors as a snapshot.

    Raises:
        ValueError: on a `peft_type` or a setting that no family here has, and on tensors that are missing, or
            too many, or of another rank than the config says.
    """
    tensors = dict(tensors)
    kind = config.get("peft_type")
    if kind not in ("LORA", "VERA"):
        raise ValueError(f"peft_type is {kind!r}; LORA (with DoRA and rsLoRA) and VERA can be loaded")
    if config.get("bias", "none") != "none":
        raise ValueError(f"the file trains biases (bias={config['bias']!r}); only bias='none' can be loaded")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"the file was made with {key}={config[key]!r}, which no family here computes")
    start = config.get("init_lora_weights", True)
    if kind == "LORA" and start not in HARMLESS_STARTS:
        raise ValueError(f"the file was made with init_lora_weights={start!r}, which changes the base; save it from PEFT "
                         "with path_initial_model_for_weight_conversion to get a LoRA of the unchanged one")

    projection = tensors.pop("base_model.vera_A", None), tensors.pop("base_model.vera_B", None)
    names = VERA if kind == "VERA" else DORA if config.get("use_dora") else LORA
    layers, rest = {}, {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"unexpected tensor {key!r}: PEFT's names begin with {PREFIX!r}")
        key = key.removeprefix(PREFIX)
        theirs = next((theirs for theirs in names if key.endswith("." + theirs)), None)
        if theirs is None:
            rest[key] = tensor
        else:
            layers.setdefault(key.removesuffix("." + theirs), {})[names[theirs]] = tensor
    for layer, known in layers.items():
        missing = [theirs for theirs, ours in names.items() if ours not in known]
        if missing:
            raise ValueError(f"layer {layer!r} lacks the tensors {shortened(missing)}")
    if not layers:
        raise ValueError(f"the file holds no tensor called {shortened(names)}")
    also = _modules_to_save(rest, config.get("modules_to_save") or [])

    if kind == "VERA":
        spec = _vera(config, projection)
    else:
        spec = _lora(config, list(layers))
        prefix = "inner." if isinstance(spec, DoRA) else ""
        lora = spec.inner if isinstance(spec, DoRA) else spec
        for layer, known in layers.items():
            ranks = (known[prefix + "A"].shape[0], known[prefix + "B"].shape[-1])
            if ranks != (lora.rank_of(layer),) * 2:
                raise ValueError(f"the config gives layer {layer!r} rank {lora.rank_of(layer)}; its tensors have {ranks}")
    return Snapshot(spec, layers, also)


def _lora(config: Mapping[str, Any], layers: list[str]) -> Spec:
    def matched(pattern: Mapping[str, Any] | None) -> dict[str, Any]:  # PEFT lets a pattern match nothing
        return {key: value for key, value in (pattern or {}).items() if any(matching({key: 1}, layer, 0) for layer in layers)}

    lora = LoRA(
        rank=_setting(config, "r"),
        alpha=_setting(config, "lora_alpha"),
        scaling="rslora" if config.get("use_rslora") else "standard",
        dropout=config.get("lora_dropout", 0.0),
        rank_pattern=matched(config.get("rank_pattern")),
        alpha_pattern=matched(config.get("alpha_pattern")),
    )
    return DoRA(lora) if config.get("use_dora") else lora


def _vera(config: Mapping[str, Any], projection: tuple[Tensor | None, Tensor | None]) -> Spec:
    stored = bool(config.get("save_projection", True))
    if any((tensor is not None) != stored for tensor in projection):
        raise ValueError(f"save_projection is {stored}, yet vera_A and vera_B are {'missing' if stored else 'stored'}")
    return VeRA(
        rank=_setting(config, "r"),
        d_init=config.get("d_initial", 0.1),
        projection_seed=_setting(config, "projection_prng_key"),
        dropout=config.get("vera_dropout", 0.0),
        projection=projection if stored else None,
    )


def _setting(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"the config lacks {key!r}")
    return config[key]


def _modules_to_save(tensors: Mapping[str, Tensor], names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Tensors that are no adapter's, by the module of `modules_to_save` that they belong to."""
    also: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        module = next((m for m in modules if any(m == name or m.endswith("." + name) for name in names)), None)
        if module is None:
            raise ValueError(f"unexpected tensor {PREFIX + key!r}: it belongs to no adapter, nor to modules_to_save={names}")
        also.setdefault(module, {})[key.removeprefix(module + ".")] = tensor
    return also


def most_common_rank(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The rank most layers have, and the others' as a `rank_pattern` that matches each by its whole name."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    return rank, {"^" + layer.replace(".", r"\."): r for layer, r in ranks.items() if r != rank}
