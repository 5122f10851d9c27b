"""Rates and ranks, and what another rank is worth beside another variant (chapter 8): as in `comparison`."""

from typing import TYPE_CHECKING, Any

from . import claim, require
from .comparison import (
    BOOK,
    CODE,
    EARLY,
    FIXED,
    FULL,
    LORA,
    MARGIN,
    MEASURED,
    SIZED,
    all_code,
    all_rows,
    analysis,
    at_rate,
    beside,
    differences,
    new_pair,
    on,
    rounded,
    shown,
)

if TYPE_CHECKING:
    import pandas


def between_rates() -> "pandas.Series":
    """By how much a row's tuning loss on code could be lower between the rates tried: the lowest point of the parabola in
    log rate through its best rate and the two neighbours, which lie a factor √2 away."""
    import numpy as np
    import pandas as pd

    from deltaw.experiments.engine import verdicts

    found = {}
    for row, curve in verdicts.curves(all_code()).groupby("row"):
        curve = curve.sort_values("rate")
        loss, logs = curve["mean"].to_numpy(), np.log(curve["rate"].to_numpy())
        best = int(loss.argmin())
        near = slice(best - 1, best + 2)
        bend, slope, top = np.polyfit(logs[near] - logs[best], loss[near], 2)
        found[row] = loss[best] - (top - slope**2 / (4 * bend))
    return pd.Series(found)


@claim("comparison-grid", "Rates a factor √2 apart could hide a loss on code that is lower by 0.005 nats or more.", BOOK,
       "does not hold", MEASURED)  # fmt: skip
def grid(least: float = 0.005) -> dict[str, Any]:
    found = between_rates()
    require(found.max() < least, f"{found.idxmax()}: {found.max():.4f}")
    main = found[[row for row in found.index if row in set(on(CODE, "every_pair").index) | {LORA}]]
    return {"main rows, at most": f"{main.max():.4f} ({main.idxmax()})", "all rows": f"{found.max():.4f} ({found.idxmax()})"}


# ---------------------------------------------------------------------------------------------------------------------
# Rates and ranks


@claim("comparison-one-rate", "Who is ahead at one rate for all is ahead when each is tuned.", BOOK, "does not hold", MEASURED)
def one_rate(rate: float = EARLY) -> dict[str, Any]:
    """At 0.000316 on the tuning split of code, Init[B], PiSSA and LoRA+ are ahead of LoRA with each of the three seeds."""
    early, tuned_ = at_rate(rate), on(CODE)
    turned = [row for row in SIZED if row != LORA and (early[row] - early[LORA]).max() < 0 and tuned_.verdict[row] == "worse"]
    require(turned == ["Init[B]", "PiSSA", "LoRA+"], f"{turned}")
    return {row: f"{(early[row] - early[LORA]).mean():+.3f} at {rate:g}, {tuned_.difference[row]:+.3f} tuned" for row in turned}


@claim("comparison-rate-matters", "To halve or to double LoRA's rate costs more on code than DoRA gains on LoRA.",
       "after Lee et al. 2026", "holds", MEASURED)  # fmt: skip
def rate_matters(row: str = "DoRA") -> dict[str, Any]:
    table, gain = on(CODE, "sensitivity"), -on(CODE).difference[row]
    cost = table.loc[LORA, ["half", "double"]]
    require(cost.min() > 2 * gain > 0, f"{cost.to_dict()}, and {gain:.3f}")
    return {"half": f"{cost['half']:.3f}", "double": f"{cost['double']:.3f}", "DoRA's gain": f"{gain:.3f}"}


def lora_rank(row: str) -> float:
    """The rank at which LoRA has a row's loss on code: on the line, in log rank, between the two nearest that were run."""
    import numpy as np

    rows = all_rows()["report"]
    ranks = (1, 2, 4, 8, 16)
    loss = rows[[LORA if rank == 8 else f"LoRA {rank}" for rank in ranks]].to_numpy()
    require(loss[-1] <= rows[row] <= loss[0], f"{row}: {rows[row]:.3f} is off the line {loss}")
    return float(2 ** np.interp(-rows[row], -loss, np.log2(ranks)))


@claim("comparison-rank-first", "Twice the rank gains LoRA more on code than DoRA does at rank 8.", "this book, seen afterwards",
       "holds if numbers are left out: the lead, 0.009 nats, is below the margin and costs 1.87 times DoRA's numbers; for "
       "DoRA's loss LoRA would need about rank 12", MEASURED)  # fmt: skip
