"""DoRA on text, and what detaching costs and saves: the records of `dora_directions` and `dora_detach` (chapter 5).

What was fixed before each record is in the experiment's docstring. Intervals are over seeds, given the chosen rates and the
sentences. ΔM and ΔD are means over the rows of a matrix, of query matrices unless it is said otherwise; the null is a random
change of the same size and rank.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from . import claim, require
from .dora import PAPER, null_correlations, on_digits

if TYPE_CHECKING:
    import pandas

BOOK = "this book"
FIXED = "this book, fixed before the record"
MEASURED = "measured at this scale"
FULL, LORA, DORA = "full fine-tuning", "LoRA", "DoRA, exact gradient"  # the paper analyses DoRA before it detaches the norm
ALL, QV = "all-linear", "query, value"
IN_PAPER = {FULL: ALL, LORA: QV, DORA: QV}  # what is trained there
LLAMA, SMALL, LARGE = "Llama-2-7B, 4 × 2048", "MiniLM, 32 × 64", "MiniLM, 2048 × 64"


@lru_cache(maxsize=1)
def directions() -> "pandas.DataFrame":
    from deltaw import results

    return results.load("dora_directions")


@lru_cache(maxsize=1)
def correlations() -> "pandas.DataFrame":
    """By task ("mean" is that of the two), targets, method and view."""
    from deltaw.experiments import dora_directions

    return dora_directions.correlations(directions()).set_index(["task", "targets", "method", "view"]).sort_index()


@lru_cache(maxsize=1)
def contrasts() -> "pandas.DataFrame":
    """Of two methods, by task, targets, view, method and reference."""
    from deltaw.experiments import dora_directions

    return dora_directions.contrasts(directions()).set_index(["task", "targets", "view", "method", "reference"]).sort_index()


@lru_cache(maxsize=1)
def moved() -> "pandas.DataFrame":
    """Along the rows, lengths and directions beside chance, by task, targets and method."""
    from deltaw.experiments import dora_directions

    return dora_directions.beyond_chance(directions()).set_index(["task", "targets", "method"]).sort_index()


def in_paper(table: "pandas.DataFrame", view: str = "pooled", task: str = "mean") -> "pandas.DataFrame":
    """The rows of `correlations` that stand beside the paper's, by method."""
    keys = [(task, targets, method, view) for method, targets in IN_PAPER.items()]
    return table.loc[keys].droplevel(["task", "targets", "view"])


def parts(points: "pandas.DataFrame", keys: list[str]) -> "pandas.DataFrame":
    """The parts of the pooled correlation r of ΔM with ΔD, by the groups of `keys`.

    Columns: b_M and b_D, the shares of the variances between the checkpoints' means; r_b, the correlation of these means; r_w,
    within a checkpoint; pooled = √(b_M b_D) r_b + √((1 − b_M)(1 − b_D)) r_w, which is r.
    """
    import pandas

    groups = points.groupby([*keys, "step"], sort=False)[["ΔM", "ΔD"]].transform("mean")
    all_ = points.groupby(keys, sort=False)[["ΔM", "ΔD"]].transform("mean")
    sums = {}
    for name, left in (("b", groups - all_), ("w", points[["ΔM", "ΔD"]] - groups)):
        products = {"MM": left["ΔM"] ** 2, "DD": left["ΔD"] ** 2, "MD": left["ΔM"] * left["ΔD"]}
        sums[name] = pandas.DataFrame(products).groupby([points[key] for key in keys], sort=False).sum()
    between, within = sums["b"], sums["w"]
    found = pandas.DataFrame({
        "b_M": between.MM / (between.MM + within.MM), "b_D": between.DD / (between.DD + within.DD),
        "r_b": between.MD / (between.MM * between.DD) ** 0.5, "r_w": within.MD / (within.MM * within.DD) ** 0.5})  # fmt: skip
    inside = ((1 - found.b_M) * (1 - found.b_D)) ** 0.5
    return found.assign(pooled=(found.b_M * found.b_D) ** 0.5 * found.r_b + inside * found.r_w)


