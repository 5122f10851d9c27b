"""Sentence classification from parquet files of our own making, and from a Hub that is only played."""

import copy
import itertools
import random

import pandas as pd
import pytest
import torch

from deltaw.tasks import docstrings, text, tokenize
from deltaw.tasks.text import SOURCES, fingerprint, split, words
from deltaw.train import evaluate

pytestmark = pytest.mark.usefixtures("minilm_folder")


def write(folder, name, labels, train=None, validation=None):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for part, sentences in (("train", train), ("validation", validation)):
        sentences = sentences or [f"{part} sentence {i}" for i in range(len(labels))]
        rows = pd.DataFrame({"sentence": sentences, "label": labels[:len(sentences)]})
        rows.to_parquet(folder / name / f"{part}.parquet")


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
        return {"train": rows, source.validation: {source.sentence: ["three", "four"], source.label: [1, 0]}}

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


def test_at_most_so_many_and_always_the_same(tmp_path):
    write(tmp_path, "trec", list(range(6)) * 5)
    whole, some, again = (text("trec", data_dir=tmp_path, length=8, limit=limit) for limit in (None, 7, 7))
    assert len(some.train["labels"]) == len(some.held_out["labels"]) == len(some.sentences) == 7
    assert some.sentences == again.sentences and set(some.sentences) < set(whole.sentences)
    assert [int(sentence.split()[-1]) % 6 for sentence in some.sentences] == some.train["labels"].tolist()
    with pytest.raises(ValueError, match="limit .* not 0"):
        text("trec", data_dir=tmp_path, limit=0)


def test_docstrings_as_a_text_task():
    ours, theirs = text("docstrings", length=8), docstrings(length=8)
    assert ours.num_labels == 8 and ours.sentences == list(theirs.texts)
    assert torch.equal(ours.train["labels"], theirs.train["labels"])
    assert 0 <= ours.dropped == len(theirs.held_out_texts) - len(ours.held_out["labels"]) < 20


def test_validation_sentences_that_the_training_set_has_are_left_out(tmp_path):
    train = ["A film.", "Good", "so it goes", "the end"]
    write(tmp_path, "trec", [0, 1, 2, 3], train, validation=["a  film", "film", "GOOD !", "So it went"])
    task = text("trec", data_dir=tmp_path, length=8)
    assert task.dropped == 2 and task.held_out["labels"].tolist() == [1, 3]
    assert torch.equal(task.held_out["input_ids"], tokenize(["film", "So it went"], 8)["input_ids"])
    assert task.train["labels"].tolist() == [0, 1, 2, 3]
    write(tmp_path, "trec", [0, 1], ["one", "two"], validation=["two.", "One"])
    with pytest.raises(ValueError, match="trec: there is no validation sentence"):
        text("trec", data_dir=tmp_path)


