"""Powers fitted to tidy tables, with bootstrap intervals over seeds. Columns "seed" and "rate" are what they say."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas

Pick = Callable[[np.ndarray, np.ndarray], tuple[float, bool]]  # (rates, rising, losses) -> (rate, is it inside the grid?)


def power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The least-squares slope of log y, `(…, X)`, over log x, `(X,)`: `(…)`."""
    centred = np.log(x) - np.log(x).mean()  # (X,)
    return (np.log(y) * centred).sum(-1) / (centred**2).sum()


def geometric_mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, the seeds."""
    return np.exp(np.log(values).mean(-1))


def interval(estimate: float, draws: np.ndarray, seeds: int, level: float = 0.95) -> dict[str, float]:
    """The percentile interval of bootstrap draws `(R,)` as low and high, widened for few seeds; NaN for one.

    The mean of m resampled seeds varies by (m − 1)/m of what the mean of m new ones does (in variance). With m = 6, that
    alone takes a 95 % interval down to 93 %.
    """
    if seeds < 2:
        return {"low": np.nan, "high": np.nan}
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - estimate  # (2,)
    return dict(zip(("low", "high"), (estimate + np.sqrt(seeds / (seeds - 1)) * ends).tolist()))


def exponents(
    table: "pandas.DataFrame", values: Sequence[str], by: Sequence[str], x: str = "width",
    level: float = 0.95, resamples: int = 2000, seed: int = 0,
) -> "pandas.DataFrame":
    """The power of `x` with which each of `values` grows, in each group.

    Args:
        table: a row a group, `x` and seed.
        values: columns, positive. If one is zero throughout, its power is −inf; if in part or not finite, NaN.
        by: columns that make the groups.
        x: a column with two or more different values. Seeds are resampled within each, as other draws.
        level, resamples, seed: of the interval.

    Returns:
        A row a group and value: `by`, quantity, exponent, low, high.

    Raises:
        ValueError: if `x` has one value only, or if a group lacks a seed at some `x`, or has it twice.
    """
    import pandas as pd

    random, rows = np.random.default_rng(seed), []
    for key, group in table.groupby(list(by), sort=False):
        for value in values:
            xs, ys = _matrix(group, x, value)  # (X,), (X, m)
            found = dict.fromkeys(("exponent", "low", "high"), -np.inf if (ys == 0).all() else np.nan)
            if (ys > 0).all() and np.isfinite(ys).all():
                which = random.integers(ys.shape[1], size=(resamples, *ys.shape))  # (R, X, m)
                drawn = np.take_along_axis(ys[None], which, axis=2)  # (R, X, m)
                estimate, draws = power(xs, geometric_mean(ys)), power(xs, geometric_mean(drawn))  # (), (R,)
                found = {"exponent": float(estimate)} | interval(estimate, draws, ys.shape[1], level)
            rows.append(dict(zip(by, key)) | {"quantity": value} | found)
    return pd.DataFrame(rows)


def best(rates: np.ndarray, losses: np.ndarray, reach: float = 1.0) -> tuple[float, bool]:
    """The lowest point of a parabola in the logs, through the lowest loss and those at rates within a factor e^`reach`."""
    lowest = int(np.argmin(losses))
    if lowest in (0, len(rates) - 1):
        return float(rates[lowest]), False
    offsets = np.log(rates / rates[lowest])  # (R,)
    near = (np.abs(offsets) <= reach) & np.isfinite(losses)
    if near.sum() < 3:
        return float(rates[lowest]), True
    bend, slope, _ = np.linalg.lstsq(np.vander(offsets[near], 3), np.log(losses[near]), rcond=None)[0]
    offset = np.clip(-slope / (2 * bend), -reach, reach) if bend > 0 else 0
    return float(rates[lowest] * np.exp(offset)), True


def edge(rates: np.ndarray, losses: np.ndarray) -> tuple[float, bool]:
    """How far, up from the lowest loss, losses stay below 1, theirs at the start: to where a line in the logs reaches 1."""
    lowest = int(np.argmin(losses))
    above = lowest + np.flatnonzero(losses[lowest:] >= 1)  # a loss beyond these does not count
    if losses[lowest] >= 1 or len(above) == 0:
        return float(rates[lowest if len(above) else -1]), False
    before, after = np.log(losses[above[0] - 1]), np.log(losses[above[0]])
    share = before / (before - after)  # 0 if the next loss is infinite
    return float(rates[above[0] - 1] * (rates[above[0]] / rates[above[0] - 1]) ** share), True


def picks(
    table: "pandas.DataFrame", by: Sequence[str], pick: Pick, x: str = "width", loss: str = "train_loss"
) -> "pandas.DataFrame":
    """The rate picked at each `x` in each group, from the geometric mean of the seeds' losses: `by`, x, rate, inside."""
    import pandas as pd

    return pd.DataFrame([
        dict(zip([*by, x, "rate", "inside"], [*key, value, *pick(rates, geometric_mean(losses))]))
        for key, sweeps in _sweeps(table, by, x, loss) for value, (rates, losses) in sweeps.items()
    ])


