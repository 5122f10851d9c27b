"""Every statement the book makes, as code that checks it: one file a chapter.

A claim is a function that computes its evidence and raises if the verdict it is listed with is not what it finds.

>>> from deltaw import claims
>>> claims.listing()          # all of them, for readers
>>> claims.get("appendix-eq5").check()
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib import import_module
from textwrap import fill
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

# The files of this folder, and the chapter that each belongs to.
CHAPTERS = {
    "initialization": "02_initialization",
    "dynamics": "03_dynamics",
    "vera": "04_vera",
    "vera_record": "04_vera",
    "dora": "05_dora",
    "dora_record": "05_dora",
    "moslora": "06_moslora",
    "moslora_training": "06_moslora",
    "moslora_record": "06_moslora",
    "moslora_appendix": "07_moslora_appendix",
    "moslora_symmetry": "07_moslora_appendix",
    "appendix_record": "07_moslora_appendix",
    "comparison": "08_comparison",
    "comparison_rates": "08_comparison",
    "comparison_tasks": "08_comparison",
    "comparison_card": "08_comparison",
    "cost": "09_cost",
    "step_cost": "09_cost",
}
SCOPES = ("proved", "measured at this scale")


class ClaimFailed(AssertionError):
    """The evidence does not bear the verdict out."""


@dataclass(frozen=True)
class Claim:
    """A statement, where it is from, and the code that checks it.

    Attributes:
        id: lower-case words joined by hyphens.
        says: the statement in one sentence.
        source: paper, section and equation, or "this book".
        verdict: "holds", "does not hold", or "holds if …".
        scope: "proved" or "measured at this scale".
        check: computes the evidence, a dict of printable values, or raises `ClaimFailed`.
        chapter: the chapter that derives it, as in "07_moslora_appendix".
    """

    id: str
    says: str
    source: str
    verdict: str
    scope: str
    check: Callable[[], dict[str, Any]]
    chapter: str


_claims: dict[str, Claim] = {}


def claim(id: str, says: str, source: str, verdict: str, scope: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the check of a claim.

    Raises:
        ValueError: if the id is taken or malformed, or verdict or scope is none of those there are.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
        raise ValueError(f"a claim's id is lower-case words joined by hyphens, not {id!r}")
    if id in _claims:
        raise ValueError(f"there is a claim {id!r} already")
    if verdict not in ("holds", "does not hold") and not verdict.startswith("holds if "):
        raise ValueError(f"verdict must be 'holds', 'does not hold' or 'holds if …', not {verdict!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, not {scope!r}")

    def register(check: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        file = check.__module__.rpartition(".")[2]
        _claims[id] = Claim(id, says, source, verdict, scope, check, CHAPTERS.get(file, file))
        return check

    return register


def require(condition: bool, what: str) -> None:
    """Raises `ClaimFailed` unless `condition`; unlike `assert` it is there under `python -O`, too."""
    if not condition:
        raise ClaimFailed(what)


def all_claims() -> list[Claim]:
    """Every claim of the book, chapter by chapter, whichever file imports another's helpers."""
    for file in CHAPTERS:
        import_module(f"{__name__}.{file}")
    return sorted(_claims.values(), key=lambda one: one.chapter)


def get(id: str) -> Claim:
    """The claim of that id.

    Raises:
        KeyError: if there is none; the message names those there are.
    """
    known = {one.id: one for one in all_claims()}
    if id not in known:
        raise KeyError(f"there is no claim {id!r}; there are {sorted(known)}")
    return known[id]


def check(*ids: str) -> None:
    """Run the checks of these claims and print their verdicts.

    Raises:
        ClaimFailed: at the first whose evidence does not bear its verdict out. KeyError: if there is no such claim.
    """
    for one in map(get, ids):
        one.check()
        print(fill(f"{one.id}: {one.verdict} ({one.scope})", width=64, subsequent_indent="    "))


def table(chapter: str | None = None) -> "pandas.DataFrame":
    """The claims as a table, one a row: one chapter's, such as "07_moslora_appendix", or all."""
    import pandas

    columns = ["id", "says", "source", "verdict", "scope", "chapter"]
    rows = [{name: getattr(one, name) for name in columns} for one in _of(chapter)]
    return pandas.DataFrame(rows, columns=columns)


class Listing:
    """Claims for a reader: a list in a notebook or on a page, each claim linked to where its chapter derives it."""

    def __init__(self, chosen: list[Claim]):
        self.chosen = chosen

    def __repr__(self) -> str:
        return "\n\n".join(f"{one.says}\n  {one.verdict} · {one.source} · {one.scope} [{one.id}]" for one in self.chosen)

    def _repr_html_(self) -> str:
        items = "".join(
            f'<li><a href="{one.chapter}.html#claim-{one.id}">{escape(one.says)}</a><br>'
            f"<small><b>{escape(one.verdict)}</b> · {escape(one.source)} · {escape(one.scope)}</small></li>"
            for one in self.chosen)  # fmt: skip
        return f'<ul class="claims">{items}</ul>'


def listing(chapter: str | None = None, verdict: str = "") -> Listing:
    """The claims of one chapter, or of all, whose verdict begins with `verdict`."""
    return Listing([one for one in _of(chapter) if one.verdict.startswith(verdict)])


def _of(chapter: str | None) -> list[Claim]:
    if chapter is not None and chapter not in CHAPTERS.values():
        raise ValueError(f"chapter must be one of {sorted(set(CHAPTERS.values()))}, not {chapter!r}")
    return [one for one in all_claims() if chapter in (None, one.chapter)]