@lru_cache(maxsize=1)
def parts_by_run() -> "pandas.DataFrame":
    """`parts` of every run, of what is trained and of the null, by task, targets, method, change and seed."""
    from deltaw.experiments import dora_directions

    keys = ["task", "targets", "method", "change", "seed"]
    return parts(dora_directions.points(directions()), keys)


def mean_parts() -> "pandas.DataFrame":
    """Averaged over runs and tasks, of the rows beside the paper's: by method and change (trained, or the null)."""
    means = parts_by_run().groupby(["targets", "method", "change"]).mean()
    from deltaw.experiments.engine.decomposition import FULL_RANK, SAME_RANK, TRAINED

    keys = [(targets, method, change) for method, targets in IN_PAPER.items()
            for change in (TRAINED, FULL_RANK if method == FULL else SAME_RANK)]  # fmt: skip
    return means.loc[keys].droplevel("targets").rename(index=lambda name: "null" if name.startswith("random") else name)


@lru_cache(maxsize=1)
def by_kind() -> "pandas.DataFrame":
    """Trained − null of the pooled correlation by kind of matrix and method: all layers trained, the mean of runs and tasks."""
    from deltaw.experiments import dora_directions
    from deltaw.experiments.engine.decomposition import FULL_RANK, SAME_RANK, TRAINED

    points = dora_directions.points(directions(), None)
    points = points[(points.targets == ALL) & points.method.isin(list(IN_PAPER))]
    r = parts(points, ["kind", "method", "change", "task", "seed"]).pooled.groupby(["method", "change", "kind"]).mean()
    import pandas

    null = {method: FULL_RANK if method == FULL else SAME_RANK for method in IN_PAPER}
    return pandas.DataFrame({method: r[method, TRAINED] - r[method, null[method]] for method in IN_PAPER})


def shown(row: Any, name: str = "difference", digits: int = 3, prefix: str | None = None) -> str:
    """A column with its interval. `prefix` is that of the interval's columns: by default its own, or none."""
    prefix = {"correlation": "", "slope": "slope_"}.get(name, f"{name}_") if prefix is None else prefix
    return f"{row[name]:+.{digits}f} [{row[f'{prefix}low']:+.{digits}f}, {row[f'{prefix}high']:+.{digits}f}]"


# ---------------------------------------------------------------------------------------------------------------------
# Lengths and directions


@claim("dora-record-primary", "Pooled over layers and checkpoints, full fine-tuning's and LoRA's correlations of ΔM with ΔD are "
       "those of random changes of their sizes, within 0.15.", FIXED, "holds", MEASURED)  # fmt: skip
def primary(bound: float = 0.15) -> dict[str, Any]:
    """The primary endpoint: the whole interval of trained − random is within the bound, for both, in the mean of the tasks."""
    table = in_paper(correlations()).loc[[FULL, LORA]]
    for method, row in table.iterrows():
        require(-bound < row.difference_low and row.difference_high < bound, f"{method}: {shown(row)}")
    return {name: f"{row.correlation:.3f}, null {row.null:.3f}, {shown(row)}" for name, row in table.iterrows()}


@claim("dora-analysis-null", "LoRA's correlation of ΔM with ΔD, +0.83, mirrors its learning capability: it moves magnitude and direction in "
       "proportion.", PAPER + "section 3.2, Figure 2", "does not hold", MEASURED)  # fmt: skip
def analysis_null(method: str = LORA) -> dict[str, Any]:
    """In the record random changes of rank 8, which have learnt nothing, give as much at LoRA's sizes, in every view; and so
    they do over the range of ΔD that its Figure 2 (b) shows, of rank 8 and of full rank."""
    rows = {view: in_paper(correlations(), view).loc[method] for view in ("pooled", "within layer", "within checkpoint")}
    for view, row in rows.items():
        require(row.null > 0.8 and abs(row.difference) < 0.01, f"{view}: {row.correlation:.3f}, null {row.null:.3f}")
    found = {"rank 8": null_correlations(8, 0.10, 0.16), "full rank": null_correlations(None, 0.10, 0.16)}
    for name, values in found.items():
        require(min(values) > 0.8, f"{name}: {min(values):.2f} at the least")
    return ({f"record, {view}": f"{row.correlation:.3f}, null {row.null:.3f}" for view, row in rows.items()}
            | {f"ΔD as in its figure, {name}": f"{min(each):.2f} … {max(each):.2f}" for name, each in found.items()}
            | {"LoRA, printed": 0.83})  # fmt: skip


