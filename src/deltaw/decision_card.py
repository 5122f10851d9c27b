"""One picture of what the comparison says: for each budget of trained numbers a method, its rank, rates and cost.

    record = results.load("tuned_comparison")
    card = draw(budgets(record), sentences, footers(record))  # sentences of `notes`
    Path("card.png").write_bytes(png(card))

Rows of another record may be added to those on code, if they were tuned and reported alike.

The choice is by rule, and made on code: of all rows within a budget that were run the one of the lowest mean loss, beside it
those that the record does not tell from it, and whom it is better than. The rule and the budgets were chosen after the record
was seen, and the card says so. Every number comes from the record; `CLAIMS` says which claim checks it.
"""

import re
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
NAMED = 2  # as many rows that are worse are named, more are counted
_SCALE = re.compile(r"s = (\S+) \(α = (\S+)\)")  # of the record's column "scale"
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
        budget (the limit in words), limit (numbers), row, label (with its rank), scale (s, two digits; "" where the row has
        none), alpha (that gives this s with s = α/r, if it is not the α that was set; else NaN), parameters, share, report
        (loss), gap (of full's gain over `base`), rate, lowest, highest (of the rates, as in `sensitivity`), unit (LoRA's own
        rate), whose (it is), equivalent, unresolved (labels of the rows within the budget that are equivalent to it, or not
        told from it, with their scales and steps; a family in each budget), worse (a tuple: label, and numbers in units of
        the best row's), others (rows within the budget), time (a tuple, of `cost`'s columns; empty where it is not known).

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
        verdict = {word: list(apart.loc[apart["verdict"] == word, "row"]) for word in ("equivalent", "not separable", "worse")}
        near = {word: tuple(with_scale(label(row, settings), scale(rows.loc[row, "scale"]))
                            + (f" (step {_times(times[row])})" if row in times else "") for row in names)
                for word, names in verdict.items() if word != "worse"}
        found.append({
            "budget": f"up to {100 * limit:g} %",
            "limit": limit * rows.loc[FULL, "parameters"], "row": best, "label": label(best, settings),
            "scale": scale(own["scale"]), "alpha": plain_alpha(own["scale"], rank(best, settings)),
            "parameters": own["parameters"], "share": own["parameters"] / rows.loc[FULL, "parameters"],
            "report": own["report"], "gap": (zero - ends[best]) / (zero - ends[FULL]), "rate": own["rate"],
            "lowest": rates.loc[best, "lowest"], "highest": rates.loc[best, "highest"], "unit": rows.loc[LORA, "rate"],
            "whose": f"LoRA {settings['rank']}'s",
            "equivalent": near["equivalent"], "unresolved": near["not separable"],
            "worse": tuple((label(row, settings), rows.loc[row, "parameters"] / own["parameters"]) for row in verdict["worse"]),
            "others": len(pairs), "time": times.get(best, ())})
    return pd.DataFrame(found)


def label(row: str, settings: dict) -> str:
    """A row with its rank."""
    if row in (HEAD, FULL):
        return {FULL: "full fine-tuning"}.get(row, row)
    own = rank(row, settings)
    return f"{row.removesuffix(f' {own}')}, rank {own}"


def rank(row: str, settings: dict) -> int:
    """An adapter's: in its name, or what the record set."""
    return rank_of(row) or settings[{"VeRA": "vera", "DVoRA": "vera", "LoRA-XS": "xs"}.get(row, "rank")]


def scale(said: str) -> str:
    """Of a record's "s = 2.828 (α = 8)" the s, to two digits; as it is written if that is no decimal number; "" if none is."""
    found = _SCALE.match(said)
    return "" if found is None else f"{float(found[1]):.2g}" if _decimal(found[1]) else found[1]


def with_scale(name: str, scale: str) -> str:
    """A label with the row's s, if it has one."""
    return f"{name}, s = {scale}" if scale else name


def plain_alpha(said: str, rank: int) -> float:
    """The α that gives a row's s if s = α/r, as plain LoRA has it: rank · s. NaN if that is the α that was set, or none was."""
    found = _SCALE.match(said)
    if found is None or not (_decimal(found[1]) and _decimal(found[2])):
        return float("nan")
    alpha = rank * float(found[1])
    return float("nan") if abs(alpha / float(found[2]) - 1) < 1e-3 else alpha  # the record has four digits


