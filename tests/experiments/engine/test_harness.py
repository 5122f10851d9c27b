"""A record is whole at any moment, and does not tell how often its run was interrupted."""

import dataclasses
import getpass
import json
import math
import os
import random
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_experiment
import pandas as pd
import pyarrow as pa
import pytest
import torch

from deltaw import experiments, results
from deltaw.experiments.engine import harness, machine, record

TESTS = Path(fake_experiment.__file__).parent
NAME = "fake_experiment"


@pytest.fixture(autouse=True)
def calls():
    """The cells measured, by their numbers."""
    fake_experiment.CALLS.clear()
    return fake_experiment.CALLS


def like(**changes):
    """The fake experiment with some of its parts changed."""
    module = ModuleType(NAME)
    parts = {key: value for key, value in vars(fake_experiment).items() if not key.startswith("__")}
    module.__dict__.update(parts | changes)
    return module


def run(out, module=fake_experiment, **options):
    return harness.run(module, out=out, **{"device": "cpu", "progress": False} | options)


def measured_as(rows):
    """An experiment with one cell, which measures these rows."""
    return like(cells=lambda settings: [{"i": 0}], measure=lambda cell, settings, device: rows)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def same(a, b):
    """Two records' tables: values, order of rows and columns, and types, in the file and as a DataFrame."""
    (table, _), (other, _) = record.read(a), record.read(b)
    assert table.schema.equals(other.schema)
    assert record.content_hash(table) == record.content_hash(other)
    pd.testing.assert_frame_equal(*(results.load(path.stem, folder=path.parent) for path in (a, b)), check_exact=True)


def until(stop, error=KeyboardInterrupt):
    """The experiment, which stops in the middle of a cell."""

    def measure(cell, settings, device):
        rows = fake_experiment.measure(cell, settings, device)
        if cell["i"] == stop:
            raise error
        return rows

    return like(measure=measure)


# ---------------------------------------------------------------------------------------------------------------------
# What a record is


def test_the_table_has_every_value_in_its_type(tmp_path, calls):
    path = run(tmp_path)
    assert path == tmp_path / f"{NAME}.parquet" and calls == [0, 1, 2, 3, 4, 5]
    table, _ = record.read(path)
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("i", "int64"), ("name", "string"), ("rank", "int64"), ("whole", "int64"), ("loss", "double"), ("none", "null"),
        ("ok", "bool"), ("some", "int64"), ("grows", "double"), ("late", "string")]
    calls.clear()
    expected = [cell | row for cell in fake_experiment.cells(fake_experiment.Settings())
                for row in fake_experiment.measure(cell, fake_experiment.Settings(), "cpu")]
    for row, should in zip(table.to_pylist(), expected, strict=True):
        for key, value in row.items():
            wanted = should.get(key)
            assert value == wanted or math.isnan(value) and math.isnan(wanted), key
    assert math.copysign(1, table["loss"][6].as_py()) == -1  # −0.0

    frame = results.load(NAME, folder=tmp_path)
    assert list(frame.columns) == table.column_names
    types = {"i": "int64", "rank": "Int64", "whole": "int64", "loss": "float64", "ok": "boolean", "some": "Int64",
             "grows": "float64"}
    assert {key: str(frame[key].dtype) for key in types} == types
    assert frame.some[0] == 2**53 + 1 and frame.some.isna().sum() == 10
    assert frame.ok.tolist()[:3] == [False, pd.NA, True] and frame["name"][0] == "é" and frame.none.isna().all()


