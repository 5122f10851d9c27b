"""Rotated digits: real images, an honest split, a base that knows them upright."""

import pytest
import torch

from deltaw.tasks import digits
from deltaw.tasks.digits import _images, fingerprint
from deltaw.train import Recipe, evaluate, fit


@pytest.fixture(scope="module")
def task():
    return digits()


def test_shapes_and_ranges(task):
    for examples, count in ((task.train, 1297), (task.held_out, 500)):
        assert examples["pixels"].shape == (count, 64) and examples["pixels"].dtype == torch.float32
        assert examples["labels"].shape == (count,) and examples["labels"].dtype == torch.int64
        assert 0 <= examples["pixels"].min() and examples["pixels"].max() <= 1
        assert set(examples["labels"].tolist()) == set(range(10))


@pytest.mark.parametrize("angle", [0, 30, 90, -45, 180])
def test_every_angle_has_the_same_images_on_the_same_side(angle):
    for upright, turned in zip(_images(0), _images(angle)):
        assert torch.equal(upright["labels"], turned["labels"])
        ink, left = upright["pixels"].sum(dim=1), turned["pixels"].sum(dim=1)
        if angle % 90 == 0:
            torch.testing.assert_close(left, ink)
        else:  # a little is lost at the corners
            assert 0.9 * ink.mean() < left.mean() <= ink.mean()


def test_no_validation_image_is_a_training_image(task):
    train = {tuple(row) for row in task.train["pixels"].tolist()}
    assert not train & {tuple(row) for row in task.held_out["pixels"].tolist()}


def test_both_ways_of_turning_go_anticlockwise():
    exact, interpolated = _images(90)[0]["pixels"], _images(90.001)[0]["pixels"]
    torch.testing.assert_close(interpolated, exact, rtol=0, atol=0.02)
    corner = torch.zeros(8, 8)
    corner[0, 7] = 1  # upper right goes to the upper left
    image, turned = _images(0)[0]["pixels"].view(-1, 8, 8), exact.view(-1, 8, 8)
    assert torch.equal(turned[:, 0, 0], (image * corner).sum(dim=(1, 2)))


def test_the_base_is_the_same_each_time_and_nobody_can_change_it(task):
    state = torch.get_rng_state()
    one = task.model()
    with torch.no_grad():
        one.hidden1.weight.zero_()
    two, three = task.model(), digits(angle=45).model()
    assert two.hidden1.weight.any() and two.training
    for (name, a), b in zip(two.named_parameters(), three.parameters()):
        assert torch.equal(a, b) and a.requires_grad, name
    assert torch.equal(torch.get_rng_state(), state)


def test_the_base_knows_upright_digits_and_not_turned_ones(task):
    model = task.model()
    assert evaluate(model, task.upright)["accuracy"] > 0.95
    assert evaluate(model, task)["accuracy"] < 0.3


def test_training_teaches_the_turned_ones(task):
    history = fit(task.model(), task, Recipe(steps=300, learning_rate=1e-3), device="cpu")
    assert history.metrics["accuracy"] > 0.7


def test_the_fingerprint_is_of_all_images():
    assert fingerprint() == fingerprint(90) != fingerprint(45) and len(fingerprint()) == 64


def test_width_is_the_network_s():
    model = digits(width=24, base_steps=1).model()
    assert [tuple(w.shape) for w in model.parameters() if w.ndim == 2] == [(24, 64), (24, 24), (10, 24)]


@pytest.mark.parametrize(("name", "value"), [
    ("width", 0), ("width", 1.5), ("base_steps", 0), ("angle", 400), ("angle", float("nan"))])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name) as raised:
        digits(**{name: value})
    assert repr(value) in str(raised.value)
