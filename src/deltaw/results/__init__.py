"""The recorded tables of the book's experiments, and how to read any record.

>>> from deltaw import results
>>> table = results.load("init_width")
>>> table.attrs["manifest"]["sittings"]
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.engine import record

if TYPE_CHECKING:
    import pandas
    import pyarrow

FOLDER = Path(__file__).parent


class Manifest(dict):
    """A manifest, which the tables derived from a record share: pandas would copy it deeply at every step."""

    def __deepcopy__(self, memo: dict) -> "Manifest":
        return self


def names(folder: str | os.PathLike = FOLDER) -> tuple[str, ...]:
    """The records in a folder; by default those that come with the package."""
    return tuple(sorted(path.stem for path in Path(folder).glob("*.parquet")))


def load(name: str, *, folder: str | os.PathLike = FOLDER, partial: bool = False) -> "pandas.DataFrame":
    """A record's table, checked against its hash, with the manifest in `.attrs["manifest"]`.

    Where an integer or a bool is missing, its column has pandas' nullable type; a missing float is NaN.

    Args:
        name: one of `names(folder)`.
        folder: where the record lies: the package, or the `out` of a run of your own.
        partial: take a record that is not complete, too.

    Raises:
        ValueError: if there is no such record, if it is damaged, or not complete.
    """
    table, manifest = _read(name, folder)
    if not (manifest["complete"] or partial):
        done = len(manifest["cells"])
        raise ValueError(f"the record {name!r} is not complete: {done} of {manifest['planned_cells']} cells; "
                         "partial=True loads them, running the experiment again adds the others")
    frame = _frame(table)
    frame.attrs["manifest"] = Manifest(manifest)
    return frame


def manifest(name: str, *, folder: str | os.PathLike = FOLDER) -> dict[str, Any]:
    """What was run, where, and how long it took.

    Raises:
        ValueError: if there is no such record, or if it is damaged.
    """
    return _read(name, folder)[1]


def _read(name: str, folder: str | os.PathLike) -> "tuple[pyarrow.Table, dict[str, Any]]":
    known = names(folder)
    if name not in known:
        raise ValueError(f"there is no record {name!r} {'here' if folder == FOLDER else f'in {folder}'}; "
                         f"there are {', '.join(known) or 'none'}")
    return record.read(Path(folder) / f"{name}.parquet")


def _frame(table: "pyarrow.Table") -> "pandas.DataFrame":
    import pandas as pd
    import pyarrow as pa

    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}  # an integer must not become a float
    return pd.DataFrame({
        name: column.to_pandas(types_mapper=nullable.get if column.null_count else None)
        for name, column in zip(table.column_names, table.columns)
    })
