"""The file an experiment writes: a table, and a manifest that says where it is from.

`NAME.parquet` is the record: the rows of all finished cells, the manifest as JSON in the schema's metadata.
`NAME.json` is the manifest once more, for human eyes.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import filelock
    import pyarrow

FORMAT = 1
METADATA_KEY = b"deltaw"


class Refused(ValueError):
    """What is not run, read or written, in words for its user. Files are as they were."""


def read(path: str | os.PathLike) -> "tuple[pyarrow.Table, dict[str, Any]]":
    """A record's table and its manifest.

    Raises:
        ValueError: if it is no record, or if its numbers are not those that were written.
    """
    import pyarrow.parquet

    content = Path(path).read_bytes()
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        manifest = json.loads(table.schema.metadata[METADATA_KEY])
        written, form = manifest["sha256"], manifest["format"]
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise Refused(f"{path} is not a record of deltaw.experiments: move it away") from None
    if form != FORMAT:
        raise Refused(f"{path} has format {form!r}; {FORMAT} can be read")
    table = table.replace_schema_metadata(None)
    if content_hash(table) != written:
        raise Refused(f"{path} is damaged: its table is not the one whose SHA-256 the manifest holds")
    return table, manifest


def resume(path: Path, planned: dict[str, Any], cells: list[dict]) -> "tuple[pyarrow.Table | None, dict[str, Any]]":
    """The table and the manifest to go on with: the record's, or new ones.

    Args:
        path: where the record is, or will be.
        planned: what the manifest says before the first cell; a record must say the same.
        cells: all of them, in order; a record must hold some of them, in this order.

    Raises:
        ValueError: if there is something else in the record's place.
    """
    sidecar = path.with_suffix(".json")
    if path.parent.exists() and not path.parent.is_dir():
        raise Refused(f"{path.parent} is not a folder, so no record can lie there")
    if not path.exists():
        if sidecar.exists():
            raise Refused(f"{sidecar} lies in a record's place, but {path.name} is missing: move it away")
        fresh = {"format": FORMAT, **planned, "complete": False, "seconds": 0.0, "sha256": None, "cells": [], "sittings": []}
        return None, fresh
    table, manifest = read(path)
    done = finished(manifest)
    there = {key: manifest.get(key) for key in planned} | {"cells": dict(enumerate(done))}
    here = planned | {"cells": dict(enumerate(cell for cell in cells if cell in done))}
    if differing := list(_differing(there, here)):
        raise Refused(f"{path} is the record of another run ({'; '.join(differing[:8])}): move it away, or write elsewhere")
    content = _json(manifest).encode()
    if not sidecar.exists() or sidecar.read_bytes() != content:  # the last run was killed between the two files
        _replace(sidecar, content)
    return table, manifest


def finished(manifest: dict[str, Any]) -> list[dict]:
    """The cells that a record holds, in the order of its rows."""
    return [each["cell"] for each in manifest["cells"]]


def _lock(path: Path, what: str) -> "filelock.BaseFileLock":
    """A lock of the record's, not yet taken, which a process that dies lets go of."""
    import filelock

    # It lies with what is temporary: the folder of records stays clean, and it need hold on one machine only.
    folder = Path(tempfile.gettempdir()) / f"deltaw-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    return filelock.FileLock(folder / f"{what}.lock")