def notes(
    room: pd.DataFrame, every: pd.DataFrame, lora: pd.DataFrame, sized: Sequence[str], few: Sequence[str]
) -> list[str]:
    """What the text tasks say, in sentences.

    Args:
        room, every, lora: of `tuned_comparison.headroom`, `every_pair` and `against_lora`. On the digits a row that differs
            from LoRA in `lora` is said not to where it does not in `every`, the larger family.
        sized, few: rows of about LoRA's size, and of fewer numbers.
    """
    known = [task for task in TASKS if task in set(room["task"]) - {CODE, "digits"}]
    can = room.set_index("task")["can_rank"]
    tasks = [task for task in known if can[task]]
    told = every[every["task"].isin(tasks) & every["verdict"].isin(["better", "worse"])
                 & every["row"].isin(sized) & every["reference"].isin(sized)]
    some = "no two told apart." if told.empty else f"pairs told apart: {len(told)}."
    found = [f"{', '.join(TASKS[task] for task in tasks)}: LoRA and {len(sized) - 1} of its size: {some}"]
    words = {"worse": "behind LoRA", "better": "ahead of LoRA", "equivalent": "equivalent to LoRA",
             "not separable": "not told from LoRA", "not tuned": "not tuned", "stopped": "stopped"}
    verdicts = {row: lora[lora["row"] == row].set_index("task")["verdict"] for row in few}
    said = {row: "; ".join(f"{word} on {', '.join(on)}" for verdict, word in words.items()
                           if (on := [TASKS[task] for task in tasks if own[task] == verdict])) for row, own in verdicts.items()}
    found += [f"{', '.join(row for row in few if said[row] == text)}: {text}." for text in dict.fromkeys(said.values())]
    if "digits" in set(room.loc[room["can_rank"], "task"]):
        found += _of_digits(every, lora, sized, words)
    ends = room.set_index("task")[["low", "high"]]  # of full − head only
    for task in known:
        if not can[task]:
            low, high = ends.loc[task]
            how = "too little ahead of" if low > 0 else "behind" if high < 0 else "not told from"
            found.append(f"{TASKS[task]}: full fine-tuning is {how} the head alone.")
    return found


def _of_digits(every: pd.DataFrame, lora: pd.DataFrame, sized: Sequence[str], words: dict[str, str]) -> list[str]:
    own = lora[(lora["task"] == "digits") & lora["row"].isin(sized)]
    pairs = every[(every["task"] == "digits") & (every["reference"] == LORA)].set_index("row")["verdict"]
    found = []
    for verdict in ("better", "worse"):
        rows = list(own.loc[own["verdict"] == verdict, "row"])
        firm = [row for row in rows if pairs[row] == verdict]
        frail = ", ".join(row for row in rows if row not in firm)
        if firm:
            also = f"; {frail} too, but not among all pairs" if frail else ""
            found.append(f"Digits: {', '.join(firm)} {words[verdict]}{also}.")
        elif frail:
            found.append(f"Digits: {frail} {words[verdict]}, but not among all pairs.")
    return found


