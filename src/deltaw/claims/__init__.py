"""Every statement the book makes, as code that checks it: one file a chapter.

A claim is a function that computes its evidence and raises if the verdict it is listed with is not what it finds.

>>> from deltaw import claims
>>> claims.table()            # all of them, for readers
>>> claims.get("appendix-eq5").check()
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

CHAPTERS = ("moslora_appendix", "moslora_symmetry")
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
        chapter: the file it stands in.
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
        _claims[id] = Claim(id, says, source, verdict, scope, check, check.__module__.rpartition(".")[2])
        return check

    return register


def require(condition: bool, what: str) -> None:
    """Raises `ClaimFailed` unless `condition`; unlike `assert` it is there under `python -O`, too."""
    if not condition:
        raise ClaimFailed(what)


def all_claims() -> list[Claim]:
    """Every claim of the book, chapter by chapter."""
    for chapter in CHAPTERS:
        import_module(f"{__name__}.{chapter}")
    return list(_claims.values())


def get(id: str) -> Claim:
    """The claim of that id.

    Raises:
        KeyError: if there is none; the message names those there are.
    """
    known = {one.id: one for one in all_claims()}
    if id not in known:
        raise KeyError(f"there is no claim {id!r}; there are {sorted(known)}")
    return known[id]


def table(chapter: str | None = None) -> "pandas.DataFrame":
    """The claims as a table, one a row: those of one chapter's file, or all."""
    import pandas

    rows = [one for one in all_claims() if chapter in (None, one.chapter)]
    columns = ["id", "says", "source", "verdict", "scope", "chapter"]
    return pandas.DataFrame([{name: getattr(one, name) for name in columns} for one in rows], columns=columns)
