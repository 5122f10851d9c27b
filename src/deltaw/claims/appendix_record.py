"""Merged and unmerged on a text task: what the record of the experiment `appendix_runs` says (chapter 7).

MiniLM on TREC, 500 steps, twelve optimizers and sixty pairs; what was fixed before the record is in the experiment's docstring.
A pair is a run that keeps its mixer and the merged one. Its control is the first again, with A changed by a few roundings.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import claim, require

if TYPE_CHECKING:
    import pandas

BOOK = "this book"
FIXED = "this book, fixed before the record"
MEASURED = "measured at this scale"
ROUNDING = "equal to rounding"
PAIR = ["optimizer", "mixer", "kind"]


@lru_cache(maxsize=1)
def record() -> "pandas.DataFrame":
    from deltaw import results

    return results.load("appendix_runs")


@lru_cache(maxsize=1)
def hypotheses() -> "pandas.DataFrame":
    """Of each hypothesis, by its first word or two: as_said, of, holds."""
    from deltaw.experiments import appendix_runs

    found = appendix_runs.hypotheses(record())
    return found.assign(hypothesis=["1", "2", "3", "4", "4b"]).set_index("hypothesis")


def verdicts(precision: str) -> "pandas.DataFrame":
    """The sixty pairs, by optimizer, mixer and kind."""
    return _of("verdicts", precision)


def ends(precision: str) -> "pandas.DataFrame":
    """What the runs of each pair, and of each control, predict in the end."""
    return _of("ends", precision)


def growth(precision: str) -> "pandas.DataFrame":
    """How fast rounding grows, in pairs that should be equal and in controls."""
    return _of("growth", precision)


@lru_cache(maxsize=3)
def _analysed(analysis: str) -> "pandas.DataFrame":
    from deltaw.experiments import appendix_runs

    return getattr(appendix_runs, analysis)(record())


def _of(analysis: str, precision: str) -> "pandas.DataFrame":
    found = _analysed(analysis)
    return found[found["precision"] == precision].drop(columns="precision").set_index(PAIR)


def rows(precision: str) -> "pandas.DataFrame":
    """What was recorded of pairs and controls: a row for each seed and checkpoint."""
    from deltaw.experiments import appendix_runs

    table = appendix_runs.pairs(record())
    return table[table["precision"] == precision]


def distances(pair: tuple[str, str, str], precision: str) -> "pandas.DataFrame":
    """Of one pair or control, `(checkpoints, seeds)`."""
    table = rows(precision)
    table = table[(table[PAIR] == list(pair)).all(axis=1)]
    return table.pivot(index="step", columns="seed", values="distance")


def control(pair: tuple[str, str, str]) -> tuple[str, str, str]:
    """That of a pair's mixer."""
    return (*pair[:2], "control")


def missed() -> list[tuple[str, str, str]]:
    """The pairs whose verdict in float32 is not as predicted."""
    table = verdicts("float32")
    return list(table.index[~table["as_predicted"]])


# ---------------------------------------------------------------------------------------------------------------------
# In float64


@claim("symmetry-record-theorem", "On MiniLM, over 500 steps in float64, merging changes no more than rounding exactly where the "
       "mixer is fixed and a symmetry of the optimizer: in 18 of 60 pairs.", FIXED, "holds", MEASURED)  # fmt: skip
def theorem(equal: int = 18) -> dict[str, Any]:
    """Hypothesis 1, by the rule that was fixed: at most 100 times the control in every seed and at every checkpoint, or more
    than 1000 times in every seed at some. No pair is near either."""
    table, found = verdicts("float64"), hypotheses().loc["1"]
    require(found["of"] == 60 and bool(found["holds"]), f"{found['as_said']} of {found['of']} pairs as predicted")
    same = table["verdict"] == ROUNDING
    require(int(same.sum()) == equal, f"{same.sum()} pairs are equal to rounding")
    most, least = table["largest"][same].max(), table["largest"][~same].min()
    require(most < 5 and least > 1e11, f"a pair is near a threshold: {most:.1f}, {least:.0e} times the control")
    return {"as predicted": f"{found['as_said']} of {found['of']}", "equal": int(same.sum()),
            "most, over the control": most, "least of the others": least}  # fmt: skip


@claim("symmetry-record-parting", "The pairs that part do so at the second step; at the first only a trained mixer under weight "
       "decay.", FIXED, "holds", MEASURED)  # fmt: skip
def parting(first: tuple[str, ...] = ("SGD, decay", "AdamW")) -> dict[str, Any]:
    """Hypothesis 2."""
    table, found = verdicts("float64"), hypotheses().loc["2"]
    require(found["of"] == 42 and bool(found["holds"]), f"{found['as_said']} of {found['of']} pairs")
    table = table[table["verdict"] == "apart"]
    at_once = table.index[table["parted"] == 1]
    expected = {(optimizer, mixer, "trained") for optimizer in first for mixer in ("orthogonal", "Kaiming")}
    require(set(at_once) == expected, f"at the first step: {list(at_once)}")
    require(set(table["parted"]) == {1, 2}, f"{table['parted'].value_counts().to_dict()}")
    return {"pairs": int(found["of"]), "at the first step": [", ".join(pair) for pair in at_once]}