def rank_first(row: str = "LoRA 16") -> dict[str, Any]:
    table, numbers = differences((row, "DoRA"), (row, LORA)), on(CODE, "reported").parameters
    require(bool((table["verdict"] == "better").all()), f"{[shown(one) for one in table.itertuples()]}")
    lead = -table.difference[(row, "DoRA")]
    require(round(lead, 3) == 0.009 < MARGIN and round(numbers[row] / numbers["DoRA"], 2) == 1.87, f"{lead:.4f}")
    rank = lora_rank("DoRA")
    more = rank / 8 * numbers[LORA] / numbers["DoRA"]
    require(12 < rank < 13 and more > 1.4, f"rank {rank:.1f}, {more:.2f} times the numbers")
    return {" − ".join(pair): shown(one) for pair, one in table.iterrows()} | {"DoRA's loss": f"LoRA's at rank {rank:.1f}"}


@claim("comparison-dora-rank", "DoRA ends lower than LoRA on code at rank 16 as well, by 0.012 nats [0.008, 0.015], and its lead "
       "is that at rank 8 within the margin.", FIXED, "holds", MEASURED)  # fmt: skip
def dora_rank(most: float = 0.0065) -> dict[str, Any]:
    """The lead is told to be smaller, by 0.0044 [0.0024, 0.0065], and still within the margin."""
    found, change = new_pair("DoRA 16", "LoRA 16", "better"), beside("lead_by_rank").iloc[0]
    require(rounded(found, -1) == [0.012, 0.008, 0.015], shown(found))
    require(change.verdict == "equivalent" and 0 < change.low and change.high < most + 5e-4, f"{shown(change)}: {change.verdict}")
    return {"DoRA 16 − LoRA 16": shown(found), "less that at rank 8": shown(change)}


@claim("comparison-dora-rs", "DoRA of rank 16 is better on code than rsLoRA of rank 16, with LoRA's numbers.", BOOK, "does not hold",
       MEASURED)  # fmt: skip
def dora_rs(row: str = "DoRA 16") -> dict[str, Any]:
    """Equivalent, though ahead by 0.005 [0.001, 0.009]."""
    found = new_pair(row, "rsLoRA 16", "equivalent")
    require(rounded(found, -1) == [0.005, 0.001, 0.009], shown(found))
    return {"DoRA 16 − rsLoRA 16": shown(found)}


@claim("comparison-rank-one", "LoRA of rank 1 ends lower on code than DVoRA, with fewer numbers.", FIXED, "holds", MEASURED)
def rank_one(row: str = "LoRA 1") -> dict[str, Any]:
    """By 0.038 [0.021, 0.056], with 79 %. Seen afterwards: it is ahead of VeRA as well, with 1.4 times its numbers."""
    found, numbers = new_pair(row, "DVoRA", "better"), all_rows().parameters
    require(rounded(found, -1) == [0.038, 0.021, 0.056] and round(numbers[row] / numbers["DVoRA"], 2) == 0.79, shown(found))
    vera = differences((row, "VeRA")).iloc[0]
    require(vera.verdict == "better" and 1.3 < numbers[row] / numbers["VeRA"] < 1.4, f"{shown(vera)}")
    return {"− DVoRA": shown(found), "− VeRA": shown(vera), "numbers": numbers[[row, "VeRA", "DVoRA"]].to_dict()}


@claim("comparison-rank-full", "Full fine-tuning ends lower on code than a low-rank adapter of any rank tried.",
       "this book, seen afterwards", "does not hold", MEASURED)  # fmt: skip
def rank_full(row: str = "rsLoRA 256") -> dict[str, Any]:
    """rsLoRA of rank 256, with four fifths of the numbers, is equivalent to it: a family of one, chosen afterwards. In the
    card's family the two are not told apart. LoRA of rank 256, with LoRA's scale, is behind it."""
    found = differences((FULL, row)).iloc[0]
    require(found.verdict == "equivalent" and found.difference > 0, f"{shown(found)}: {found.verdict}")
    plain = differences(("LoRA 256", FULL)).iloc[0]
    require(plain.verdict == "worse", f"LoRA 256 {shown(plain)}: {plain.verdict}")
    rows = on(CODE, "reported").parameters
    return {"full − rsLoRA 256": shown(found), "LoRA 256 − full": shown(plain), "numbers": f"{rows[row] / rows[FULL]:.2f} of full's"}


