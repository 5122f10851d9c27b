"""What a training step costs with each method: what the record of `step_cost` says (chapter 9).

What was fixed before the record is in the experiment's docstring. A time is compared in the same round: median, least and
largest over seven rounds. Beside the record stand counts from shapes, of operations, bytes and memory.
"""

import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..linear import adapted_linear
from . import claim, require
from .cost import Work, work

if TYPE_CHECKING:
    import pandas

BOOK = "this book"
FIXED = "this book, fixed before the record"
MEASURED = "measured at this scale"
SMALL, LARGE, LLAMA = "MiniLM, 32 × 64", "MiniLM, 2048 × 64", "Llama-2-7B, 4 × 2048"
BASE, HEAD, FULL = "frozen base", "head only", "full"
LIKE_LORA = ("LoRA", "PiSSA", "MoSLoRA, trained", "MoSLoRA, orthogonal", "LoRA-XS")
DORAS = ("DoRA", "DoRA(MoSLoRA)", "DVoRA")
OURS = (*LIKE_LORA, "VeRA", *DORAS)  # at the ranks of `tuned_comparison`
PEFT = ("LoRA", "DoRA", "VeRA")  # what both libraries have
FLOPS, BYTES = 989e12, 4.8e12  # a second, of an H200's data sheet
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm, torch.ops.aten.baddbmm_}


@lru_cache(maxsize=1)
def record() -> "pandas.DataFrame":
    from deltaw import results

    return results.load("step_cost")


@lru_cache(maxsize=1)
def costs() -> "pandas.DataFrame":
    """By shape, compiled and arm."""
    from deltaw.experiments import step_cost

    return step_cost.cost(record()).set_index(["shape", "compiled", "arm"])


@lru_cache(maxsize=64)
def _between(one: str, other: str) -> "pandas.DataFrame":
    from deltaw.experiments import step_cost

    return step_cost.between(record(), one, other).set_index(["shape", "compiled"])


def times(one: str, other: str = BASE, shape: str = LLAMA, compiled: bool = False) -> tuple[float, float, float]:
    """How many times as long a step of one arm takes as the other's in the same round: median, least, largest."""
    row = _between(one, other).loc[shape, compiled]
    return float(row.ratio), float(row.least), float(row.largest)


def added_ms(one: str, other: str = BASE, shape: str = LLAMA, compiled: bool = False) -> float:
    """How many ms more, the median over rounds."""
    return float(_between(one, other).added_ms[shape, compiled])


def sizes(shape: str):
    """Tokens, widths and weights of the adapted layers."""
    from deltaw.experiments import step_cost

    return step_cost.sizes(step_cost.SHAPES[shape])


# ---------------------------------------------------------------------------------------------------------------------
# Counts


class _Products(TorchDispatchMode):
    """Matrix products in which tokens take part: one of their sizes is `tokens`."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.found = tokens, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            self.found += any(self.tokens in leaf.shape for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor))
        return result


@lru_cache(maxsize=32)
def counted(arm: str) -> tuple[Work, int]:
    """What a step of an arm does on MiniLM's layer, 32 × 64, forward and backward, and its products with tokens in them.

    On meta tensors and without autocast and the optimizer, which starts one operation or two for all that is trained.
    """
    from deltaw.experiments import step_cost
    from deltaw.experiments.engine.step import base

    shape = step_cost.SHAPES[SMALL]
    with warnings.catch_warnings():  # PEFT's, of transformers
        warnings.simplefilter("ignore")
        model = base(shape, "meta").to(torch.bfloat16)
        model = step_cost.arms(step_cost.Settings())[arm](model, shape)
    x = torch.empty(shape.batch, shape.length, shape.width, device="meta", dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        loss = model(inputs_embeds=x).last_hidden_state.float().square().mean()
        if loss.requires_grad:
            loss.backward()

    with _Products(shape.batch * shape.length) as products:
        done = work(step)
    return done, products.found


def gain_numbers(width: tuple[int, int], rank: int = 8, gain: bool = True) -> float:
    """16-bit numbers that a token's step reads and writes more for a gain, an output: counted operation by operation."""
    rows, columns = width

    def moved(tokens: int, with_gain: bool) -> int:
        def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(*shape, device="meta", dtype=dtype)

        x, down, up = (t.requires_grad_() for t in (make(tokens, rows), make(rank, rows), make(columns, rank)))
        weight, bias, grad = make(columns, rows), make(columns), make(tokens, columns)
        g = make(columns, dtype=torch.float32).requires_grad_() if with_gain else None
        wanted = [x, down, up] + ([g] if with_gain else [])
        return work(lambda: torch.autograd.grad(adapted_linear(x, weight, bias, down, up, g), wanted, grad)).moved

    of_a_token = [(moved(512, each) - moved(256, each)) / 256 for each in (gain, False)]
    return (of_a_token[0] - of_a_token[1]) / (2 * columns)


