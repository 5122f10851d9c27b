"""A record that says otherwise, or a wrong number, makes a claim about it fail; the helpers count what they say."""

import math

import pandas as pd
import pytest

from deltaw.claims import ClaimFailed
from deltaw.claims import vera_record as rec

# The helpers


def test_counts_are_those_by_formula():
    """36 layers: Σ (in + out) = 41,472, Σ out = 20,736, and A and B are 1536 wide."""
    held = rec.held()
    for r in rec.LORA:
        assert tuple(held.loc[f"LoRA {r}"]) == (41_472 * r, 0)
    for r in rec.VERA:
        assert tuple(held.loc[f"VeRA {r}"]) == (20_736 + 36 * r, 2 * 1536 * r)


def test_the_shapes_are_those_of_the_model():
    transformers = pytest.importorskip("transformers")
    import torch

    from deltaw.experiments.bank_speed import Settings, base

    with torch.device("meta"):
        model = base(Settings(), "meta")
    assert isinstance(model, transformers.PreTrainedModel)
    linear = [tuple(layer.weight.shape) for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert sorted(linear) == sorted(tuple(layer.weight.shape) for layer in rec.minilm())


def test_the_constant_loss_is_the_log_loss_of_the_shares(monkeypatch):
    monkeypatch.setattr(rec, "record", lambda: pd.DataFrame({"report/labels": [None, "1101", "1101"]}))
    from sklearn.metrics import log_loss

    assert rec.constant_loss() == pytest.approx(log_loss([1, 1, 0, 1], [0.75] * 4))
    assert rec.constant_loss() < math.log(2)


def test_a_lower_loss_is_better():
    found = rec.losses([("LoRA 1", "VeRA 512"), ("VeRA 512", "LoRA 1")])
    assert list(found.verdict) == ["better", "worse"]
    assert found.difference.iloc[0] == -found.difference.iloc[1] < 0


def test_two_rows_are_a_family_of_one_over_sentences_too():
    one, among = rec.over_sentences("VeRA 512", "LoRA 1"), rec.over_sentences()
    assert len(one) == 1 and len(among) == 25
    pair = ("VeRA 512", "LoRA 1")
    assert one.difference[pair] == pytest.approx(among.difference[pair])
    assert one.high_all[pair] - one.low_all[pair] < among.high_all[pair] - among.low_all[pair]
    over_seeds = rec.pairs().loc[[pair]].iloc[0]
    assert one.high[pair] - one.low[pair] > over_seeds.high - over_seeds.low, "sentences add to the seeds"


# What a claim does when it is wrong

WRONG = [
    pytest.param(rec.primary, ("LoRA 1", "VeRA 512"), id="primary-the-other-way-round"),
    pytest.param(rec.primary, ("VeRA 1024", "LoRA 1"), id="primary-of-another-pair"),
    pytest.param(rec.loss, ("LoRA 1", "VeRA 512"), id="loss-the-other-way-round"),
    pytest.param(rec.loss, ("VeRA 512", "LoRA 16"), id="loss-of-another-pair"),
    pytest.param(rec.measures, ("VeRA 1024",), id="measures-of-another-row"),
    pytest.param(rec.family, ((),), id="pairs-none-over-sentences"),
    pytest.param(rec.family, ((("VeRA 512", "LoRA 1"),),), id="pairs-another-over-sentences"),
    pytest.param(rec.tenth, (0.2,), id="tenth-a-fifth"),
    pytest.param(rec.tenth, (0.05,), id="tenth-a-twentieth"),
    pytest.param(rec.room, (0.1,), id="room-for-a-larger-margin"),
    pytest.param(rec.rate, ("VeRA", "LoRA"), id="rate-the-other-way-round"),
    pytest.param(rec.one_rate, (-0.5,), id="one-rate-falls-with-the-root"),
    pytest.param(rec.one_rate, (0.5,), id="one-rate-rises-with-the-root"),
    pytest.param(rec.head, ("LoRA", "VeRA"), id="head-the-other-way-round"),
    pytest.param(rec.rank, ((64, 512, 1024),), id="rank-without-the-dip"),
    pytest.param(rec.dip, (0.0447,), id="dip-a-rate-that-tuned-worse"),
    pytest.param(rec.dip, (0.0158,), id="dip-no-other-rate"),
    pytest.param(rec.cost, ("LoRA", "VeRA"), id="cost-the-other-way-round"),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)


# What a claim does when the record is another, by the fixture `changed`

CACHED = (rec.record, rec.rows, rec.pairs, rec.over_sentences)


def exchanged(table, one, other):
    """With the measurements of two rows exchanged, but not their counts."""
    names = {one: other, other: one}
    new = table.assign(row=table.row.replace(names))
    counts = table.groupby("row")[["parameters", "with_head"]].first()
    families = table.groupby("row").family.first()
    return new.assign(family=new.row.map(families), **{name: new.row.map(counts[name]) for name in counts})


def test_exchanged_measurements_are_found(changed):
    changed(exchanged(rec.record(), "VeRA 512", "LoRA 1"))
    for check in (rec.primary, rec.loss, rec.rate):
        with pytest.raises(ClaimFailed):
            check()


def test_other_reported_seeds_are_found(changed):
    """As if rank 256 had no dip, and LoRA 16 were no better than LoRA 1."""
    table = rec.record()
    measured = [name for name in table.columns if name.startswith(("report/", "train_loss"))]
    for row, like in (("VeRA 256", "VeRA 512"), ("LoRA 16", "LoRA 1")):
        to, source = ((table.row == each) & (table.phase == "report") for each in (row, like))
        table = table.copy()
        table.loc[to, measured] = table.loc[source, measured].to_numpy()
    changed(table)
    for check in (rec.family, rec.tenth, rec.dip, rec.rank, rec.measures):
        with pytest.raises(ClaimFailed):
            check()


def test_a_choice_at_the_edge_is_found(changed):
    table = rec.record()
    changed(table[~((table.row == "LoRA 1") & (table.phase != "report") & (table.rate > 0.00223))])
    with pytest.raises(ClaimFailed, match="edge"):
        rec.rate()


def test_other_counts_are_found(changed):
    table = rec.record()
    changed(table.assign(parameters=table.parameters + (table.row == "VeRA 64")))
    with pytest.raises(ClaimFailed, match="recorded"):
        rec.cost()
