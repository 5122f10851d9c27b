"""Docstrings of the standard library: masked, balanced, split so that nothing is on both sides."""

import re

import pytest
import torch

from deltaw.tasks import docstrings
from deltaw.tasks.docstrings import PACKAGES, _docstrings, _in_module
from deltaw.train import evaluate


@pytest.fixture(scope="module")
def task(minilm_folder):
    return docstrings(length=16)


def test_shapes_are_fixed_and_labels_in_range(task):
    for examples, texts in ((task.train, task.texts), (task.held_out, task.held_out_texts)):
        assert examples["input_ids"].shape == examples["attention_mask"].shape == (len(texts), 16)
        assert examples["labels"].shape == (len(texts),)
        assert set(examples["labels"].tolist()) == set(range(8))


def test_classes_are_about_equal(task):
    counts = torch.bincount(task.train["labels"])
    assert counts.min() > 60 and counts.max() < 2.5 * counts.min()
    assert 0.1 < len(task.held_out_texts) / len(task.texts) < 0.45
    assert (torch.bincount(task.held_out["labels"]) > 10).all()


def test_no_text_is_on_both_sides_or_there_twice(task):
    texts = task.texts + task.held_out_texts
    assert len(set(texts)) == len(texts)


def test_a_definition_is_on_one_side_only(task):
    sides = {}
    for package in PACKAGES:
        for text, where in _docstrings(package):
            for side, texts in (("train", set(task.texts)), ("held out", set(task.held_out_texts))):
                if text in texts:
                    sides.setdefault(where, set()).add(side)
    both = [where for where, found in sides.items() if len(found) > 1]
    # Only a text that the package repeats elsewhere may say otherwise, as it counts for one place.
    assert len(both) <= 0.01 * len(sides)


def test_no_package_s_text_names_it(task):
    for texts, examples in ((task.texts, task.train), (task.held_out_texts, task.held_out)):
        for text, label in zip(texts, examples["labels"].tolist()):
            assert not re.search(rf"\b{task.packages[label]}\b", text, re.IGNORECASE)


def test_the_seed_decides_the_split(task):
    again, other = docstrings(length=16), docstrings(length=16, seed=1)
    assert again.held_out_texts == task.held_out_texts != other.held_out_texts
    assert torch.equal(again.train["input_ids"], task.train["input_ids"])


def test_fewer_packages_and_examples():
    few = docstrings(length=8, packages=["json", "email", "xml"], per_class=20)
    assert few.packages == ("json", "email", "xml") and few.num_labels == 3
    assert len(few.texts) + len(few.held_out_texts) <= 60


def test_the_base_is_the_same_each_time_and_knows_nothing_yet(task):
    one, two = task.model(), task.model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    few = docstrings(length=16, per_class=20)
    assert evaluate(one, few)["accuracy"] < 0.4


def test_docstrings_belong_to_their_top_level_definition():
    import ast

    module = ast.parse('"""M."""\nclass C:\n  """C."""\n  def f(self):\n    """f."""\n    def g():\n      """g."""\n'
                       'async def h():\n  """h."""\nif 1:\n  def i():\n    """i."""\nx = 1\n')
    assert list(_in_module(module)) == [("", "M."), ("C", "C."), ("C", "f."), ("C", "g."), ("h", "h."), ("", "i.")]


@pytest.mark.parametrize(("settings", "value"), [
    ({"packages": ("email",)}, "email"), ({"packages": ("email", "email")}, "email"),
    ({"packages": ("email", "no_such")}, "no_such"), ({"per_class": 5}, "5"), ({"length": 1}, "1")])
def test_bad_settings_are_named(settings, value):
    with pytest.raises(ValueError, match=value):
        docstrings(**settings)
