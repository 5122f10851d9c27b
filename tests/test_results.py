"""Records read, and the records that the package ships."""

import copy
import json
import math

import fake_experiment
import pandas as pd
import pytest

from deltaw import experiments, results
from deltaw.experiments.engine import harness, record

NAME = "fake_experiment"


def run(out, **options):
    return harness.run(fake_experiment, out=out, device="cpu", progress=False, **options)


def test_a_record_loads_with_its_manifest(tmp_path):
    run(tmp_path)
    frame = results.load(NAME, folder=tmp_path)
    assert isinstance(frame, pd.DataFrame) and len(frame) == 12
    assert frame.attrs["manifest"] == results.manifest(NAME, folder=str(tmp_path))
    kept = frame[frame.i == 1].sort_values("loss").attrs["manifest"]
    assert kept is frame.attrs["manifest"] is copy.deepcopy(frame.attrs["manifest"])


def test_what_there_is_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no record 'nope' in {tmp_path}; there are none"):
        results.load("nope", folder=tmp_path)
    run(tmp_path, quick=True)
    with pytest.raises(ValueError, match="there are fake_experiment-quick"):
        results.manifest(NAME, folder=tmp_path)
    with pytest.raises(ValueError, match="no record 'nope' here"):
        results.load("nope")


def test_an_incomplete_record_must_be_asked_for(tmp_path, monkeypatch):
    whole = fake_experiment.measure

    def measure(cell, settings, device):
        if cell["i"] == 4:
            raise KeyboardInterrupt
        return whole(cell, settings, device)

    monkeypatch.setattr(fake_experiment, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    with pytest.raises(ValueError, match="'fake_experiment' is not complete: 4 of 6 cells; partial=True"):
        results.load(NAME, folder=tmp_path)
    frame = results.load(NAME, folder=tmp_path, partial=True)
    assert len(frame) == 8 and frame.attrs["manifest"]["complete"] is False


@pytest.mark.parametrize("column", ["whole", "loss", "some", "ok", "late", "i"])
def test_a_changed_value_is_seen(tmp_path, column):
    import pyarrow as pa
    import pyarrow.parquet

    path = run(tmp_path)
    table, manifest = record.read(path)
    values = table[column].to_pylist()
    at = next(i for i, value in enumerate(values) if isinstance(value, str) or value is not None and math.isfinite(value))
    change = {bool: lambda v: not v, str: lambda v: v + " ", int: lambda v: v + 1, float: lambda v: math.nextafter(v, -9)}
    values[at] = change[type(values[at])](values[at])
    changed = table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))
    pyarrow.parquet.write_table(changed.replace_schema_metadata({record.METADATA_KEY: json.dumps(manifest)}), path)
    with pytest.raises(ValueError, match="is damaged"):
        results.load(NAME, folder=tmp_path)


def test_a_cut_file_is_refused(tmp_path):
    path = run(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a record"):
        results.load(NAME, folder=tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The records in the package. (While there are none, pytest shows the first test as skipped.)


@pytest.mark.parametrize("name", results.names())
def test_a_shipped_record(name):
    manifest = results.load(name).attrs["manifest"]  # complete, and its hash verified
    assert json.loads((results.FOLDER / f"{name}.json").read_text()) == manifest
    module = experiments.experiment(name)  # which also means: not a quick one
    assert manifest["experiment"] == name and manifest["quick"] is False
    assert manifest["settings"] == harness.plain(module.Settings()), "the defaults are no longer those of the record"
    assert [each["cell"] for each in manifest["cells"]] == module.cells(module.Settings())
    assert all(len(bytes.fromhex(each)) == 32 for each in manifest["data"].values())  # not every machine has the data
    for each in manifest["sittings"]:
        assert each["device"] == "cuda" and each["name"] and each["commit"] and each["source"]
    text = json.dumps(manifest)
    assert not [word for word in ("/work", "/root", "/home", "/tmp", "://", "\\\\") if word in text]


def test_the_shipped_files_are_records_and_small():
    files = [path for path in results.FOLDER.iterdir() if path.suffix != ".py" and path.name != "__pycache__"]
    assert {path.name for path in files} == {name + suffix for name in results.names() for suffix in (".parquet", ".json")}
    assert set(results.names()) <= set(experiments.NAMES)
    assert sum(path.stat().st_size for path in files) <= 3e6
