"""Powers that are known are found again, and intervals hold what they promise."""

import numpy as np
import pandas as pd
import pytest

from deltaw import statistics

WIDTHS = 2.0 ** np.arange(7, 14)


def table(exponent, noise=0.0, seeds=6, random=None, widths=WIDTHS):
    random = random or np.random.default_rng(0)
    return pd.DataFrame([
        {"start": "A", "width": width, "seed": seed, "y": 3 * width**exponent * np.exp(noise * random.standard_normal())}
        for width in widths for seed in range(seeds)])


def sweep(exponent, noise=0.0, seeds=4, rates=19, random=None, widths=WIDTHS):
    """Losses that are a parabola in the log rate, lowest at 0.1 · (width/128)^exponent, and 1 at four times that."""
    random = random or np.random.default_rng(0)
    rows = []
    for width in widths:
        lowest = 0.1 * (width / 128) ** exponent
        for rate in 0.1 * (width / 128) ** -0.75 * 1.6 ** np.arange(-(rates // 2), rates // 2 + 1):
            loss = 0.01 ** (1 - (np.log(rate / lowest) / np.log(4)) ** 2)
            rows += [{"start": "A", "width": width, "seed": seed, "rate": rate,
                      "train_loss": loss * np.exp(noise * random.standard_normal())} for seed in range(seeds)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("exponent", [-1, -0.5, 0, 0.25])
def test_an_exact_power_is_found(exponent):
    (row,) = statistics.exponents(table(exponent), ["y"], ["start"]).itertuples()
    assert (row.start, row.quantity) == ("A", "y")
    assert row.exponent == pytest.approx(exponent, abs=1e-9)
    assert row.low == pytest.approx(exponent, abs=1e-9) and row.high == pytest.approx(exponent, abs=1e-9)


@pytest.mark.parametrize("seeds", [4, 8])
def test_the_interval_covers_as_often_as_it_says(seeds):
    random, covered, runs = np.random.default_rng(1), 0, 200
    for run in range(runs):
        data = table(-0.5, noise=0.3, seeds=seeds, random=random)
        (row,) = statistics.exponents(data, ["y"], ["start"], resamples=200, seed=run).itertuples()
        covered += row.low <= -0.5 <= row.high
    assert 0.9 <= covered / runs <= 0.99  # 0.95 ± 3 standard errors


def test_a_level_is_a_level_and_a_seed_repeats():
    data = table(-0.5, noise=0.5)
    (wide,), (narrow,), (again,) = (
        statistics.exponents(data, ["y"], ["start"], level=level).itertuples() for level in (0.99, 0.5, 0.99))
    assert wide.low < narrow.low < narrow.exponent < narrow.high < wide.high
    assert wide == again


def test_zero_is_said_to_be_zero():
    data = table(-0.5)
    found = statistics.exponents(data.assign(none=0.0, some=data["y"] * (data["seed"] > 0), burst=np.inf),
                                 ["none", "some", "burst"], ["start"])
    assert found["exponent"].tolist()[0] == -np.inf and found["exponent"].isna().tolist() == [False, True, True]
    assert found["low"].isna().tolist() == [False, True, True]


def test_one_seed_has_a_slope_and_no_interval():
    (row,) = statistics.exponents(table(-0.5, seeds=1), ["y"], ["start"]).itertuples()
    assert row.exponent == pytest.approx(-0.5) and np.isnan(row.low) and np.isnan(row.high)


def test_what_cannot_be_fitted_is_named():
    data = table(-0.5)
    with pytest.raises(ValueError, match="one width only"):
        statistics.exponents(data[data["width"] == 128], ["y"], ["start"])
    with pytest.raises(ValueError, match="seeds are missing at some width: there are 41 values of 'y', not 42"):
        statistics.exponents(data.iloc[1:], ["y"], ["start"])
    with pytest.raises(ValueError, match="more than once"):
        statistics.exponents(pd.concat([data, data]), ["y"], ["start"])


def test_the_best_rate_lies_between_the_grid_s():
    rates = 1.6 ** np.arange(-5.0, 6.0)
    losses = np.exp(0.7 * (np.log(rates) - 0.21) ** 2)
    assert statistics.best(rates, losses) == (pytest.approx(np.exp(0.21)), True)
    losses[0] = losses[-1] = np.inf  # far from the lowest
    assert statistics.best(rates, losses) == (pytest.approx(np.exp(0.21)), True)


def test_a_best_rate_at_the_end_is_not_inside():
    rates = 1.6 ** np.arange(-5.0, 6.0)
    assert statistics.best(rates, rates) == (rates[0], False)
    assert statistics.best(rates, 1 / rates) == (rates[-1], False)


def test_two_neighbours_are_no_parabola():
    assert statistics.best(np.array([1.0, 10.0, 100.0]), np.array([2.0, 1.0, 2.0])) == (10.0, True)


@pytest.mark.parametrize(("losses", "expected"), [
    ([0.9, 0.1, 0.1, 10.0], (2 * 2**0.5, True)),  # a line in the logs: half-way between 2 and 4
    ([0.9, 0.1, np.inf, np.inf], (1.0, True)),  # up to there it is known
    ([0.9, 0.1, 10.0, 0.5], (2**0.5, True)),  # what lies beyond a loss above the start's does not count
    ([0.9, 0.1, 0.2, 0.3], (4.0, False)),
    ([1.5, 1.1, 1.2, 3.0], (1.0, False))])
def test_the_edge(losses, expected):
    rate, inside = statistics.edge(np.array([0.5, 1.0, 2.0, 4.0]), np.array(losses))
    assert (rate, inside) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize("exponent", [-1, -0.75, -0.5])
@pytest.mark.parametrize(("pick", "at"), [(statistics.best, 0.1), (statistics.edge, 0.4)])
def test_powers_of_picked_rates_are_found(exponent, pick, at):
    (exact,) = statistics.pick_exponents(sweep(exponent), ["start"], pick, drop=0, resamples=2).itertuples()
    assert exact.inside and exact.exponent == pytest.approx(exponent, abs=0.05)  # the edge's line is no parabola
    chosen = statistics.picks(sweep(exponent), ["start"], pick)
    assert chosen["width"].tolist() == WIDTHS.tolist() and chosen["inside"].all()
    assert np.allclose(chosen["rate"], at * (WIDTHS / 128) ** exponent, rtol=0.15)
    (noisy,) = statistics.pick_exponents(sweep(exponent, noise=0.3), ["start"], pick, resamples=100).itertuples()
    assert noisy.low < exponent < noisy.high and noisy.high - noisy.low < 0.5


def test_a_rate_at_the_end_of_the_grid_is_told():
    data = sweep(-2)  # leaves the grid, which follows −3/4
    (row,) = statistics.pick_exponents(data, ["start"], statistics.best, resamples=2).itertuples()
    assert row.inside is False
    assert statistics.picks(data, ["start"], statistics.best)["inside"].tolist()[0]
