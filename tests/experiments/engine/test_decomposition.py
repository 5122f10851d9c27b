"""Lengths and directions of rows: against the claims' definitions, against chance, and in a bank."""

import pytest
import torch
from torch import Generator

import deltaw as dw
from deltaw.claims import dora as claims
from deltaw.experiments import bank_speed
from deltaw.experiments.engine import decomposition
from deltaw.experiments.engine.decomposition import (
    BITS,
    FULL_RANK,
    SAME_RANK,
    TRAINED,
    Watch,
    along,
    changes,
    kept,
    random_like,
)
from deltaw.experiments.engine.ends import FullLinear


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def seeds(*numbers):
    return [Generator().manual_seed(number) for number in numbers]


def test_changes_are_those_of_chapter_5():
    weight, delta = draw(9, 7), 0.3 * draw(4, 9, 7, seed=1)
    moved, relative, turned = changes(weight, delta)
    for i in range(4):
        expected = claims.changes(weight, weight + delta[i])
        assert (moved[i].item(), turned[i].item()) == pytest.approx(expected, rel=1e-12)
        assert relative[i].item() == pytest.approx(claims.changes(weight, weight + delta[i], relative=True)[0], rel=1e-12)
        assert along(weight, delta)[i].item() == pytest.approx(7 * claims.radial_share(weight, weight + delta[i]), rel=1e-10)


def test_rows_that_are_stretched_do_not_turn_and_rows_that_turn_keep_their_length():
    weight = draw(6, 8)
    moved, relative, turned = changes(weight, 0.1 * weight)
    assert relative.item() == pytest.approx(0.1) and moved.item() == pytest.approx(0.1 * weight.norm(dim=1).mean().item())
    assert abs(turned.item()) < 1e-15 and along(weight, 0.1 * weight).item() == pytest.approx(8)
    rotation = torch.linalg.qr(draw(8, 8, seed=1)).Q
    moved, _, turned = changes(weight, weight @ rotation - weight)
    assert moved.item() < 1e-14 and turned.item() > 0.1


@pytest.mark.parametrize("rank", [2, None])
def test_a_random_change_has_the_size_and_the_rank_and_no_direction(rank):
    weight, delta = draw(300, 40), 0.1 * draw(5, 300, 40, seed=1)
    random = random_like(delta, rank, seeds(0, 1, 2, 3, 4))
    assert torch.allclose(random.norm(dim=(1, 2)), delta.norm(dim=(1, 2)), rtol=1e-12)
    assert torch.linalg.matrix_rank(random).tolist() == [rank or 40] * 5
    assert along(weight, random).mean().item() == pytest.approx(1, abs=0.3)


def test_a_random_change_depends_on_its_own_generator_alone():
    delta = draw(3, 6, 5)
    several, alone = random_like(delta, 2, seeds(7, 8, 9)), random_like(delta[1:2], 2, seeds(8))
    assert torch.allclose(several[1], alone[0], rtol=1e-6)
    assert not torch.allclose(several[0] / several[0].norm(), several[1] / several[1].norm(), rtol=0.1)


def test_what_is_kept_is_rounded_and_stays_so():
    values = torch.cat([draw(1000) * 10.0 ** draw(1000, seed=1), torch.tensor([0.0, -1.0, 1e-30, torch.nan])])
    rounded = kept(values)
    assert ((rounded - values).abs() <= 2.0**-BITS * values.abs())[:-1].all() and rounded[-1].isnan()
    assert torch.equal(kept(rounded)[:-1], rounded[:-1])
    digits = torch.frexp(rounded[:-1]).mantissa * 2**BITS
    assert torch.equal(digits, digits.round())


def test_a_watched_bank_shows_what_its_slots_become(monkeypatch):
    settings = bank_speed.QUICK
    task, model = bank_speed.Clock(settings, "cpu"), bank_speed.base(settings, "cpu")
    specs = [dw.LoRA(3), FullLinear(), dw.DoRA(dw.LoRA(3))]
    recipe = dw.Recipe(steps=4, learning_rate=0.02, batch_size=2)
    bank = dw.Bank(model, [(spec, recipe) for spec in specs], targets=bank_speed.LAYERS)
    watch = Watch((2, 4), seeds=(5, 6, 7), ranks=(3, None, 3))
    drawn = []  # how many slots' changes, of which rank
    monkeypatch.setattr(decomposition, "random_like",
                        lambda delta, rank, draws: drawn.append((len(delta), rank)) or random_like(delta, rank, draws))
    bank.fit(task, watch=watch, progress=False, device="cpu")
    assert set(drawn) == {(2, 3), (3, None)}
    for slot, seen in watch.seen.items():
        per_matrix = 2 if slot == 1 else 3  # full fine-tuning has one null
        assert len(seen) == 2 * 2 * 6 * per_matrix  # checkpoints, layers, kinds
        assert {row["change"] for row in seen} == {TRAINED, FULL_RANK} | ({SAME_RANK} if slot != 1 else set())
        last = {(row["layer"], row["kind"]): row for row in seen if row["step"] == 4 and row["change"] == TRAINED}
        early = {(row["layer"], row["kind"]): row for row in seen if row["step"] == 2 and row["change"] == TRAINED}
        assert all(0 < early[key]["size"] < last[key]["size"] for key in last)
        layer = bank.adapter(slot).get_submodule("encoder.layer.1.attention.self.value")
        weight, delta = layer.weight.detach().double(), layer.delta_weight(torch.float64)
        row = last[1, "value"]
        found = [value.item() for value in changes(weight, delta)]
        assert [row["ΔM"], row["ΔM/m"], row["ΔD"]] == pytest.approx(found, rel=1e-3)
        assert row["size"] == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-3)
        dw.detach(model)
