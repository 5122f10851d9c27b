"""A record that says otherwise, or a wrong number, makes a claim about it fail; the helpers compute what they say."""

import numpy as np
import pandas as pd
import pytest

from deltaw.claims import ClaimFailed
from deltaw.claims import dora_record as rec

# The helpers


def random_points(seed=0, layers=5, steps=4):
    draw = np.random.default_rng(seed)
    step = np.repeat(np.arange(steps), layers)
    return pd.DataFrame({"run": seed, "step": step, "ΔM": draw.normal(size=steps * layers) + step,
                         "ΔD": draw.normal(size=steps * layers) - 0.3 * step})  # fmt: skip


def test_parts_give_pearsons_correlation():
    points = pd.concat([random_points(0), random_points(1), random_points(2, layers=3, steps=6)])
    table = rec.parts(points, ["run"])
    for run, some in points.groupby("run"):
        assert table.pooled[run] == pytest.approx(some["ΔM"].corr(some["ΔD"]), abs=1e-12)
        inside = some[["ΔM", "ΔD"]] - some.groupby("step")[["ΔM", "ΔD"]].transform("mean")
        assert table.r_w[run] == pytest.approx(inside["ΔM"].corr(inside["ΔD"]), abs=1e-12)
        means = some.groupby("step")[["ΔM", "ΔD"]].mean()
        assert table.r_b[run] == pytest.approx(means["ΔM"].corr(means["ΔD"]), abs=1e-12)
        assert table.b_M[run] == pytest.approx(1 - inside["ΔM"].var() / some["ΔM"].var(), abs=1e-12)


def test_parts_by_hand():
    """Two checkpoints, two layers: ΔM is the checkpoint's alone, ΔD the layer's alone."""
    points = pd.DataFrame({"run": 0, "step": [1, 1, 2, 2], "ΔM": [1.0, 1.1, 3.0, 3.1], "ΔD": [1.0, 2.0, 1.1, 2.1]})
    table = rec.parts(points, ["run"]).loc[0]
    assert table.b_M == pytest.approx(4 / 4.01) and table.b_D < 0.02
    assert table.r_b == pytest.approx(1) and table.r_w == pytest.approx(1)


def test_within_checkpoints_is_the_experiments_own_view():
    from deltaw.experiments import dora_directions

    runs = dora_directions.by_run(rec.directions())
    runs = runs[(runs["view"] == "within checkpoint") & (runs.task != "mean")]
    own = runs.set_index(["task", "targets", "method", "change", "seed"]).correlation
    assert (own - rec.parts_by_run().r_w).abs().max() < 1e-10


