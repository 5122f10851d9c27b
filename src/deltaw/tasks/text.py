"""Text classification from the Hub, or from a local folder of parquet files."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .docstrings import docstrings
from .minilm import minilm, tokenize
from .task import ClassificationTask


class Source(NamedTuple):
    """Where a data set is on the Hub, and what its columns are called there."""

    path: str
    config: str | None
    revision: str | None
    sentence: str
    label: str
    validation: str  # the split to validate on; GLUE's test labels are not public
    num_labels: int


SOURCES = {
    "cola": Source("nyu-mll/glue", "cola", None, "sentence", "label", "validation", 2),
    "sst2": Source("nyu-mll/glue", "sst2", None, "sentence", "label", "validation", 2),
    # TREC is published as a script, which `datasets` no longer runs: the Hub's own conversion to parquet.
    "trec": Source("CogComp/trec", None, "refs/convert/parquet", "text", "coarse_label", "test", 6),
    "subj": Source("SetFit/subj", None, None, "text", "label", "test", 2),
}
MEASURES = {"cola": "matthews"}  # what a task is judged by, where it is not accuracy

Examples = tuple[list[str], list[int]]  # sentences and their labels


class TextTask(ClassificationTask):
    """Which class is the sentence of? Inputs: input_ids and attention_mask, both (batch, length) int64.

    A validation sentence that the training set has too, `words` for `words`, is left out.

    Attributes:
        sentences: of the training examples, in their order.
        dropped: how many validation sentences were left out.
    """

    def __init__(self, name: str, train: Examples, held_out: Examples, num_labels: int, length: int):
        known = {words(sentence) for sentence in train[0]}
        new = [row for row in zip(*held_out) if words(row[0]) not in known]
        if not new:
            raise ValueError(f"{name}: there is no validation sentence that the training set has not")
        super().__init__(*({**tokenize(sentences, length), "labels": torch.tensor(labels)}  # (n, length), (n,)
                           for sentences, labels in (train, zip(*new))), num_labels=num_labels)
        self.name, self.length, self.sentences = name, length, list(train[0])
        self.dropped = len(held_out[0]) - len(new)

    def model(self) -> nn.Module:
        """A `MiniLMClassifier`: pre-trained encoder, new classifier."""
        return minilm(num_labels=self.num_labels)

    def for_tuning(self, share: float = 0.2, seed: int = 0, report: bool = False) -> "TextTask":
        """The same task with the training examples alone, split once more, as `split` does.

        Args:
            share: of the training set's whole sentences, held out; in (0, 1).
            seed: of the sample.
            report: as in `ClassificationTask.for_tuning`.
        """
        train, tune = split(self.sentences, share, seed)
        task = self._divided(train, tune, report)
        task.sentences = [self.sentences[row] for row in train]
        return task

    def _of_one_set(self, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Loss and accuracy; for cola Matthews' correlation too, GLUE's measure, because its classes are uneven."""
        metrics = super()._of_one_set(predictions, labels)
        if MEASURES.get(self.name) == "matthews":
            from sklearn.metrics import matthews_corrcoef

            metrics["matthews"] = float(matthews_corrcoef(labels.numpy(), predictions.argmax(dim=-1).numpy()))
        return metrics


