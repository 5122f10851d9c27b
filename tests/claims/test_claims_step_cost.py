"""A record that says otherwise, or a wrong number, makes a claim about it fail; the counts are what they say."""

import pandas as pd
import pytest
import torch

from deltaw import claims
from deltaw.claims import ClaimFailed
from deltaw.claims import step_cost as rec

# Counts


def test_products_with_tokens_are_counted_and_others_are_not():
    x, w, small = torch.ones(7, 3), torch.ones(3, 5), torch.ones(3, 3)
    with rec._Products(7) as products:
        x @ w
        small @ w
        torch.baddbmm(torch.ones(2, 5), small[None, :2], w[None])
        torch.mm(x.T, x)
    assert products.found == 2


def test_the_frozen_base_and_full_differ_by_the_weights_gradients():
    (base, products), (full, more) = rec.counted(rec.BASE), rec.counted(rec.FULL)
    s = rec.sizes(rec.SMALL)
    assert full.flops - base.flops == 2 * s.tokens * s.weights and more - products == s.layers


def test_head_only_starts_half():
    head, base = rec.counted(rec.HEAD)[0], rec.counted(rec.BASE)[0]
    assert 0.4 < head.started / base.started < 0.6


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_a_gain_moves_outputs_whatever_the_rank(rank):
    assert rec.gain_numbers((64, 48), rank) == pytest.approx(15)
    assert rec.gain_numbers((64, 48), rank, gain=False) == 0


def test_widths_cross_where_both_take_as_long():
    w = rec.crossing(lora=3.0, full=0.004)
    assert 2 * w * 3.0 == pytest.approx(w * w * 0.004) and w == 1500
    assert rec.crossing_by_rates() == pytest.approx(8 * rec.FLOPS / rec.BYTES)


# The record


def test_a_time_is_of_the_same_round():
    median, least, largest = rec.times("DoRA", "LoRA", rec.LARGE)
    rows = rec.record().query("shape == @rec.LARGE and not compiled")
    ms = rows.pivot(index="round", columns="arm", values="ms")
    ratio = ms["DoRA"] / ms["LoRA"]
    assert (median, least, largest) == pytest.approx((ratio.median(), ratio.min(), ratio.max()))
    assert rec.added_ms("DoRA", "LoRA", rec.LARGE) == pytest.approx((ms["DoRA"] - ms["LoRA"]).median())


def test_per_number_takes_the_tokens_and_widths_out():
    s = rec.sizes(rec.LLAMA)
    assert s.ins + s.outs == 3 * 8192 + 2 * (4096 + 11008) and s.tokens == 8192
    expected = rec.added_ms("LoRA") * 1e9 / (8192 * (s.ins + s.outs))
    assert rec.per_number("LoRA", rec.LLAMA, "in + out") == pytest.approx(expected)


def test_what_is_kept_more_is_a_difference():
    assert rec.kept_more("DoRA", "LoRA") == pytest.approx(rec.kept_more("DoRA") - rec.kept_more("LoRA"))


@pytest.fixture
def otherwise(monkeypatch):
    """Puts a changed copy of the record in the place of the real one."""

    def put(change):
        table = rec.record().copy()
        change(table)
        monkeypatch.setattr(rec, "record", lambda: table)
        for cached in (rec.costs, rec._between):
            cached.cache_clear()

    yield put
    for cached in (rec.costs, rec._between):
        cached.cache_clear()


def scaled(arm, factor, column="ms", shape=None, compiled=None):
    def change(table):
        rows = table["arm"] == arm
        if shape:
            rows &= table["shape"] == shape
        if compiled is not None:
            rows &= table["compiled"] == compiled
        table.loc[rows, column] *= factor

    return change


@pytest.mark.parametrize("id, change", [
    ("step-llama-adapters", scaled("LoRA", 1.5)),
    ("step-llama-adapters", scaled("PiSSA", 1.12)),
    ("step-llama-full", scaled("full", 0.85)),
    ("step-llama-full", scaled("head only", 1.2)),
    ("step-host", scaled("full", 2)),
    ("step-started", scaled("DoRA", 0.3)),
    ("step-few-numbers", scaled("VeRA", 0.9)),
    ("step-few-numbers", scaled("VeRA", 1.1)),
    ("step-rank", scaled("LoRA 4", 0.92)),
    ("step-rank", scaled("LoRA 256", 1.2)),
    ("step-rank-eights", scaled("LoRA 64", 1.05)),
    ("step-rank-eights", scaled("LoRA 4", 0.95)),
    ("step-width", scaled("full", 1.3, shape=rec.LARGE)),
    ("step-width", scaled("LoRA", 1.1, shape=rec.LLAMA)),
    ("step-gain", scaled("DoRA", 1.1, shape=rec.LLAMA)),
    ("step-gain", scaled("DoRA", 1.3, compiled=True)),
    ("step-compiled", scaled("LoRA", 0.8, compiled=True)),
    ("step-compiled", scaled("DoRA", 1.6, compiled=True)),
    ("step-kept", scaled("LoRA", 1.2, "kept_gib")),
    ("step-kept", scaled("LoRA-XS", 1.1, "kept_gib")),
    ("step-memory-count", scaled("VeRA", 1.01, "kept_gib")),
    ("step-memory-saved", scaled("full", 1.05, "kept_gib", rec.LARGE)),
    ("step-peft", scaled("PEFT LoRA", 0.8)),
    ("step-peft", scaled("VeRA", 2, "kept_gib")),
    ("step-peft-host", scaled("DoRA", 0.9)),
])  # fmt: skip
def test_a_record_that_says_otherwise_is_noticed(otherwise, id, change):
    otherwise(change)
    with pytest.raises(ClaimFailed):
        claims.get(id).check()


@pytest.mark.parametrize("check, wrong", [
    (rec.products, {"lora": 5}), (rec.gain, {"expected": 13}), (rec.dora, {"least": 5}),
    (rec.width, {"lora": "in · out"}), (rec.width, {"full": "in + out"}), (rec.kept, {"bytes_a_number": 16}),
    (rec.memory_count, {"within": 0.001}), (rec.saved, {"arm": "LoRA-XS"}), (rec.compiled, {"others": ("DoRA",)}),
    (rec.rank, {"shape": rec.LLAMA}), (rec.few_numbers, {"cell": (rec.LARGE, False)}), (rec.host, {"shape": rec.LLAMA}),
    (rec.peft_host, {"name": "VeRA"}), (rec.eights, {"few": "LoRA 64"}), (rec.llama_adapters, {"bound": 1.4}),
    (rec.llama_full, {"bound": 1.2}), (rec.started, {"least": 0.99}), (rec.peft, {"names": ("LoRA", "full")}),
])  # fmt: skip
def test_a_wrong_number_makes_a_claim_fail(check, wrong):
    check()
    with pytest.raises((ClaimFailed, KeyError)):
        check(**wrong)


def test_what_was_fixed_before_is_marked_and_two_of_it_failed():
    listed = claims.table("09_cost").set_index("id").filter(like="step-", axis=0)
    fixed = listed[listed.source == rec.FIXED]
    assert isinstance(listed, pd.DataFrame) and len(fixed) == 7
    assert set(fixed.index[fixed.verdict == "does not hold"]) == {"step-few-numbers", "step-rank"}
