"""One picture of what the comparison says: for each budget of trained numbers a method, its rank, rates and cost.

    record = results.load("tuned_comparison")
    card = draw(budgets(record), sentences, footers(record))  # sentences of `notes`
    Path("card.png").write_bytes(png(card))

Rows of another record may be added to those on code, if they were tuned and reported alike.

The choice is by rule, and made on code: of all rows within a budget that were run the one of the lowest mean loss, and beside
it those that the record does not tell from it. The rule and the budgets were chosen after the record was seen. Every number comes from the
record; `CLAIMS` says which claim checks it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from .experiments import tuned_comparison
from .experiments.engine import two_level
from .experiments.tuned_comparison import CODE, FULL, HEAD, LORA, MARGIN, rank_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMITS = (0.0025, 0.005, 0.015, 0.03, 0.06, 0.25)  # of the numbers that full fine-tuning trains
TASKS = {CODE: "code", "cola": "CoLA", "sst2": "SST-2", "trec": "TREC", "subj": "SUBJ", "digits": "digits"}
CLAIMS = {  # the marks on the card
    "a": ("comparison-card-choice",), "b": ("comparison-card-gap",), "c": ("comparison-card-rates",),
    "d": ("comparison-text", "comparison-text-few", "comparison-text-xs", "comparison-digits", "comparison-headroom"),
    "e": ("comparison-card-cost",)}
SIZE, DPI = (7.2, 12.8), 150  # 1080 × 1920 pixels
INK, FAINT, FILL, EMPTY = "#1a1a1a", "#5a5a5a", "#0072B2", "#e6e6e6"


def budgets(
    record: pd.DataFrame, limits: Sequence[float] = LIMITS, cost: pd.DataFrame | None = None, base: float | None = None
) -> pd.DataFrame:
    """Of each budget the row of the lowest mean loss on code.

    Args:
        record: of `tuned_comparison`, with "code_lm" complete.
        limits: shares of the numbers that full fine-tuning trains, rising.
        cost: a step's time in units of the frozen base's, by row (index) and what it was measured on (columns); None where
            it is not known.
        base: the untrained base's loss on "report"; None where it is not known: then the head alone stands for it.

    Returns:
        budget (the limit in words), limit (numbers), row, label (with its rank), parameters, share, report (loss), gap (of
        full's gain over `base`), rate, lowest, highest (of the rates, as in `sensitivity`), unit (LoRA's own rate), whose (it is),
        equivalent, unresolved (labels of the rows within the budget that are equivalent to it, or not told from it, with
        their steps; a family in each budget), time (a tuple, of `cost`'s columns; empty where it is not known).

    Raises:
        ValueError: if the record has no row within a budget, or none called "full", "head only" or "LoRA" on code.
    """
    table = record[record["task"] == CODE]
    settings = record.attrs["manifest"]["settings"]
    rows = tuned_comparison.reported(table).set_index("row")
    if missing := {FULL, HEAD, LORA} - set(rows.index):
        raise ValueError(f"the card needs the rows {FULL!r}, {HEAD!r} and {LORA!r} of {CODE!r}; the record lacks "
                         f"{sorted(missing)}")
    ends, adapters = rows["report"], rows.drop(HEAD)
    zero = ends[HEAD] if base is None else base
    within = {limit: adapters[adapters["parameters"] <= limit * rows.loc[FULL, "parameters"]] for limit in limits}
    if empty := [limit for limit, own in within.items() if own.empty]:
        raise ValueError(f"no row of the record is within a budget of {empty[0]:.2%}")
    chosen = {limit: own["report"].idxmin() for limit, own in within.items()}
    draws = two_level.resampled(table)
    rates = tuned_comparison.sensitivity(table).set_index("row")[["lowest", "highest"]]
    times = {} if cost is None else {row: tuple(own) for row, own in cost.iterrows()}
    found = []
    for limit, best in chosen.items():
        own = rows.loc[best]
        pairs = [(row, best) for row in within[limit].index if row != best]
        apart = two_level.compare(draws, pairs, MARGIN, less_is_better=True) if pairs else pd.DataFrame({"row": [], "verdict": []})
        near = {word: tuple(label(row, settings) + (f" (step {_times(times[row])})" if row in times else "")
                            for row in apart.loc[apart["verdict"] == word, "row"])
                for word in ("equivalent", "not separable")}
        found.append({
            "budget": f"up to {100 * limit:g} %",
            "limit": limit * rows.loc[FULL, "parameters"], "row": best, "label": label(best, settings),
            "parameters": own["parameters"], "share": own["parameters"] / rows.loc[FULL, "parameters"],
            "report": own["report"], "gap": (zero - ends[best]) / (zero - ends[FULL]), "rate": own["rate"],
            "lowest": rates.loc[best, "lowest"], "highest": rates.loc[best, "highest"], "unit": rows.loc[LORA, "rate"],
            "whose": f"LoRA {settings['rank']}'s",
            "equivalent": near["equivalent"], "unresolved": near["not separable"], "time": times.get(best, ())})
    return pd.DataFrame(found)


def label(row: str, settings: dict) -> str:
    """A row with its rank."""
    if row in (HEAD, FULL):
        return {FULL: "full fine-tuning"}.get(row, row)
    rank = rank_of(row) or settings[{"VeRA": "vera", "DVoRA": "vera", "LoRA-XS": "xs"}.get(row, "rank")]
    return f"{row.removesuffix(f' {rank}')}, rank {rank}"


def notes(
    room: pd.DataFrame, every: pd.DataFrame, lora: pd.DataFrame, sized: Sequence[str], few: Sequence[str]
) -> list[str]:
    """What the text tasks say, in sentences.

    Args:
        room, every, lora: of `tuned_comparison.headroom`, `every_pair` and `against_lora`.
        sized, few: rows of about LoRA's size, and of fewer numbers.
    """
    known = [task for task in TASKS if task in set(room["task"]) - {CODE, "digits"}]
    can = room.set_index("task")["can_rank"]
    tasks = [task for task in known if can[task]]
    told = every[every["task"].isin(tasks) & every["verdict"].isin(["better", "worse"])
                 & every["row"].isin(sized) & every["reference"].isin(sized)]
    some = "no two are told apart." if told.empty else f"{len(told)} pairs are told apart."
    found = [f"{', '.join(TASKS[task] for task in tasks)}: of LoRA and {len(sized) - 1} variants of its size {some}"]
    words = {"worse": "behind LoRA", "better": "ahead of LoRA", "equivalent": "equivalent to LoRA",
             "not separable": "not told from LoRA", "not tuned": "not tuned", "stopped": "stopped"}
    verdicts = {row: lora[lora["row"] == row].set_index("task")["verdict"] for row in few}
    said = {row: "; ".join(f"{word} on {', '.join(on)}" for verdict, word in words.items()
                           if (on := [TASKS[task] for task in tasks if own[task] == verdict])) for row, own in verdicts.items()}
    found += [f"{', '.join(row for row in few if said[row] == text)}: {text}." for text in dict.fromkeys(said.values())]
    if "digits" in set(room.loc[room["can_rank"], "task"]):
        own = lora[(lora["task"] == "digits") & lora["row"].isin(sized)]
        found += [f"Digits, a small network: {', '.join(rows)} {words[verdict]}."
                  for verdict in ("better", "worse") if (rows := list(own.loc[own["verdict"] == verdict, "row"]))]
    if flat := [TASKS[task] for task in known if not can[task]]:
        found.append(f"{', '.join(flat)} cannot rank: too little is learnt.")
    return found


def footers(record: pd.DataFrame, base: float | None = None, cost: pd.DataFrame | None = None) -> list[str]:
    """What the bars, the choice, the rates and the steps are of, in sentences.

    Args:
        record, base, cost: as in `budgets`.
    """
    settings = record.attrs["manifest"]["settings"]
    rows = record[record["task"] == CODE].groupby("row", sort=False).first()
    zero = "the untrained base"
    if base is None:
        zero = f"the output matrix trained alone ({rows.loc[HEAD, 'with_head'] / 1e6:.1f} M numbers), not {zero}"
    ranks = {LORA: [settings["rank"]]}
    for row in rows.index:
        if rank := rank_of(row):
            ranks.setdefault(row.split()[0], [settings["rank"]] if row.split()[0] in rows.index else []).append(rank)
    spans = ", ".join(f"{name} {', '.join(map(str, sorted(own)))}" for name, own in ranks.items())
    rates = (f"Rates (at most {MARGIN:g} nats lost) are this 47 M model's: AdamW, α = {settings['rank']}, bf16, "
             f"{settings['code_steps']} updates. Do not copy them: tune yours.")
    found = [f"Bars: 100 % is full fine-tuning; 0 % is {zero}.", f"Ranks run: {spans}; every other row at one only.", rates]
    if cost is not None:
        full = f" Full fine-tuning's: {_times(tuple(cost.loc[FULL]))}." if FULL in cost.index else ""
        found.append(f"Step: eager, over the frozen base's, on {' / '.join(cost.columns)}.{full}")
    return found


def draw(table: pd.DataFrame, sentences: Sequence[str], footer: Sequence[str] = (), source: str = "") -> "Figure":
    """The card, 1080 × 1920 pixels at `DPI`.

    Args:
        table: of `budgets`.
        sentences: of `notes`.
        footer: of `footers`.
        source: what the numbers are from, for the last line.
    """
    from textwrap import wrap

    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    figure = plt.figure(figsize=SIZE, dpi=DPI, layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
    ax.axis("off")
    left, right = 0.4, SIZE[0] - 0.4

    def write(x: float, y: float, text: str, size: float = 14, colour: str = INK, **how) -> None:
        ax.text(x, y, text, fontsize=size, color=colour, va="baseline", **how)

    write(left, 0.72, "Which adapter?", 28, weight="bold")
    write(left, 1.10, "A decoder of 47 M learns C++ after Python. Rates tuned", 14, FAINT)
    write(left, 1.36, "alike; in each budget of numbers the best row of those run.", 14, FAINT)
    y, step = 1.58, 1.15
    for one in table.itertuples():
        ax.plot((left, right), (y, y), color="#bdbdbd", linewidth=0.8)
        write(left, y + 0.33, f"{one.label}$^a$", 18, weight="bold")
        write(right - 1.25, y + 0.33, one.budget, 14, FAINT, ha="right")
        write(right, y + 0.33, f"{one.gap:.0%}$^b$".replace("%", " %"), 18, FILL, weight="bold", ha="right")
        ax.add_patch(Rectangle((left, y + 0.42), right - left, 0.1, color=EMPTY, linewidth=0))
        ax.add_patch(Rectangle((left, y + 0.42), (right - left) * min(one.gap, 1), 0.1, color=FILL, linewidth=0))
        time = f" · step {_times(one.time)}$^e$" if one.time else ""
        write(left, y + 0.77, f"{_percent(one.share)} of numbers · rate {_range(one)} × {one.whose}$^c${time}", 13.5)
        near = [f"{word}: {', '.join(rows)}" for word, rows in (("equivalent", one.equivalent), ("not told apart", one.unresolved))
                if rows]
        write(left, y + 1.05, f"{' · '.join(near) or 'all others tried in this budget are worse'}$^a$", 14, FAINT)
        y += step
    ax.plot((left, right), (y, y), color="#bdbdbd", linewidth=0.8)
    y += 0.36
    write(left, y, "Classifying short texts (MiniLM)$^d$", 16, weight="bold")
    for sentence in sentences:
        for line in wrap(sentence, 64):
            y += 0.26
            write(left, y, line, 13.5)
    last = [line for sentence in footer for line in wrap(sentence, 70)] + [source]
    for i, line in enumerate(reversed(last)):
        write(left, SIZE[1] - 0.18 - 0.2 * i, line, 12, FAINT)
    return figure


def png(figure: "Figure") -> bytes:
    """The card as a PNG of its fixed size. Closes the figure."""
    import io

    import matplotlib.pyplot as plt

    with io.BytesIO() as file, plt.rc_context({"savefig.bbox": None}):
        figure.savefig(file, format="png", dpi=DPI)
        plt.close(figure)
        return file.getvalue()


def _times(time: tuple[float, ...]) -> str:
    return " / ".join(f"{each:.1f}" for each in time) + " ×"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _range(one) -> str:
    return f"{_two(one.lowest / one.unit)}–{_two(one.highest / one.unit)}"


def _two(rate: float) -> str:
    """Two digits."""
    from decimal import Decimal

    return f"{Decimal(f'{rate:.1e}'):f}"
