"""A wrong count or bar makes a claim about the cost fail; the helpers do what they are called."""

import math
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from deltaw import results
from deltaw.claims import ClaimFailed, cost

# Counting


def test_a_product_is_counted_once():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert cost.work(lambda: a @ b) == cost.Work(2 * 3 * 5 * 7, 1, 4 * (15 + 35 + 21))


def test_a_product_added_in_place_reads_what_it_is_added_to():
    """PyTorch's own counter gives 0 for these."""
    a, b, total = torch.ones(2, 3, 5), torch.ones(2, 5, 7), torch.zeros(2, 3, 7)
    assert cost.work(lambda: total.baddbmm_(a, b)) == cost.Work(2 * 2 * 3 * 5 * 7, 1, 4 * (30 + 70 + 42 + 42))
    assert cost.work(lambda: total[0].addmm_(a[0], b[0])) == cost.Work(2 * 3 * 5 * 7, 1, 4 * (15 + 35 + 21 + 21))


def test_what_touches_no_number_is_no_work():
    x = torch.ones(4, 6)
    assert cost.work(lambda: (x.view(2, 12), x.mT, x[1:], x.expand(3, 4, 6), torch.empty_like(x))) == cost.Work(0, 0, 0)


def test_a_slot_moves_what_another_does():
    assert cost.numbers_a_token("fused", (64, 128), 8, slots=1) == cost.numbers_a_token("fused", (64, 128), 8, slots=3)


def test_the_floor_of_the_experiment_takes_a_gradient_that_no_adapter_needs():
    """To the embedded tokens, through the first layer's query, key and value: the chapter says how much."""
    needless = cost.minilm_work(8).flops - cost.minilm_work(8, embedded=False).flops
    weights = 3 * 384 * 384 * 2 * cost.MINILM_TOKENS
    assert weights < needless < 1.05 * weights


# The slots


def test_each_slot_has_gradients_of_its_own():
    gradients = cost.cross_gradients(slots=4)
    assert gradients.shape == (4, 4) and (gradients.diagonal() > 0).all()


def test_without_clipping_one_norm_is_no_matter():
    torch.testing.assert_close(cost.regression(3, math.inf, True), cost.regression(3, math.inf, False), rtol=0, atol=0)


def test_a_slot_alone_is_the_row_of_the_bank():
    torch.testing.assert_close(cost.regression(3, 0.5, False)[1:2], cost.regression(3, 0.5, False, only=1))


# The record


@pytest.fixture
def table():
    """Each time another, so that a mix-up shows."""
    rows = [("PEFT", 1, False, 24.0), ("PEFT", 1, True, 18.0), ("PEFT bf16", 1, False, 16.0), ("PEFT bf16", 1, True, 12.0),
            ("fit", 1, False, 20.0), ("fit", 1, True, 10.0), ("floor", 32, False, 22.0), ("floor", 32, True, 16.0),
            ("bank", 1, False, 4.0), ("bank", 2, False, 4.4), ("bank", 4, False, 5.0), ("bank", 8, False, 8.4),
            ("bank", 32, False, 32.0), ("bank", 64, False, 64.0), ("bank", 32, True, 19.2)]
    frame = pd.DataFrame(rows, columns=["arm", "slots", "compiled", "ms"])
    return frame.assign(ms_per_slot=frame.ms / frame.slots)


def test_ratios_are_those_fixed_before(table):
    found = cost.ratios(table)
    assert found["bank / floor, the faster of each"] == pytest.approx(1.2)
    assert found["bank, eager / the faster floor"] == pytest.approx(2.0)
    assert found["PEFT / slot of the bank, compiled"] == pytest.approx(18 / 0.6)
    assert found["PEFT / slot of the bank, eager"] == pytest.approx(24.0)
    assert found["fit / slot of the bank, eager"] == pytest.approx(20.0)


def test_the_fastest_rounds_can_be_compared(table):
    fast = table.assign(fastest_ms=table.ms.where(table.arm != "PEFT", table.ms / 2))
    assert cost.ratios(fast, time="fastest_ms")["PEFT / slot of the bank, compiled"] == pytest.approx(9 / 0.6)
    assert cost.ratios(fast)["PEFT / slot of the bank, compiled"] == pytest.approx(18 / 0.6)


