"""The experiments themselves: each keeps the interface, and its `QUICK` runs. The slow file of this folder."""

import dataclasses
import json
from types import ModuleType

import pytest

from deltaw import experiments, results
from deltaw.experiments.engine import harness


@pytest.fixture(params=experiments.NAMES)
def module(request):
    return experiments.experiment(request.param)


def test_the_interface(module):
    question = module.__doc__.strip().partition("\n")[0]
    assert question.endswith("?") and len(question) <= 120
    assert dataclasses.is_dataclass(module.Settings) and module.Settings.__dataclass_params__.frozen
    assert isinstance(module.QUICK, module.Settings) and module.QUICK != module.Settings()
    assert isinstance(getattr(module, "TIMED", False), bool)
    for settings in (module.QUICK, module.Settings()):
        assert settings == from_json(module.Settings, json.loads(json.dumps(harness.plain(settings))))
        cells = harness._cells(module.cells(settings))
        assert cells == module.cells(settings) == json.loads(json.dumps(cells))
    data = harness._data(module.data(module.QUICK))  # the full record's is not on every machine
    assert data == module.data(module.QUICK) and all(len(bytes.fromhex(each)) == 32 for each in data.values())
    assert len(module.cells(module.Settings())) >= len(module.cells(module.QUICK))


def from_json(settings, fields):
    def tuples(value):
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return settings(**{key: tuples(value) for key, value in fields.items()})


def test_quick_runs_and_a_cell_does_not_depend_on_those_before_it(module, quick, tmp_path):
    """So that a record is the same however its run was interrupted: the last cell, which all others came before, measured
    alone."""
    name = module.__name__.rpartition(".")[2]
    table = quick(name)
    assert table.attrs["cpu"] < 60
    cells = module.cells(module.QUICK)
    front = list(dict.fromkeys(key for cell in cells for key in cell))
    assert list(table.columns)[:len(front)] == front and len(table.columns) > len(front)
    if getattr(module, "TIMED", False) or len(cells) == 1:
        return
    alone = ModuleType(name)
    alone.__dict__.update({key: getattr(module, key) for key in ("Settings", "QUICK", "data", "measure")})
    alone.cells = lambda settings: cells[-1:]
    harness.run(alone, quick=True, device="cpu", out=tmp_path, progress=False)
    again = results.load(f"{name}-quick", folder=tmp_path)
    last = table.attrs["manifest"]["cells"][-1]
    assert last["cell"] == cells[-1] and last["rows"] == len(again) and set(again.columns) <= set(table.columns)
    before = table[-len(again):]
    assert before.drop(columns=again.columns).isna().all(axis=None)
    assert json.loads(before[again.columns].to_json(orient="records", double_precision=15)) == json.loads(
        again.to_json(orient="records", double_precision=15))