@claim("step-products", "Beside the two products of a frozen layer LoRA and DoRA need six more in which tokens take part, VeRA and "
       "LoRA-XS, whose A is fixed, five, and full fine-tuning one.", BOOK, "holds", "proved")  # fmt: skip
def products(lora: int = 6) -> dict[str, Any]:
    """Counted on a step of MiniLM's layer, which has six linear layers: attention's own products are the frozen base's too."""
    frozen = counted(BASE)[1]
    expected = {arm: lora for arm in ("LoRA", "PiSSA", "MoSLoRA, trained", "DoRA")} | dict.fromkeys(("VeRA", "LoRA-XS", "DVoRA"), 5)
    found = {arm: (counted(arm)[1] - frozen) / 6 for arm in (*expected, FULL)}
    for arm, number in (expected | {FULL: 1}).items():
        require(found[arm] == number, f"{arm}: {found[arm]} products a layer more, not {number}")
    return found


@claim("step-started", "Where a GPU waits for its host a step's time goes with the number of operations that it starts, and not with "
       "what they compute.", BOOK, "holds", MEASURED)  # fmt: skip
def started(least: float = 0.96) -> dict[str, Any]:
    """MiniLM, 32 × 64: operations counted, ms measured, of the frozen base and all arms of the comparison and of PEFT. LoRA at
    rank 256 does more than twice rank 1's FLOPs in as many operations."""
    import numpy as np

    arms = (BASE, HEAD, *OURS, FULL, *(f"PEFT {name}" for name in PEFT))
    number = np.array([counted(arm)[0].started for arm in arms])
    ms = np.array([costs().ms[SMALL, False, arm] for arm in arms])
    correlation = float(np.corrcoef(number, ms)[0, 1])
    slope = float(np.polyfit(number, ms, 1)[0])
    require(least < correlation < 0.98, f"correlation {correlation:.3f}")
    require(15 < 1e3 * slope < 25, f"{1e3 * slope:.1f} µs an operation more")
    thick, thin = counted("LoRA 256")[0], counted("LoRA 1")[0]
    ratio = times("LoRA 256", "LoRA 1", SMALL)
    require(thick.flops > 2 * thin.flops and thick.started == thin.started, f"{thick}, {thin}")
    require(ratio[1] < 1 < ratio[2] and abs(ratio[0] - 1) < 0.05, f"rank 256 to rank 1: {ratio}")
    return {"correlation": correlation, "µs an operation more": 1e3 * slope, "ms, rank 256 / rank 1": ratio,
            "started": dict(zip(arms, number.tolist()))}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Time


@claim("step-llama-adapters", "On Llama-2-7B's layer, eager, every adapter of this library takes at most 1.5 times the frozen base's "
       "time, DVoRA the longest, and PiSSA at most a tenth more than LoRA.", FIXED, "holds", MEASURED)  # fmt: skip
