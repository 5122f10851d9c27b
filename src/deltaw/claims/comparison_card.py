"""What is on the decision card (chapter 8): as in `comparison`."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from . import claim, require
from .comparison import BOOK, FULL, HEAD, LORA, MEASURED, all_code, all_rows, differences, frozen
from .comparison_tasks import decoder

if TYPE_CHECKING:
    import pandas

SHAPES = {"Llama-2-7B, 4 × 2048": "Llama-2-7B's layer", "MiniLM, 2048 × 64": "MiniLM's"}  # of `step_cost`, and on the card


@lru_cache(maxsize=2)
def steps(compiled: bool = False) -> "pandas.DataFrame":
    """A step's time over the frozen base's, `step_cost.by_method`'s ratio: (rows, shapes)."""
    from deltaw import results
    from deltaw.experiments import step_cost

    table = step_cost.by_method(results.load("step_cost"))
    table = table[(table["compiled"] == compiled) & table["shape"].isin(list(SHAPES))]
    return table.pivot(index="row", columns="shape", values="ratio")[list(SHAPES)].rename(columns=SHAPES)


@lru_cache(maxsize=1)
def card() -> "pandas.DataFrame":
    from deltaw import decision_card

    return decision_card.budgets(all_code(), cost=steps(), base=frozen())


@lru_cache(maxsize=1)
def around() -> "pandas.DataFrame":
    """`tuned_comparison.sensitivity` of the rows of both records on code."""
    from deltaw.experiments import tuned_comparison

    return tuned_comparison.sensitivity(all_code()).set_index("row")


@claim("comparison-card-choice", "The card names for each budget the row of the lowest loss on code of those that were run, "
       "and with it those rows within the budget that are equivalent to it, or that the record does not tell from it; up to "
       "0.25 % the only other is LoRA-XS of rank 16, with a quarter of VeRA's numbers. Its s is α/r, for rsLoRA α/√r, with α = 8: "
       "for rsLoRA of rank 64 it is 1, as in plain LoRA with α = 64.", BOOK, "holds", MEASURED)  # fmt: skip
def card_choice(column: str = "report") -> dict[str, Any]:
    """Rule and budgets were chosen after the main record was seen. A budget's family is every row within it against the
    lowest."""
    from deltaw import decision_card

    rows, table, settings = all_rows(), card(), all_code().attrs["manifest"]["settings"]
    for one in table.itertuples():
        within = rows[(rows.parameters <= one.limit) & (rows.parameters > 0)]
        require(within[column].idxmin() == one.row, f"{one.budget}: {within[column].idxmin()}, not {one.row}")
        others = [row for row in within.index if row != one.row]
        verdicts = differences(*((row, one.row) for row in others)).droplevel("reference").verdict
        names = {row: decision_card.label(row, settings) for row in others}
        share = rows.parameters / rows.parameters[one.row]
        worse = {(names[row], share[row]) for row in others if verdicts[row] == "worse"}
        require(set(one.worse) == worse and one.others == len(others), f"{one.budget}: worse are {worse}, of {len(others)}")
        for word, said in (("equivalent", one.equivalent), ("not separable", one.unresolved)):
            near = [row for row in others if verdicts[row] == word]
            require(len(said) == len(near), f"{one.budget}: {word} are {near}, not {said}")
            for row in near:
                whole = decision_card.with_scale(names[row], _scale(row))
                require(any(each.split(" (step")[0] == whole for each in said), f"{one.budget}: {whole} is not among {said}")
        require(one.scale == _scale(one.row), f"{one.row}: s = {one.scale}, not {_scale(one.row)}")
    base = decoder().query("row == 'summary' and size == '45m'")["trained"].item()
    require(round(base / 1e6) == 47, f"the decoder has {base:,.0f} numbers")
    first, last = table.iloc[0], table.iloc[-1]
    require(first.worse == (("LoRA-XS, rank 16", 0.25),), f"{first.budget}: {first.worse}")
    require((last.row, last.scale, last.alpha) == ("rsLoRA 64", "1", 64), f"{last.row}: s = {last.scale}, {last.alpha}")
    require(bool(table.alpha.iloc[:-1].isna().all()), f"{table.alpha.tolist()}")
    return {one.budget: f"{decision_card.with_scale(one.row, one.scale)}; equivalent or unresolved: "
                        f"{', '.join(one.equivalent + one.unresolved) or 'none'}; worse: {len(one.worse)} of {one.others}"
            for one in table.itertuples()}  # fmt: skip


