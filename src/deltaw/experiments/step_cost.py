"""What does a training step cost with each method, in time and in memory?

`tuned_comparison` says what each method reaches; this says what a step of it takes. As the cost part of `dora_detach`
(`engine.step`): an encoder layer of MiniLM's shape, rank 8, all its linear layers, and a decoder layer of Llama-2-7B's, rank
32, on q, k, v, up and down; random weights in bf16 under autocast; forward, backward to the input, AdamW. The arms take
turns in each of several rounds, and a time is divided by the frozen base's in the same round. The input requires a gradient,
as in the middle of a model.

    frozen base                       no adapter: forward, and backward to the input
    head only                         the forward pass alone: nothing below the head needs a gradient, and the head is no
                                      part of these layers
    LoRA, MoSLoRA, LoRA-XS, DoRA,     this library's, adapters in fp32; LoRA-XS of rank 16, VeRA and DVoRA = DoRA(VeRA) of
      DoRA(MoSLoRA), VeRA, DVoRA      rank 256, the others of the layer's
    PiSSA                             LoRA with a start that is subtracted: here W stays what it was, and each product is of
                                      rank 2r (taken out of W, as in the paper, it would cost what LoRA costs)
    LoRA 1 … 256, DoRA 16             the same at other ranks, absolute on both layers: eager only
    full                              no adapter: the same layers' weights, in fp32 under autocast, trained in place
    PEFT LoRA, PEFT DoRA, PEFT VeRA   PEFT's, by its default in fp32: eager only, since compiling them takes too long

Methods that differ from LoRA in a start whose product is zero, in scale or in rates are no arms: Init[B], rsLoRA and LoRA+
cost what LoRA of their rank costs (LoRA+'s second group of parameters is one more launch of the optimizer). `ARM_OF` has every
row of `tuned_comparison` but those that are there for their rank. PiSSA's and LoRA-XS's starts are drawn, not computed from W: a step takes the time it takes whatever
they are, and what a start costs once is no part of it.

*Memory* is the arm's, all of it, less the frozen base's weights in bf16: what is trained, the optimizer's state, activations
and, at the peak, gradients. The same is taken off every arm, so "full" is charged with its fp32 weights less the bf16 ones
that they replace (2 bytes a number), AdamW's two moments (8) and autocast's bf16 copy, kept for the backward pass (2): 12
between forward and backward, and after it, with the gradient (4) and without that copy, 14. That is the usual full
fine-tuning in mixed precision; all in bf16 it takes less.

Fixed before the run. Known then from a trial of `dora_detach` on a GPU: on Llama's layer, eager, LoRA takes 1.09 times the
frozen base, DoRA 1.40, PEFT's DoRA 1.91. Eager, if not said otherwise:

- *Time, Llama.* Every adapter of this library is within 1.5 times the frozen base; DVoRA comes nearest to it. PiSSA takes at
  most a tenth longer than LoRA. Full takes longer than LoRA, and at most 1.6 times the frozen base: the weights' gradients
  are a third more of the base's products, and AdamW moves 28 bytes a number. Head only takes between a third and a half.
- *Few numbers are no short step.* VeRA trains 61 times fewer numbers than LoRA on Llama's layer and 11 times fewer on
  MiniLM's. Its step is in no cell the shorter one, compiled ones included: the products are of its rank, 256.
- *Rank*, MiniLM, 2048 × 64, whose layers are 384 wide. From rank 1 to 16 LoRA's time changes by at most a twentieth; at 256 its
  products are as many multiplications as the frozen layers', and it takes at least a quarter longer than at 1.
- *MiniLM, 32 × 64*, where a GPU waits for its host: kernels are what counts, so full takes less than every adapter.
- *Memory kept, Llama.* Full − LoRA: 12 bytes a number, 1.57 GiB, within a tenth. LoRA − frozen base: the inputs of its
  layers, 0.29 GiB, within a quarter. Of that difference LoRA-XS and VeRA, whose A is fixed and which keep no inputs, have
  at most a tenth and at most half. DoRA − LoRA: the outputs of its layers, 0.42 GiB, within a quarter.
- *PEFT.* On MiniLM, 2048 × 64, and on Llama this library's LoRA, DoRA and VeRA take no longer than PEFT's, and keep less.
"""

from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import nn

from ..adapters import DoRA, LoRA, LoRAXS, MoSLoRA, Spec, VeRA
from ..targets import find_targets
from .engine import step
from .engine.step import BASE, SHAPES, Builder, Shape, ours, peft_lora, theirs
from .tuned_comparison import FULL, HEAD, LORA, SCALINGS, rank_of