def test_two_sittings_stand_side_by_side(table):
    both = cost.two_sittings(table)
    assert both["this record"].tolist() == pytest.approx([16.0, 19.2, 1.2, 18.0, 30.0, 32.0, 24.0, 24.0])
    assert (both.earlier["bank / floor"], both.earlier["PEFT / slot, eager"]) == pytest.approx(
        (18.9346 / 15.8251, 37.1310 * 32 / 25.8903))


def test_the_earlier_record_is_the_one_in_the_history(tmp_path):
    """Where the repository's history is at hand."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, check=False).stdout

    if shutil.which("git") is None:
        pytest.skip("no git")
    path = "src/deltaw/results/bank_speed.parquet"
    for commit in git("log", "--format=%H", "--", f":/{path}").decode().split():
        (tmp_path / "bank_speed.parquet").write_bytes(git("show", f"{commit}:{path}"))
        table = results.load("bank_speed", folder=tmp_path)
        if table.attrs["manifest"]["sha256"].startswith("0a4be9e1"):
            then = table.set_index(["arm", "slots", "compiled"]).ms
            assert {cell: round(float(then[cell]), 4) for cell in cost.EARLIER} == cost.EARLIER
            return
    pytest.skip("no history")


def test_full_from_is_where_more_slots_no_longer_help(table):
    assert cost.full_from(table) == 8
    assert cost.full_from(table, within=1.3) == 4
    bump = table.assign(ms_per_slot=table.ms_per_slot.where(table.slots != 32, 1.2))
    assert cost.full_from(bump) == 64, "not before a K that is slower"


def test_two_factors_make_the_ratio(table):
    graph, sharing = cost.two_factors(table, compiled=False)
    assert (graph, sharing) == (6.0, 4.0)
    assert graph * sharing == pytest.approx(cost.ratios(table)["PEFT / slot of the bank, eager"])


def test_memory_a_slot_is_a_difference(table):
    assert cost.slot_mib(table.assign(peak_gib=1 + table.slots / 4)) == pytest.approx({2: 256, 4: 256, 8: 256, 32: 256, 64: 256})


def test_what_the_record_lacks_is_said(table):
    with pytest.raises(ClaimFailed, match="no 'floor' of 7 slots"):
        cost.step_ms(table, "floor", 7)


def test_without_the_record_a_claim_fails_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "load", lambda name, folder=tmp_path, load=results.load: load(name, folder=folder))
    for check in (cost.record_floor, cost.record_peft, cost.record_graph, cost.record_launched, cost.record_full,
                  cost.record_memory):
        with pytest.raises(ClaimFailed, match="no record 'bank_speed'.*run bank_speed"):
            check()


# What a claim does when it is wrong

WRONG = [
    pytest.param(cost.bytes_moved, (5,), id="bytes-too-few"),
    pytest.param(cost.flops, (4,), id="flops-of-the-forward-pass-twice"),
    pytest.param(cost.independent, (1,), id="independent-another-slot"),
    pytest.param(cost.jacobian, (nn.BatchNorm1d,), id="jacobian-with-a-batch-norm"),
    pytest.param(cost.mixing, (nn.LayerNorm,), id="mixing-with-a-layer-norm"),
    pytest.param(cost.one_clip, (False,), id="one-clip-a-norm-each"),
    pytest.param(cost.backward, (False,), id="backward-wrong-sign"),
    pytest.param(cost.same_work, (0.5,), id="same-work-half"),
    pytest.param(cost.launches, (1,), id="launches-grow"),
    pytest.param(cost.record_floor, (1.21,), id="record-floor-a-higher-bar"),
    pytest.param(cost.record_floor, (1.1,), id="record-floor-missed-by-more"),
    pytest.param(cost.record_peft, (25.0,), id="record-peft-a-bar-that-all-but-one-meet"),
    pytest.param(cost.record_peft, (31.0,), id="record-peft-a-bar-that-none-meets"),
    pytest.param(cost.record_graph, (True,), id="record-graph-the-other-way-round"),
    pytest.param(cost.record_launched, ("fit",), id="record-launched-beside-itself"),
    pytest.param(cost.record_launched, ("PEFT", "bank"), id="record-launched-with-a-graph"),
    pytest.param(cost.record_full, (16,), id="record-full-from-16"),
    pytest.param(cost.record_memory, (1.0,), id="record-memory-of-the-floor"),
    pytest.param(cost.record_memory, (2.0,), id="record-memory-of-two-floors"),
]


@pytest.mark.parametrize("check, wrong", WRONG)
def test_a_wrong_statement_is_found_out(check, wrong):
    with pytest.raises(ClaimFailed):
        check(*wrong)