def _scale(row: str) -> str:
    """s by its definition, of a row of LoRA, rsLoRA or DoRA; "" of VeRA, which has none."""
    alpha, name = all_code().attrs["manifest"]["settings"]["rank"], row.split()[0]
    if name == "VeRA":
        return ""
    require(name in (LORA, "rsLoRA", "DoRA"), f"the scale of {row}")
    rank = int(row.split()[1]) if " " in row else alpha
    return f"{alpha / rank ** (0.5 if name == 'rsLoRA' else 1):.2g}"


@claim("comparison-card-gap", "The share of full fine-tuning's gain over the untrained base that each row of the card reaches on "
       "code: from 0.66, with 0.2 % of the numbers, to 0.98, with 20 %. The output matrix trained alone, of 4.2 million numbers, "
       "reaches 0.50.", BOOK, "holds", MEASURED)  # fmt: skip
def card_gap(ends: tuple[float, float] = (0.66, 0.98), head: float = 0.50) -> dict[str, Any]:
    table, rows = card(), all_rows()
    gain = frozen() - rows.report[FULL]
    for one in table.itertuples():
        require(abs(one.gap - (frozen() - rows.report[one.row]) / gain) < 1e-9, f"{one.row}: {one.gap}")
    require((round(table.gap.iloc[0], 2), round(table.gap.iloc[-1], 2)) == ends, f"{table.gap.round(3).tolist()}")
    share = table.parameters / rows.parameters[FULL]
    require(bool(table.gap.is_monotonic_increasing) and (round(share.iloc[0], 3), round(share.iloc[-1], 2)) == (0.002, 0.20),
            f"{share.tolist()}")  # fmt: skip
    alone = (frozen() - rows.report[HEAD]) / gain
    numbers = round(rows.with_head[HEAD] / 1e6, 1)
    require((round(alone, 2), numbers) == (head, 4.2), f"{HEAD}: {alone:.3f}, {numbers} million")
    return {one.row: f"{one.gap:.2f}" for one in table.itertuples()} | {HEAD: f"{alone:.2f}"}


@claim("comparison-card-rates", "The card's rates are those around each row's best at which it loses no more than 0.01 nats "
       "on the tuning split of code, in units of the best rate of LoRA of rank 8: a factor of 1.7 to 2.2 from end to end.",
       BOOK, "holds", MEASURED)  # fmt: skip
def card_rates(ends: tuple[float, float] = (1.7, 2.2)) -> dict[str, Any]:
    table, known = card(), around()
    times = table.highest / table.lowest
    require(all(known.lowest[one.row] == one.lowest and known.highest[one.row] == one.highest for one in table.itertuples()),
            "other rates")  # fmt: skip
    require(bool(((table.unit / known.rate[LORA] - 1).abs() < 1e-3).all()), f"{table.unit.tolist()}")
    require((round(times.min(), 1), round(times.max(), 1)) == ends, f"{times.round(2).tolist()}")
    return {one.row: f"{one.lowest / one.unit:.2g} to {one.highest / one.unit:.2g}" for one in table.itertuples()}


@claim("comparison-card-cost", "Where DoRA of rank 16 and rsLoRA of rank 16 are equivalent, DoRA's eager step takes 1.3 times as "
       "long as rsLoRA's on Llama-2-7B's layer and 2.0 times as long on MiniLM's; the card's steps are those of the record.", BOOK,
       "holds", MEASURED)  # fmt: skip
def card_cost(times: tuple[float, float] = (1.3, 2.0)) -> dict[str, Any]:
    """Each over the frozen base's step in the same round. Memory is in the chapter's table, compiled steps as well."""
    known, table = steps(), card()
    for one in table.itertuples():
        require(one.time == tuple(known.loc[one.row]), f"{one.row}: {one.time}")
    found = known.loc["DoRA 16"] / known.loc["rsLoRA 16"]
    require(tuple(found.round(1)) == times, f"{found.to_dict()}")
    return found.round(2).to_dict() | {one.row: ", ".join(f"{each:.2f}" for each in one.time) for one in table.itertuples()}