@claim("dora-record-signs", "In full fine-tuning lengths and directions change inversely: ΔM and ΔD have a correlation of −0.62.",
       PAPER + "section 3.2, Figure 2", "does not hold", MEASURED)  # fmt: skip
def signs(method: str = FULL) -> dict[str, Any]:
    """On MiniLM it is positive on either task, on all layers or two, in all three views, as the null's is."""
    table = correlations().xs(method, level="method")
    require(len(table) == 18 and bool((table.low > 0).all()), f"lowest: {table.low.min():.2f} at {table.low.idxmin()}")
    require(bool((table.null > 0).all()), "the null is negative somewhere")
    return {view: shown(table.loc["mean", ALL, view], "correlation") for view in ("pooled", "within layer", "within checkpoint")}


@claim("dora-record-null", "Random changes of the sizes that full fine-tuning, LoRA and DoRA have give a pooled correlation of 0.8 or "
       "more.", FIXED, "holds", MEASURED)  # fmt: skip
def null(least: float = 0.8) -> dict[str, Any]:
    table = correlations().xs("pooled", level="view")
    require(len(table) == 24 and bool((table.null_low > least).all()), f"the lowest: {table.null_low.min():.3f}")
    return {"least, of 24": f"{table.null.min():.3f} at {table.null.idxmin()}", "largest": table.null.max()}


@claim("dora-record-along", "DoRA puts more than ten times what chance does along the rows of W, full fine-tuning and LoRA less "
       "than three times; DoRA moves lengths further than chance, and its pooled correlation is below its null's.",
       FIXED, "holds", MEASURED)  # fmt: skip
def along(far: float = 10, near: float = 3) -> dict[str, Any]:
    """On either task, on all layers or on query and value; DoRA with the exact and with the detached gradient."""
    table, r = moved(), correlations().xs("pooled", level="view")
    dora = table.index.get_level_values("method").str.startswith("DoRA")
    require(bool((table[dora].low > far).all()), f"DoRA: {table[dora].low.min():.1f} at the least")
    require(bool((table[~dora].high < near).all()), f"the others: {table[~dora].high.max():.1f} at most")
    require(bool((table[dora].longer_low > 1).all()), f"lengths: {table[dora].longer_low.min():.2f} of chance")
    below = r[r.index.get_level_values("method").str.startswith("DoRA")].difference_high
    require(len(below) == 12 and bool((below < 0).all()), f"correlation − null up to {below.max():.3f}")
    return {f"{method}, {targets}": f"along × {row['along']:.1f}, lengths × {row.longer:.2f}, directions × {row.turned:.2f}"
            for (targets, method), row in table.loc["mean"].iterrows()}  # fmt: skip


@claim("dora-record-not-chance", "Full fine-tuning and LoRA change lengths and directions as chance does.", BOOK,
       "holds if the pooled correlation is meant: along the rows they have 1.3 times what chance gives", MEASURED)  # fmt: skip