@claim("symmetry-record-growth", "Where merging is invisible, rounding grows as in the control: the exponents differ by less than 0.5 "
       "decades per 100 steps.", FIXED, "holds", MEASURED)  # fmt: skip
def rounding_grows(band: float = 0.5) -> dict[str, Any]:
    """Hypothesis 3. The band was wide: no exponent of any pair or control in float64 is as large as it."""
    table, found = growth("float64"), hypotheses().loc["3"]
    require(found["of"] == 18 and bool(found["holds"]), f"{found['as_said']} of {found['of']} pairs")
    fixed = table.xs("fixed", level="kind")
    widest = fixed["difference"].abs().max()
    require(widest < min(band, 0.15), f"exponents differ by {widest:.2f}")
    require(-0.05 < table["decades"].min() and table["decades"].max() < 0.3, f"{table['decades'].describe()}")
    require((fixed["difference"] > 0).sum() == 16, f"{(fixed['difference'] > 0).sum()} of the pairs grow faster")
    return {"largest difference": widest, "exponents": (table["decades"].min(), table["decades"].max()),
            "apart after 500 steps": (fixed["end"].min(), fixed["end"].max())}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# In float32


@claim("symmetry-record-float32", "In float32 the verdicts are those of float64.", FIXED, "does not hold", MEASURED)
def in_float32(as_said: int = 55) -> dict[str, Any]:
    """Hypothesis 4: 55 of 60. Four of the five that miss have the orthogonal mixer, all are under sign descent or Adagrad, and
    all were to be apart."""
    table, found = verdicts("float32"), hypotheses().loc["4"]
    require((found["as_said"], found["of"]) == (as_said, 60) and not found["holds"], f"{found['as_said']} of {found['of']}")
    expected = {(optimizer, "orthogonal", kind) for optimizer in ("sign", "Adagrad") for kind in ("fixed", "trained")}
    require(set(missed()) == expected | {("Adagrad", "Kaiming", "trained")}, f"{missed()}")
    require(set(table["predicted"][missed()]) == {"apart"}, "one was to be equal")
    return {", ".join(pair): f"{table['verdict'][pair]}, {table['largest'][pair]:.0f} times the control" for pair in missed()}


@claim("symmetry-record-control", "The five pairs whose verdict changes in float32 are as far apart as in float64; it is their controls "
       "that have moved too far for the rule.", BOOK, "holds", MEASURED)  # fmt: skip
def controls_moved(near: float = 0.15) -> dict[str, Any]:
    """Looked for afterwards. "Apart" asks for 1000 times the control; these controls, of which the largest seed counts, pass
    0.0008 in the first two steps, and a distance is hardly ever above 1. No control of another pair that is told apart passes
    0.0001 by then."""
    found = {}
    for pair in missed():
        here, there = (verdicts(precision).loc[pair] for precision in ("float32", "float64"))
        for step in ("step 2", "step 100", "step 500"):
            require(abs(here[step] / there[step] - 1) < near, f"{pair}, {step}: {here[step]:.3f} and {there[step]:.3f}")
        early = distances(control(pair), "float32").loc[:2].max(axis=None)
        require(early > 8e-4, f"the control of {pair}: {early:.1e}")
        found[", ".join(pair)] = f"{here['step 2']:.2f} at step 2, its control up to {early:.4f}"
    told = verdicts("float32").query("verdict == 'apart'").index
    others = {control(pair) for pair in told} - {control(pair) for pair in missed()}
    most = max(distances(one, "float32").loc[:2].max(axis=None) for one in others)
    require(most < 1e-4, f"another control: {most:.1e}")
    return found | {"the largest other control in two steps": most}


@claim("symmetry-record-sign", "In float32 a symmetry of the optimizer leaves no trace that a user could see.", BOOK,
       "holds if the optimizer is not sign descent, whose runs are taken apart by the rounding of float32", MEASURED)  # fmt: skip
def sign_descent(odd: str = "sign") -> dict[str, Any]:
    """By the rule, its signed permutation is equal to rounding: 37 % apart, where the control is 38 %. The other seventeen
    stay below 1e-4 and predict the same. In float64 all of sign descent's stays below 1e-15."""
    pairs = verdicts("float32").query("predicted == @ROUNDING", local_dict={"ROUNDING": ROUNDING})
    last, own = ends("float32").loc[pairs.index], (odd, "signed permutation", "fixed")
    end = growth("float32")["end"]
    require(pairs["verdict"][own] == ROUNDING and 0.35 < end[own] < 0.4 and 0.35 < end[control(own)] < 0.4, f"{end[own]:.2f}")
    require(last["differ"][own] >= 5, f"{last['differ'][own]} predictions differ")
    others = pairs.index.drop([own])
    require(end[others].max() < 1e-4 and last["differ"][others].max() == 0, f"{end[others].max():.1e}")
    double = growth("float64").loc[odd]["highest"].max()
    require(double < 1e-15, f"in float64 {double:.1e}")
    return {"sign descent": end[own], "its control": end[control(own)], "predictions that differ": last["differ"][own],
            "largest of the others": end[others].max(), "sign descent in float64, highest": double}  # fmt: skip