@contextmanager
def claimed(path: Path, number: int) -> Iterator[bool]:
    """Is the cell of this number free for this process? While the block runs it is no other's; one that dies frees it."""
    from filelock import Timeout

    lock = _lock(path, str(number))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def add(
    path: Path, planned: dict[str, Any], cells: list[dict], sitting: dict[str, Any], place: int | None, cell: dict,
    rows: list[dict], seconds: float,
) -> "tuple[pyarrow.Table, dict[str, Any], int]":
    """A finished cell written into the record, at its place among those that are there by now.

    Args:
        path, planned, cells: as in `resume`.
        sitting: this process's entry; place: where it is among the record's, None if it is not there yet.
        cell, rows, seconds: what was measured.

    Returns:
        The table, the manifest, and the sitting's place.
    """
    with _lock(path, "record"):
        table, manifest = resume(path, planned, cells)
        sittings, entries = manifest["sittings"], manifest["cells"]
        place = len(sittings) if place is None else place
        sittings[place:place + 1] = [sitting]
        before = [each for each in entries if cells.index(each["cell"]) < cells.index(cell)]
        front = list(dict.fromkeys(key for each in cells for key in each))
        table = with_rows(table, rows, front, sum(each["rows"] for each in before))
        entry = {"cell": cell, "rows": len(rows), "seconds": round(seconds, 3), "sitting": place}
        manifest["cells"] = [*before, entry, *entries[len(before):]]
        manifest["seconds"] = round(sum(each["seconds"] for each in sittings), 3)
        manifest["complete"] = len(manifest["cells"]) == len(cells)
        write(path, table, manifest)
        return table, manifest, place


def with_rows(
    table: "pyarrow.Table | None", rows: list[dict], front: list[str], at: int | None = None
) -> "pyarrow.Table":
    """The table with rows put in at a place (None: below), the columns of `front` first, the others as they came.

    A column is null where a row lacks it, and of integers until a float comes. Each step keeps all that the next one
    needs, so the table does not depend on whether it was written and read again in between.

    Raises:
        ValueError: if a column mixes numbers, bools and strings.
    """
    import pyarrow as pa

    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}
    columns = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        kinds = {types[type(value)] for value in values if value is not None}
        if table is not None and name in table.column_names:
            kinds |= {table.schema.field(name).type} - {pa.null()}
        if len(kinds) > 1 and kinds != {pa.int64(), pa.float64()}:
            raise Refused(f"column {name!r} mixes {' and '.join(sorted(map(str, kinds)))}: of numbers, bools and strings, "
                          "a column holds one")
        columns[name] = pa.array(values, pa.float64() if pa.float64() in kinds else kinds.pop() if kinds else pa.null())
    new = pa.table(columns)
    if table is not None:
        at = table.num_rows if at is None else at
        new = pa.concat_tables([table[:at], new, table[at:]], promote_options="permissive").combine_chunks()
    return new.select(sorted(new.column_names, key=lambda name: front.index(name) if name in front else len(front)))


def write(path: Path, table: "pyarrow.Table", manifest: dict[str, Any]) -> None:
    """Both files, with the table's hash in the manifest. Should only the first get written, `resume` renews the other."""
    import pyarrow.parquet

    manifest["sha256"] = content_hash(table)
    text = _json(manifest)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table.replace_schema_metadata({METADATA_KEY: text}), sink, compression="zstd")
    _replace(path, sink.getvalue())
    _replace(path.with_suffix(".json"), text.encode())


def content_hash(table: "pyarrow.Table") -> str:
    """SHA-256 of a table's names, types and values, however they are stored. All NaN are alike."""
    import numpy as np
    import pyarrow as pa

    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns):
        digest.update(json.dumps([name, str(column.type), len(column)]).encode())
        if column.type in (pa.int64(), pa.float64(), pa.bool_()):
            values = column.fill_null(pa.scalar(0).cast(column.type)).to_numpy()
            if column.type == pa.float64():
                values = np.where(np.isnan(values), np.nan, values)
            digest.update(values.tobytes() + column.is_null().to_numpy().tobytes())
        else:
            digest.update(json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()


def _differing(there: dict, here: dict, where: str = "") -> Iterator[str]:
    """What differs, each in words."""
    for key in {**there, **here}:
        a, b = there.get(key), here.get(key)
        if a != b and isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b, f"{where}{key}.")
        elif a != b:
            yield f"{where}{key} is {a!r} there and {b!r} here"


def _json(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _replace(path: Path, content: bytes) -> None:
    """The whole new file, or the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