def not_chance(methods: tuple[str, str] = (FULL, LORA)) -> dict[str, Any]:
    """Looked for afterwards. Their part along the rows, and their lengths' change, are above chance; full fine-tuning's
    correlation within a checkpoint is above the null's, but on CoLA or with query and value alone not seen to be; and with
    these two its pooled one is below."""
    found = {}
    for method in methods:
        row = moved().loc["mean", IN_PAPER[method], method]
        require(1.15 < row.low and row.high < 1.35, f"{method}: {row['along']:.2f} times along")
        require(1 < row.longer_low and row.longer_high < 1.15, f"{method}: lengths × {row.longer:.3f}")
        found[method] = f"{shown(row, 'along', 2, prefix='')}, lengths {shown(row, 'longer', 2)}"
    within, pooled = (correlations().loc["mean", where, FULL, view] for where, view in ((ALL, "within checkpoint"), (QV, "pooled")))
    require(within.difference_low > 0.1 and -0.05 < pooled.difference_low and pooled.difference_high < -0.02, "full fine-tuning")
    unseen = [correlations().loc[task, where, FULL, "within checkpoint"] for task, where in (("cola", ALL), ("mean", QV))]
    require(all(row.difference_low < 0 < row.difference_high for row in unseen), str([shown(row) for row in unseen]))
    return found | {"full fine-tuning within a checkpoint, − null": shown(within), "… on CoLA": shown(unseen[0]),
                    "… on query and value": shown(unseen[1]), "pooled, on query and value": shown(pooled)}  # fmt: skip


@claim("dora-record-dora-sign", "DoRA's correlation of ΔM with ΔD is negative, −0.31.", PAPER + "section 4.2, Figure 2",
       "holds if it is taken within checkpoints, on SST-2, with query and value trained: pooled as in the paper it is +0.50, and on "
       "CoLA or with all layers the sign is open", MEASURED)  # fmt: skip
def dora_sign(method: str = DORA) -> dict[str, Any]:
    views = {task: correlations().loc[task, QV, method] for task in ("mean", "cola", "sst2")}
    inside = {task: table.loc["within checkpoint"] for task, table in views.items()}
    require(views["mean"].loc["pooled"].low > 0.4, shown(views["mean"].loc["pooled"], "correlation"))
    require(inside["mean"].high < 0 and inside["sst2"].high < -0.3, shown(inside["mean"], "correlation"))
    inside |= {f"{task}, all layers": correlations().loc[task, ALL, method, "within checkpoint"] for task in views}
    for name in ("cola", *(f"{task}, all layers" for task in views)):
        require(inside[name].low < 0 < inside[name].high, f"{name}: {shown(inside[name], 'correlation')}")
    return {"pooled": shown(views["mean"].loc["pooled"], "correlation", 2)} | {
        f"within checkpoint, {task}": shown(row, "correlation", 2) for task, row in inside.items()}  # fmt: skip


@claim("dora-record-within", "Within a checkpoint all correlations of ΔM with ΔD are smaller than pooled.", FIXED, "holds", MEASURED)
def within(view: str = "within checkpoint") -> dict[str, Any]:
    """Each method on all layers and on query and value, in the mean of the tasks and on each."""
    r = correlations().correlation.unstack("view")
    require(len(r) == 24 and bool((r[view] < r["pooled"]).all()), f"{(r['pooled'] - r[view]).min():.4f}")
    return {method: f"{r.loc['mean', targets, method]['pooled']:.2f} → {r.loc['mean', targets, method][view]:.2f}"
            for method, targets in IN_PAPER.items()}  # fmt: skip


@claim("dora-record-exact", "The exact and the detached DoRA have the same correlation of ΔM with ΔD, within 0.1.", FIXED, "holds",
       MEASURED)  # fmt: skip
def exact(bound: float = 0.1) -> dict[str, Any]:
    """The whole interval, on either task and in the mean, on all layers and on two, in all views."""
    table = contrasts().xs("DoRA", level="method").xs(DORA, level="reference")
    require(len(table) == 18, f"{len(table)} differences")
    require(bool((table.low > -bound).all() and (table.high < bound).all()), f"{table.low.min():.3f} to {table.high.max():.3f}")
    return {"intervals within": (table.low.min(), table.high.max()), "pooled": shown(table.loc["mean", QV, "pooled"], prefix="")}


# ---------------------------------------------------------------------------------------------------------------------
# Why