@claim("symmetry-record-predictions", "In float32, pairs that should be equal predict at most one point more of the validation set "
       "differently than their controls do.", FIXED, "holds", MEASURED)  # fmt: skip
def predictions(share: float = 0.01) -> dict[str, Any]:
    """Hypothesis 4, its second part."""
    found, table = hypotheses().loc["4b"], ends("float32")
    require(found["of"] == 18 and bool(found["holds"]), f"{found['as_said']} of {found['of']} pairs")
    table = table[table["predicted"].astype(bool)].xs("fixed", level="kind")
    excess = ((table["differ"] - table["control"]) / table["examples"]).max()
    require(excess <= min(share, 0.0), f"{excess:.3f} of the examples")
    return {"largest excess over the control": excess, "predict the same": f"{(table['differ'] == 0).sum()} of {len(table)}"}


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to


@claim("symmetry-record-outcome", "Two runs that are apart predict differently.", BOOK,
       "holds if one prediction in a hundred is meant: 5 of 489 on average, at most 17 in a seed", MEASURED)  # fmt: skip
def outcome(most: int = 17) -> dict[str, Any]:
    """In float64, in the end. The 18 equal pairs predict the same in every seed. The accuracies of the others differ by less than
    a point in the mean of three seeds, in both directions; which form is better was not asked."""
    table = ends("float64")
    fixed, parted = table["predicted"].astype(bool), ~table["predicted"].astype(bool)
    require(table["largest"][fixed].max() == 0, "an equal pair predicts differently")
    apart = table[parted]
    require(len(apart) == 42 and apart["largest"].max() == most, f"{len(apart)} pairs, at most {apart['largest'].max()}")
    mean, gap = apart["differ"].mean(), apart["score"] - apart["other_score"]
    require(4.5 < mean < 5.5 and (apart["differ"] > 0).all(), f"{mean:.1f} on average")
    require(-0.01 < gap.min() < -0.005 < 0.005 < gap.max() < 0.01 and abs(gap.mean()) < 0.001, f"{gap.describe()}")
    return {"differ, means of the pairs": (apart["differ"].min(), mean, apart["differ"].max()), "most in a seed": most,
            "unmerged − merged accuracy": (gap.min(), gap.mean(), gap.max())}  # fmt: skip


@claim("symmetry-record-learns", "Every run of the record trains: the loss falls, and in every seed it scores above the head alone.",
       BOOK, "holds", MEASURED)  # fmt: skip
def learns(above: float = 0.08) -> dict[str, Any]:
    """And what clips, clips."""
    from deltaw.experiments import appendix_runs

    table = appendix_runs.learning(record())
    require(len(table) == 120 and bool(table["learns"].all()), f"{(~table['learns']).sum()} do not")
    gain = (table[["score", "other_score"]].min(axis=1) - table["head_alone"]).min()
    require(gain > above, f"as little as {gain:.3f} above the head alone")
    clipped = table.groupby("optimizer")["clipped"].agg(["min", "max"])
    clipping = clipped.index.str.contains("clip")
    require(clipped["min"][clipping].min() > 0.2 and clipped["max"][~clipping].max() == 0, f"{clipped}")
    return {"accuracy": (table["score"].min(), table["score"].max()), "head alone": table["head_alone"].mean(),
            "clipped": clipped["max"][clipping].to_dict()}  # fmt: skip


@claim("symmetry-record-rates", "Each optimizer's rate was found inside its grid.", BOOK, "does not hold", MEASURED)
def rates(at_edge: tuple[str, ...] = ("Muon",)) -> dict[str, Any]:
    """Eleven were. Muon's lowest was its best, so a lower one may be better; the rule was to flag it, not to extend the grid."""
    from deltaw.experiments import appendix_runs

    table = appendix_runs.rates(record())
    chosen = table[table["chosen"]].set_index("optimizer")
    require(len(chosen) == 12 and tuple(chosen.index[chosen["at_edge"]]) == at_edge, f"{chosen['at_edge'].to_dict()}")
    ends_ = table.groupby("optimizer")["rate"].agg(["min", "max"])
    require(all(np.isclose(chosen["rate"][one], ends_["min"][one]) for one in at_edge), "the edge is the upper one")
    return {**chosen["rate"].to_dict(), "at an edge": list(at_edge)}