def llama_adapters(bound: float = 1.5) -> dict[str, Any]:
    """In every round."""
    found = {arm: times(arm) for arm in OURS}
    for arm, (_, _, largest) in found.items():
        require(largest <= bound, f"{arm}: up to {largest:.3f} times")
    require(max(found, key=lambda arm: found[arm][0]) == "DVoRA", f"{found}")
    pissa = times("PiSSA", "LoRA")
    require(pissa[2] < 1.1, f"PiSSA / LoRA {pissa}")
    return found | {"PiSSA / LoRA": pissa}


@claim("step-llama-full", "On Llama-2-7B's layer, eager, full fine-tuning takes longer than LoRA and at most 1.6 times the frozen base; "
       "head only takes between a third and a half of it.", FIXED, "holds", MEASURED)  # fmt: skip
def llama_full(bound: float = 1.6) -> dict[str, Any]:
    """In every round."""
    full, lora, head = times(FULL), times(FULL, "LoRA"), times(HEAD)
    require(full[2] <= bound and lora[1] > 1, f"full {full}, beside LoRA {lora}")
    require(1 / 3 < head[1] < head[2] < 1 / 2, f"head only {head}")
    return {"full / frozen base": full, "full / LoRA": lora, "head only / frozen base": head}


@claim("step-host", "On MiniLM's layer with 32 × 64 tokens full fine-tuning's step is shorter than every adapter's.", FIXED, "holds",
       MEASURED)  # fmt: skip
def host(shape: str = SMALL) -> dict[str, Any]:
    """In every round, PEFT's adapters among them; it starts no more operations than the frozen base."""
    found = {arm: times(FULL, arm, shape) for arm in (*OURS, *(f"PEFT {name}" for name in PEFT))}
    for arm, (_, _, largest) in found.items():
        require(largest < 1, f"full / {arm}: up to {largest:.3f}")
    require(counted(FULL)[0].started <= counted(BASE)[0].started, "full starts more operations than the frozen base")
    return found


@claim("step-few-numbers", "VeRA trains 11 to 61 times fewer numbers than LoRA, and in no cell is its step the shorter one.", FIXED,
       "does not hold", MEASURED)  # fmt: skip
def few_numbers(cell: tuple[str, bool] = (LLAMA, True)) -> dict[str, Any]:
    """By the medians it is shorter, by 3 %, in one cell of five, whose rounds do not agree. In every round it is shorter in
    none; it is longer in every round on MiniLM, 2048 × 64, eager."""
    cells = list(_between("VeRA", "LoRA").index)
    found = {key: times("VeRA", "LoRA", *key) for key in cells}
    table = costs()
    counts = [table.parameters[shape, False, "LoRA"] / table.parameters[shape, False, "VeRA"] for shape in (SMALL, LLAMA)]
    require(round(counts[0]) == 11 and round(counts[1]) == 61, f"{counts} times fewer numbers")
    require(0.95 < found[cell][0] < 0.99 and found[cell][1] < 1 < found[cell][2], f"{cell}: {found[cell]}")
    require(table.ratio[(*cell, "VeRA")] < table.ratio[(*cell, "LoRA")], "beside the frozen base VeRA takes longer")
    require(all(largest > 1 for _, _, largest in found.values()), f"shorter in every round: {found}")
    require(found[LARGE, False][1] > 1.03, f"{found[LARGE, False]}")
    return {f"{shape}, {'compiled' if compiled else 'eager'}": value for (shape, compiled), value in found.items()}


@claim("step-rank", "On MiniLM's layer with 2048 × 64 tokens LoRA's time changes by at most a twentieth from rank 1 to 16, and is a "
       "quarter longer at rank 256 than at rank 1.", FIXED, "does not hold", MEASURED)  # fmt: skip
def rank(shape: str = LARGE) -> dict[str, Any]:
    """Neither half: rank 4 takes 9 % longer than rank 16, and rank 256 2 % longer than rank 1."""
    four, most = times("LoRA 4", "LoRA 16", shape), times("LoRA 256", "LoRA 1", shape)
    require(four[1] > 1.05, f"rank 4 / rank 16: {four}")
    require(most[2] < 1.05, f"rank 256 / rank 1: {most}")
    share = (counted("LoRA 256")[0].flops - counted(BASE)[0].flops) / counted(BASE)[0].flops
    require(1.4 < share < 1.5, f"rank 256 adds {share:.2f} of the frozen base's FLOPs")
    return {"rank 4 / rank 16": four, "rank 256 / rank 1": most, "FLOPs that rank 256 adds, of the base's": share}