@claim("dora-power", "If ΔM is proportional to ΔDᵖ, and ΔD is spread evenly from 0 on, their correlation is √(3(1 + 2p)) / (2 + p): "
       "1 for p = 1, 0.98 for p = 1/2, and above √3/2 = 0.87 for every p between 0 and 1.", BOOK, "holds", "proved")  # fmt: skip
def power() -> dict[str, Any]:
    """By sympy, from the moments of x and xᵖ over [0, 1]."""
    import sympy

    x, p = sympy.symbols("x p", positive=True)

    def mean(f: Any) -> Any:
        return sympy.integrate(f, (x, 0, 1))

    covariance = mean(x * x**p) - mean(x) * mean(x**p)
    variances = (mean(x**2) - mean(x) ** 2) * (mean(x ** (2 * p)) - mean(x**p) ** 2)
    stated = sympy.sqrt(3 * (1 + 2 * p)) / (2 + p)
    require(sympy.simplify(covariance**2 / variances - stated**2) == 0, f"the square is {sympy.simplify(covariance**2 / variances)}")
    rises = sympy.simplify(sympy.diff(stated**2, p) - 6 * (1 - p) / (2 + p) ** 3)
    require(rises == 0, "r² does not rise in p up to p = 1")
    ends = {f"p = {value}": float(stated.subs(p, value)) for value in (sympy.Rational(1, 2), 1)}
    require(abs(ends["p = 1/2"] - 0.98) < 1e-3 and ends["p = 1"] == 1, f"{ends}")
    return ends | {"p → 0": float(sympy.limit(stated, p, 0))}


@claim("dora-parts", "The pooled correlation is √(b_M b_D) r_b + √((1 − b_M)(1 − b_D)) r_w, with b the shares of the variances between the "
       "checkpoints' means, r_b the correlation of these means and r_w that within checkpoints.", BOOK, "holds", "proved")  # fmt: skip
def pooled_by_parts() -> dict[str, Any]:
    """Deviations from the checkpoints' means are orthogonal to these means, so covariances add. On every run of the record,
    against Pearson's correlation, to rounding."""
    from deltaw.experiments import dora_directions

    by_run = parts_by_run()
    pearson = dora_directions.by_run(directions())
    keys = ["task", "targets", "method", "change", "seed"]
    pearson = pearson[(pearson.view == "pooled") & (pearson.task != "mean")].set_index(keys).correlation
    apart = (by_run.pooled - pearson).abs().max()
    require(len(by_run) == len(pearson) and apart < 1e-12, f"{apart:.1e} from Pearson's correlation")
    return {"runs": len(by_run), "largest difference": apart}


@claim("dora-record-clock", "DoRA's ΔM is the checkpoint's, not the layer's: most of its variance is between checkpoints, while ΔD's is "
       "between layers as much as a random change's.", BOOK, "holds", MEASURED)  # fmt: skip
def clock(method: str = DORA) -> dict[str, Any]:
    """Looked for afterwards. On query and value the share of the variance between checkpoints, beside the null's; and at the
    end of SST-2's runs the largest layer's over the least, of ΔM and of ΔD."""
    from deltaw.experiments import dora_directions

    trained, null = (mean_parts().loc[method, change] for change in ("trained", "null"))
    require(trained.b_M > 0.8 and null.b_M < 0.55, f"of ΔM: {trained.b_M:.2f}, null {null.b_M:.2f}")
    require(abs(trained.b_D - null.b_D) < 0.02, f"of ΔD: {trained.b_D:.2f}, null {null.b_D:.2f}")
    table = dora_directions.points(directions())
    at_end = table.query("task == 'sst2' and targets == @QV and step == step.max() and change != 'random, full rank'",
                         local_dict={"QV": QV})  # fmt: skip
    layers = at_end[at_end.method == method].groupby(["change", "layer"])[["ΔM", "ΔD"]].mean()
    spread = (layers.groupby("change").max() / layers.groupby("change").min()).rename(index=lambda name: name.split(",")[0])
    require(spread["ΔM"]["trained"] < 1.15 and spread["ΔM"]["random"] > 2 and spread["ΔD"]["trained"] > 2, f"{spread}")
    return {"between checkpoints, of ΔM": (trained.b_M, null.b_M), "of ΔD": (trained.b_D, null.b_D),
            "largest layer over least": {name: column.to_dict() for name, column in spread.items()}}  # fmt: skip


