"""The wide network and its teacher: the same task at every width, whatever the recipe's seed."""

import pytest
import torch

from deltaw import LoRA, Recipe, attach, fit
from deltaw.tasks import teacher_student
from deltaw.train import evaluate

READOUTS = ("1/√n", "1/n")
WIDTHS = (32, 128, 512)


def residuals(task):
    with torch.no_grad():
        return task.train["labels"] - task.model()(task.train["inputs"])  # (points,)


def test_shapes():
    task = teacher_student(24, points=50, held_out=7)
    for examples, count in ((task.train, 50), (task.held_out, 7)):
        assert examples["inputs"].shape == (count, 5) and examples["labels"].shape == (count,)
    model = task.model()
    assert [tuple(p.shape) for p in model.parameters()] == [(24, 5), (24, 24), (1, 24)]
    assert model.features(task.train["inputs"]).shape == (50, 24) and model(task.train["inputs"]).shape == (50,)
    assert sum(len(batch["labels"]) for batch in task.validation(3)) == 7
    assert repr(task) == "TeacherStudentTask(width=24, train=50, validation=7)"


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_loss_at_the_start_is_one_and_labels_keep_their_size(width, readout):
    for seed in range(4):
        task = teacher_student(width, readout, seed, points=200)
        model = task.model()
        assert task.losses(model, task.train).mean().item() == pytest.approx(1, rel=1e-4)
        assert 0.4 < task.train["labels"].square().mean().sqrt().item() < 3
        assert 0.3 < evaluate(model, task)["loss"] < 3  # examples held out are of the same kind


@pytest.mark.parametrize("width", WIDTHS)
def test_features_keep_their_size_and_readouts_do_not(width):
    one, other = (teacher_student(width, readout, 1, points=200) for readout in READOUTS)
    with torch.no_grad():
        z = one.base.features(one.train["inputs"])  # (200, n)
        assert 0.5 < z.square().mean().sqrt() < 1 and 0.5 < one.base.hidden(z).square().mean().sqrt() < 1
    assert one.base.readout.weight.std().item() * width**0.5 == pytest.approx(1, rel=0.3)
    torch.testing.assert_close(one.base.readout.weight, other.base.readout.weight * width**0.5)


def test_both_readouts_have_the_same_to_learn():
    one, other = (teacher_student(128, readout, 2, points=100) for readout in READOUTS)
    torch.testing.assert_close(residuals(one), residuals(other), rtol=1e-4, atol=1e-5)


def test_inputs_are_those_of_the_seed_at_every_width():
    narrow, wide, other = (teacher_student(width, seed=seed, points=30) for width, seed in ((16, 3), (64, 3), (64, 4)))
    for split in ("train", "held_out"):
        assert torch.equal(getattr(narrow, split)["inputs"], getattr(wide, split)["inputs"])
    assert not torch.equal(wide.train["inputs"], other.train["inputs"])
    assert not torch.equal(wide.base.hidden.weight, other.base.hidden.weight)


def test_every_batch_is_all_examples_in_one_order():
    task = teacher_student(16, points=30)
    for seed in (0, 1):
        batches = task.batches(seed, 30)
        for batch in (next(batches), next(batches)):
            assert all(torch.equal(batch[name], task.train[name]) for name in ("inputs", "labels"))
    with pytest.raises(ValueError, match="30 training examples, so batch_size must be that, not 8"):
        next(task.batches(0, 8))


def test_the_base_is_the_same_each_time_and_nobody_can_change_it():
    state = torch.get_rng_state()
    task = teacher_student(16, points=10)
    with torch.no_grad():
        task.model().hidden.weight.zero_()
    again = teacher_student(16, points=10)
    for one, other in zip(task.model().parameters(), again.model().parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad
    assert torch.equal(task.train["labels"], again.train["labels"])
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_of_a_double_model():
    task = teacher_student(16, points=10)
    model = task.model().double()
    assert task.predict(model, task.train).dtype == torch.float64
    assert task.losses(model, task.train).mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("readout", READOUTS)
def test_lora_learns_it(readout):
    task = teacher_student(64, readout, points=100)
    model = attach(task.model(), LoRA(rank=4), targets=["hidden"])
    history = fit(model, task, Recipe(steps=40, batch_size=100, learning_rate=0.03, optimizer="adam"), device="cpu")
    assert history.loss[-1] < 0.3 * history.loss[0] and history.metrics["loss"] < 0.6


@pytest.mark.parametrize(("name", "value"), [
    ("width", 0), ("width", 2.5), ("points", 0), ("held_out", True), ("readout", "1/n²"), ("seed", -1), ("seed", 0.5)])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name) as raised:
        teacher_student(**{"width": 8, name: value})
    assert repr(value) in str(raised.value)