def test_times_are_of_the_same_round(monkeypatch):
    ms = pd.DataFrame({"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 6.0]})
    monkeypatch.setattr(rec, "cells", lambda: {("shape", True): ms})
    assert rec.times("a", "b", "shape", True) == (2.0, 1.0, 4.0)


def test_the_primary_endpoint_is_the_experiments_own():
    from deltaw.experiments import dora_directions

    table = dora_directions.primary(rec.directions()).set_index("method")
    own = rec.in_paper(rec.correlations()).loc[[rec.FULL, rec.LORA]]
    for column in ("correlation", "null", "difference_low", "difference_high", "paper"):
        assert table[column].to_dict() == own[column].to_dict()
    assert set(table.verdict) == {"as chance"} and dora_directions.BOUND == rec.primary.__defaults__[0]


def test_an_interval_is_shown_with_its_own_ends():
    row = pd.Series({"difference": 0.1, "difference_low": -0.25, "difference_high": 0.5, "low": 7.0, "high": 8.0, "along": 7.5})
    assert rec.shown(row, digits=2) == "+0.10 [-0.25, +0.50]"
    assert rec.shown(row, "along", 1, prefix="") == "+7.5 [+7.0, +8.0]"


# What a claim does when it is wrong

WRONG = [
    pytest.param(rec.primary, (0.03,), id="primary-a-narrower-bound"),
    pytest.param(rec.analysis_null, (rec.DORA,), id="null-of-dora"),
    pytest.param(rec.analysis_null, (rec.FULL,), id="null-of-full-fine-tuning-in-every-view"),
    pytest.param(rec.signs, (rec.DORA,), id="signs-of-dora"),
    pytest.param(rec.null, (0.9,), id="null-at-nine-tenths"),
    pytest.param(rec.along, (30, 3), id="along-thirty-times"),
    pytest.param(rec.along, (10, 1.3), id="along-the-others-less"),
    pytest.param(rec.not_chance, ((rec.DORA,),), id="not-chance-of-dora"),
    pytest.param(rec.dora_sign, (rec.LORA,), id="sign-of-lora"),
    pytest.param(rec.dora_sign, (rec.FULL,), id="sign-of-full-fine-tuning"),
    pytest.param(rec.within, ("within layer",), id="within-layers"),
    pytest.param(rec.kinds, (rec.LORA,), id="kinds-of-lora"),
    pytest.param(rec.exact, (0.05,), id="exact-within-a-twentieth"),
    pytest.param(rec.clock, (rec.LORA,), id="clock-of-lora"),
    pytest.param(rec.clock, (rec.FULL,), id="clock-of-full-fine-tuning"),
    pytest.param(rec.cola, (0.009,), id="cola-a-narrower-margin"),
    pytest.param(rec.detaching_accuracy, ("digits", "cola"), id="accuracy-the-other-way-round"),
    pytest.param(rec.digits, ("digits, 120 steps",), id="digits-after-120-steps"),
    pytest.param(rec.memory, ("factored", "formed"), id="memory-the-other-way-round"),
    pytest.param(rec.kept, (4096,), id="kept-of-half-the-tokens"),
    pytest.param(rec.exact_time, ("formed",), id="exact-time-of-the-formed-norm"),
    pytest.param(rec.lora_time, (1.27,), id="lora-time-a-higher-bound"),
    pytest.param(rec.peft, ("LoRA",), id="peft-of-lora"),
    pytest.param(rec.norm_time, ("formed norm, exact gradient",), id="norm-time-of-the-exact-gradient"),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)


def test_wrong_parts_are_found(monkeypatch):
    monkeypatch.setattr(rec, "parts_by_run", lambda: true.assign(pooled=true.r_b))
    true = rec.parts(rec.directions().query("what == 'matrix' and kind == 'query'"), ["task", "targets", "method", "change", "seed"])
    with pytest.raises(ClaimFailed, match="Pearson"):
        rec.pooled_by_parts()


# What a claim does when the record is another, by the fixture `changed`

CACHED = (rec.directions, rec.correlations, rec.contrasts, rec.moved, rec.parts_by_run, rec.by_kind, rec.detach, rec.differences,
          rec.cells, rec.costs, rec.saved)  # fmt: skip


def test_exchanged_methods_are_found(changed):
    names = {"LoRA": "DoRA, exact gradient", "DoRA, exact gradient": "LoRA"}
    table = rec.directions()
    changed(table.assign(method=table.method.replace(names)))
    for check in (rec.primary, rec.analysis_null, rec.along, rec.not_chance, rec.dora_sign, rec.exact, rec.clock, rec.kinds):
        with pytest.raises(ClaimFailed):
            check()


def test_a_sign_with_all_layers_is_found(changed):
    """As if DoRA's correlations were the same whatever is trained."""
    table = rec.directions()
    matrix = table.what == "matrix"
    two = table[matrix & (table.targets == rec.QV)]
    changed(pd.concat([table[~matrix], two, two.assign(targets=rec.ALL)]))
    with pytest.raises(ClaimFailed, match="mean, all layers"):
        rec.dora_sign()


def test_a_difference_on_cola_is_found(changed):
    """As if full fine-tuning of all layers did on CoLA what it does on SST-2."""
    table = rec.directions()
    full = (table.method == rec.FULL) & (table.targets == rec.ALL)
    other = table[full & (table.task == "sst2")]
    changed(pd.concat([table[~full], other, other.assign(task="cola")]))
    with pytest.raises(ClaimFailed, match=r"^\['\+0\.4"):
        rec.not_chance()


def test_lengths_that_shrink_where_directions_turn_are_found(changed):
    """As if the paper's sign were there: the largest ΔM with the least ΔD, of full fine-tuning and of chance."""
    table = rec.directions()
    full = (table.method == rec.FULL) & (table.what == "matrix")
    changed(table.assign(ΔM=table["ΔM"].where(~full, table.loc[full, "ΔM"].max() - table["ΔM"])))
    for check in (rec.signs, rec.null):
        with pytest.raises(ClaimFailed):
            check()


def test_exchanged_gradients_are_found(changed):
    names = {"DoRA": "DoRA, exact gradient", "DoRA, exact gradient": "DoRA"}
    table = rec.detach()
    changed(table.assign(row=table["row"].replace(names), arm=table["arm"].replace(names)))
    for check in (rec.cola, rec.detaching_accuracy, rec.digits):
        with pytest.raises(ClaimFailed):
            check()


def test_other_costs_are_found(changed):
    """As if the formed norm kept nothing, and PEFT's DoRA were the slower one everywhere."""
    table = rec.detach()
    formed, peft = table.arm == "formed norm, exact gradient", table.arm == "PEFT DoRA"
    changed(table.assign(kept_gib=table.kept_gib.where(~formed, 2.0), ms=table.ms * (1 + 9.0 * peft.fillna(False).astype(float))))
    for check in (rec.memory, rec.peft):
        with pytest.raises(ClaimFailed):
            check()