def test_the_manifest_says_what_was_run_and_where(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_COMMIT", "abc")
    run(tmp_path, settings=fake_experiment.Settings(n=3))
    manifest = results.manifest(NAME, folder=tmp_path)
    assert json.loads((tmp_path / f"{NAME}.json").read_text()) == manifest
    assert manifest["experiment"] == NAME and manifest["quick"] is False and manifest["complete"] is True
    assert manifest["settings"] == {"n": 3, "scale": 0.5, "names": ["é", ""]}
    assert manifest["data"] == {"numbers": "0" * 64} and manifest["planned_cells"] == 3
    assert [each["cell"] for each in manifest["cells"]] == fake_experiment.cells(fake_experiment.Settings(n=3))
    assert {(each["rows"], each["sitting"]) for each in manifest["cells"]} == {(2, 0)}
    (sitting,) = manifest["sittings"]
    assert sitting["device"] == "cpu" and sitting["name"] is sitting["driver"] is None
    assert (machine.PACKAGE / "bank.py").is_file()  # all of the package, not the part that the file lies in
    assert sitting["commit"] == "abc" and sitting["source"] == machine.source_hash()
    assert sitting["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert 0 <= sum(each["seconds"] for each in manifest["cells"]) <= sitting["seconds"] + 0.01 == manifest["seconds"] + 0.01


def test_the_manifest_names_no_host_user_or_path(tmp_path):
    run(tmp_path)
    text = (tmp_path / f"{NAME}.json").read_text()
    private = {socket.gethostname(), getpass.getuser(), os.path.expanduser("~"), os.getcwd(), str(tmp_path), sys.prefix}
    assert not [word for word in private if len(word) > 2 and word in text] and "/" not in text


def test_quick_is_a_record_of_its_own(tmp_path, calls):
    path = run(tmp_path, quick=True)
    assert path.name == f"{NAME}-quick.parquet" and calls == [0, 1]
    assert results.manifest(path.stem, folder=tmp_path)["quick"] is True
    run(tmp_path)
    assert results.names(tmp_path) == (NAME, f"{NAME}-quick")


def test_global_draws_depend_on_no_earlier_cell(tmp_path):
    def measure(cell, settings, device):
        return [{"drawn": torch.rand(1).item()}]

    state = torch.get_rng_state()
    run(tmp_path / "a", like(measure=measure))
    assert torch.equal(torch.get_rng_state(), state)
    run(tmp_path / "b", like(measure=measure, cells=lambda settings: fake_experiment.cells(settings)[::-1]))
    a, b = (results.load(NAME, folder=tmp_path / each).set_index("i").drawn for each in "ab")
    pd.testing.assert_series_equal(a, b[::-1])


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted


@pytest.mark.parametrize("stop", range(6))
def test_an_exception_loses_the_cell_that_it_was_in(tmp_path, calls, stop):
    whole = run(tmp_path / "whole")
    calls.clear()
    with pytest.raises(RuntimeError) as caught:
        run(tmp_path / "cut", until(stop, RuntimeError("out of memory")))
    assert f"'i': {stop}" in caught.value.__notes__[0]
    cut = tmp_path / "cut" / whole.name
    assert cut.exists() == (stop > 0)
    if stop:
        partial = results.load(NAME, folder=cut.parent, partial=True)
        assert len(partial) == 2 * stop and not partial.attrs["manifest"]["complete"]
    run(cut.parent)
    assert calls == [*range(stop + 1), *range(stop, 6)]
    same(whole, cut)
    manifest = results.manifest(NAME, folder=cut.parent)
    assert [each["sitting"] for each in manifest["cells"]] == [0] * stop + [min(stop, 1)] * (6 - stop)
    assert len(manifest["sittings"]) == min(stop, 1) + 1
    assert manifest["seconds"] == pytest.approx(sum(each["seconds"] for each in manifest["sittings"]), abs=0.01)


KILLED = """
import os, sys
import fake_experiment
from deltaw.experiments.engine import harness, record

when, out = sys.argv[1:]
measure, replace, fsync = fake_experiment.measure, os.replace, os.fsync
count = {"replace": 0, "fsync": 0}


def dies(what, at, call):
    def wrapped(*arguments):
        count[what] += 1
        if count[what] == at:
            os._exit(9)  # as SIGKILL: nothing is tidied up
        return call(*arguments)
    return wrapped


def dying(cell, settings, device):
    if cell["i"] == 3:
        os._exit(9)
    return measure(cell, settings, device)


if when == "in a cell":
    fake_experiment.measure = dying
elif when == "before the table is in place":
    os.replace = dies("replace", 7, replace)
elif when == "between the first two files":
    os.replace = dies("replace", 2, replace)
elif when == "between the last two files":
    os.replace = dies("replace", 12, replace)
elif when == "while a file is written":
    os.fsync = dies("fsync", 7, fsync)
harness.run(fake_experiment, out=out, device="cpu")
"""


MOMENTS = {  # and how many cells are then kept
    "in a cell": 3,
    "before the table is in place": 3,
    "between the first two files": 1,
    "between the last two files": 6,
    "while a file is written": 3,
}


@pytest.mark.parametrize("when", MOMENTS)
def test_a_killed_run_leaves_a_whole_record(tmp_path, calls, when):
    kept = MOMENTS[when]
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, when, str(tmp_path / "cut")]
    died = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert died.returncode == 9, died.stderr.decode()
    partial = results.load(NAME, folder=tmp_path / "cut", partial=True)
    assert len(partial) == 2 * kept
    cut = run(tmp_path / "cut")
    assert calls == list(range(kept, 6))
    assert set(files(tmp_path / "cut")) == {f"{NAME}.parquet", f"{NAME}.json"}
    assert json.loads((tmp_path / "cut" / f"{NAME}.json").read_text()) == record.read(cut)[1]
    same(run(tmp_path / "whole"), cut)


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_any_interruptions(tmp_path, seed):
    """Random columns, each of one kind, some missing here and there, and a run stopped at random."""
    draw = random.Random(seed)
    kinds = {
        "bool": lambda: draw.random() < 0.5,
        "int": lambda: draw.randrange(-(2**63), 2**63),
        "str": lambda: draw.choice("aß\0"),
        "float": lambda: draw.choice([math.nan, math.inf, -0.0, draw.gauss(0, 1)]),
        "number": lambda: draw.choice([draw.randrange(9), draw.random()]),
        "none": lambda: None,
    }
    columns = {f"c{i}": draw.choice(list(kinds)) for i in range(8)}
    cells = [{"cell": i, **({"k": draw.random()} if draw.random() < 0.5 else {})} for i in range(5)]
    rows = [[{"always": i} | {name: kinds[kind]() for name, kind in draw.sample(list(columns.items()), draw.randrange(9))}
             for _ in range(draw.randrange(1, 4))] for i in range(5)]

    def measure(cell, settings, device):
        if stops and cell["cell"] == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return rows[cell["cell"]]

    module = like(cells=lambda settings: cells, measure=measure)
    stops = []
    whole = run(tmp_path / "whole", module)
    stops = sorted(draw.sample(range(5), 3))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", module)
    same(whole, run(tmp_path / "cut", module))
    flat = [cell | row for cell, part in zip(cells, rows) for row in part]
    for kept, given in zip(record.read(whole)[0].to_pylist(), flat, strict=True):
        assert repr({key: value for key, value in kept.items() if value is not None}) == repr(
            {key: float(given[key]) if columns.get(key) == "number" and isinstance(kept[key], float) else given[key]
             for key in kept if given.get(key) is not None})


def test_minutes_stop_between_cells(tmp_path, calls, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def measure(cell, settings, device):
        clock[0] += 25.0  # seconds a cell
        return fake_experiment.measure(cell, settings, device)

    for begun in ([0, 1, 2], [3, 4, 5]):  # the third begins at 50 s, a fourth would at 75 s
        calls.clear()
        path = run(tmp_path, like(measure=measure), minutes=1, progress=None)
        assert calls == begun
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{path}: 3 of 6 cells, 6 rows, 75.0 s (INCOMPLETE, 3 left: run it again to go on, unless other processes are at them)"
    assert second == f"{path}: 6 of 6 cells, 12 rows, 150.0 s"
    manifest = results.manifest(NAME, folder=tmp_path)
    assert [each["seconds"] for each in manifest["cells"]] == [25.0] * 6
    assert [each["seconds"] for each in manifest["sittings"]] == [75.0, 75.0]
    same(run(tmp_path / "whole"), path)


def test_no_minutes_no_file(tmp_path, calls, capsys):
    path = run(tmp_path / "new", minutes=0, progress=None)
    assert not path.exists() and not calls
    assert "0 of 6 cells, 0 rows, 0.0 s (INCOMPLETE, 6 left" in capsys.readouterr().out


def test_a_complete_record_stays_as_it_is(tmp_path, calls, capsys):
    run(tmp_path)
    before, stat = files(tmp_path), (tmp_path / f"{NAME}.parquet").stat()
    calls.clear()
    capsys.readouterr()
    run(tmp_path, progress=None)
    assert files(tmp_path) == before and (tmp_path / f"{NAME}.parquet").stat() == stat and not calls
    assert "nothing to do" in capsys.readouterr().out


def test_on_a_terminal_each_cell_is_seen_elsewhere_one_line_is(tmp_path, capsys):
    run(tmp_path / "a", progress=None)
    quiet = capsys.readouterr()
    assert quiet.err == "" and len(quiet.out.splitlines()) == 1
    run(tmp_path / "b", progress=True)
    assert f"{NAME}:" in capsys.readouterr().err
    run(tmp_path / "c", progress=False)
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Shared by processes

WORKER = """
import sys
import fake_experiment
from deltaw.experiments.engine import harness

harness.run(fake_experiment, out=sys.argv[1], device="cpu")
print(*fake_experiment.CALLS)
"""


def worker(out):
    """What another process says that measures what it can, and the cells it measured."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WORKER, str(out)], env=environment, capture_output=True, text=True, check=True)
    said, cells = done.stdout.splitlines()
    return said, [int(cell) for cell in cells.split()]


@pytest.mark.parametrize("at", [0, 2, 4])
def test_processes_share_the_cells_out(tmp_path, calls, at):
    """Another process comes while this one is at a cell: it leaves that one alone and takes those after it."""
    whole, theirs = run(tmp_path / "whole"), []
    calls.clear()

    def measure(cell, settings, device):
        if cell["i"] == at:
            theirs.append(worker(tmp_path / "shared"))
        return fake_experiment.measure(cell, settings, device)

    shared = run(tmp_path / "shared", like(measure=measure))
    ((said, cells),) = theirs
    assert "5 of 6 cells" in said and "unless other processes are at them" in said
    assert (calls, cells) == ([*range(at + 1)], [*range(at + 1, 6)])
    tables = (results.load(NAME, folder=path.parent) for path in (whole, shared))
    pd.testing.assert_frame_equal(*tables, check_exact=True, check_like=True)  # columns stand as they came
    assert set(files(tmp_path / "shared")) == {f"{NAME}.parquet", f"{NAME}.json"}
    manifest = results.manifest(NAME, folder=tmp_path / "shared")
    assert [each["cell"]["i"] for each in manifest["cells"]] == [*range(6)]
    ours, other = (0, 1) if at else (1, 0)  # in the order in which they first wrote
    assert [each["sitting"] for each in manifest["cells"]] == [ours] * (at + 1) + [other] * (5 - at)
    assert manifest["seconds"] == pytest.approx(sum(each["seconds"] for each in manifest["sittings"]), abs=0.01)


def test_a_claim_ends_with_its_process(tmp_path, calls):
    path = tmp_path / f"{NAME}.parquet"
    with record.claimed(path, 2) as ours:
        assert ours
        assert worker(tmp_path)[1] == [0, 1, 3, 4, 5]
    run(tmp_path)
    assert calls == [2]
    same(run(tmp_path / "whole"), path)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


@dataclasses.dataclass(frozen=True)
class Unplain:
    device: object = torch.device("cpu")
    rate: float = math.nan


@dataclasses.dataclass(frozen=True)
class NotFinite:
    rate: float = math.nan


NOT_GIVEN = {
    "no cells": (like(cells=lambda settings: []), "no cells"),
    "an empty cell": (like(cells=lambda settings: [{}]), "a cell must be a dict with at least one entry, not {}"),
    "a cell twice": (like(cells=lambda settings: [{"i": 1, "j": 2}, {"j": 2, "i": 1}]), "{'j': 2, 'i': 1} is there twice"),
    "a cell of a list": (like(cells=lambda settings: [{"i": [1]}]), r"'i' of a cell must be a bool, .* not a list: \[1\]"),
    "a cell that is NaN": (like(cells=lambda settings: [{"i": math.nan}]), "not finite"),
    "data of numbers": (like(data=lambda settings: {"a": 1}), "not {'a': 1}"),
    "settings no JSON has": (like(Settings=Unplain), "setting device=device"),
    "settings not finite": (like(Settings=NotFinite), "setting rate=nan"),
    "no rows": (measured_as([]), "no rows"),
    "an empty row": (measured_as([{}]), "a row must be a dict with at least one entry, not {}"),
    "a row that is a tuple": (measured_as([(1, 2)]), r"not \(1, 2\)"),
    "a tensor": (measured_as([{"x": torch.ones(())}]), r"'x' of a row .* not a Tensor: tensor\(1.\)"),
    "a list": (measured_as([{"x": [1.0]}]), r"'x' of a row must be a bool, int, float, str or None, not a list: \[1.0\]"),
    "a key that is a number": (measured_as([{1: 1.0}]), "keys of a row must be strings, not 1"),
    "a large integer": (measured_as([{"x": 2**63}]), "64 bits; 9223372036854775808"),
    "the cell's column": (measured_as([{"i": 0, "x": 1}]), r"the cell's own columns \['i'\]"),
    "mixed in a cell": (measured_as([{"x": True}, {"x": 1}]), "column 'x' mixes bool and int64"),
}


@pytest.mark.parametrize("case", NOT_GIVEN)
def test_what_an_experiment_must_not_give(tmp_path, case):
    module, match = NOT_GIVEN[case]
    with pytest.raises(harness.Refused, match=match):
        run(tmp_path, module)
    assert not files(tmp_path)


@pytest.mark.parametrize("before, after, allowed", [
    (1, True, False), (True, 0.5, False), ("a", 1, False), (0.5, "a", False), (2**53 + 1, 0.5, False),
    (1, 0.5, True), (0.5, 1, True), (None, "a", True),
])
def test_mixed_kinds_lose_the_later_cell_only(tmp_path, before, after, allowed):
    module = like(measure=lambda cell, settings, device: [{"x": before if cell["i"] == 0 else after}])
    if allowed:
        run(tmp_path, module, quick=True)
        assert record.read(tmp_path / f"{NAME}-quick.parquet")[0]["x"].to_pylist() == [before, after]
    else:
        with pytest.raises(ValueError, match="mixes|not in range"):
            run(tmp_path, module, quick=True)
        assert len(results.load(f"{NAME}-quick", folder=tmp_path, partial=True)) == 1


OTHER_RUNS = {
    "a setting": ({"settings": fake_experiment.Settings(scale=0.25)}, "settings.scale is 0.5 there and 0.25 here"),
    "a setting in a tuple": ({"settings": fake_experiment.Settings(names=("é", "b"))}, "settings.names is .* there"),
    "fewer cells": ({"settings": fake_experiment.Settings(n=2)}, "settings.n is 6 there and 2 here; planned_cells is 6"),
    "data": ({"module": like(data=lambda settings: {"numbers": "1" * 64})}, "data.numbers is '000.* there and '111.* here"),
    "more data": ({"module": like(data=lambda settings: {"numbers": "0" * 64, "b": "1"})}, "data.b is None there and '1'"),
    "a cell": ({"module": like(cells=lambda settings: fake_experiment.cells(settings)[::-1])}, "cells.0.i is 0 there and [52] here"),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
@pytest.mark.parametrize("complete", [True, False])
def test_the_record_of_another_run_is_left_alone(tmp_path, calls, case, complete):
    options, match = OTHER_RUNS[case]
    if complete:
        run(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, until(3))
    before = files(tmp_path)
    calls.clear()
    with pytest.raises(harness.Refused, match=match):
        run(tmp_path, **options)
    assert files(tmp_path) == before and not calls


def parquet(table):
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


NO_RECORDS = {
    "text": b"not a table",
    "empty": b"",
    "another's table": parquet(pa.table({"a": [1]})),
    "other metadata": parquet(pa.table({"a": [1]}).replace_schema_metadata({"deltaw": "[]"})),
    "metadata that is not JSON": parquet(pa.table({"a": [1]}).replace_schema_metadata({"deltaw": "{"})),
    "a newer format": parquet(pa.table({"a": [1]}).replace_schema_metadata({"deltaw": '{"format": 2, "sha256": ""}'})),
}


@pytest.mark.parametrize("case", NO_RECORDS)
def test_a_file_that_is_no_record_is_left_alone(tmp_path, calls, case):
    (tmp_path / f"{NAME}.parquet").write_bytes(NO_RECORDS[case])
    with pytest.raises(harness.Refused, match="is not a record of|has format 2; 1 can be read"):
        run(tmp_path)
    assert files(tmp_path) == {f"{NAME}.parquet": NO_RECORDS[case]} and not calls


def test_json_without_its_table_is_left_alone(tmp_path, calls):
    (tmp_path / f"{NAME}.json").write_text("mine")
    with pytest.raises(harness.Refused, match="is missing: move it away"):
        run(tmp_path)
    assert files(tmp_path) == {f"{NAME}.json": b"mine"} and not calls


def test_a_damaged_record_is_left_alone(tmp_path, calls):
    import pyarrow.parquet

    path = run(tmp_path)
    table, manifest = record.read(path)
    changed = table.set_column(3, "whole", pa.array([each + (i == 5) for i, each in enumerate(table["whole"].to_pylist())]))
    metadata = {record.METADATA_KEY: json.dumps(manifest)}
    pyarrow.parquet.write_table(changed.replace_schema_metadata(metadata), path)
    before = files(tmp_path)
    calls.clear()
    with pytest.raises(harness.Refused, match="is damaged"):
        run(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        results.load(NAME, folder=tmp_path)
    assert files(tmp_path) == before and not calls


def test_out_must_be_a_folder(tmp_path, calls):
    (tmp_path / "file").write_text("")
    with pytest.raises(harness.Refused, match="file is not a folder"):
        run(tmp_path / "file")
    assert run(tmp_path / "a" / "b").exists()


@pytest.mark.parametrize("options, match", [
    ({"device": "cuda:9"}, "device 'cuda:9' is not here; there is cpu"),
    ({"device": "gpu"}, "device 'gpu' is not here; there is cpu"),
    ({"minutes": -1}, "at least 0, or None, not -1"),
    ({"minutes": math.nan}, "not nan"),
    ({"settings": 3}, "must be a fake_experiment.Settings, not 3"),
    ({"module": "nope"}, f"no experiment 'nope'; there are {', '.join(experiments.NAMES)}"),
])
def test_arguments_are_checked_before_a_file_is_touched(tmp_path, calls, options, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists() and not calls


# ---------------------------------------------------------------------------------------------------------------------
# The hash


def test_the_hash_sees_each_change_and_no_storage():
    table = pa.table({"a": [1, 2, None], "b": [0.5, math.nan, None], "c": ["x", "", None], "d": [True, False, None]})
    hashed = record.content_hash(table)
    assert record.content_hash(pa.concat_tables([table[:1], table[1:]])) == hashed
    assert record.content_hash(table.set_column(1, "b", pa.array([0.5, -math.nan, None]))) == hashed
    others = [
        ("a", [1, 3, None]), ("a", [1, 2, 0]), ("a", [1.0, 2.0, None]),
        ("b", [0.5, math.nan, 0.0]), ("b", [0.5, None, None]), ("b", [math.nextafter(0.5, 1), math.nan, None]),
        ("c", ["x", None, ""]), ("d", [True, None, False]), ("d", [True, False, False]),
    ]
    hashes = {record.content_hash(table.set_column("abcd".index(key), key, pa.array(values))) for key, values in others}
    hashes |= {record.content_hash(each) for each in (
        table[:2], table.select([1, 0, 2, 3]), table.rename_columns(["A", "b", "c", "d"]), table.take([1, 0, 2]))}
    assert len(hashes) == len(others) + 4 and hashed not in hashes
    zeros = [record.content_hash(pa.table({"a": [zero]})) for zero in (0.0, -0.0)]
    assert zeros[0] != zeros[1]


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def test_a_gpu_is_named_with_its_driver(tmp_path, monkeypatch):
    """A machine with two GPUs, acted: which device is current, and what the manifest says."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    entered = []
    gpus = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda device: f"GPU {device}",
                           device=lambda device: entered.append(device) or nullcontext())
    for key, value in vars(gpus).items():
        monkeypatch.setattr(torch.cuda, key, value)
    monkeypatch.setattr(harness, "seeded", lambda seed, device: nullcontext())
    given = []
    module = like(measure=lambda cell, settings, device: given.append(device) or [{"x": 1}])
    with pytest.raises(harness.Refused, match="device 'cuda:2' is not here; there is cpu, cuda, cuda:0, cuda:1$"):
        run(tmp_path / "out", module, device="cuda:2")
    for device, said in ((None, "cuda"), ("cuda:1", "cuda:1")):
        run(tmp_path / said[-1], module, device=device, quick=True)
        (sitting,) = results.manifest(f"{NAME}-quick", folder=tmp_path / said[-1])["sittings"]
        assert (sitting["device"], sitting["name"], sitting["driver"]) == ("cuda", f"GPU {said}", "580.1")
        assert entered[-1] == said and given[-2:] == [said] * 2
    assert machine._output("no-such-program-as-this") is None is machine._output("false")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    module = like(measure=lambda cell, settings, device: [{"x": torch.rand(2, device=device).sum().item()}])
    same(run(tmp_path / "a", module, device=None), run(tmp_path / "b", module, device="cuda:0"))
    (sitting,) = results.manifest(NAME, folder=tmp_path / "a")["sittings"]
    assert sitting["device"] == "cuda" and sitting["name"] == torch.cuda.get_device_name() and sitting["driver"]


def test_a_record_may_change_machines_and_says_so_for_each_cell(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, until(2))
    elsewhere = machine.sitting("cpu") | {"device": "cuda", "name": "another"}
    monkeypatch.setattr(harness, "sitting", lambda device: elsewhere)
    run(tmp_path)
    manifest = results.manifest(NAME, folder=tmp_path)
    assert [manifest["sittings"][each["sitting"]]["device"] for each in manifest["cells"]] == ["cpu"] * 2 + ["cuda"] * 4


def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "src" / "deltaw"
    (package / "sub").mkdir(parents=True)
    for name in ("__init__.py", "sub/a.py"):
        (package / name).write_text("")
    monkeypatch.setattr(machine, "PACKAGE", package)
    monkeypatch.delenv("DELTAW_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None  # no repository
    try:
        git("init", "-q")
    except OSError:
        pytest.skip("git is not here")
    (tmp_path / "README").write_text("")
    git("add", "README")
    git("commit", "-qm", "another project's")
    assert machine.commit() is None  # it does not track the package
    git("add", "-A")
    git("commit", "-qm", "ours")
    head = git("rev-parse", "HEAD")
    (package / "table.parquet").write_text("")
    (tmp_path / "setup.py").write_text("")
    assert machine.commit() == head and len(head) == 40
    source = machine.source_hash()
    (package / "sub" / "b.py").write_text("")
    assert machine.commit() == head + "-dirty" and machine.source_hash() != source
    monkeypatch.setenv("DELTAW_COMMIT", "said")
    assert machine.commit() == "said"
    monkeypatch.delenv("DELTAW_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert machine.commit() is None


def test_the_names():
    assert len(set(experiments.NAMES)) == len(experiments.NAMES) and {"init_width", "init_text"} < set(experiments.NAMES)
    with pytest.raises(ValueError, match=f"no experiment 'nope'; there are {', '.join(experiments.NAMES)}$"):
        experiments.experiment("nope")


def test_importing_is_light():
    code = ("import sys, deltaw; assert not [name for name in sys.modules if name.startswith('deltaw.experiments')]\n"
            "import deltaw.results, deltaw.experiments.__main__\n"
            "heavy = 'pandas', 'pyarrow', 'transformers', 'deltaw.experiments.init_width'\n"
            "print([name for name in heavy if name in sys.modules])")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