@claim("step-rank-eights", "On both large shapes ranks 8 to 64 that are multiples of 8 cost the same, to 2 %, and rank 4 more than 16 "
       "in every round.", BOOK, "holds", MEASURED)  # fmt: skip
def eights(few: str = "LoRA 4") -> dict[str, Any]:
    """Looked for afterwards. "LoRA" is rank 8 on MiniLM and 32 on Llama's layer."""
    found = {}
    for shape in (LARGE, LLAMA):
        for one, other in (("LoRA", "LoRA 16"), ("LoRA 64", "LoRA 16")):
            found[f"{shape}: {one} / {other}"] = ratio = times(one, other, shape)
            require(abs(ratio[0] - 1) < 0.02, f"{shape}, {one} / {other}: {ratio}")
        found[f"{shape}: {few} / LoRA 16"] = ratio = times(few, "LoRA 16", shape)
        require(ratio[1] > 1, f"{shape}, {few} / rank 16: {ratio}")
    return found


def per_number(arm: str, shape: str, of: str, other: str = BASE, compiled: bool = False) -> float:
    """Picoseconds that an arm takes more, for each token and `of` the layers' sizes."""
    s = sizes(shape)
    numbers = {"in + out": s.ins + s.outs, "in · out": s.weights, "out": s.outs}[of]
    return added_ms(arm, other, shape, compiled) * 1e9 / (s.tokens * numbers)


def crossing(lora: float, full: float) -> float:
    """The width of square layers at which LoRA's and full fine-tuning's additions take as long: from ps a token and in + out,
    and ps a token and in · out, 2 w · lora = w² · full."""
    return 2 * lora / full


def crossing_by_rates() -> float:
    """The same from a data sheet: 4 numbers of 2 bytes for each of in + out, 2 FLOPs for each of in · out."""
    return crossing(1e12 * 8 / BYTES, 1e12 * 2 / FLOPS)


@claim("step-width", "What LoRA adds to a step grows as tokens · (in + out), what full fine-tuning adds as tokens · in · out: so the "
       "first is the smaller on wide layers only.", BOOK, "holds", MEASURED)  # fmt: skip
def width(lora: str = "in + out", full: str = "in · out") -> dict[str, Any]:
    """Eager, two shapes of which one has 11 times the other's width: a law's constant may change by half between them. By the
    other's law each is off by more than six times."""
    found = {}
    for arm, law, wrong in (("LoRA", lora, full), (FULL, full, lora)):
        own, not_own = ([per_number(arm, shape, of) for shape in (LARGE, LLAMA)] for of in (law, wrong))
        require(max(own) < 1.5 * min(own), f"{arm}, ps a token and {law}: {own}")
        require(max(not_own) > 6 * min(not_own), f"{arm}, ps a token and {wrong}: {not_own}")
        found[f"{arm}, ps a token and {law}"] = own
    constants = [found[f"LoRA, ps a token and {lora}"], found[f"{FULL}, ps a token and {full}"]]
    widths = [crossing(*pair) for pair in zip(*constants)]
    require(all(1500 < each < 2200 for each in widths), f"they cross at widths {widths}")
    require(abs(crossing_by_rates() / 1650 - 1) < 0.01, f"{crossing_by_rates()}")
    return found | {"they cross at width": widths, "by a data sheet's rates": crossing_by_rates()}


@claim("step-gain-numbers", "For DoRA's gain a token's step moves 14 numbers of 16 bits an output more than LoRA's, forward and "
       "backward.", BOOK, "holds if each operation reads its tensors once and writes its results once", "proved")  # fmt: skip
