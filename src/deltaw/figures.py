"""From tidy tables to matplotlib axes: every figure of the book that more than one chapter could use.

Figures are drawn on a light ground, which they keep in the dark theme.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas
    from IPython.display import HTML
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by readers who do not tell red from green, and in grey.
COLOURS = {
    "full fine-tuning": "#000000",
    "LoRA": "#0072B2",
    "MoSLoRA": "#009E73",
    "LoRA-XS": "#56B4E9",
    "VeRA": "#D55E00",
    "DoRA": "#CC79A7",
    "DoRA, exact gradient": "#8f4f76",
    "DVoRA": "#E69F00",
    "null": "#8c8c8c",
}
MARKERS = {"LoRA": "o", "MoSLoRA": "s", "LoRA-XS": "^", "VeRA": "D", "DoRA": "v", "DoRA, exact gradient": "<", "DVoRA": "P", "full fine-tuning": "*"}


def use_style() -> None:
    """Set matplotlib up for the book: light ground, no box, sizes that a phone can show."""
    import matplotlib as mpl

    mpl.rcParams |= {
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "savefig.facecolor": "white",
        "figure.figsize": (6.4, 3.8),
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "font.size": 11,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }


def lines(
    table: "pandas.DataFrame",
    x: str,
    y: str,
    by: str,
    ax: "Axes | None" = None,
    colours: dict[str, str] | None = None,
    styles: dict[str, str] | None = None,
    labels: bool = True,
) -> "Axes":
    """One line for each value of column `by`, `y` over `x`, in the order of the table.

    Args:
        table: tidy, one point a row.
        x, y, by: names of its columns.
        ax: to draw on; new ones if None.
        colours, styles: of the lines, by the value of `by`; what is missing is chosen.
        labels: whether to add a legend.

    Raises:
        ValueError: if a column is missing.
    """
    ax = _axes(ax)
    _check_columns(table, (x, y, by))
    for value, rows in table.groupby(by, sort=False):
        style = (styles or {}).get(value, "-")
        ax.plot(rows[x], rows[y], style, color=(colours or {}).get(value, COLOURS.get(value)), label=value, markersize=4)
    ax.set(xlabel=x, ylabel=y)
    if labels:
        ax.legend()
    return ax


def intervals(table: "pandas.DataFrame", x: str, y: str, by: str, low: str, high: str, ax: "Axes | None" = None) -> "Axes":
    """One point with a vertical interval for each row, named at its side by column `by`.

    Args:
        table: tidy, one point a row; columns `low` and `high` are the ends of the interval.
        x, y, by, low, high: names of its columns.
        ax: to draw on; new ones if None.

    Raises:
        ValueError: if a column is missing.
    """
    ax = _axes(ax)
    _check_columns(table, (x, y, by, low, high))
    for _, row in table.iterrows():
        name = row[by]
        ends = [[row[y] - row[low]], [row[high] - row[y]]]
        ax.errorbar(row[x], row[y], yerr=ends, fmt=MARKERS.get(name, "o"), color=COLOURS.get(name, "#444444"),
                    capsize=3, markersize=7, label=name)  # fmt: skip
    ax.set(xlabel=x, ylabel=y)
    ax.legend()
    return ax


def symmetry(table: "pandas.DataFrame", ax: "Axes | None" = None) -> "Axes":
    """Optimizers against mixers: is the merged run the unmerged one, and does the theorem say so?

    Args:
        table: one pair a row, as `deltaw.claims.two_forms.compare` makes it: optimizer, mixer, apart (the largest distance
            of any step), equal (is that rounding?) and predicted (is it to be equal?).
        ax: to draw on; new ones if None.

    Raises:
        ValueError: if a column is missing.
    """
    from matplotlib.patches import Rectangle

    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(5.0, 5.8))
    _check_columns(table, ("optimizer", "mixer", "apart", "equal", "predicted"))
    optimizers, mixers = list(dict.fromkeys(table.optimizer)), list(dict.fromkeys(table.mixer))
    for _, row in table.iterrows():
        x, y = mixers.index(row.mixer), optimizers.index(row.optimizer)
        colour = "#56B4E9" if row.equal else "#f6e3cf"
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
        if row.predicted:
            ax.add_patch(Rectangle((x - 0.44, y - 0.43), 0.88, 0.86, fill=False, edgecolor="#000000", linewidth=1.4))
        text = f"{row['apart']:.0e}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}") if row.equal else f"{row['apart']:.2f}"
        ax.text(x, y, text, ha="center", va="center", fontsize=11)
    names = [name.replace(" ", "\n").replace("2\n×", "2 ×").replace("permutation", "permu-\ntation") for name in mixers]
    ax.set(xlim=(-0.5, len(mixers) - 0.5), ylim=(len(optimizers) - 0.5, -0.5), xticks=range(len(mixers)), xticklabels=names,
           yticks=range(len(optimizers)), yticklabels=optimizers)  # fmt: skip
    ax.xaxis.tick_top()
    ax.tick_params(axis="x", labelsize=9)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax


def roomy(table: "pandas.DataFrame", size: float = 0.85, breaks: Iterable[str] = (" [",)) -> "HTML":
    """A table for a page: room between its columns, no line broken but where it may be, scrolled on a phone.

    Args:
        table: of text or numbers; HTML in it stays HTML.
        size: of the letters, the page's being 1.
        breaks: before what a new line begins, in place of its space; the default puts intervals on their own line.
    """
    from IPython.display import HTML

    page = table.to_html(border=0, escape=False)
    for text in breaks:
        page = page.replace(text, f"<br>{text.lstrip()}")
    room = "padding: 0.2em 0.3em; text-align: right; white-space: nowrap"
    page = re.sub(r"<(th|td)\b", rf'<\1 style="{room}"', page)
    return HTML(f'<div style="font-size: {size}em; overflow-x: auto">{page}</div>')


def _axes(ax: "Axes | None") -> "Axes":
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots()
    return ax


def _check_columns(table: "pandas.DataFrame", names: Iterable[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {missing}; it has {list(table.columns)}")
