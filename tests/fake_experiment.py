"""Does the harness keep everything?

An experiment that takes no time, with columns of every kind.
"""

import math
from dataclasses import dataclass

CALLS = []  # the cells measured in this process


@dataclass(frozen=True)
class Settings:
    n: int = 6
    scale: float = 0.5
    names: tuple[str, ...] = ("é", "")


QUICK = Settings(n=2)


def cells(settings):
    plain = [{"i": i, "name": settings.names[i % 2]} for i in range(settings.n)]
    return [cell | ({"rank": 2 * cell["i"]} if cell["i"] == 4 else {}) for cell in plain]


def data(settings):
    return {"numbers": "0" * 64}


def measure(cell, settings, device):
    CALLS.append(cell["i"])
    i = cell["i"]
    first = {"whole": i, "loss": [math.nan, math.inf, -math.inf, -0.0, 0.1, 1e-310][i], "none": None, "ok": i == 1}
    if i in (0, 5):
        first["some"] = 2**53 + 1  # an integer that no float is
    if i == 3:
        first["late"] = "text"
    return [first, {"whole": -i, "grows": 7 if i < 2 else 0.5, "loss": settings.scale}]