def footers(record: pd.DataFrame, base: float | None = None, cost: pd.DataFrame | None = None) -> list[str]:
    """What the bars, the choice, the rates and the steps are of, in sentences.

    Args:
        record, base, cost: as in `budgets`.
    """
    settings = record.attrs["manifest"]["settings"]
    code = record[record["task"] == CODE]
    rows = code.groupby("row", sort=False).first()
    alone = f"the output matrix trained alone ({rows.loc[HEAD, 'with_head'] / 1e6:.1f} M numbers)"
    bars = f"0 % is {alone}, not the untrained base."
    if base is not None:
        ends = code[code["phase"] == "report"].groupby("row")["report/loss"].mean()
        reached = f"{(base - ends[HEAD]) / (base - ends[FULL]):.0%}".replace("%", " %")
        bars = f"0 % is the untrained base; {alone} reaches {reached}."
    ranks = {LORA: [settings["rank"]]}
    for row in rows.index:
        if own := rank_of(row):
            ranks.setdefault(row.split()[0], [settings["rank"]] if row.split()[0] in rows.index else []).append(own)
    spans = "; ".join(f"{name} {', '.join(map(str, sorted(own)))}" for name, own in ranks.items())
    tried = [each for own in ranks.values() for each in own]
    lacking = []
    for name, own in ranks.items():
        where = [f"below rank {min(own)}"] * (min(own) > min(tried)) + [f"above rank {max(own)}"] * (max(own) < max(tried))
        lacking += [f"{name} {' or '.join(where)}"] if where else []
    whole = "\N{NO-BREAK SPACE}".join  # by spaces at which no line is broken
    rates = (f"Rates (at most {MARGIN:g} nats lost) are this 47 M model's: AdamW, {whole(['α', '=', str(settings['rank'])])} "
             f"({whole(['s', '=', 'α/r'])}, rsLoRA's α/√r), bf16, {settings['code_steps']} updates. Do not copy them: tune yours. "
             f"{whole(['×', 'LoRA', str(settings['rank'])])}'s is for going from one row to another.")
    found = [f"Bars: 100 % is full fine-tuning; {bars}", "Rule and budgets chosen after the record was seen.",
             f"Ranks run: {spans}; every other row at one only."]
    found += [f"Not run: {'; '.join(lacking)}."] if lacking else []
    found.append(rates)
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

    write(left, 0.62, "Which adapter?", 28, weight="bold")
    write(left, 0.96, "A decoder of 47 M learns C++ after Python. Rates tuned", 14, FAINT)
    write(left, 1.21, "alike; in each budget of numbers the best row of those run.", 14, FAINT)
    y, step = 1.38, 1.1
    for one in table.itertuples():
        ax.plot((left, right), (y, y), color="#bdbdbd", linewidth=0.8)
        write(left, y + 0.33, f"{with_scale(one.label, one.scale)}$^a$", 18, weight="bold")
        write(right - 1.25, y + 0.33, one.budget, 14, FAINT, ha="right")
        write(right, y + 0.33, f"{one.gap:.0%}$^b$".replace("%", " %"), 18, FILL, weight="bold", ha="right")
        ax.add_patch(Rectangle((left, y + 0.42), right - left, 0.1, color=EMPTY, linewidth=0))
        ax.add_patch(Rectangle((left, y + 0.42), (right - left) * min(one.gap, 1), 0.1, color=FILL, linewidth=0))
        time = f" · step {_times(one.time)}$^e$" if one.time else ""
        write(left, y + 0.76, f"{_percent(one.share)} of numbers · rate {_range(one)} × {one.whose}$^c${time}", 13.5)
        write(left, y + 1.02, f"{_rivals(one)}$^a$", 14, FAINT)
        y += step
    ax.plot((left, right), (y, y), color="#bdbdbd", linewidth=0.8)
    y += 0.33
    write(left, y, "Other tasks (MiniLM; digits: a small network)$^d$", 16, weight="bold")
    for sentence in sentences:
        for line in wrap(sentence, 64):
            y += 0.255
            write(left, y, line, 13.5)
    last = [line for sentence in footer for line in wrap(sentence, 75)] + [source]
    for i, line in enumerate(reversed(last)):
        write(left, SIZE[1] - 0.16 - 0.195 * i, line, 12, FAINT)
    return figure


def png(figure: "Figure") -> bytes:
    """The card as a PNG of its fixed size, in 64 colours, which takes a third of the bytes. Closes the figure."""
    import io

    import matplotlib.pyplot as plt
    from PIL import Image

    with io.BytesIO() as file, io.BytesIO() as small, plt.rc_context({"savefig.bbox": None}):
        figure.savefig(file, format="png", dpi=DPI)
        plt.close(figure)
        Image.open(file).convert("RGB").quantize(64).save(small, format="png", optimize=True)
        return small.getvalue()


def _rivals(one) -> str:
    """What became of the other rows within a budget."""
    found = [] if pd.isna(one.alpha) else [f"s as in LoRA with α = {one.alpha:.3g}"]
    near = (("equivalent", one.equivalent), ("not told apart", one.unresolved))
    found += [f"{word}: {', '.join(rows)}" for word, rows in near if rows]
    number, others = len(one.worse), bool(one.equivalent or one.unresolved)
    if others and number:
        found.append(f"{number} worse")
    elif number > NAMED:
        found.append(f"worse: {f'all {number}' if number == one.others else f'{number} of {one.others}'} others run")
    elif number:
        found.append("worse: " + ", ".join(f"{name} ({_two(share)} × its numbers)" for name, share in one.worse))
    return " · ".join(found) or f"others run: {one.others}"


def _decimal(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


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