def pick_exponents(
    table: "pandas.DataFrame", by: Sequence[str], pick: Pick, x: str = "width", loss: str = "train_loss",
    drop: float = 0.2, level: float = 0.95, resamples: int = 400, seed: int = 0,
) -> "pandas.DataFrame":
    """The power of `x` of the picked rate, in each group: `by`, exponent, low, high, inside (at every `x`).

    Each draw of the interval resamples the seeds within each `x`, and leaves out a share `drop` of the rates. Raises as
    `exponents` does.
    """
    import pandas as pd

    random, rows = np.random.default_rng(seed), []
    for key, sweeps in _sweeps(table, by, x, loss):
        xs, draws = np.array(list(sweeps), dtype=float), np.empty((resamples, len(sweeps)))  # (X,), (R, X)
        picked = [pick(rates, geometric_mean(losses)) for rates, losses in sweeps.values()]
        for column, (rates, losses) in zip(draws.T, sweeps.values()):
            seeds = losses.shape[1]
            for i in range(resamples):
                kept = np.sort(random.permutation(len(rates))[round(drop * len(rates)):])  # (kept,)
                column[i], _ = pick(rates[kept], geometric_mean(losses[kept][:, random.integers(seeds, size=seeds)]))
        estimate = power(xs, np.array([rate for rate, _ in picked]))
        found = {"exponent": float(estimate)} | interval(estimate, power(xs, draws), seeds, level)
        rows.append(dict(zip(by, key)) | found | {"inside": all(inside for _, inside in picked)})
    return pd.DataFrame(rows)


def _sweeps(table: "pandas.DataFrame", by: Sequence[str], x: str, loss: str) -> Iterator[tuple[tuple, dict]]:
    """For each group, by `x`: rates `(R,)` and losses `(R, m)`."""
    for key, group in table.groupby(list(by), sort=False):
        yield key, {value: _matrix(part, "rate", loss) for value, part in group.groupby(x)}


def _matrix(table: "pandas.DataFrame", row: str, value: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of column `row`, `(X,)`, and the table's `value` for each of them and each seed, `(X, m)`."""
    if table.duplicated([row, "seed"]).any():
        raise ValueError(f"{value!r} is there more than once for one {row} and seed: name in `by` what else differs")
    matrix = table.pivot(index=row, columns="seed", values=value)
    if len(matrix) < 2:
        raise ValueError(f"there is one {row} only, {matrix.index[0]}: a power or a best rate needs more")
    if len(table) < matrix.size:
        raise ValueError(f"seeds are missing at some {row}: there are {len(table)} values of {value!r}, not {matrix.size}")
    return matrix.index.to_numpy(float), matrix.to_numpy(float)
