"""What a table for a page keeps and breaks, and what the figures draw or say is missing."""

import re

import pandas as pd
import pytest

from deltaw import figures

POINTS = pd.DataFrame({"n": [1, 2, 1, 2], "loss": [3.0, 2.0, 4.0, 1.0], "row": ["VeRA", "VeRA", "LoRA", "LoRA"],
                       "low": [2.5, 1.5, 3.0, 0.5], "high": [3.2, 2.2, 6.0, 1.2]})  # fmt: skip


@pytest.fixture
def ax():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def page(table: pd.DataFrame, **how) -> str:
    return figures.roomy(table, **how).data


# Tables


@pytest.mark.parametrize("table", [POINTS, pd.DataFrame({"x": ["<b>better</b> [1, 2]"]}, index=["a, fixed"]),
                                   POINTS.set_index(["row", "n"])], ids=["numbers", "html", "two-levels"])  # fmt: skip
def test_a_page_holds_what_the_table_does(table):
    """Its text and its marks, in the same order, but for where lines end."""
    plain = table.to_html(border=0, escape=False)
    found = re.sub(r' style="[^"]*"|</?div[^>]*>', "", page(table)).replace("<br>", " ")
    assert found == re.sub(r' style="[^"]*"', "", plain)


def test_an_interval_has_its_own_line_in_cells_and_labels():
    found = page(pd.DataFrame({"loss [nats]": ["2 [1, 3]"]}, index=["row [0]"]))
    assert all(text in found for text in ("2<br>[1, 3]", "loss<br>[nats]", "row<br>[0]"))


@pytest.mark.parametrize("breaks, expected", [
    ((), "a, fixed b, trained"), ((" fixed",), "a,<br>fixed b, trained"), ((" fixed", " trained"), "a,<br>fixed b,<br>trained")])
def test_a_line_begins_before_what_is_given_and_nowhere_else(breaks, expected):
    assert expected in page(pd.DataFrame({"x": [1]}, index=["a, fixed b, trained"]), breaks=breaks)


def test_every_cell_has_room_and_the_size_is_the_pages():
    found = page(POINTS, size=0.7)
    assert found.count("white-space: nowrap") == found.count("<td ") + found.count("<th ") == POINTS.size + len(POINTS) + POINTS.shape[1] + 1
    assert "font-size: 0.7em" in found and "overflow-x: auto" in found


# Figures


def test_a_line_for_each_value_in_the_tables_order(ax):
    assert figures.lines(POINTS, "n", "loss", by="row", ax=ax, colours={"VeRA": "#123456"}) is ax
    first, second = ax.get_lines()
    assert [line.get_label() for line in (first, second)] == ["VeRA", "LoRA"]
    assert first.get_color() == "#123456" and second.get_color() == figures.COLOURS["LoRA"]
    assert first.get_ydata().tolist() == [3.0, 2.0] and (ax.get_xlabel(), ax.get_ylabel()) == ("n", "loss")


def test_an_interval_ends_where_the_table_says(ax):
    figures.intervals(POINTS, "n", "loss", by="row", low="low", high="high", ax=ax)
    ends = [[bar.get_segments()[0][k][1] for k in (0, 1)] for each in ax.containers for bar in each[2]]
    assert ends == [pytest.approx(pair) for pair in zip(POINTS.low, POINTS.high)]


@pytest.mark.parametrize("column", ["n", "loss", "row"])
def test_lines_name_the_column_that_is_missing(ax, column):
    with pytest.raises(ValueError, match=rf"no column \['{column}'\]; it has"):
        figures.lines(POINTS.drop(columns=column), "n", "loss", by="row", ax=ax)


@pytest.mark.parametrize("column", ["n", "loss", "row", "low", "high"])
def test_intervals_name_the_column_that_is_missing(ax, column):
    with pytest.raises(ValueError, match=rf"no column \['{column}'\]; it has"):
        figures.intervals(POINTS.drop(columns=column), "n", "loss", by="row", low="low", high="high", ax=ax)