TIMED = True  # two runs differ
PEFT = ("PEFT LoRA", "PEFT DoRA", "PEFT VeRA")
PISSA, TRAINED, ORTHOGONAL, XS = "PiSSA", "MoSLoRA, trained", "MoSLoRA, orthogonal", "LoRA-XS"
ARM_OF = {HEAD: HEAD, LORA: LORA, "Init[B]": LORA, PISSA: PISSA, "LoRA+": LORA, TRAINED: TRAINED, ORTHOGONAL: ORTHOGONAL,
          XS: XS, "DoRA": "DoRA", "DoRA(MoSLoRA)": "DoRA(MoSLoRA)", "VeRA": "VeRA", "DVoRA": "DVoRA", FULL: FULL,
          "rsLoRA": LORA}  # a row of `tuned_comparison`: the arm that costs what it costs; rsLoRA's at LoRA's rank


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        shapes: of `SHAPES`, measured eager, with all arms.
        compiled_shapes: measured under `torch.compile`, which takes each arm some seconds, without PEFT's.
        xs, vera: the ranks of LoRA-XS and of VeRA.
        ranks, dora_ranks: at which LoRA and DoRA are measured besides.
        rounds, round_steps: how many rounds, and of how many steps.
    """

    shapes: tuple[str, ...] = ("MiniLM, 32 × 64", "MiniLM, 2048 × 64", "Llama-2-7B, 4 × 2048")
    compiled_shapes: tuple[str, ...] = ("MiniLM, 2048 × 64", "Llama-2-7B, 4 × 2048")
    xs: int = 16
    vera: int = 256
    ranks: tuple[int, ...] = (1, 4, 16, 64, 256)
    dora_ranks: tuple[int, ...] = (16,)
    rounds: int = 7
    round_steps: int = 4

    def __post_init__(self) -> None:
        if unknown := {*self.shapes, *self.compiled_shapes} - SHAPES.keys():
            raise ValueError(f"shapes must be of {list(SHAPES)}, not {sorted(unknown)}")


QUICK = Settings(shapes=("small bert", "small llama"), compiled_shapes=(), xs=4, vera=16, ranks=(2,), dora_ranks=(), rounds=2, round_steps=1)


def arms(settings: Settings, compiled: bool = False) -> dict[str, Builder]:
    """What is measured, by name."""
    vera = VeRA(settings.vera)
    found: dict[str, Builder] = {
        BASE: lambda model, shape: model,
        HEAD: lambda model, shape: WithoutGradient(model),
        LORA: ours(LoRA),
        PISSA: ours(lambda rank: LoRA(rank, init="orthogonal-pair")),
        TRAINED: ours(MoSLoRA),
        ORTHOGONAL: ours(lambda rank: MoSLoRA(rank, mixer="orthogonal", train_mixer=False)),
        XS: ours(lambda rank: LoRAXS(settings.xs, init="orthogonal-pair")),
        "DoRA": ours(lambda rank: DoRA(LoRA(rank))),
        "DoRA(MoSLoRA)": ours(lambda rank: DoRA(MoSLoRA(rank))),
        "VeRA": ours(lambda rank: vera),
        "DVoRA": ours(lambda rank: DoRA(vera)),
        FULL: in_place,
        PEFT[0]: peft_lora(),
        PEFT[1]: peft_lora(use_dora=True),
        PEFT[2]: theirs(lambda peft, shape: peft.VeraConfig(r=settings.vera, target_modules=shape.targets)),
    }
    found |= {f"{LORA} {rank}": of_rank(LoRA(rank)) for rank in settings.ranks}
    found |= {f"DoRA {rank}": of_rank(DoRA(LoRA(rank))) for rank in settings.dora_ranks}
    return {name: build for name, build in found.items() if not compiled or name not in PEFT and not rank_of(name)}


def of_rank(spec: Spec) -> Builder:
    """The spec as it is, whatever the layer's own rank."""
    return ours(lambda rank: spec)


class WithoutGradient(nn.Module):
    """A model that nothing is to be learned in: its forward pass keeps nothing."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        with torch.no_grad():
            return self.model(**inputs)


def in_place(model: nn.Module, shape: Shape) -> nn.Module:
    """The targets' weights `(out, in)` in fp32, trained, in the place of the frozen ones. Biases and the rest stay fixed, as
    in the row "full" of `tuned_comparison`; there ΔW is trained beside W, so that many runs can share W."""
    for module in find_targets(model, shape.targets, {}).values():
        module.weight = nn.Parameter(module.weight.detach().float())  # (out, in)
    return model


def cells(settings: Settings) -> list[dict]:
    """A shape, eager or compiled."""
    return [{"shape": shape, "compiled": compiled}
            for compiled, shapes in ((False, settings.shapes), (True, settings.compiled_shapes)) for shape in shapes]


def data(settings: Settings) -> dict[str, str]:
    return {}  # the input is drawn from a seed


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """A row an arm and round: `step.costs`."""
    shape, compiled = SHAPES[cell["shape"]], cell["compiled"]
    return step.costs(arms(settings, compiled), shape, compiled, settings.rounds, settings.round_steps, device)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out


def cost(table: pd.DataFrame) -> pd.DataFrame:
    """Of each shape, eager or compiled, and arm: `step.cost`'s columns."""
    return step.cost(table)