def text(name: str, data_dir: str | Path | None = None, length: int = 64, limit: int | None = None) -> TextTask:
    """A sentence classification task for MiniLM.

    Args:
        name: "cola" (is the sentence grammatical?), "sst2" (a positive review?), "trec" (what kind of answer does
            the question ask for?) or "subj" (is it opinion or plot?); or "docstrings", that task's sentences as a
            text task, for a machine that has no other data.
        data_dir: a folder with NAME/train.parquet and NAME/validation.parquet, columns sentence and label; None
            looks at the environment variable DELTAW_DATA, and without it loads from the Hub or its cache.
        length: tokens per sentence, cut or padded.
        limit: at most so many training and so many validation sentences, always the same; None for all.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 or None, not {limit!r}")
    splits = _read(name, data_dir)
    num_labels = SOURCES[name].num_labels if name in SOURCES else 1 + max(splits[0][1])
    return TextTask(name, *(_some(examples, limit) for examples in splits), num_labels, length)


def fingerprint(name: str, data_dir: str | Path | None = None) -> str:
    """SHA-256 of the sentences and labels that `text(name, data_dir)` reads, all of them, in their order."""
    return hashlib.sha256(json.dumps(_read(name, data_dir)).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# No sentence on both sides, whole or in part


def words(sentence: str) -> str:
    """The sentence's words in lower case, a space between them. Sentences that agree in them count as the same."""
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def split(sentences: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to hold out, so that no sentence of the one side is contained in one of the other.

    SST-2 has the phrases of its sentences as rows of their own, and a short phrase is part of many sentences: groups
    of all that have something in common would be one group. So a sample of the whole sentences is held out, those that
    no other contains, `words` for `words`. What one of them contains is left out of the training side; and no row
    contains one of them, or it would not be whole. Near misses, such as two sentences that differ in a word, are not
    looked for.

    Args:
        sentences: one a row.
        share: of the whole sentences, held out with their duplicates; in (0, 1).
        seed: of the sample, which does not depend on the rows' order.

    Raises:
        ValueError: if `share` is not allowed, or one of the sides would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), not {share!r}")
    rows = [words(sentence) for sentence in sentences]
    known = set(rows) - {""}
    whole, inside = [], set()
    for row in sorted(known, key=lambda row: (-len(row), row)):  # what contains it comes first
        if row not in inside:
            whole.append(row)
            inside |= known & _runs(row)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = {whole[i] for i in order[:max(1, round(share * len(whole)))]}
    contained = {""}.union(*(known & _runs(row) for row in chosen))
    train = [i for i, row in enumerate(rows) if row not in contained]
    held_out = [i for i, row in enumerate(rows) if row in chosen]
    if not train or not held_out:
        raise ValueError(f"{len(whole)} whole sentences are too few to hold out a share of {share}")
    return train, held_out


def _runs(row: str) -> set[str]:
    """The row's words, and every run of them."""
    ends = [space.start() for space in re.finditer(" ", row)] + [len(row)]
    starts = [0] + [end + 1 for end in ends[:-1]]
    return {row[start:end] for i, start in enumerate(starts) for end in ends[i:]}


# ---------------------------------------------------------------------------------------------------------------------
# Where the sentences are from


def _read(name: str, data_dir: str | Path | None) -> list[Examples]:
    """Training and validation set."""
    if name == "docstrings":
        task = docstrings(length=3)  # its sentences are wanted, not its tokens
        return [(list(sentences), examples["labels"].tolist())
                for sentences, examples in ((task.texts, task.train), (task.held_out_texts, task.held_out))]
    if name not in SOURCES:
        raise ValueError(f"name must be one of {(*SOURCES, 'docstrings')}, not {name!r}")
    data_dir = data_dir or os.environ.get("DELTAW_DATA")
    return _local(Path(data_dir) / name) if data_dir else _hub(SOURCES[name])


def _some(examples: Examples, limit: int | None) -> Examples:
    """At most `limit` of them, drawn at random."""
    sentences, labels = examples
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:limit].sort().values.tolist()  # (n,)
    return [sentences[row] for row in rows], [labels[row] for row in rows]


def _local(folder: Path) -> list[Examples]:
    import pandas as pd

    splits = []
    for file in (folder / "train.parquet", folder / "validation.parquet"):
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: a local task has train.parquet and validation.parquet in a folder "
                                    "of its name")
        rows = pd.read_parquet(file, columns=["sentence", "label"])
        splits.append((rows["sentence"].tolist(), rows["label"].tolist()))
    return splits


def _hub(source: Source) -> list[Examples]:
    import datasets

    try:
        splits = datasets.load_dataset(source.path, source.config, revision=source.revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(f"{source.path} is not on this machine and the Hub cannot be reached; a local folder "
                           "does as well: data_dir, or the environment variable DELTAW_DATA") from error
    return [(list(splits[split][source.sentence]), list(splits[split][source.label]))
            for split in ("train", source.validation)]
