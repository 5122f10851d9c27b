"""Every experiment of the book: settings in, one tidy table out. One file an experiment.

    python -m deltaw.experiments list
    python -m deltaw.experiments run init_width --quick

An experiment is a module with

- a docstring whose first line is the question it answers;
- `Settings`, a frozen dataclass of numbers, strings and tuples of them: the defaults are the full record on one GPU;
- `QUICK`, the `Settings` at which the same code takes two CPU cores less than a minute;
- `cells(settings) -> list[dict]`: what is measured, one dict of scalars each, no two alike;
- `measure(cell, settings, device) -> list[dict]`: a cell's rows, a dict of scalars each. They follow from the cell,
  the settings and the machine alone, whichever cells ran before; `device` is a string for `torch.device`;
- `data(settings) -> dict[str, str]`: the SHA-256 of every data set used, by name;
- `TIMED = True` if its rows hold times, which no second run repeats.

`engine.harness.run` does the rest, what several experiments share is in `engine`, and `deltaw.results` reads the tables that were recorded.
"""

from importlib import import_module
from types import ModuleType

NAMES = (
    "init_width", "init_text", "mixers", "vera_budget", "dora_directions", "dora_detach", "step_cost",
    "tuned_comparison", "tuned_further", "appendix_runs", "bank_speed", "code_lm",
)


def experiment(name: str) -> ModuleType:
    """The experiment of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in NAMES:
        raise ValueError(f"there is no experiment {name!r}; there are {', '.join(NAMES)}")
    return import_module(f".{name}", __package__)