@claim("comparison-rs-equivalent", "Tuned, rsLoRA and LoRA are equivalent on code up to rank 64.", FIXED,
       "holds if rank 64 is left out: there rsLoRA ends 0.025 nats lower [0.021, 0.029]", MEASURED)  # fmt: skip
def rs_equivalent(upto: int = 16) -> dict[str, Any]:
    table = analysis("by_rank")
    table = table[table["task"] == CODE].set_index("rank")
    require(bool((table["verdict"][table.index <= upto] == "equivalent").all()), f"{table['verdict'].to_dict()}")
    found = table.loc[64]
    require(found.verdict == "better", f"rank 64: {shown(found)}")
    require(rounded(found, -1) == [0.025, 0.021, 0.029], shown(found))
    return {8: f"{shown(new_pair('rsLoRA 8', LORA, 'equivalent'))}: equivalent"} | {rank: f"{shown(one)}: {one.verdict}" for rank, one in table.iterrows()}


@claim("comparison-rs-rates", "rsLoRA's best rate varies less with the rank than LoRA's.", "this book, fixed before; after rsLoRA",
       "does not hold", MEASURED)  # fmt: skip
def rs_rates(spread: float = 1.9) -> dict[str, Any]:
    """From rank 4 to 256 LoRA's rises and rsLoRA's falls, each by about a factor of two: powers 0.16 and −0.15."""
    powers = analysis("rate_powers").set_index(["task", "scaling"])["exponent"][CODE]
    require(powers[LORA] > 0 > powers["rsLoRA"] and abs(powers.sum()) < 0.03, f"{powers.to_dict()}")
    table = analysis("by_rank")
    table = table[table["task"] == CODE]
    times = {name: table[column].max() / table[column].min() for name, column in (("rsLoRA", "rate"), (LORA, "rate_reference"))}
    require(min(times.values()) > spread, f"{times}")
    return {"powers": powers.round(2).to_dict(), "largest over smallest": {name: f"{each:.2f}" for name, each in times.items()}}


def knob(one: Any, other: Any, ratios: tuple[float, float], steps: int = 30) -> float:
    """Two LoRAs on one float64 network of two layers, trained by Adam with ε → 0, B's rate being `ratios` times A's: the
    largest distance of their ΔW, relative, over the steps."""
    import torch
    from torch import nn

    import deltaw as dw

    from .measure import apart

    runs = []
    for spec, ratio in zip((one, other), ratios):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 6)).double()
        x, y = torch.randn(32, 12).double(), torch.randn(32, 6).double()  # (batch, in), (batch, out)
        dw.attach(net, spec, seed=1)
        adapters = [layer.adapter for layer in dw.adapted_layers(net).values()]
        adam = torch.optim.Adam([{"params": [a.A for a in adapters], "lr": 0.01},
                                 {"params": [a.B for a in adapters], "lr": 0.01 * ratio}], eps=1e-30)
        path = []
        for _ in range(steps):
            adam.zero_grad()
            (net(x) - y).square().mean().backward()
            adam.step()
            path.append([layer.delta_weight().detach() for layer in dw.adapted_layers(net).values()])
        runs.append(path)
    return max(apart(a, b) for first, second in zip(*runs) for a, b in zip(first, second))


@claim("comparison-one-knob", "Under Adam without weight decay rsLoRA of rank r is LoRA of rank r with B's rate √r times A's, and "
       "LoRA+ with the ratio λ is LoRA with the scale λ·s.", "this book, from chapter 2's proposition on four settings",
       "holds if there is no clipping by the global norm, and ε is negligible", "proved")  # fmt: skip
def one_knob(rank: int = 4, ratio: float = 16.0, right: float = 1.0) -> dict[str, Any]:
    """`right` scales the ratios: any but 1 is wrong."""
    import deltaw as dw

    rs = knob(dw.LoRA(rank, 8, scaling="rslora"), dw.LoRA(rank, 8), (1.0, right * rank**0.5))
    plus = knob(dw.LoRA(rank, 8 * ratio), dw.LoRA(rank, 8), (1.0, right * ratio))
    require(max(rs, plus) < 1e-9, f"rsLoRA {rs:.1e}, LoRA+ {plus:.1e} apart")
    return {"rsLoRA": f"{rs:.0e}", "LoRA+": f"{plus:.0e}"}
