"""A record that says otherwise, or a wrong number, makes a claim about it fail; the helpers do what they are called."""

import pandas as pd
import pytest
import torch

from deltaw.claims import ClaimFailed
from deltaw.claims import moslora_record as rec

# The helpers


def test_of_loras_own_rate_nothing_is_gained():
    table = rec.rates()
    assert (table.times.xs("LoRA", level="row") == 1).all()
    assert (table.gain[table.rate == table.rate_of_lora] == 0).all()


def test_a_family_of_one_is_narrower_than_the_family_of_all():
    one, among = rec.pair(rec.ORTHOGONAL, rec.LORA).loc["cola"], rec.differences().loc["cola", rec.ORTHOGONAL]
    assert one.difference == pytest.approx(among.difference) and one.low == pytest.approx(among.low)
    assert one.high_all - one.low_all < among.high_all - among.low_all


def test_the_tuning_seeds_of_a_row_and_itself():
    assert rec.tuning_seeds("LoRA", "LoRA") == (0, 0, 0)
    assert rec.tuning_seeds("LoRA", rec.ORTHOGONAL)[1] == -rec.tuning_seeds(rec.ORTHOGONAL, "LoRA")[1]


def test_what_drawing_the_tuning_seeds_anew_chooses(changed):
    """One of two rates is the better in one of five seeds only, but by far; a row and its copy have the same factor always."""
    assert rec.factors("code_lm", "identity, fixed").to_dict() == {1.0: 1.0}
    losses = {("LoRA", 0.1): [0] * 5, ("LoRA", 0.2): [1] * 5, ("x", 0.1): [0] * 5, ("x", 0.2): [-9, 1, 1, 1, 1]}
    changed(pd.DataFrame([("code_lm", row, "coarse", rate, seed, loss) for (row, rate), each in losses.items()
                          for seed, loss in enumerate(each)],
                         columns=["task", "row", "phase", "rate", "seed", "tune/loss"]))  # fmt: skip
    assert rec.tuned_by("code_lm", "x").shape == (5, 2)
    assert rec.factors("code_lm", "x").to_dict() == pytest.approx({1.0: 0.8**5, 2.0: 1 - 0.8**5})


def test_lora_lags_by_nothing():
    found = rec.lag("code_lm", "identity, fixed")
    assert len(found) > 3 and found.to_numpy() == pytest.approx(1) and found.index.max() < rec.rates().rate["code_lm", "LoRA"]


def test_the_three_forms_of_a_mixer():
    drawn, large, even = (rec.drawn(name, seed=4).mixer for name in ("Kaiming", "large", "even"))
    torch.testing.assert_close(large, 3**0.5 * drawn)
    torch.testing.assert_close(torch.linalg.svdvals(even), torch.full((8,), 3**-0.5))
    u, values, vt = torch.linalg.svd(drawn)
    torch.testing.assert_close((u.mT @ even @ vt.mT).abs(), torch.eye(8) / 3**0.5, atol=1e-5, rtol=0)
    assert values[0] > 5 * values[-1]
    assert not torch.equal(drawn, rec.drawn("Kaiming", seed=5).mixer)
    assert rec.drawn("Kaiming, trained", 4).train_mixer and not rec.drawn("even", 4).train_mixer


def test_goals_and_what_the_best_matrix_leaves_of_them():
    assert int(torch.linalg.matrix_rank(rec.goal(4))) == 4 and rec.floor(rec.goal(4)) < 1e-9
    assert 0.3 < rec.floor(rec.goal(32)) < 0.45
    assert rec.floor(torch.diag(torch.tensor([2.0, 1.0])), 1) == pytest.approx(0.2)


def test_the_loss_is_half_the_squared_error():
    task = rec.Toward(torch.eye(3))
    batch = {"x": torch.tensor([[1.0, 2.0, 3.0]]), "labels": torch.tensor([[1.0, 2.0, 3.0]])}
    assert task.losses(task.model(), batch).tolist() == [7.0]
    batch = next(task.batches(0, 4))
    torch.testing.assert_close(batch["x"], batch["labels"])


def test_each_at_its_best_rate():
    table = pd.DataFrame([("LoRA", 0.1, 0, 0.2), ("LoRA", 0.1, 1, 0.4), ("LoRA", 0.2, 0, 0.9), ("LoRA", 0.2, 1, 0.9),
                          ("even", 0.1, 0, 0.8), ("even", 0.1, 1, 0.8), ("even", 0.2, 0, 0.3), ("even", 0.2, 1, 0.5)],
                         columns=["name", "rate", "seed", "left"])  # fmt: skip
    found = rec.at_best(table)
    assert found.rate.to_dict() == {"LoRA": 0.1, "even": 0.2}
    assert found.loc["even", ["low", "difference", "high"]].tolist() == pytest.approx([0.1, 0.1, 0.1])


# What a claim does when it is wrong

