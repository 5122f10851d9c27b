"""Source code that every Python machine carries: Python of the installed packages, and the C++ and CUDA headers they bring.

Machines differ in what is installed, so a corpus is known by its hashes. How it is made:

- *Files.* The `.py` files of every installed distribution, as its RECORD lists them, and of the standard library; for
  the target, the headers of the distributions. Not deltaw itself, and nothing in a folder of vendored copies.
- *Removed:* files that are not UTF-8, very short or very long, marked as generated, or like data (long lines, mostly
  digits, much that is not ASCII); Python with C, C++ or CUDA in its strings or comments, or the target would be known
  before. A licence header is cut off, the file stays.
- *Sides.* Whole packages of Python are held out. Of the headers, whole folders are, drawn by the hash of their names:
  "validation", and "tune" for what is chosen. No folder is on two sides.
- *Near-duplicates.* A file is removed if more than half of its distinct lines are in the files kept before it. Lines
  count without blanks, those of less than 20 characters not at all. The training side comes first, then "tune", then
  "validation": what straddles two sides is lost from the one that is measured.
- *Tokens.* A byte-level BPE, trained on the Python of the training side alone. It has never seen C++: otherwise the base
  would have tokens that it was never trained on, and a part of the adaptation would be done by the tokenizer.
"""

import hashlib
import importlib.metadata
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PYTHON = (".py",)
HEADERS = (".h", ".hh", ".hpp", ".hxx", ".cuh", ".inl")
STDLIB = "python"  # what the standard library is called among the packages
HELD_OUT = ("jinja2", "joblib", "networkx", "requests")  # of Python, those that are installed
SHARE = 0.06  # of the bytes that are drawn for a side that is measured
SIZES = (200, 200_000)  # characters of a file
OVERLAP = 0.5  # of a near-duplicate's lines
LINE = 20  # characters, without blanks, from which on a line counts

_ELSEWHERE = {"_vendor", "_vendored", "vendor", "vendored", "third_party", "_third_party", "externals", "extern",
              "site-packages", "__pycache__", "lib2to3", "node_modules"}
_GENERATED = re.compile(r"generated (?:by|from|with|using|file|code)|auto-?\s?generated|@generated|do not (?:edit|modify)",
                        re.IGNORECASE)
_LICENCE = re.compile(r"licen[cs]e|copyright|\(c\) |spdx-|all rights reserved|redistribution", re.IGNORECASE)
_HEAD = {  # a comment at the beginning of what is left of a file
    PYTHON: re.compile(r"\s*(?P<comment>(?:[ \t]*#[^\n]*(?:\n|$))+|[rRuU]?(?P<q>\"\"\"|''').*?(?P=q)[ \t]*(?:\n|$))",
                       re.DOTALL),
    HEADERS: re.compile(r"\s*(?P<comment>(?:[ \t]*//[^\n]*(?:\n|$))+|/\*.*?\*/[ \t]*(?:\n|$)?)", re.DOTALL),
}
_C = ("#include <", '#include "', "#pragma ", "std::", "__global__ ", "__device__ ", "__shared__ ", "__host__ ",
      "static_cast<", "reinterpret_cast<", "template <", "template<", "nullptr", 'extern "C"', "const auto", "const char",
      "const void", "void *", "void*", "char *", "char*", "double*", "float*", "unsigned int", "long long", "at::Tensor",
      "c10::", "torch::")
_TRIPLE = re.compile(r"(\"\"\"|''')(.*?)\1", re.DOTALL)


@dataclass(frozen=True)
class File:
    """A file that was kept, as it was read and cleaned. `unit` is what is on one side as a whole."""

    unit: str
    path: str
    text: str


# ---------------------------------------------------------------------------------------------------------------------
# What there is


def installed(kinds: tuple[str, ...], packages: Iterable[str] = ()) -> Iterator[tuple[str, str, Path]]:
    """(package, path within it, file) of each file of those kinds, in one order on every machine.

    Args:
        kinds: how the files' names end.
        packages: distributions, or "python" for the standard library; none for all but deltaw.

    Raises:
        ValueError: if one of them is not installed.
    """
    found: dict[str, dict[str, Path]] = {STDLIB: {}}
    for distribution in importlib.metadata.distributions():  # of two of one name, the first is imported
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in found or (not packages and name == "deltaw") or (packages and name not in packages):
            continue
        paths = [path for path in distribution.files or () if path.parts[0] != ".." and path.suffix in kinds]
        found[name] = {path.as_posix(): Path(distribution.locate_file(path)) for path in paths}
    if missing := sorted(set(packages) - set(found)):
        raise ValueError(f"packages {missing} are not installed here; the corpus cannot have them")
    if PYTHON == kinds and (not packages or STDLIB in packages):
        root = Path(sysconfig.get_paths()["stdlib"])
        found[STDLIB] = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(found):
        for path, file in sorted(found[name].items()):
            if not _ELSEWHERE & set(path.split("/")[:-1]) and file.is_file():
                yield name, path, file


