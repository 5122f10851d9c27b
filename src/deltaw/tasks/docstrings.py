"""Docstrings of the standard library: which package is this one from? Real text, wherever Python is."""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from .minilm import minilm, tokenize
from .task import ClassificationTask

# Pure-Python packages with many docstrings, part of every CPython 3.11 to 3.14 and of every distribution's minimum.
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")


class DocstringsTask(ClassificationTask):
    """Which package? Inputs: input_ids and attention_mask, both (batch, length) int64.

    Attributes:
        texts, held_out_texts: the docstrings as the model sees them, in the order of the examples.
        packages: the classes; label i is packages[i].
    """

    def __init__(self, texts, held_out_texts, labels, held_out_labels, packages, length):
        super().__init__({**tokenize(texts, length), "labels": torch.tensor(labels)},
                         {**tokenize(held_out_texts, length), "labels": torch.tensor(held_out_labels)},
                         num_labels=len(packages))
        self.texts, self.held_out_texts, self.packages, self.length = texts, held_out_texts, packages, length

    def model(self) -> nn.Module:
        """A `MiniLMClassifier`: pre-trained encoder, new classifier."""
        return minilm(num_labels=self.num_labels)


def docstrings(length: int = 64, packages: tuple[str, ...] = PACKAGES, per_class: int = 200,
               seed: int = 0) -> DocstringsTask:
    """The docstrings of this Python's own standard library, as text classification.

    The packages' own names, and their modules', are masked by "…". The text of a top-level class or function, its
    methods included, is on one side of the split only; a text that two packages have is in neither.
    Counts and texts differ a little between Python versions, shapes do not.

    Args:
        length: tokens per docstring, cut or padded.
        packages: top-level packages of the standard library, two or more.
        per_class: at most so many docstrings of a package, about a fifth of them for validation.
        seed: chooses the split, and the docstrings where a package has more.
    """
    packages = tuple(packages)
    if len(packages) < 2 or len(set(packages)) < len(packages):
        raise ValueError(f"packages must be two or more different names, not {packages!r}")
    if per_class < 10:
        raise ValueError(f"per_class must be at least 10, not {per_class!r}")
    examples = {package: dict(_docstrings(package)) for package in packages}  # text → where it is defined
    everywhere = [text for found in examples.values() for text in found]
    train, held_out = [], []
    for label, (package, found) in enumerate(examples.items()):
        own = [(text, where) for text, where in found.items() if everywhere.count(text) == 1]
        own = sorted(own, key=lambda example: _draw(seed, *example))[:per_class]
        for text, where in own:
            (held_out if _draw(seed, where) < 0.2 else train).append((text, label))
    (texts, labels), (held_out_texts, held_out_labels) = zip(*train), zip(*held_out)
    return DocstringsTask(texts, held_out_texts, labels, held_out_labels, packages, length)


def _draw(seed: int, *words: str) -> float:
    """A number in [0, 1) that depends on its arguments alone, whatever the machine or process."""
    digest = hashlib.sha256("\0".join([str(seed), *words]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@lru_cache(maxsize=None)
def _docstrings(package: str) -> tuple[tuple[str, str], ...]:
    """(text, top-level definition it belongs to) for each docstring of `package`, its names masked."""
    root = Path(sysconfig.get_paths()["stdlib"]) / package
    files = sorted(file for file in root.rglob("*.py") if not {"test", "tests"} & set(file.parts))
    if not files:
        raise ValueError(f"{package!r} is no package of the standard library in {root.parent}")
    modules = {file.stem for file in files} - {"__init__", "__main__"}
    names = re.compile(rf"\b({'|'.join(map(re.escape, sorted({package, *modules})))})\b", re.IGNORECASE)
    found = []
    for file in files:
        for where, text in _in_module(ast.parse(file.read_bytes())):
            text = " ".join(names.sub("…", text).split())
            if len(text) >= 20:
                found.append((text, f"{package}/{file.relative_to(root).as_posix()}:{where}"))
    return tuple(found)


def _in_module(module: ast.Module) -> Iterator[tuple[str, str]]:
    """(name of the top-level definition, docstring) for everything in the module that has one."""
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if text := ast.get_docstring(module):
        yield "", text
    for definition in module.body:
        for node in ast.walk(definition):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield getattr(definition, "name", ""), text
