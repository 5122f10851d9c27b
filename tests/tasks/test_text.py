"""Sentence classification from parquet files of our own making, and from a Hub that is only played."""

import pandas as pd
import pytest
import torch

from deltaw.tasks import text
from deltaw.tasks.minilm import _folder
from deltaw.tasks.text import SOURCES


@pytest.fixture(scope="module", autouse=True)
def base():
    try:
        _folder()
    except RuntimeError:
        pytest.skip("neither the wheel nor the Hub is there")


def write(folder, name, labels):
    (folder / name).mkdir(parents=True)
    for split in ("train", "validation"):
        rows = pd.DataFrame({"sentence": [f"{split} sentence {i}" for i in range(len(labels))], "label": labels})
        rows.to_parquet(folder / name / f"{split}.parquet")


@pytest.mark.parametrize("name", SOURCES)
def test_a_local_folder(tmp_path, name):
    classes = SOURCES[name].num_labels
    write(tmp_path, name, list(range(classes)) * 2)
    task = text(name, data_dir=tmp_path, length=8)
    assert task.num_labels == classes
    for examples in (task.train, task.held_out):
        assert examples["input_ids"].shape == examples["attention_mask"].shape == (2 * classes, 8)
        assert examples["labels"].tolist() == list(range(classes)) * 2
    assert not torch.equal(task.train["input_ids"], task.held_out["input_ids"])
    assert task.model().classifier.out_features == classes


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    write(tmp_path, "cola", [0, 1])
    monkeypatch.setenv("DELTAW_DATA", str(tmp_path))
    assert len(text("cola").train["labels"]) == 2


@pytest.mark.parametrize("name", SOURCES)
def test_the_hub_s_columns_and_splits(name, monkeypatch):
    source, asked = SOURCES[name], []

    def load_dataset(path, config, revision):
        asked.append((path, config, revision))
        rows = {source.sentence: ["one", "two"], source.label: [0, 1], "idx": [0, 1]}
        return {"train": rows, source.validation: {**rows, source.label: [1, 0]}}

    monkeypatch.delenv("DELTAW_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = text(name, length=8)
    assert asked == [source[:3]]
    assert task.train["labels"].tolist() == [0, 1] and task.held_out["labels"].tolist() == [1, 0]


def test_cola_has_matthews_correlation(tmp_path):
    for name in ("cola", "sst2"):
        write(tmp_path, name, [0, 1])
    logits = torch.eye(2)[[0, 0, 1, 1, 1, 0]]  # (6, 2): predictions 0 0 1 1 1 0
    labels = torch.tensor([0, 1, 1, 1, 0, 0])  # TP 2, TN 2, FP 1, FN 1
    cola, sst2 = (text(name, data_dir=tmp_path, length=8).metrics(logits, labels) for name in ("cola", "sst2"))
    assert cola["matthews"] == pytest.approx((2 * 2 - 1 * 1) / 9)
    assert cola["accuracy"] == pytest.approx(4 / 6) and "matthews" not in sst2


def test_unknown_names_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="'mnli'"):
        text("mnli")
    with pytest.raises(FileNotFoundError, match="train.parquet"):
        text("cola", data_dir=tmp_path)


def test_without_a_hub_the_error_says_what_helps(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.delenv("DELTAW_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(RuntimeError, match="nyu-mll/glue.*DELTAW_DATA"):
        text("cola")


def test_labels_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path, "cola", [0, 2])
    with pytest.raises(ValueError, match="0 … 1"):
        text("cola", data_dir=tmp_path)