def by_method(table: pd.DataFrame) -> pd.DataFrame:
    """`cost` for each row of `tuned_comparison`, by its name in `row`; `arm` is what was measured. "rsLoRA" is that of LoRA's
    rank; at other ranks it is called as there, "rsLoRA 64". The order is that of shapes, then of rows."""
    arms_of = dict(ARM_OF)
    for arm in table["arm"].unique():
        if rank := rank_of(arm):
            name = arm.removesuffix(f" {rank}")
            arms_of |= {f"{each} {rank}": arm for each in (SCALINGS if name == LORA else (name,))}
    rows = pd.DataFrame({"row": list(arms_of), "arm": list(arms_of.values())})
    found = [rows.merge(cell, on="arm") for _, cell in cost(table).groupby(["shape", "compiled"], sort=False)]
    return pd.concat(found, ignore_index=True)


def between(table: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """Of each shape, eager or compiled, that has both arms: `one`'s time over `other`'s in the same round (median, least and
    largest), and the ms that it takes more (`added_ms`, the median over rounds)."""
    found = []
    for key, ms, _ in step.by_cell(table):
        if {one, other} <= set(ms):
            ratio, more = ms[one] / ms[other], ms[one] - ms[other]  # (rounds,)
            found.append({**key, "ratio": ratio.median(), "least": ratio.min(), "largest": ratio.max(), "added_ms": more.median()})
    return pd.DataFrame(found, columns=["shape", "compiled", "ratio", "least", "largest", "added_ms"])


class Sizes(NamedTuple):
    """What a count from a shape needs: of the adapted layers together, unless it is said otherwise."""

    tokens: int
    layers: int
    ins: int  # Σ in
    outs: int  # Σ out
    weights: int  # Σ in · out
    widest: int  # the widest in, and the widest out
    inputs: int  # numbers a token that are kept for a weight's or A's gradient, and that the frozen base does not keep


def sizes(shape: Shape) -> Sizes:
    """Of `SHAPES`' layers as they run under autocast. BERT's layer norm gives fp32 there, so each layer that follows one
    makes a bf16 copy of its input, query, key and value one each; attention's output is kept by the base as well. Llama's
    gives bf16, which q, k and v share."""
    w, inner, bert = shape.width, shape.inner, shape.family == "bert"
    square, tokens = (4 if bert else 3), shape.batch * shape.length
    ends = square * w + w + inner  # (w, w) layers, (w, inner) and (inner, w)
    inputs = (3 if bert else 1) * w + w + inner
    return Sizes(tokens, square + 2, ends, ends, square * w * w + 2 * w * inner, inner, inputs)


def kept_from_shapes(arm: str, shape: Shape, settings: Settings = Settings()) -> float:
    """GiB that an arm keeps between forward and backward beyond the frozen base, counted: for tokens in bf16 the inputs
    (`inputs` a token), the r-wide products and, for a gain, the outputs; and for each number trained 4 bytes, AdamW's 8 and
    the bf16 copy's 2, for each fixed one 4 and 2.

    Raises:
        ValueError: for an arm whose tensors are not this library's.
    """
    s, name = sizes(shape), arm.removeprefix("DoRA(").removesuffix(")")
    wrapped = name != arm or arm in ("DoRA", "DVoRA") or arm.startswith("DoRA ")
    rank = rank_of(arm) or shape.rank
    both = s.ins + s.outs
    if arm == FULL:
        kept = 2 * s.tokens * s.inputs + 12 * s.weights
    elif arm in ("VeRA", "DVoRA"):  # no inputs; A and B are shared, and b ⊙ B is made at each layer, in fp32 and in bf16
        r = settings.vera
        kept = 2 * s.tokens * r * s.layers + 8 * r * s.widest + 2 * r * s.ins + 6 * r * s.outs
    elif arm == XS:  # no inputs
        kept = 2 * s.tokens * settings.xs * s.layers + 6 * settings.xs * both
    elif arm == PISSA:  # products of rank 2r; the start is kept too, and both are put side by side in fp32
        kept = 2 * s.tokens * (s.inputs + 2 * rank * s.layers) + 20 * rank * both
    elif arm.startswith(("LoRA", "MoSLoRA", "DoRA")):
        kept = 2 * s.tokens * (s.inputs + rank * s.layers) + 14 * rank * both
    else:
        raise ValueError(f"what {arm!r} keeps is not counted here, but only what this library's arms keep")
    return (kept + (2 * s.tokens + 16) * s.outs * wrapped) / 2**30


def kept(table: pd.DataFrame) -> pd.DataFrame:
    """Beyond the frozen base, of each shape measured eager and each arm of this library that trains: `measured` and
    `counted`, GiB. A shape of so few tokens that what the first arm takes once weighs in is left to the caller."""
    found = []
    for key, _, fixed in step.by_cell(table):
        if key["compiled"]:
            continue
        for arm in table["arm"].unique():
            if arm in fixed.index and arm not in (BASE, HEAD, *PEFT):
                found.append({"shape": key["shape"], "arm": arm,
                              "measured": fixed.kept_gib[arm] - fixed.kept_gib[BASE],
                              "counted": kept_from_shapes(arm, SHAPES[key["shape"]])})
    return pd.DataFrame(found)