def test_the_fingerprint_is_of_all_that_is_read(tmp_path, monkeypatch):
    def of(labels, *sentences):
        write(tmp_path, "subj", labels, *sentences)
        return fingerprint("subj", tmp_path)

    first = of([0, 1], ["a", "b"], ["c", "a"])
    others = [of([1, 1], ["a", "b"], ["c", "a"]), of([0, 1], ["a", "b!"], ["c", "a"]), of([0, 1], ["b", "a"], ["c", "a"]),
              of([0, 1], ["c", "a"], ["a", "b"])]
    assert len(first) == 64 and len({first, *others}) == 5
    source = SOURCES["subj"]
    rows = [{source.sentence: sentences, source.label: [0, 1]} for sentences in (["a", "b"], ["c", "a"])]
    monkeypatch.delenv("DELTAW_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: dict(zip(("train", source.validation), rows)))
    assert fingerprint("subj") == first  # wherever they are from


# ---------------------------------------------------------------------------------------------------------------------
# The split for tuning


def phrases(seed, sentences=60):
    """Sentences of few different words, some of their phrases, and some duplicates; as in SST-2, but denser."""
    draw = random.Random(seed)
    rows = []
    for _ in range(sentences):
        sentence = draw.choices("abcdefghij", k=draw.randint(1, 9))
        for _ in range(4):
            start, end = sorted(draw.sample(range(len(sentence) + 1), 2))
            rows.append(" ".join(sentence[start:end]))
        rows += [" ".join(sentence), " ".join(sentence).upper() + " ."]
    draw.shuffle(rows)
    return [*rows, "", "..."]


def within(a, b):
    """Is the one contained in the other, word for word?"""
    return f" {words(a)} " in f" {words(b)} " or words(a) == ""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_no_sentence_is_contained_in_one_of_the_other_side(seed, share):
    rows = phrases(seed)
    train, held_out = split(rows, share, seed)
    for i, j in itertools.product(train, held_out):
        assert not within(rows[i], rows[j]) and not within(rows[j], rows[i])
    whole = {words(row) for row in rows if not any(within(row, other) and words(row) != words(other) for other in rows)}
    assert len({words(rows[i]) for i in held_out}) == round(share * len(whole))
    assert {words(rows[i]) for i in held_out} <= whole
    left_out = set(range(len(rows))) - set(train) - set(held_out)  # nothing is, without a reason
    assert all(any(within(rows[i], rows[j]) for j in held_out) for i in left_out)


def test_the_split_s_seed_decides_and_not_the_order_of_the_rows():
    def chosen(rows, seed):
        return {words(rows[i]) for i in split(rows, 0.3, seed)[1]}

    rows = phrases(0)
    assert split(rows, 0.3, 0) == split(list(rows), 0.3, 0)
    assert chosen(rows, 0) == chosen(sorted(rows), 0) != chosen(rows, 1)


def test_a_split_done_by_hand():
    rows = ["it is a good film", "good film", "film", "Good film!", "filming is", "a good filming", "is a", "no film at all"]
    seen = set()
    for seed in range(20):
        train, held_out = split(rows, 0.25, seed)
        seen.add((tuple(train), tuple(held_out)))
    assert seen == {((4, 5, 7), (0,)), ((0, 1, 2, 3, 5, 6, 7), (4,)), ((0, 1, 2, 3, 4, 6, 7), (5,)),
                    ((0, 1, 3, 4, 5, 6), (7,))}


@pytest.mark.parametrize(("rows", "share", "message"), [
    (["a b", "c d"], 0.0, "share"), (["a b", "c d"], 1.0, "share"), (["a b", "a", "b"], 0.5, "1 whole sentences"),
    ([], 0.5, "0 whole")])
def test_splits_that_cannot_be_are_refused(rows, share, message):
    with pytest.raises(ValueError, match=message):
        split(rows, share, 0)


@pytest.fixture
def cola(tmp_path):
    train = [f"{subject} {verb} {thing}" for subject in ("we", "they") for verb in ("see", "hear") for thing in "abcde"]
    write(tmp_path, "cola", [0, 1] * 10, train, validation=[f"you saw {thing}" for thing in "abcdefg"])
    return text("cola", data_dir=tmp_path, length=8)


def test_tuning_has_the_training_examples_alone(cola):
    tuning = cola.for_tuning(0.25)
    train, held_out = split(cola.sentences, 0.25, 0)
    assert len(held_out) == 5 and tuning.sets == {} and cola.sets == {}
    for rows, examples in ((train, tuning.train), (held_out, tuning.held_out)):
        assert all(torch.equal(examples[name], tensor[rows]) for name, tensor in cola.train.items())
    assert tuning.sentences == [cola.sentences[row] for row in train]
    assert torch.equal(tuning.train["input_ids"], tokenize(tuning.sentences, 8)["input_ids"])
    assert cola.for_tuning(0.25, seed=1).sentences != tuning.sentences
    assert len(tuning.for_tuning(0.25).sentences) == 11  # once more


def test_two_sets_in_one_pass_measure_what_each_does_alone(cola):
    both, tune, report = cola.for_tuning(0.25, report=True), cola.for_tuning(0.25), copy.copy(cola)
    assert both.sets == {"tune": 5, "report": 7} and len(both.train["labels"]) == 15
    model = cola.model().double()
    found = evaluate(model, both, batch_size=4)  # a batch that has examples of both
    assert found.keys() == {f"{part}/{name}" for part in ("tune", "report") for name in ("loss", "accuracy", "matthews")}
    labels = "".join(map(str, report.held_out["labels"].tolist()))
    assert found.examples.keys() == {"report/predicted", "report/labels"} and found.examples["report/labels"] == labels
    right = [a == b for a, b in zip(found.examples["report/predicted"], labels, strict=True)]
    assert sum(right) / 7 == pytest.approx(found["report/accuracy"])
    for part, task in (("tune", tune), ("report", report)):
        alone = evaluate(model, task)
        assert {name: found[f"{part}/{name}"] for name in alone} == pytest.approx(alone) and len(alone) == 3
    assert both.for_tuning().sets == {}


def test_a_bank_measures_two_sets(cola):
    import deltaw as dw

    slots = [(dw.LoRA(2, init=init), dw.Recipe(steps=2, batch_size=4, learning_rate=1e-3)) for init in "AB"]
    task = cola.for_tuning(0.25, report=True)
    found = dw.Bank(cola.model(), slots).fit(task, progress=False, device="cpu")
    for (spec, recipe), history in zip(slots, found):
        alone = dw.fit(dw.attach(cola.model(), spec), task, recipe, device="cpu")
        assert history.metrics == pytest.approx(alone.metrics, rel=1e-3) and len(history.metrics) == 6
