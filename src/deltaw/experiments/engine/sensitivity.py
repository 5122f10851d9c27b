"""How much a learning rate may be off: from the curves of a tuned record."""

import numpy as np
import pandas as pd

from . import verdicts
from .tuning import measure_of

MARGIN = 0.01  # one point of accuracy or correlation, or 0.01 nats
FACTORS = {"quarter": 0.25, "half": 0.5, "double": 2.0, "fourfold": 4.0}  # of a rate, beside the best


def costs(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """What a rate that is off costs, from the tuning runs: means over three seeds, linear in log rate between those tried.

    Columns: task, row, rate; quarter, half, double, fourfold: by how much the measure is worse there than at the best rate
    (inf where a run was stopped, NaN beyond the rates tried); lowest and highest: the rates around the best at which it is
    no more than `margin` worse, as far as was tried; and times, the factor between them. The best of several noisy means
    looks better than it is, and so these costs are a little too large.
    """
    found = []
    for (task, row), curve in verdicts.curves(table).groupby(["task", "row"], sort=False):
        curve = curve.sort_values("rate")
        score = curve["mean"].to_numpy() * (-1 if measure_of(task) == "loss" else 1)  # (rates,)
        score = np.where(curve["stopped"] > 0, -np.inf, score)
        if not np.isfinite(score).any():
            continue
        logs, best = np.log(curve["rate"].to_numpy()), int(score.argmax())
        cost = score[best] - score  # (rates,)
        at = {name: _between(logs, cost, logs[best] + np.log(factor)) for name, factor in FACTORS.items()}
        low, high = _reach(logs[best::-1], cost[best::-1], margin), _reach(logs[best:], cost[best:], margin)
        found.append({"task": task, "row": row, "rate": float(np.exp(logs[best])), **at, "lowest": float(np.exp(low)),
                      "highest": float(np.exp(high)), "times": float(np.exp(high - low))})
    return pd.DataFrame(found)


def _between(logs: np.ndarray, cost: np.ndarray, at: float) -> float:
    """The cost at a rate, interpolated; inf beside a rate at which a run was stopped, NaN outside. All rates are logs."""
    if not logs[0] - 1e-9 <= at <= logs[-1] + 1e-9:
        return float("nan")
    near = int(abs(logs - at).argmin())
    if abs(logs[near] - at) < 1e-2:  # rates are of three digits
        return float(cost[near])
    right = int(np.searchsorted(logs, at))
    share = (at - logs[right - 1]) / (logs[right] - logs[right - 1])
    return float(cost[right - 1] + share * (cost[right] - cost[right - 1]))


def _reach(logs: np.ndarray, cost: np.ndarray, margin: float) -> float:
    """How far from the first rate, where the cost is 0, it stays within the margin: to where a line crosses it."""
    beyond = np.flatnonzero(cost > margin)
    if len(beyond) == 0:
        return float(logs[-1])
    right = int(beyond[0])
    share = (margin - cost[right - 1]) / (cost[right] - cost[right - 1])  # 0 if the cost is infinite
    return float(logs[right - 1] + share * (logs[right] - logs[right - 1]))