def gain(expected: int = 14) -> dict[str, Any]:
    """Counted on the library's kernel; one more is counted and taken off, a result that is given as `out` and not read."""
    found = {f"{rows} → {columns}": gain_numbers((rows, columns)) - 1 for rows, columns in ((384, 384), (384, 1536), (1536, 384))}
    for name, numbers in found.items():
        require(abs(numbers - expected) < 1e-9, f"{name}: {numbers} numbers an output")
    return found


@claim("step-gain", "What DoRA adds to LoRA's step grows as tokens · out, and eager it takes four times as long as moving its bytes.",
       BOOK, "holds", MEASURED)  # fmt: skip
def dora(least: float = 3.5) -> dict[str, Any]:
    """MiniLM, 2048 × 64, and Llama's layer; compiled, where passes are fused, it takes less than their bytes unfused."""
    eager = [per_number("DoRA", shape, "out", "LoRA") for shape in (LARGE, LLAMA)]
    compiled = [per_number("DoRA", shape, "out", "LoRA", True) for shape in (LARGE, LLAMA)]
    bytes_alone = 1e12 * 2 * 14 / BYTES
    require(max(eager) < 1.1 * min(eager), f"eager, ps a token and output: {eager}")
    require(all(least < each / bytes_alone < 4.5 for each in eager), f"{eager}, the bytes {bytes_alone:.2f}")
    require(max(compiled) < bytes_alone, f"compiled: {compiled}")
    return {"eager, ps": eager, "compiled, ps": compiled, "the bytes alone, ps": bytes_alone}


@claim("step-compiled", "Compiled, an adapter costs less beside the frozen base than eager.", BOOK, "holds if it has DoRA's gain",
       MEASURED)  # fmt: skip
def compiled(others: tuple[str, ...] = ("LoRA", "VeRA", "LoRA-XS")) -> dict[str, Any]:
    """Both are faster, but on MiniLM the base gains more than LoRA. On Llama's layer LoRA's rounds do not tell."""
    found = {}
    for shape in (LARGE, LLAMA):
        for arm in DORAS:
            eager, fused = times(arm, shape=shape), times(arm, shape=shape, compiled=True)
            require(fused[2] < eager[1], f"{shape}, {arm}: eager {eager}, compiled {fused}")
            found[f"{shape}, {arm}"] = (eager[0], fused[0])
    for arm in others:
        eager, fused = times(arm, shape=LARGE), times(arm, shape=LARGE, compiled=True)
        require(fused[1] > eager[2], f"{arm}: eager {eager}, compiled {fused}")
        require(added_ms(arm, shape=LARGE, compiled=True) > added_ms(arm, shape=LARGE), f"{arm} adds fewer ms compiled")
        found[f"{LARGE}, {arm}"] = (eager[0], fused[0])
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def kept_more(one: str, other: str = BASE, shape: str = LLAMA) -> float:
    """GiB between forward and backward, eager."""
    table = costs().kept_gib
    return float(table[shape, False, one] - table[shape, False, other])


@claim("step-kept", "On Llama-2-7B's layer full fine-tuning keeps 12 bytes a number more than LoRA (within a tenth), LoRA its layers' "
       "inputs more than the frozen base (a quarter), of which LoRA-XS has at most a tenth and VeRA at most half, and DoRA its "
       "layers' outputs more than LoRA (a quarter).", FIXED, "holds", MEASURED)  # fmt: skip
def kept(bytes_a_number: int = 12) -> dict[str, Any]:
    """Eager."""
    s = sizes(LLAMA)
    weights, inputs, outputs = (number / 2**30 for number in (bytes_a_number * s.weights, 2 * s.tokens * s.inputs, 2 * s.tokens * s.outs))
    lora = kept_more("LoRA")
    found = {"full − LoRA": (kept_more(FULL, "LoRA"), weights, 0.1), "LoRA − base": (lora, inputs, 0.25),
             "DoRA − LoRA": (kept_more("DoRA", "LoRA"), outputs, 0.25)}  # fmt: skip
    for name, (measured, shapes, within) in found.items():
        require(abs(measured / shapes - 1) < within, f"{name}: {measured:.4f} GiB, the shapes give {shapes:.4f}")
    shares = {arm: kept_more(arm) / lora for arm in ("LoRA-XS", "VeRA")}
    require(shares["LoRA-XS"] < 0.1 and shares["VeRA"] < 0.5, f"{shares}")
    return {name: (measured, shapes) for name, (measured, shapes, _) in found.items()} | shares


