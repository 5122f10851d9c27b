"""The width experiment: what it records is what it says, and the theory is the arithmetic of aligned signs."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from deltaw import LoRA, Recipe, stacked
from deltaw.adapters import Layer
from deltaw.bank import Bank
from deltaw.experiments import init_width
from deltaw.experiments.init_width import MEASURES, STARTS, Settings, theory, threshold
from deltaw.tasks import teacher_student

TINY = dataclasses.replace(init_width.QUICK, widths=(16, 32), seeds=2, points=32, held_out=8, steps=4,
                           record=(1, 2, 4), rates=3, spacing=8.0)
GAMMAS = (-1.0, -0.75, -0.5)
READOUTS = ("1/√n", "1/n")


@pytest.fixture(scope="module")
def table():
    return pd.DataFrame([cell | row for cell in init_width.cells(TINY) for row in init_width.measure(cell, TINY, "cpu")])


# ---------------------------------------------------------------------------------------------------------------------
# What is run


@pytest.mark.parametrize("settings", [Settings(), init_width.QUICK])
def test_cells_are_every_width_readout_and_seed_once(settings):
    cells = init_width.cells(settings)
    assert len({tuple(cell.items()) for cell in cells}) == len(cells)
    assert len(cells) == len(settings.widths) * len(settings.readouts) * settings.seeds
    assert init_width.data(settings) == {}


def test_the_full_record_is_what_the_question_needs():
    full = Settings()
    assert full.widths == tuple(2**i for i in range(7, 14)) and full.readouts == READOUTS and full.gammas == GAMMAS
    assert full.seeds >= 5 and full.rates >= 13 and full.spacing <= 2 and init_width.STEP in full.record


@pytest.mark.parametrize("record", [(), (0, 60), (5, 3, 60), (1, 2), (1, 61)])
def test_a_record_that_does_not_end_with_the_run_is_refused(record):
    with pytest.raises(ValueError, match="record must rise"):
        Settings(record=record)


def test_rates():
    settings = Settings()
    base, wide = (pd.DataFrame(init_width.arms(width, settings)) for width in (128, 2048))
    for runs, ratio in ((base, 1), (wide, 16)):
        assert set(runs["start"]) == set(STARTS) and runs.groupby("start").size().eq(19 + 3).all()
        plus = runs["start"] == "A, LoRA+"
        assert (runs["ratio"][plus] == ratio).all() and (runs["ratio"][~plus] == 1).all()
        for _, one in runs.groupby("start"):
            assert one["rate"].tolist() == runs["rate"][:22].tolist()
            assert np.allclose(one["rate"][:19].pct_change()[1:], 0.6) and one["rate"].iloc[9] == 0.15 * (ratio**-0.75)
    assert (base["rate"][base["kind"] == "scaled"] == settings.scaled).all()
    scaled = wide[(wide["kind"] == "scaled") & (wide["start"] == "A")]
    assert np.allclose(scaled["rate"], settings.scaled * 16 ** scaled["gamma"].astype(float))


@pytest.mark.parametrize(("start", "zero", "variance"), [
    ("A", "B", 1 / 400), ("B, 1/r", "A", 1 / 4), ("B, 1/n", "A", 1 / 400), ("A, LoRA+", "B", 1 / 400)])
def test_starts(start, zero, variance):
    layer = Layer("hidden", torch.zeros(400, 400))
    a, b = init_width.init(start)(layer, 4, 1.0, torch.Generator().manual_seed(3))
    assert a.shape == (4, 400) and b.shape == (400, 4)
    drawn, other = (a, b) if zero == "B" else (b.mT, a)
    assert not other.any() and drawn.var().item() == pytest.approx(variance, rel=0.1)
    reference, _ = init_width.init("A")(layer, 4, 1.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn / variance**0.5, reference * 20)  # the same numbers


@pytest.mark.parametrize(("gradient", "moved"), [(0.0, 0.0), (1e-30, 0.0), (1e-24, 0.0), (1e-12, 1.0), (1.0, 1.0)])
def test_an_epsilon_that_is_none_and_yet_safe_in_fp32(gradient, moved):
    weights, moments = torch.zeros(1, 1), torch.zeros(2, 1, 1)
    tables = stacked.settings([Recipe(steps=1, learning_rate=1.0, optimizer="adam", eps=init_width.EPS)])
    at = type("At", (), {name: values[0].float() for name, values in tables.items()})
    stacked.UPDATES["adam"](weights, torch.full((1, 1), gradient), moments, at)
    assert -weights.item() == pytest.approx(moved, abs=1e-3)


def test_no_underflow_makes_a_step_larger_than_the_rate():
    gradients = torch.logspace(-45, 0, 2000)[None]  # (1, 2000)
    weights, moments = torch.zeros(1, 2000), torch.zeros(2, 1, 2000)
    tables = stacked.settings([Recipe(steps=1, learning_rate=1.0, optimizer="adam", eps=init_width.EPS)])
    at = type("At", (), {name: values[0].float() for name, values in tables.items()})
    stacked.UPDATES["adam"](weights, gradients, moments, at)
    assert weights.isfinite().all() and weights.abs().max() < 1.2


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


@pytest.mark.parametrize("start", STARTS)
def test_rows_against_matrices_that_are_formed(table, start):
    """The slot alone, Z_B and the three terms as n × N matrices."""
    cell = {"width": 32, "readout": "1/n", "seed": TINY.first_seed + 1}
    rows = table[(table["start"] == start) & (table["gamma"] == -0.75) & (table[list(cell)] == pd.Series(cell)).all(axis=1)]
    rate, ratio = rows["rate"].iloc[0], rows["ratio"].iloc[0]
    task = teacher_student(**cell, points=TINY.points, held_out=TINY.held_out)
    recipe = Recipe(steps=TINY.steps, learning_rate=rate / ratio**0.5, lora_plus_ratio=ratio, batch_size=TINY.points,
                    optimizer="adam", eps=init_width.EPS, precision="fp32", seed=cell["seed"])
    factors = []

    def watch(updates, model, slots):
        down, up, _ = model.hidden.factors(model.hidden.adapter)
        factors.append((down[0].double().clone(), up[0].double().clone()))

    bank = Bank(task.model(), [(LoRA(4, init=init_width.init(start)), recipe)], targets=["hidden"])
    (history,) = bank.fit(task, watch=watch, device="cpu", progress=False)
    with torch.no_grad():
        z = task.model().features(task.train["inputs"]).double().mT  # (n, N)
    assert rows["step"].tolist() == list(TINY.record)
    for row in rows.itertuples():
        (a0, b0), (a, b) = factors[row.step - 1:row.step + 1]  # (r, n), (n, r)
        terms = {"delta1": b0 @ (a - a0) @ z, "delta2": (b - b0) @ a0 @ z, "delta3": (b - b0) @ (a - a0) @ z}  # (n, N)
        change = b @ a @ z - b0 @ a0 @ z
        assert (sum(terms.values()) - change).norm() <= 1e-12 * (b @ a @ z).norm()
        terms |= {"z_a": a @ z, "step_z_a": (a - a0) @ z, "z_b": b @ a @ z}
        for name in MEASURES:
            assert getattr(row, name) == pytest.approx(terms[name].square().mean().sqrt().item(), rel=2e-3, abs=1e-12), name
        if row.step < TINY.steps:
            assert row.train_loss == pytest.approx(history.loss[row.step], rel=1e-3)
        else:
            assert row.test_loss == pytest.approx(history.metrics["loss"], rel=1e-3)


def test_the_first_update_is_sign_like():
    task = teacher_student(32, points=32)
    factors = []

    def watch(updates, model, slots):
        down, up, _ = model.hidden.factors(model.hidden.adapter)
        factors.append((down.clone(), up.clone()))

    recipe = Recipe(steps=1, learning_rate=0.01, batch_size=32, optimizer="adam", eps=init_width.EPS, precision="fp32")
    Bank(task.model(), [(LoRA(4, init=init_width.init(start)), recipe) for start in STARTS], targets=["hidden"]).fit(
        task, watch=watch, device="cpu", progress=False)
    step_a, step_b = factors[1][0] - factors[0][0], factors[1][1] - factors[0][1]  # (4, r, n), (4, n, r)
    for slot, start in enumerate(STARTS):
        moved, still = (step_b, step_a) if STARTS[start][0] == "A" else (step_a, step_b)
        assert not still[slot].any()  # 0/0 is no step
        torch.testing.assert_close(moved[slot].abs(), torch.full_like(moved[slot], 0.01), rtol=1e-3, atol=0)


def test_rows(table):
    assert list(table.columns) == [
        "width", "readout", "seed", "start", "kind", "gamma", "rate", "ratio", "step", *MEASURES, "train_loss", "test_loss"]
    assert table.groupby(["width", "readout", "seed"]).size().eq(4 * (3 * 3 + 3 + 2)).all()
    assert np.isfinite(table[[*MEASURES, "train_loss"]]).all(axis=None)
    assert (table["test_loss"].notna() == (table["step"] == 4)).all()
    assert (table["gamma"].isna() == (table["kind"] == "sweep")).all()
    first = table[table["step"] == 1]
    init_a = first["start"].isin(["A", "A, LoRA+"])
    assert (first.loc[init_a, ["step_z_a", "delta1", "delta3"]] == 0).all(axis=None)
    assert (first.loc[~init_a, ["delta2", "delta3"]] == 0).all(axis=None)
    assert np.allclose(first["z_b"], first["delta1"] + first["delta2"], rtol=1e-6)  # all of it is from one update


def test_in_the_sweep_only_the_best_rate_has_every_step(table):
    for _, rows in table[table["kind"] == "sweep"].groupby(["width", "readout", "seed", "start"]):
        last = rows[rows["step"] == 4]
        full = rows.groupby("rate").filter(lambda one: len(one) == 3)
        assert len(last) == 3 and full["rate"].nunique() == 1
        assert full["rate"].iloc[0] == last["rate"][last["train_loss"].idxmin()]


def test_measuring_again_gives_the_same_rows():
    cell = init_width.cells(TINY)[3]
    assert init_width.measure(cell, TINY, "cpu") == init_width.measure(cell, TINY, "cpu")


def test_a_readout_that_is_not_known_is_named():
    with pytest.raises(ValueError, match="readout"):
        init_width.measure({"width": 16, "readout": "1", "seed": 0}, TINY, "cpu")


def test_from_the_first_loss_that_is_not_finite_on_it_is_infinite():
    assert init_width._finite([1.0, 0.5, math.nan, 0.1], 3) == [1.0, 0.5, math.inf, math.inf]
    assert init_width._finite([1.0, math.inf, math.nan], 3) == [1.0, math.inf, math.inf, math.inf]
    assert init_width._finite([1.0, 0.5, 0.4, 0.3], 3) == [1.0, 0.5, 0.4, 0.3]


# ---------------------------------------------------------------------------------------------------------------------
# What was expected


def aligned(start, gamma, width, steps):
    """`MEASURES` when every sign is the same: z = 1, each entry of a factor with a gradient grows by its rate."""
    factor, by_width, _ = STARTS[start]
    ratio = width if start.endswith("LoRA+") else 1
    rate_a, rate_b = width**gamma / ratio**0.5, width**gamma * ratio**0.5
    z_a, b = torch.zeros(1, 1, 1, dtype=torch.float64), torch.zeros(1, width, 1, dtype=torch.float64)  # (K, r, N), (K, n, r)
    if factor == "A":
        z_a += width ** ((by_width + 1) / 2)  # n random entries of variance n^by_width
    else:
        b += width ** (by_width / 2)
    for _ in range(steps):
        before = b, z_a
        b, z_a = b + rate_b * bool(before[1].any()), z_a + rate_a * width * bool(before[0].any())
    return dict(zip(MEASURES, init_width.measures(*before, b, z_a)[0].double().tolist()))


@pytest.mark.parametrize("gamma", [-1.0, -0.8, -0.75, -0.5, -0.3])
@pytest.mark.parametrize("start", STARTS)
def test_the_theory_is_what_aligned_signs_add_up_to(start, gamma):
    for step in (1, 2, 3, 5):
        low, high = (aligned(start, gamma, width, step) for width in (2**16, 2**18))
        for name, power in theory(start, gamma, step).items():
            if power == -math.inf:
                assert low[name] == high[name] == 0, (step, name)
            else:  # what grows more slowly is not yet gone
                assert math.log(high[name] / low[name], 4) == pytest.approx(power, abs=0.12), (step, name)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_theory_by_hand(gamma):
    a, random, small, plus = (theory(start, gamma) for start in STARTS)
    assert a["z_a"] == gamma + 1 and {a[name] for name in ("z_b", "delta1", "delta2", "delta3")} == {2 * gamma + 1}
    assert {random[name] for name in ("z_a", "z_b", "delta1")} == {gamma + 1}
    assert random["delta2"] == random["delta3"] == 2 * gamma + 1
    assert small["z_a"] == gamma + 1 and small["z_b"] == small["delta1"] == gamma + 0.5
    assert small["delta2"] == small["delta3"] == 2 * gamma + 1
    assert plus["z_a"] == 0 and plus["z_b"] == plus["delta2"] == gamma + 0.5 and plus["delta1"] == 2 * gamma + 1


def test_thresholds():
    assert [threshold(start) for start in STARTS] == [-0.5, -1, -0.5, -0.5]
    assert [threshold(start, "1/√n") for start in STARTS] == [-0.75, -1, -0.75, -1]
    assert [threshold(start, "1/n") for start in STARTS] == [-0.5, -0.5, -0.5, -0.5]


# ---------------------------------------------------------------------------------------------------------------------
# What was found


def test_exponents_stand_beside_the_theory(table):
    found = init_width.exponents(table, step=4)
    assert len(found) == 2 * 4 * 3 * len(MEASURES)
    assert list(found.columns) == ["readout", "start", "gamma", "quantity", "exponent", "low", "high", "theory"]
    row = found.query("readout == '1/n' and start == 'B, 1/n' and gamma == -0.5 and quantity == 'z_b'").iloc[0]
    assert row["theory"] == 0 and row["low"] <= row["exponent"] <= row["high"]
    first = init_width.exponents(table, step=1).query("start == 'A' and quantity in ('delta1', 'delta3', 'step_z_a')")
    assert (first[["exponent", "theory"]] == -math.inf).all(axis=None)


def test_an_early_exponent_is_the_theory_s():
    """Powers of n need no wide networks where nothing has been learnt yet: δ¹ of the second update from Init[B], 1/r."""
    settings = dataclasses.replace(TINY, widths=(64, 128, 256), points=64, steps=2, record=(1, 2), seeds=4, rates=1,
                                   readouts=("1/n",))
    rows = [cell | row for cell in init_width.cells(settings) for row in init_width.measure(cell, settings, "cpu")]
    found = init_width.exponents(pd.DataFrame(rows), step=2)
    for row in found.query("quantity in ('delta1', 'step_z_a')").itertuples():
        assert row.exponent == pytest.approx(row.theory, abs=0.35), row
        assert row.low - 0.1 < row.theory < row.high + 0.1, row


@pytest.mark.parametrize("how", ["best", "edge"])
def test_rates_stand_beside_both_predictions(table, how):
    found = init_width.rate_exponents(table, how, resamples=5)
    assert list(found.columns) == ["readout", "start", "exponent", "low", "high", "inside", "paper", "output"]
    assert found.set_index(["readout", "start"]).loc[("1/n", "B, 1/r"), ["paper", "output"]].tolist() == [-1, -0.5]
    chosen = init_width.chosen_rates(table, how)
    assert len(chosen) == 2 * 4 * 2 and chosen["rate"].between(table["rate"].min(), table["rate"].max()).all()


def test_what_is_not_a_rate_is_named(table):
    with pytest.raises(ValueError, match="how must be one of .*best.*edge.*, not 'worst'"):
        init_width.chosen_rates(table, "worst")
