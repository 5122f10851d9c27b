"""What a training step of a few layers costs in time and memory, with one method beside another.

For `dora_detach` and `step_cost`. An arm is a name and a builder, which puts what is trained into a frozen model; the arms
take turns in each of several rounds.
"""

import itertools
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Generator, Tensor, nn

from ...adapters import Spec
from ...attach import attach
from ..bank_speed import autocast, now

BASE = "frozen base"
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

Builder = Callable[[nn.Module, Shape], nn.Module]


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


def ours(spec: Callable[[int], Spec]) -> Builder:
    """This library's, of the shape's rank."""
    return lambda model, shape: attach(model, spec(shape.rank), targets=shape.targets)


def theirs(config: Callable[[types.ModuleType, Shape], Any], in_bf16: bool = False) -> Builder:
    """PEFT's: `config(peft, shape)`; by its default what is trained is in fp32, on a bf16 base, too."""

    def build(model: nn.Module, shape: Shape) -> nn.Module:
        import peft

        return peft.get_peft_model(model, config(peft, shape), autocast_adapter_dtype=not in_bf16).train()

    return build


def peft_lora(in_bf16: bool = False, **options) -> Builder:
    """PEFT's LoRA of the shape's rank, s = 1; `options` are its `LoraConfig`'s."""
    return theirs(lambda peft, shape: peft.LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=shape.targets,
                                                      **options), in_bf16)


def costs(arms: Mapping[str, Builder], shape: Shape, compiled: bool, rounds: int, steps: int, device: str) -> list[dict]:
    """A row an arm and round: arm, round, ms a step, `graphs` that were compiled on the way (none, or the time is not the
    step's); and of the arm, how many numbers it trains (`parameters`), the bytes of the optimizer's state, and in GiB above
    the frozen base's weights, `kept_gib` between the forward and the backward pass, and `peak_gib` (NaN on a CPU). All arms
    are there at once, and take turns. An arm that needs no gradient has a step without a backward pass."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        x = torch.randn(shape.batch, shape.length, shape.width, generator=Generator().manual_seed(0))
        x = x.to(device, dtype).requires_grad_(True)  # (batch, length, width)
        (x.detach()[0] @ x.detach()[0].mT).sum().item()  # the workspace of the products belongs to no arm
        names, rows = list(arms), []
        built = {name: _arm(name, build, shape, compiled, x, device) for name, build in arms.items()}
        for number in range(rounds):
            first = number % len(names)  # another one each time
            for name in names[first:] + names[:first]:
                step, own = built[name]
                graphs, began = _graphs(), now(device)
                for _ in range(steps):
                    step()
                ms = 1e3 * (now(device) - began) / steps
                rows.append({"arm": name, "round": number, "ms": ms, "graphs": _graphs() - graphs, **own})
    return sorted(rows, key=lambda row: (names.index(row["arm"]), row["round"]))


def _graphs() -> int:
    """How many torch.compile has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def own_code(function: types.FunctionType, name: str) -> types.FunctionType:
    """The function with a code object of its own. What torch.compile has made of a code object, or that it gave it up, is
    kept with it: of arms that share one, the first graph that breaks would break the others'."""
    code = function.__code__.replace(co_name="".join(letter if letter.isalnum() else "_" for letter in name))
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


def _arm(name: str, build: Builder, shape: Shape, compiled: bool, x: Tensor,
         device: str) -> tuple[Callable[[], None], dict[str, float]]:
    """An arm's step, warm, and what it trains and takes of memory: `x` of `(batch, length, width)` is there already."""
    on_gpu = device.startswith("cuda")
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = base(shape, device)
    weights = sum(tensor.numel() * tensor.itemsize for tensor in itertools.chain(model.parameters(), model.buffers()))
    model = build(model, shape)
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
        if loss.requires_grad:
            loss.backward()
        x.grad = None
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    def step() -> None:
        backward(forward())

    for _ in range(WARM_UP):
        step()
    states = optimizer.state.values() if optimizer else ()
    own = {"parameters": sum(parameter.numel() for parameter in trained),
           "optimizer_bytes": sum(tensor.numel() * tensor.itemsize for state in states for tensor in state.values()),
           "kept_gib": math.nan, "peak_gib": math.nan}
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        loss = forward()
        kept = torch.cuda.memory_allocated() - before - weights
        backward(loss)
        peak = torch.cuda.max_memory_allocated() - before - weights
        own |= {"kept_gib": kept / 2**30, "peak_gib": peak / 2**30}
    return step, own


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record's rows of costs


def by_cell(rows: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame, pd.DataFrame]]:
    """Of each shape, eager or compiled: which, ms (rounds, arms), and what does not change with the round (arms, columns).
    A round in which something was compiled is left out."""
    fixed = [name for name in ("parameters", "optimizer_bytes", "kept_gib", "peak_gib") if name in rows]
    for (shape, compiled), cell in rows.groupby(["shape", "compiled"], sort=False):
        order = list(cell["arm"].unique())
        clean = cell.groupby("round")["graphs"].transform("sum") == 0
        ms = cell[clean].pivot(index="round", columns="arm", values="ms").reindex(columns=order)  # (rounds, arms)
        yield ({"shape": shape, "compiled": bool(compiled)}, ms.rename_axis(columns=None),
               cell.groupby("arm")[fixed].first())


def cost(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each shape, eager or compiled, and arm: ms (median of the rounds), ratio to the frozen base in the same round
    (median, least and largest), what the rows have of parameters and optimizer_bytes, and GiB above the base's weights:
    kept_gib between forward and backward, peak_gib, and how far that is above the frozen base's own peak, above_base_gib."""
    found = []
    for key, ms, fixed in by_cell(rows):
        for arm in ms:
            own = fixed.loc[[arm]].to_dict("records")[0]  # a row by itself would make floats of the counts
            ratio = ms[arm] / ms[BASE]  # (rounds,)
            found.append({**key, "arm": arm, "ms": ms[arm].median(), "ratio": ratio.median(), "least": ratio.min(),
                          "largest": ratio.max(), **own, "above_base_gib": own["peak_gib"] - fixed.loc[BASE, "peak_gib"]})
    return pd.DataFrame(found)