def unit(package: str, path: str, kinds: tuple[str, ...]) -> str:
    """What stays together: a package of Python; of headers the folder, up to the fourth level."""
    return package if kinds == PYTHON else "/".join([package, *path.split("/")[:-1][:4]])


# ---------------------------------------------------------------------------------------------------------------------
# What is removed


def fault(text: str, kinds: tuple[str, ...]) -> str:
    """Why the file is left out, in a word or two; "" if it is not."""
    if not SIZES[0] <= len(text) <= SIZES[1]:
        return "size"
    if _GENERATED.search(text[:1000]):
        return "generated"
    solid = len(text) - text.count(" ") - text.count("\n")
    if max(map(len, text.split("\n"))) > 400 or len(text) > 100 * (text.count("\n") + 1):
        return "long lines"
    if 4 * sum(map(text.count, "0123456789")) > solid or (not text.isascii() and len(text.encode()) > 1.05 * len(text)):
        return "data"
    return "C in Python" if kinds == PYTHON and _has_c(text) else ""


def _has_c(text: str) -> bool:
    """Three words of C, C++ or CUDA anywhere; or a string of five lines, a third of which end as those of C do."""
    if sum(text.count(word) for word in _C) >= 3:  # many times as fast as a regular expression
        return True
    for match in _TRIPLE.finditer(text):
        lines = [line for line in match[2].split("\n") if line.strip()]
        if len(lines) >= 5 and 3 * sum(line.rstrip().endswith((";", "{")) for line in lines) >= len(lines):
            return True
    return False


def without_licence(text: str, kinds: tuple[str, ...]) -> str:
    """The text without those of its first comments, or Python's first string, that speak of a licence."""
    kept, at = [], 0
    while match := _HEAD[kinds].match(text, at):
        if not _LICENCE.search(match["comment"]):
            kept.append(match[0])
        at = match.end()
    return "".join([*kept, text[at:]]).lstrip("\n")


class Originals:
    """Finds near-duplicates among the files it is asked about, one after the other."""

    def __init__(self):
        self._seen: set[str] = set()

    def take(self, text: str) -> bool:
        """Whether the file is new: at most half of its lines, and not all it has, are in those taken before."""
        lines = {bare for line in text.split("\n") if len(bare := "".join(line.split())) >= LINE}
        if not lines or len(lines & self._seen) > OVERLAP * len(lines):
            return False
        self._seen |= lines
        return True


# ---------------------------------------------------------------------------------------------------------------------
# What is left, by sides


def drawn(sizes: dict[str, int], share: float) -> list[str]:
    """Units with about `share` of all bytes: in the order of their names' SHA-256, each that is not too large for it.

    Raises:
        ValueError: if there is none.
    """
    room, chosen = share * sum(sizes.values()), []
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if sizes[name] <= room:
            chosen.append(name)
            room -= sizes[name]
    if not chosen:
        raise ValueError(f"of {len(sizes)} packages or folders, none is small enough to be held out: each has more than "
                         f"{share:.0%} of the bytes. Take more packages")
    return chosen


def gather(
    kinds: tuple[str, ...], packages: Iterable[str], sides: tuple[str, ...], held_out: Iterable[str] = (),
    share: float = SHARE,
) -> tuple[dict[str, list[File]], Counter]:
    """Read, clean and split.

    Args:
        kinds: `PYTHON` or `HEADERS`.
        packages: as in `installed`.
        sides: "train" first; what comes later is checked for near-duplicates later.
        held_out: units of the last side, as far as they are there. Without one, units are drawn for each side but
            the first.
        share: as in `drawn`.

    Returns:
        The kept files of each side, and how many files were removed for each reason.

    Raises:
        ValueError: a package is not installed, a side is left empty.
    """
    files, removed = [], Counter()
    for package, path, file in installed(kinds, packages):
        try:
            text = file.read_bytes().decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            removed["not UTF-8"] += 1
            continue
        text = without_licence(text, kinds)
        if reason := fault(text, kinds):
            removed[reason] += 1
        else:
            files.append(File(unit(package, path, kinds), f"{package}/{path}", text))
    sizes = Counter()
    for file in files:
        sizes[file.unit] += len(file.text)
    where = {name: sides[-1] for name in held_out if name in sizes}
    for side in () if where else sides[1:]:
        rest = {name: size for name, size in sizes.items() if name not in where}
        where |= dict.fromkeys(drawn(rest, share), side)
    originals, kept = Originals(), {side: [] for side in sides}
    for side in sides:
        for file in files:
            if where.get(file.unit, sides[0]) != side:
                continue
            if originals.take(file.text):
                kept[side].append(file)
            else:
                removed["near-duplicate"] += 1
    if empty := [side for side in sides if not kept[side]]:
        raise ValueError(f"no {'/'.join(kinds)} file is left for {empty} of {len(files)} that were read")
    return kept, removed
