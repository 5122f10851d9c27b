"""What a name stands for: a task of two sets, its budget, and the hashes of its data."""


from deltaw.experiments.engine import subjects
from deltaw.experiments.engine.subjects import hashes, subject
from deltaw.experiments.engine.tuning import SMALL_CODE, Budget, Budgets

SMALL = Budgets(limit=24, length=8, **SMALL_CODE)


def test_digits():
    found = subject("digits", SMALL)
    assert found.task.angle == 90 and found.task.sets == {"tune": 259, "report": 500} and found.head == ("classifier",)
    assert found.measure == "accuracy" and found.budget.length == 1
    assert hashes(["digits"], SMALL).keys() == {"digits"}


def test_code_lm():
    found = subject("code_lm", SMALL)
    assert list(found.task.held_out) == ["tune", "report", "python"] and found.task.blocks == 4 and found.head == ()
    assert (found.measure, found.budget.length, found.task.base.size) == ("loss", 32, "tiny")
    assert hashes(["code_lm"], SMALL).keys() >= {"code_lm cpp", "code_lm tokenizer"}
    large = subject("code_lm", Budgets(code_size="45m", **{k: v for k, v in SMALL_CODE.items() if k != "code_size"}))
    assert 0.5e6 < large.bytes_a_token[0] < 1.5e6  # 3.7 GB a slot of 16 × 256 tokens


def test_texts_are_divided_once_for_all_cells(minilm_folder, monkeypatch):
    subjects._text.cache_clear()
    one, two = subject("docstrings", SMALL), subject("docstrings", Budget(limit=24, length=8))
    assert one.task is two.task and set(one.task.sets) == {"tune", "report"} and one.budget == SMALL
    assert subject("docstrings", Budget(limit=20, length=8)).task is not one.task
    monkeypatch.setenv("DELTAW_DATA", "elsewhere")
    assert subject("docstrings", SMALL).task is not one.task  # another folder may hold other sentences
