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


def test_quick_runs_and_its_cells_do_not_depend_on_their_order(module, quick, tmp_path):
    name = module.__name__.rpartition(".")[2]
    table = quick(name)
    assert table.attrs["cpu"] < 60
    front = list(dict.fromkeys(key for cell in module.cells(module.QUICK) for key in cell))
    assert list(table.columns)[:len(front)] == front and len(table.columns) > len(front)
    if getattr(module, "TIMED", False) or len(table.attrs["manifest"]["cells"]) == 1:
        return
    backward = ModuleType(name)
    backward.__dict__.update({key: getattr(module, key) for key in ("Settings", "QUICK", "data", "measure")})
    backward.cells = lambda settings: module.cells(settings)[::-1]
    harness.run(backward, quick=True, device="cpu", out=tmp_path, progress=False)
    again = results.load(f"{name}-quick", folder=tmp_path)
    assert set(again.columns) == set(table.columns) and len(again) == len(table)
    rows = {json.dumps(each["cell"], sort_keys=True): part for each, part in parts(again)}
    for each, part in parts(table):
        same = rows[json.dumps(each["cell"], sort_keys=True)]
        assert part.to_json(orient="records", double_precision=15) == same[part.columns].to_json(
            orient="records", double_precision=15), each["cell"]


def parts(table):
    """A manifest's cells, each with its rows."""
    at = 0
    for each in table.attrs["manifest"]["cells"]:
        yield each, table[at:at + each["rows"]]
        at += each["rows"]