WRONG = [
    pytest.param(rec.primary, ("LoRA", rec.ORTHOGONAL), id="primary-the-other-way-round"),
    pytest.param(rec.primary, ("identity, trained",), id="primary-of-another-row"),
    pytest.param(rec.code, ("kaiming, fixed",), id="code-of-another-row"),
    pytest.param(rec.code, ("identity, trained",), id="code-of-another-equivalent-row"),
    pytest.param(rec.identity, (rec.ORTHOGONAL,), id="identity-of-another-row"),
    pytest.param(rec.published, ("orthogonal, trained",), id="published-of-another-row"),
    pytest.param(rec.best_rate, (1.4,), id="best-rate-as-was-expected-on-cola"),
    pytest.param(rec.best_rate, (1.0, (1.41, 1.41)), id="best-rate-as-was-expected-on-code"),
    pytest.param(rec.confound, (rec.KAIMING[::-1],), id="confound-rows-swapped"),
    pytest.param(rec.confound, (rec.HALVES,), id="confound-of-two-subspaces"),
    pytest.param(rec.tuned, (rec.KAIMING[::-1],), id="tuned-rows-swapped"),
    pytest.param(rec.tuned, (("orthogonal, fixed", "orthogonal, trained"),), id="tuned-of-orthogonal"),
    pytest.param(rec.half_rate, ("kaiming, fixed",), id="half-rate-of-kaiming"),
    pytest.param(rec.two_subspaces, (rec.KAIMING,), id="two-subspaces-of-kaiming"),
    pytest.param(rec.trained, ("orthogonal",), id="trained-of-orthogonal"),
    pytest.param(rec.singular_values, (2.0,), id="singular-values-squared"),
    pytest.param(rec.mixers_rank, (2, 50), id="effective-rank-too-few-draws-of-small-mixers"),
    pytest.param(rec.uneven, (32, "even"), id="uneven-of-the-even"),
    pytest.param(rec.uneven, (4,), id="uneven-for-a-target-of-rank-4"),
    pytest.param(rec.evened_on_code, (rec.EVEN[0],), id="evened-on-code-of-lora's-size"),
    pytest.param(rec.evened_on_code, (rec.UNEVEN,), id="evened-on-code-of-the-uneven"),
    pytest.param(rec.start_on_code, (rec.EVEN[2],), id="start-on-code-of-the-evened"),
    pytest.param(rec.start_on_code, (rec.UNEVEN,), id="start-on-code-of-kaiming"),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)


# What a claim does when the record is another, by the fixture `changed`

CACHED = (rec.record, rec.differences, rec.rates, rec.pair, rec.training, rec.factors)


def test_exchanged_rows_are_found(changed):
    """As if Kaiming mixers were orthogonal ones, and the other way round."""
    table = rec.record()
    names = {f"{one}, {how}": f"{other}, {how}" for one, other in (("kaiming", "orthogonal"), ("orthogonal", "kaiming"))
             for how in ("fixed", "trained")}  # fmt: skip
    changed(table.assign(row=table.row.replace(names)))
    for check in (rec.primary, rec.code, rec.published, rec.best_rate, rec.confound, rec.tuned, rec.trained):
        with pytest.raises(ClaimFailed):
            check()


def test_other_reported_losses_are_found(changed):
    """As if on code the Kaiming mixers and two subspaces had reached LoRA's loss."""
    table = rec.record().copy()
    measured = [name for name in table.columns if name.startswith("report/")]
    for row in (*rec.KAIMING, *rec.HALVES):
        rate = rec.rates().rate["code_lm", row]
        to = (table.task == "code_lm") & (table.row == row) & (table.rate == rate) & (table.phase == "report")
        like = (table.task == "code_lm") & (table.row == "LoRA") & (table.phase == "report")
        table.loc[to, measured] = table.loc[like, measured].to_numpy()
    changed(table)
    for check in (rec.published, rec.tuned, rec.two_subspaces, rec.trained):
        with pytest.raises(ClaimFailed):
            check()


def test_a_choice_at_the_edge_is_found(changed):
    table = rec.record()
    changed(table[~((table.row == "kaiming, trained") & (table.phase == "coarse") & (table.rate > 0.0227))])
    with pytest.raises(ClaimFailed, match="edge"):
        rec.best_rate()


def test_a_decided_choice_is_found(changed):
    """As if LoRA's second best rate on code had been clearly worse."""
    table = rec.record().copy()
    at = (table.task == "code_lm") & (table.row == "LoRA") & (table.phase == "coarse") & (table.rate == 0.0113)
    table.loc[at, "tune/loss"] += 0.003
    changed(table)
    with pytest.raises(ClaimFailed, match="LoRA at"):
        rec.best_rate()


def test_a_lower_loss_at_loras_rate_is_found(changed):
    """As if two subspaces' lower validation loss on CoLA did not come of their rate."""
    table = rec.record().copy()
    at = (table.task == "cola") & table.row.isin(rec.HALVES) & (table.rate == 0.002) & (table.phase != "coarse")
    table.loc[at, "report/loss"] -= 0.015
    changed(table)
    with pytest.raises(ClaimFailed, match="at LoRA's rate"):
        rec.two_subspaces()


def test_another_identity_is_found(changed):
    table = rec.record().copy()
    at = table.index[(table.row == "identity, fixed") & (table.phase == "report")][0]
    table.loc[at, "report/loss"] += 1e-9
    changed(table)
    with pytest.raises(ClaimFailed, match="largest difference"):
        rec.identity()


@pytest.mark.parametrize("check", [rec.evened_on_code, rec.start_on_code])
def test_records_that_cannot_be_compared_are_found(monkeypatch, check):
    """As if LoRA's runs in the two records were not the same."""
    apart = rec.bridge().assign(report_apart=0.001)
    monkeypatch.setattr(rec, "bridge", lambda: apart)
    with pytest.raises(ClaimFailed, match="the two records"):
        check()


@pytest.mark.parametrize("check, row", [(rec.evened_on_code, rec.EVEN[2]), (rec.start_on_code, rec.EVEN[1])])
@pytest.mark.parametrize("column, value", [("difference", 0.02), ("verdict", "not separable")])
def test_another_mean_or_verdict_on_code_is_found(monkeypatch, check, row, column, value):
    table = rec.on_code().copy()
    table.loc[row, column] = value
    monkeypatch.setattr(rec, "on_code", lambda: table)
    with pytest.raises(ClaimFailed, match=row):
        check()
