"""What a step costs with DoRA's norm exact or detached, factored or formed, and with PEFT's DoRA. For `dora_detach`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ...adapters import Adapter, DoRA, Layer, LoRA
from ...adapters.dora import DoRAAdapter
from . import step
from .step import BASE, Builder, Shape, ours, peft_lora

DETACHED, EXACT = "DoRA", "DoRA, exact gradient"
FORMED, FORMED_EXACT = "formed norm", "formed norm, exact gradient"
COLUMNS = ("arm", "round", "ms", "graphs", "kept_gib", "peak_gib")  # of the record: all its DoRAs train the same numbers


@dataclass(frozen=True)
class FormedDoRA(DoRA):
    """DoRA with the norm as it is read: of the formed matrix."""

    def build(self, layers: Mapping[str, Layer], generator: Generator) -> dict[str, Adapter]:
        inner = self.inner.build(layers, generator)
        return {name: FormedAdapter(layer, inner[name], self.detach_norm) for name, layer in layers.items()}


class FormedAdapter(DoRAAdapter):
    """An out × in matrix is made at every step, and kept for the exact gradient."""

    def gain(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm = formed_norm(weight, down, up)  # (*K, out)
        return self.magnitude / norm


def formed_norm(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """‖W + up·down‖ of every row, `(*K, out)`, of the matrix in W's precision."""
    return torch.linalg.vector_norm(weight + (up @ down).to(weight.dtype), dim=-1)


ARMS: dict[str, Builder] = {
    BASE: lambda model, shape: model,
    "LoRA": ours(LoRA),
    DETACHED: ours(lambda rank: DoRA(LoRA(rank))),
    EXACT: ours(lambda rank: DoRA(LoRA(rank), detach_norm=False)),
    FORMED: ours(lambda rank: FormedDoRA(LoRA(rank))),
    FORMED_EXACT: ours(lambda rank: FormedDoRA(LoRA(rank), detach_norm=False)),
    "PEFT DoRA": peft_lora(use_dora=True),
    "PEFT DoRA bf16": peft_lora(in_bf16=True, use_dora=True),
}


def arms(shape: Shape, compiled: bool) -> list[str]:
    """The formed norm is a matter of Llama's; PEFT's graph breaks at every layer, which makes it slow to compile twice."""
    left_out = {FORMED, FORMED_EXACT} if shape.family == "bert" else set()
    return [name for name in ARMS if name not in left_out | ({"PEFT DoRA bf16"} if compiled else set())]


def costs(shape: Shape, compiled: bool, rounds: int, steps: int, device: str) -> list[dict]:
    """`step.costs` of this file's arms: a row an arm and round, `COLUMNS`."""
    built = {name: ARMS[name] for name in arms(shape, compiled)}
    return [{key: row[key] for key in COLUMNS} for row in step.costs(built, shape, compiled, rounds, steps, device)]
