"""What a step costs with DoRA's norm exact or detached, factored or formed, and with PEFT's DoRA. For `dora_detach`."""

import itertools
import math
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from ...adapters import Adapter, DoRA, Layer, LoRA, Spec
from ...adapters.dora import DoRAAdapter
from ...attach import attach
from ..bank_speed import autocast, now

DETACHED, EXACT, BASE = "DoRA", "DoRA, exact gradient", "frozen base"
FORMED, FORMED_EXACT = "formed norm", "formed norm, exact gradient"
WARM_UP = 3  # steps before the clock runs: what is compiled is compiled in the first


class Shape(NamedTuple):
    """Layers of a model, and the tokens that go through them."""

    family: str  # "bert" or "llama"
    layers: int
    width: int
    inner: int
    heads: int
    batch: int
    length: int
    rank: int

    @property
    def targets(self) -> list[str]:
        """Names that both `attach` and PEFT understand."""
        if self.family == "bert":
            return ["query", "key", "value", "dense"]
        return ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


SHAPES = {
    "MiniLM, 32 × 64": Shape("bert", 1, 384, 1536, 12, 32, 64, 8),
    "MiniLM, 2048 × 64": Shape("bert", 1, 384, 1536, 12, 2048, 64, 8),
    "Llama-2-7B, 4 × 2048": Shape("llama", 1, 4096, 11008, 32, 4, 2048, 32),
    "small bert": Shape("bert", 1, 48, 96, 4, 2, 8, 4),
    "small llama": Shape("llama", 1, 48, 96, 4, 2, 8, 4),
}


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


def base(shape: Shape, device: str) -> nn.Module:
    """A frozen model without embeddings worth the name: it is called with `inputs_embeds`."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    common = {"hidden_size": shape.width, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers,
              "num_attention_heads": shape.heads, "vocab_size": 8, "max_position_embeddings": max(64, shape.length)}
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        if shape.family == "bert":
            config = BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            model = BertModel(config, add_pooling_layer=False)
        else:
            model = LlamaModel(LlamaConfig(**common, use_cache=False))
    return model.requires_grad_(False).train().to(dtype)


def peft_dora(model: nn.Module, shape: Shape, in_bf16: bool) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=shape.targets, use_dora=True)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=not in_bf16).train()


def ours(spec: Callable[[int], Spec]) -> Callable[[nn.Module, Shape], nn.Module]:
    return lambda model, shape: attach(model, spec(shape.rank), targets=shape.targets)


ARMS: dict[str, Callable[[nn.Module, Shape], nn.Module]] = {
    BASE: lambda model, shape: model,
    "LoRA": ours(LoRA),
    DETACHED: ours(lambda rank: DoRA(LoRA(rank))),
    EXACT: ours(lambda rank: DoRA(LoRA(rank), detach_norm=False)),
    FORMED: ours(lambda rank: FormedDoRA(LoRA(rank))),
    FORMED_EXACT: ours(lambda rank: FormedDoRA(LoRA(rank), detach_norm=False)),
    "PEFT DoRA": lambda model, shape: peft_dora(model, shape, in_bf16=False),
    "PEFT DoRA bf16": lambda model, shape: peft_dora(model, shape, in_bf16=True),
}


def arms(shape: Shape, compiled: bool) -> list[str]:
    """The formed norm is a matter of Llama's; PEFT's graph breaks at every layer, which makes it slow to compile twice."""
    left_out = {FORMED, FORMED_EXACT} if shape.family == "bert" else set()
    return [name for name in ARMS if name not in left_out | ({"PEFT DoRA bf16"} if compiled else set())]


def costs(shape: Shape, compiled: bool, rounds: int, steps: int, device: str) -> list[dict]:
    """A row an arm and round: arm, round, ms a step, `graphs` that were compiled on the way (none, or the time is not the
    step's); and of the arm, in GiB above the base's weights, `kept_gib` between the forward and the backward pass, and
    `peak_gib` (NaN on a CPU). All arms are there at once, and take turns."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        x = torch.randn(shape.batch, shape.length, shape.width, generator=Generator().manual_seed(0))
        x = x.to(device, dtype).requires_grad_(True)  # (batch, length, width)
        (x.detach()[0] @ x.detach()[0].mT).sum().item()  # the workspace of the products belongs to no arm
        names, rows = arms(shape, compiled), []
        built = {name: _arm(name, shape, compiled, x, device) for name in names}
        for number in range(rounds):
            first = number % len(names)  # another one each time
            for name in names[first:] + names[:first]:
                step, memory = built[name]
                graphs, began = _graphs(), now(device)
                for _ in range(steps):
                    step()
                ms = 1e3 * (now(device) - began) / steps
                rows.append({"arm": name, "round": number, "ms": ms, "graphs": _graphs() - graphs, **memory})
    return sorted(rows, key=lambda row: (names.index(row["arm"]), row["round"]))


def _graphs() -> int:
    """How many torch.compile has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def own_code(function: types.FunctionType, name: str) -> types.FunctionType:
    """The function with a code object of its own. What torch.compile has made of a code object, or that it gave it up, is
    kept with it: of arms that share one, the first graph that breaks would break the others'."""
    code = function.__code__.replace(co_name="".join(letter if letter.isalnum() else "_" for letter in name))
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


def _arm(name: str, shape: Shape, compiled: bool, x: Tensor, device: str) -> tuple[Callable[[], None], dict[str, float]]:
    """An arm's step, warm, and what memory it takes: `x` of `(batch, length, width)` is there already."""
    on_gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = base(shape, device)
    weights = sum(tensor.numel() * tensor.itemsize for tensor in itertools.chain(model.parameters(), model.buffers()))
    model = ARMS[name](model, shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def hidden() -> Tensor:
        return model(inputs_embeds=x).last_hidden_state  # (batch, length, width)

    run = torch.compile(own_code(hidden, name), dynamic=False) if compiled else hidden

    def forward() -> Tensor:
        with autocast(device):
            y = run()  # (batch, length, width)
        return y.float().square().mean()

    def backward(loss: Tensor) -> None:
        loss.backward()
        x.grad = None
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    def step() -> None:
        backward(forward())

    for _ in range(WARM_UP):
        step()
    if not on_gpu:
        return step, {"kept_gib": math.nan, "peak_gib": math.nan}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    loss = forward()
    kept = torch.cuda.memory_allocated() - before - weights
    backward(loss)
    peak = torch.cuda.max_memory_allocated() - before - weights
    return step, {"kept_gib": kept / 2**30, "peak_gib": peak / 2**30}
