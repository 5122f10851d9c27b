"""Run an experiment cell by cell into a record that a killed run leaves whole and the next run continues.

The table is a function of the cells' rows alone: it does not tell how often the run was interrupted. The manifest does.
Several processes of one machine may run an experiment into one folder, one a GPU: each takes the next cell that none has
taken. The rows then stand in the cells' order all the same.
"""

import dataclasses
import json
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...train import seeded
from .. import experiment as by_name
from . import record
from .machine import sitting
from .record import Refused


def run(
    experiment: str | ModuleType,
    *,
    settings: Any = None,
    quick: bool = False,
    device: str | None = None,
    out: str | os.PathLike = "results",
    minutes: float | None = None,
    progress: bool | None = None,
) -> Path:
    """Measure the cells that the record lacks, and print one line at the end.

    A run may be killed at any moment: the record then holds the cells finished before. Cells that another process is
    at are left to it.

    Args:
        experiment: its name, or the module.
        settings: an instance of its `Settings`; None is the full record, or the module's `QUICK` if `quick`.
        quick: write `NAME-quick.parquet`.
        device: "cpu", "cuda" or "cuda:N"; None takes a GPU where there is one. `measure` gets it as a string.
        out: the record's folder; it is made if there is none.
        minutes: no cell begins later than this; None sets no limit.
        progress: whether to show a bar; None shows it on a terminal only. False keeps the last line back, too.

    Returns:
        The record's path. There may be no file yet if `minutes` left no time for a cell.

    Raises:
        ValueError: if there is no such experiment or device; if there is another file in the record's place, or the
            record of other settings, data or cells; if the experiment gives something else than it should.
    """
    from tqdm import tqdm

    began = time.perf_counter()
    module = by_name(experiment) if isinstance(experiment, str) else experiment
    name = module.__name__.rpartition(".")[2]
    if settings is None:
        settings = module.QUICK if quick else module.Settings()
    if not isinstance(settings, module.Settings):
        raise Refused(f"settings must be a {name}.Settings, not {settings!r}")
    if minutes is not None and not minutes >= 0:
        raise Refused(f"minutes must be at least 0, or None, not {minutes!r}")
    device = resolve(device)
    planned = {"experiment": name, "quick": quick, "settings": plain(settings), "data": _data(module.data(settings))}
    cells = _cells(module.cells(settings))
    planned["planned_cells"] = len(cells)
    path = Path(out) / f"{name}{'-quick' if quick else ''}.parquet"
    table, manifest = record.resume(path, planned, cells)
    done = len(manifest["cells"])
    if done < len(cells):
        path.parent.mkdir(parents=True, exist_ok=True)
        own, place = sitting(device), None
        hidden = None if progress is None else not progress  # tqdm takes None for "on a terminal only"
        bar = tqdm(total=len(cells), desc=name, initial=done, unit="cell", leave=False, disable=hidden)
        with bar, torch.cuda.device(device) if device != "cpu" else nullcontext():
            for number, cell in enumerate(cells):
                if cell in record.finished(manifest):
                    continue
                with record.claimed(path, number) as free:
                    table, manifest = record.resume(path, planned, cells)  # another process may have come further
                    if not free or cell in record.finished(manifest):
                        continue
                    started = time.perf_counter()
                    if minutes is not None and started - began >= 60 * minutes:
                        break
                    bar.set_postfix_str(", ".join(f"{key}={value}" for key, value in cell.items()))
                    try:
                        rows = _rows(module, cell, settings, device)
                        ended = time.perf_counter()
                        own["seconds"] = round(ended - began, 3)
                        table, manifest, place = record.add(
                            path, planned, cells, own, place, cell, rows, ended - started)
                    except Exception as error:
                        error.add_note(f"(in the cell {cell} of {name}; the cells before it are kept)")
                        raise
                bar.n = len(manifest["cells"])
                bar.refresh()
    if progress is not False:
        left = len(cells) - len(manifest["cells"])
        end = f" (INCOMPLETE, {left} left: run it again to go on, unless other processes are at them)" if left else ""
        if done == len(cells):
            end = " (complete before, nothing to do)"
        print(f"{path}: {len(cells) - left} of {len(cells)} cells, {table.num_rows if table else 0} rows, "
              f"{manifest['seconds']:.1f} s{end}", flush=True)
    return path


def resolve(device: str | None) -> str:
    """The device in words that `torch.device` takes, checked to be there: "cpu", "cuda" or "cuda:N"."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return "cuda" if gpus else "cpu"
    allowed = ["cpu", *(["cuda", *(f"cuda:{i}" for i in range(gpus))] if gpus else [])]
    if device not in allowed:
        raise Refused(f"device {device!r} is not here; there is {', '.join(allowed)}")
    return device


def plain(settings: Any) -> dict[str, Any]:
    """The settings as JSON gives them back, with lists for tuples."""
    fields = dataclasses.asdict(settings)
    for key, value in fields.items():
        try:
            fields[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise Refused(f"setting {key}={value!r}: only finite numbers, strings and tuples of them are allowed") from None
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# What an experiment gives, checked


def _cells(cells: list[dict]) -> list[dict]:
    seen = set()
    for cell in cells:
        _check_scalars("cell", cell)
        if not all(math.isfinite(value) for value in cell.values() if isinstance(value, float)):
            raise Refused(f"the cell {cell} holds a number that is not finite")
        text = json.dumps(cell, sort_keys=True)
        if text in seen:
            raise Refused(f"the cell {cell} is there twice")
        seen.add(text)
    if not seen:
        raise Refused("there are no cells with these settings")
    return cells


def _data(data: dict[str, str]) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(text, str) for item in data.items() for text in item):
        raise Refused(f"data must give each data set's SHA-256 by name, a dict of strings, not {data!r}")
    return data


def _rows(module: ModuleType, cell: dict, settings: Any, device: str) -> list[dict]:
    """The cell's rows, its own columns in front."""
    with seeded(0, torch.device(device)):  # what is drawn without a generator depends on no earlier cell either
        rows = list(module.measure(dict(cell), settings, device))
    if not rows:
        raise Refused("measure gave no rows")
    for row in rows:
        _check_scalars("row", row)
        if both := sorted(cell.keys() & row.keys()):
            raise Refused(f"a row has the cell's own columns {both}; the harness adds those")
    return [cell | row for row in rows]


def _check_scalars(what: str, scalars: Any) -> None:
    if not isinstance(scalars, dict) or not scalars:
        raise Refused(f"a {what} must be a dict with at least one entry, not {scalars!r}")
    for key, value in scalars.items():
        if not isinstance(key, str):
            raise Refused(f"the keys of a {what} must be strings, not {key!r}")
        if type(value) not in (bool, int, float, str, type(None)):
            kind = type(value).__name__
            raise Refused(f"{key!r} of a {what} must be a bool, int, float, str or None, not a {kind}: {value!r}")
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise Refused(f"{key!r} of a {what} must fit into 64 bits; {value} does not")
