"""Text classification from the Hub, or from a local folder of parquet files."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

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


class TextTask(ClassificationTask):
    """Which class is the sentence of? Inputs: input_ids and attention_mask, both (batch, length) int64."""

    def __init__(self, name: str, train, held_out, num_labels: int, length: int):
        super().__init__(*({**tokenize(sentences, length), "labels": torch.tensor(labels)}
                           for sentences, labels in (train, held_out)), num_labels=num_labels)
        self.name, self.length = name, length

    def model(self) -> nn.Module:
        """A `MiniLMClassifier`: pre-trained encoder, new classifier."""
        return minilm(num_labels=self.num_labels)

    def metrics(self, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Loss and accuracy; for cola Matthews' correlation too, GLUE's measure, because its classes are uneven."""
        metrics = super().metrics(predictions, labels)
        if self.name == "cola":
            from sklearn.metrics import matthews_corrcoef

            metrics["matthews"] = float(matthews_corrcoef(labels.numpy(), predictions.argmax(dim=-1).numpy()))
        return metrics


def text(name: str, data_dir: str | Path | None = None, length: int = 64) -> TextTask:
    """A sentence classification task for MiniLM.

    Args:
        name: "cola" (is the sentence grammatical?), "sst2" (a positive review?), "trec" (what kind of answer does
            the question ask for?) or "subj" (is it opinion or plot?).
        data_dir: a folder with NAME/train.parquet and NAME/validation.parquet, columns sentence and label; None
            looks at the environment variable DELTAW_DATA, and without it loads from the Hub or its cache.
        length: tokens per sentence, cut or padded.
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {tuple(SOURCES)}, not {name!r}")
    source, data_dir = SOURCES[name], data_dir or os.environ.get("DELTAW_DATA")
    if data_dir:
        train, held_out = _local(Path(data_dir) / name)
    else:
        train, held_out = _hub(source)
    return TextTask(name, train, held_out, source.num_labels, length)


def _local(folder: Path) -> list[tuple[list[str], list[int]]]:
    import pandas as pd

    splits = []
    for file in (folder / "train.parquet", folder / "validation.parquet"):
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: a local task has train.parquet and validation.parquet in a folder "
                                    "of its name")
        rows = pd.read_parquet(file, columns=["sentence", "label"])
        splits.append((rows["sentence"].tolist(), rows["label"].tolist()))
    return splits


def _hub(source: Source) -> list[tuple[list[str], list[int]]]:
    import datasets

    try:
        splits = datasets.load_dataset(source.path, source.config, revision=source.revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise RuntimeError(f"{source.path} is not on this machine and the Hub cannot be reached; a local folder "
                           "does as well: data_dir, or the environment variable DELTAW_DATA") from error
    return [(list(splits[split][source.sentence]), list(splits[split][source.label]))
            for split in ("train", source.validation)]