@claim("step-memory-count", "What each method keeps beyond the frozen base is counted from the shapes: inputs, r-wide products, "
       "outputs under a gain, and 14 bytes a trained number of an adapter.", BOOK, "holds", MEASURED)  # fmt: skip
def memory_count(within: float = 0.02) -> dict[str, Any]:
    """Sixteen arms on each of the two large shapes, eager: all within 2 %. The count was written after the record was seen."""
    from deltaw.experiments import step_cost

    table = step_cost.kept(record())
    table = table[table["shape"] != SMALL]
    off = (table.counted / table.measured - 1).abs()
    require(len(table) == 32 and off.max() < within, f"{table.assign(off=off).nlargest(3, 'off')}")
    return {"arms": len(table), "the furthest off": off.max(), "median": off.median()}


@claim("step-memory-saved", "Training adapters in place of the weights saves most of the memory that training takes.", BOOK,
       "holds if the weights are many beside the tokens", MEASURED)  # fmt: skip
def saved(arm: str = "LoRA") -> dict[str, Any]:
    """Of what full fine-tuning keeps beyond the frozen base: five sixths on Llama's layer, and a hundredth on MiniLM's with 131,072
    tokens, where LoRA keeps the same inputs. LoRA-XS saves both."""
    share = {shape: 1 - kept_more(arm, shape=shape) / kept_more(FULL, shape=shape) for shape in (LLAMA, LARGE)}
    require(share[LLAMA] > 0.8 and 0 < share[LARGE] < 0.015, f"{share}")
    xs = {shape: 1 - kept_more("LoRA-XS", shape=shape) / kept_more(FULL, shape=shape) for shape in (LLAMA, LARGE)}
    require(min(xs.values()) > 0.95, f"LoRA-XS: {xs}")
    return {f"{arm}, {shape}": value for shape, value in share.items()} | {f"LoRA-XS, {shape}": v for shape, v in xs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Beside PEFT


@claim("step-peft", "On MiniLM's layer with 2048 × 64 tokens and on Llama's, eager, this library's LoRA, DoRA and VeRA take no longer "
       "than PEFT's and keep less.", FIXED, "holds", MEASURED)  # fmt: skip
def peft(names: tuple[str, ...] = PEFT) -> dict[str, Any]:
    """In every round."""
    found = {}
    for shape in (LARGE, LLAMA):
        for name in names:
            found[f"{shape}, {name}"] = ratio = times(name, f"PEFT {name}", shape)
            require(ratio[2] < 1, f"{shape}, {name}: {ratio}")
            require(kept_more(name, f"PEFT {name}", shape) < 0, f"{shape}, {name} keeps more")
    return found


@claim("step-peft-host", "With 32 × 64 tokens too this library's LoRA, DoRA and VeRA take no longer than PEFT's.", BOOK,
       "does not hold", MEASURED)  # fmt: skip
def peft_host(name: str = "DoRA") -> dict[str, Any]:
    """DoRA takes longer in every round, and starts more operations. LoRA's rounds do not agree; VeRA takes less in every round."""
    found = {each: times(each, f"PEFT {each}", SMALL) for each in PEFT}
    require(found[name][1] > 1.05, f"{name}: {found[name]}")
    require(counted(name)[0].started > 1.25 * counted(f"PEFT {name}")[0].started, "it starts fewer operations")
    require(abs(counted(f"PEFT {name}")[0].started / 298 - 1) < 0.1, "PEFT's starts another number of operations")
    require(found["LoRA"][1] < 1 < found["LoRA"][2] and found["VeRA"][2] < 1, f"{found}")
    return found
