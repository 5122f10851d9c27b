"""What every in-memory classification task promises."""

import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltaw.tasks import ClassificationTask
from deltaw.tasks.task import characters


@pytest.fixture
def task():
    examples = {"x": torch.arange(10.0)[:, None], "labels": torch.arange(10) % 3}
    return ClassificationTask(examples, {name: tensor[:7] for name, tensor in examples.items()}, num_labels=3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 3)

    def forward(self, x):
        return self.out(x)


def first(task, seed, batch_size, count):
    return list(itertools.islice(task.batches(seed, batch_size), count))


@pytest.mark.parametrize("batch_size", [1, 3, 10, 23])
def test_every_batch_is_full_and_inputs_keep_their_labels(task, batch_size):
    for batch in first(task, 0, batch_size, 12):
        assert batch["x"].shape == (batch_size, 1) and batch["labels"].shape == (batch_size,)
        assert torch.equal(batch["x"][:, 0].long() % 3, batch["labels"])


def test_each_epoch_has_every_example_once_in_a_new_order(task):
    stream = torch.cat([batch["x"][:, 0] for batch in first(task, 0, 5, 6)])
    epochs = stream.view(3, 10)
    assert all(torch.equal(epoch.sort().values, torch.arange(10.0)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_the_seed_alone_decides_the_order(task):
    stream = lambda seed, size: torch.cat([b["x"] for b in first(task, seed, size, 60 // size)])  # noqa: E731
    state = torch.get_rng_state()
    assert torch.equal(stream(0, 4), stream(0, 4))
    assert torch.equal(stream(0, 4), stream(0, 6))  # whatever the batch size
    assert not torch.equal(stream(0, 4), stream(1, 4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_validation_has_every_example_once_in_order(task, batch_size):
    seen = torch.cat([batch["x"] for batch in task.validation(batch_size)])
    assert torch.equal(seen, task.held_out["x"])


def test_the_mean_of_the_losses_is_the_cross_entropy(task):
    model, batch = Net(), first(task, 0, 8, 1)[0]
    losses = task.losses(model, batch)
    assert losses.shape == (8,)
    torch.testing.assert_close(losses.mean(), F.cross_entropy(model(batch["x"]), batch["labels"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inputs_follow_the_model_s_dtype(task, dtype):
    assert task.predict(Net().to(dtype), first(task, 0, 4, 1)[0]).dtype == dtype


def test_metrics_on_a_case_done_by_hand(task):
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.25, 0.25, 0.5]]))
    metrics = task.metrics(logits, torch.tensor([0, 1, 2, 2]))
    assert metrics["accuracy"] == 0.75
    assert metrics["loss"] == pytest.approx(-torch.log(torch.tensor([0.5, 0.8, 0.2, 0.5])).mean().item())


def test_two_sets_are_measured_each_by_itself(task):
    both = task.for_tuning(0.25, report=True)
    n = len(task.train["labels"])
    assert both.sets == {"tune": round(n / 4), "report": 7} and len(both.train["labels"]) == n - round(n / 4)
    logits = torch.randn(round(n / 4) + 7, 3, generator=torch.Generator().manual_seed(0))
    found, parts = both.metrics(logits, both.held_out["labels"]), logits.split(list(both.sets.values()))
    for part, own, alone in zip(both.sets, parts, (task.for_tuning(0.25), task)):
        expected = alone.metrics(own, alone.held_out["labels"])
        assert {name: found[f"{part}/{name}"] for name in expected} == expected
    assert found.examples == {"report/predicted": "".join(map(str, parts[1].argmax(1).tolist())),
                              "report/labels": "".join(map(str, task.held_out["labels"].tolist()))}
    again = pickle.loads(pickle.dumps(found))
    assert again == found and again.examples == found.examples
    assert characters(torch.tensor([0, 9, 10])) == "09:"


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_out_of_range_are_refused(labels):
    good = {"x": torch.zeros(2, 1), "labels": torch.tensor([0, 1])}
    bad = {"x": torch.zeros(2, 1), "labels": torch.tensor(labels)}
    for train, held_out in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match=str(labels[0]) if labels[0] else "3"):
            ClassificationTask(train, held_out, num_labels=3)


def test_no_examples_are_refused():
    good = {"labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="not none"):
        ClassificationTask(good, {"labels": torch.empty(0, dtype=torch.long)}, num_labels=3)