@claim("dora-record-kinds", "In each of the six kinds of matrix, all layers trained, LoRA's pooled correlation is within 0.01 of its "
       "null's, full fine-tuning's within 0.1, and DoRA's at least 0.2 below.", BOOK, "holds", MEASURED)  # fmt: skip
def kinds(dora: str = DORA) -> dict[str, Any]:
    """Looked for afterwards: the mean of runs and tasks, without intervals."""
    table = by_kind()
    require(len(table) == 6 and table[LORA].abs().max() < 0.01, f"LoRA: {table[LORA].to_dict()}")
    require(table[FULL].abs().max() < 0.1, f"full fine-tuning: {table[FULL].to_dict()}")
    require(table[dora].max() < -0.2, f"DoRA: {table[dora].to_dict()}")
    return {method: f"{column.min():+.3f} … {column.max():+.3f}" for method, column in table.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Detaching: loss


@lru_cache(maxsize=1)
def detach() -> "pandas.DataFrame":
    from deltaw import results

    return results.load("dora_detach")


@lru_cache(maxsize=2)
def differences(margin: float = 0.01) -> "pandas.DataFrame":
    """Detached − exact, by task and quantity."""
    from deltaw.experiments import dora_detach

    return dora_detach.detach_differences(detach(), margin=margin).set_index(["task", "quantity"])


def interval(row: Any) -> list[float]:
    return [round(float(row[name]), 4) for name in ("difference", "low", "high")]


@claim("dora-record-detach", "On CoLA, detached and exact DoRA are equivalent, within one point of Matthews' correlation and 0.01 nats of "
       "validation loss.", FIXED, "holds", MEASURED)  # fmt: skip
def cola(margin: float = 0.01) -> dict[str, Any]:
    """The primary endpoint, by two one-sided tests over ten seeds. In the correlation it is close: p is 0.0485, and the 95 %
    interval, which is wider than what the tests ask for, ends beyond the margin, on the side of the detached."""
    table = differences(margin).loc["cola"]
    require(bool((table.verdict == "equivalent").all()), f"{table.verdict.to_dict()}")
    first = table.loc["matthews"]
    require(interval(first) == [0.0054, -0.0002, 0.0110] and 0.04 < first.p_equivalent < 0.05, shown(first, digits=4, prefix=""))
    require(interval(table.loc["loss"]) == [-0.0003, -0.0019, 0.0012], shown(table.loc["loss"], digits=4, prefix=""))
    return {name: f"{shown(row, digits=4, prefix='')}, p of equivalence {row.p_equivalent:.4f}" for name, row in table.iterrows()}


@claim("dora-detach-accuracy", "Taking the norm as a constant makes no noticeable difference in accuracy.", PAPER + "section 4.3, Table 7",
       "holds if CoLA is meant: on digits turned by 90° it costs 14 points after 120 steps and 1.9 after 1200", MEASURED)  # fmt: skip
def detaching_accuracy(free: str = "cola", costly: str = "digits") -> dict[str, Any]:
    """Tuned alike, ten seeds; on digits turned by 15°, one seed at one rate, it costs nothing again."""
    table = differences()
    measure = {task: table.loc[task].drop("loss").iloc[0] for task in table.index.unique("task")}
    require(all(row.verdict == "equivalent" for task, row in measure.items() if task.startswith(free)), f"on {free}")
    rows = {task: row for task, row in measure.items() if task.startswith(costly)}
    require(len(rows) == 2 and all(row.verdict == "worse" for row in rows.values()), f"on {costly}")
    short, long = (row.difference for row in rows.values())
    require(abs(short + 0.145) < 1e-3 and abs(long + 0.019) < 1e-3, f"{short:.3f} and {long:.3f}")
    little = [on_digits(15, detached, 0.01, steps=60)["accuracy"] for detached in (False, True)]
    require(abs(little[0] - little[1]) < 0.02, f"a cost at 15°: {little}")
    return {task: shown(row, prefix="") for task, row in measure.items()} | {"digits, 15°, exact and detached": little}


@claim("dora-record-digits", "On digits turned by 90°, detached DoRA is worse after 120 steps, and within two points after 1200.", FIXED,
       "holds if the mean is meant: 1.9 points, of which the interval, 1.4 to 2.3, passes two", MEASURED)  # fmt: skip
def digits(task: str = "digits, 1200 steps") -> dict[str, Any]:
    """Worse by more than a point all the same; and not equivalent within two."""
    short, long = differences().loc["digits, 120 steps", "accuracy"], differences(0.02).loc[task, "accuracy"]
    require(short.verdict == "worse" and short.high < -0.1, shown(short, prefix=""))
    require(long.difference > -0.02 > long.low and long.high < -0.01, shown(long, prefix=""))
    require(long.verdict == "worse" and long.p_equivalent > 0.05, f"{long.verdict}, p of equivalence {long.p_equivalent:.3f}")
    return {"120 steps": shown(short, prefix=""), "1200 steps": shown(long, prefix=""), "p of within two points": long.p_equivalent}


# ---------------------------------------------------------------------------------------------------------------------
# Detaching: memory and time


@lru_cache(maxsize=1)
def cells() -> "dict[tuple[str, bool], pandas.DataFrame]":
    """Milliseconds a step, (rounds, arms), by shape and whether it is compiled."""
    from deltaw.experiments.engine import step

    table = detach()
    table = table[table["part"] == "cost"].dropna(axis=1, how="all")
    return {(key["shape"], key["compiled"]): ms for key, ms, _ in step.by_cell(table)}


@lru_cache(maxsize=1)
def costs() -> "pandas.DataFrame":
    """`dora_detach.cost`, by shape, compiled and arm."""
    from deltaw.experiments import dora_detach

    return dora_detach.cost(detach()).set_index(["shape", "compiled", "arm"]).sort_index()


@lru_cache(maxsize=1)
def saved() -> "pandas.DataFrame":
    """`dora_detach.saved`, by shape, compiled and norm."""
    from deltaw.experiments import dora_detach

    return dora_detach.saved(detach()).set_index(["shape", "compiled", "norm"]).sort_index()


def times(one: str, other: str, shape: str = LLAMA, compiled: bool = False) -> tuple[float, float, float]:
    """How many times as long a step of one arm takes as the other's in the same round: median, least, largest."""
    ratio = cells()[shape, compiled][one] / cells()[shape, compiled][other]
    return float(ratio.median()), float(ratio.min()), float(ratio.max())


@claim("dora-record-memory", "On Llama-2-7B's layer detaching saves the five merged weights, 0.262 GiB of what is kept, if the norm is "
       "formed, and less than a twentieth of that if it is factored.", FIXED, "holds", MEASURED)  # fmt: skip
def memory(norm: str = "formed", other: str = "factored") -> dict[str, Any]:
    """Measured on the GPU, eager and compiled, beside the count from the shapes, which was fixed within a tenth."""
    merged = 2 * (3 * 4096**2 + 2 * 4096 * 11008) / 2**30  # GiB, in bf16
    found = {}
    for compiled in (False, True):
        formed, factored = (saved().kept_gib[LLAMA, compiled, name] for name in (norm, other))
        require(abs(formed / merged - 1) < 0.1, f"formed: {formed:.4f} GiB, the shapes give {merged:.4f}")
        require(factored < formed / 20, f"factored: {factored:.4f} GiB")
        found["compiled" if compiled else "eager"] = f"formed {formed:.3f}, factored {factored:.3f} GiB"
    return found | {"from the shapes": merged}


@claim("dora-record-kept", "What DoRA keeps for the backward pass beyond LoRA is, but for a hundredth, the output before the gain, which "
       "∂L/∂m needs: tokens × outputs, on Llama's layer more than the five merged weights.", BOOK, "holds", MEASURED)  # fmt: skip
def kept(tokens: int = 4 * 2048) -> dict[str, Any]:
    """Looked for afterwards. 8192 tokens in bf16 times the 27,392 outputs of the five matrices."""
    outputs = 2 * tokens * (4 * 4096 + 11008) / 2**30  # GiB
    found = {}
    for compiled in (False, True):
        table = costs().loc[LLAMA, compiled].kept_gib
        found["compiled" if compiled else "eager"] = table["DoRA"] - table["LoRA"]
        require(abs((table["DoRA"] - table["LoRA"]) / outputs - 1) < 0.01, f"{found}, the shapes give {outputs:.4f}")
    require(outputs > 1.5 * 0.262, f"{outputs:.3f} GiB")
    return found | {"from the shapes": outputs}


@claim("dora-record-exact-time", "On Llama's layer, eager, the exact gradient takes at most 3 % longer than the detached one.", FIXED,
       "holds", MEASURED)  # fmt: skip
def exact_time(norm: str = "factored") -> dict[str, Any]:
    """With the factored norm, in every round; with the formed one it takes 9 % longer."""
    row, formed = saved().loc[LLAMA, False, norm], saved().loc[LLAMA, False, "formed"]
    require(row.largest < 1.03, f"{row.slower:.3f}, at most {row.largest:.3f} times")
    require(1.08 < formed.slower < 1.10, f"formed: {formed.slower:.3f}")
    return {"factored": (row.slower, row.least, row.largest), "formed": (formed.slower, formed.least, formed.largest)}


@claim("dora-record-lora-time", "On Llama's layer, eager, DoRA takes at most 20 % longer than LoRA.", FIXED, "does not hold",
       MEASURED)  # fmt: skip
def lora_time(bound: float = 1.2) -> dict[str, Any]:
    """29 % in the same round, in none less than 26; compiled it is 4 %."""
    eager, compiled = (times("DoRA", "LoRA", compiled=each) for each in (False, True))
    require(eager[1] > bound, f"eager: {eager}")
    require(1.285 < eager[0] < 1.295 and 1.035 < compiled[0] < 1.045, f"eager {eager}, compiled {compiled}")
    return {"eager": eager, "compiled": compiled}


@claim("dora-record-peft", "PEFT's DoRA takes longer than this library's in every cell.", FIXED, "does not hold", MEASURED)
def peft(arm: str = "PEFT DoRA") -> dict[str, Any]:
    """It is the faster of the two where a GPU waits for its host, and on MiniLM when both are compiled."""
    found = {key: times(arm, "DoRA", *key) for key in cells()}
    faster = {key for key, each in found.items() if each[0] < 1}
    require(faster == {(SMALL, False), (LARGE, True)}, f"{found}")
    require(found[LARGE, True][2] < 1 and found[LLAMA, False][1] > 1.3 and found[LARGE, False][1] > 1.6, f"{found}")
    bf16 = times("PEFT DoRA bf16", "DoRA")
    require(1 < bf16[0] < 1.04, f"with bf16 adapters on Llama: {bf16}")
    return {f"{shape}, {'compiled' if compiled else 'eager'}": each for (shape, compiled), each in found.items()} | {
        "bf16 adapters, Llama, eager": bf16}  # fmt: skip


@claim("dora-record-norm-time", "The factored norm makes a detached step of Llama's layer faster than the formed norm does.", BOOK,
       "does not hold", MEASURED)  # fmt: skip
def norm_time(one: str = "formed norm", other: str = "DoRA") -> dict[str, Any]:
    """With 8192 tokens it is a matter of three per cent at most, and not the same way in every round."""
    found = {"compiled" if compiled else "eager": times(one, other, compiled=compiled) for compiled in (False, True)}
    for name, (median, least, largest) in found.items():
        require(abs(median - 1) < 0.03 and least < 1 < largest, f"{name}: {median:.3f}, {least:.3f} to {largest:.3f}")
    return found
