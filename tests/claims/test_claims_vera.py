"""VeRA's claims: their helpers against plain formulas, and wrong numbers that they find."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.claims import ClaimFailed, vera


def test_cells_are_read_exactly():
    assert vera.read("36.8K") == (36_800, 100)
    assert vera.read("2MB") == (2 * 2**20, 2**20)
    assert vera.read("4.6GB") == (Fraction(46, 10) * 2**30, Fraction(2**30, 10))


@pytest.mark.parametrize("number, cell, agrees", [(18_456, "18.4K", True), (18_501, "18.4K", False), (49_920, "49.5K", False)])
def test_one_unit_of_the_last_digit(number, cell, agrees):
    assert vera.within_a_unit(number, cell) is agrees


@pytest.mark.parametrize(
    "number, cell, how",
    [(18_456, "18.4K", "cut off"), (18_456, "18.5K", "rounded"), (18_432, "18.4K", "both"), (49_920, "49.5K", "neither")],
)
def test_how_a_cell_was_printed(number, cell, how):
    assert vera.how_printed(number, cell) == how


def test_what_is_counted():
    """By hand, on one layer of the smallest model."""
    assert vera.count("RoBERTa-base", "LoRA", 16) == (24 * 16 * 2 * 768, 0)
    assert vera.count("RoBERTa-base", "VeRA", 16) == (24 * (768 + 16), 2 * 768 * 16)


TABLE = {
    "a digit of LoRA's": ("RoBERTa-base", "LoRA", 1, "589.8K", "589.6K", vera.table_lora),
    "a digit of base": ("RoBERTa-base", "VeRA", 0, "18.4K", "18.6K", vera.table_base),
    "the misprint mended": ("RoBERTa-large", "VeRA", 1, "49.5K", "49.9K", vera.table_large),
    "the formula's GPT-3": ("GPT-3", "VeRA", 2, "8.7M", "2.4M", vera.table_gpt3),
}


@pytest.mark.parametrize("model, family, place, old, new, claim", TABLE.values(), ids=TABLE)
def test_another_print_is_found(model, family, place, old, new, claim, monkeypatch):
    cells, sizes = vera.PRINTED[model, family]
    assert cells[place] == old
    changed = (*cells[:place], new, *cells[place + 1 :])
    monkeypatch.setitem(vera.PRINTED, (model, family), (changed, sizes))
    with pytest.raises(ClaimFailed):
        claim()


def test_other_bytes_are_found(monkeypatch):
    cells, _ = vera.PRINTED["RoBERTa-large", "VeRA"]
    monkeypatch.setitem(vera.PRINTED, ("RoBERTa-large", "VeRA"), (cells, ("192KB", "193KB", "240KB")))
    with pytest.raises(ClaimFailed, match="not 4 a number"):
        vera.table_bytes()


def test_digits_by_one_rule_are_found(monkeypatch):
    monkeypatch.setattr(vera, "printing", lambda: {"18.4K": "cut off", "4.7M": "both"})
    with pytest.raises(ClaimFailed, match="cut off"):
        vera.table_digits()


WRONG = {
    "a sign": lambda g, a, b_, b, d: (-((b_ * (g @ a.mT)) @ d), (b_ * (g @ a.mT)).mT @ b),
    "without B": lambda g, a, b_, b, d: ((g @ a.mT) @ d, (g @ a.mT).mT @ b),
    "b for one": lambda g, a, b_, b, d: ((b_ * (g @ a.mT)) @ d, (b_ * (g @ a.mT)).sum(0)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_gradients_are_found(wrong, monkeypatch):
    monkeypatch.setattr(vera, "gradients", wrong)
    with pytest.raises(ClaimFailed, match="apart from autograd"):
        vera.gradients_are_autograds()


def test_another_factor_is_found(monkeypatch):
    """An adapter that forgets d."""
    from deltaw.adapters.vera import VeRAAdapter

    def factors(self):
        a, b = self.projection.A[:, : self.in_features], self.projection.B[: self.out_features]
        return a, self.b[:, None] * b

    monkeypatch.setattr(VeRAAdapter, "factors", factors)
    for claim in (vera.formula, vera.rank_one_in_disguise):
        with pytest.raises(ClaimFailed, match="apart"):
            claim()


def test_a_start_of_ones_is_no_start(monkeypatch):
    monkeypatch.setitem(vera.STARTS, "b zero", (1.0, 0.1))
    with pytest.raises(ClaimFailed, match="not the base"):
        vera.start()


@pytest.mark.parametrize("name, power", [("SGD", 1), ("Adam", 2)])
def test_the_wrong_power_of_c_is_found(name, power, monkeypatch):
    make, _, clipped = vera.OPTIMIZERS[name]
    monkeypatch.setitem(vera.OPTIMIZERS, name, (make, power, clipped))
    with pytest.raises(ClaimFailed, match="apart"):
        vera.d_init_is_a_ratio_of_rates()


@pytest.mark.parametrize("spec, expected", [(dw.LoRA(rank=2), 2 * (4 + 5) - 4), (dw.VeRA(rank=3), 4 + 3 - 1)])
def test_dimension(spec, expected):
    assert vera.dimension(spec, 4, 5) == expected


def test_a_set_of_another_dimension_is_found(monkeypatch):
    monkeypatch.setattr(vera, "dimension", lambda spec, out_features, in_features: out_features + spec.rank)
    for claim in (vera.dimensions, vera.high_rank):
        with pytest.raises(ClaimFailed):
            claim()


def test_a_fit_finds_a_target_that_a_vera_layer_made():
    """At r = 1 each step is exact; and no fit holds more than all of it."""
    made = dw.attach(nn.Sequential(nn.Linear(7, 9, dtype=torch.float64)), dw.VeRA(rank=1, projection_seed=3))[0]
    with torch.no_grad():
        made.adapter.b.normal_(generator=torch.Generator().manual_seed(0))
    target = made.delta_weight()
    assert vera.share(target, vera.fit(target, 1, seed=3).delta_weight()) == pytest.approx(1)
    other = vera.share(target, vera.fit(target, 4, seed=4, starts=3).delta_weight())
    assert 0 < other < 1


def test_rounds_and_starts_never_make_a_fit_worse():
    target = vera.gaussian(12, 0)
    held = [vera.share(target, vera.fit(target, 8, rounds=n).delta_weight()) for n in (1, 3, 10, 30)]
    assert held == sorted(held)
    assert vera.share(target, vera.fit(target, 8, rounds=30, starts=4).delta_weight()) >= held[-1]


def test_many_ranks_fit_everything():
    """With r = in · out rank-one matrices, d alone spans all of them."""
    target = vera.gaussian(4, 0)
    assert vera.share(target, vera.fit(target, 24).delta_weight()) == pytest.approx(1, abs=1e-6)


def test_lora_holds_what_eckart_and_young_say():
    assert vera.share_of_lora(vera.low_rank(8, 2, 0), 2) == pytest.approx(1)
    assert vera.share_of_lora(torch.eye(8, dtype=torch.float64), 2) == pytest.approx(0.25)


def test_fits_that_say_otherwise_are_found(monkeypatch):
    monkeypatch.setattr(vera, "share", lambda target, fitted: 1.0)
    for claim in (vera.fit_of_gaussian, vera.fit_of_low_rank):
        with pytest.raises(ClaimFailed, match="VeRA over LoRA"):
            claim()


def test_layers_of_their_own_matrices_do_not_share(monkeypatch):
    """What the note and the sharing claim rest on."""
    plain = dw.VeRA.build

    def unshared(self, layers, generator):
        adapters = {}
        for seed, (name, layer) in enumerate(layers.items()):
            adapters |= plain(dataclasses.replace(self, projection_seed=seed), {name: layer}, generator)
        return adapters

    monkeypatch.setattr(dw.VeRA, "build", unshared)
    for claim in (vera.note_shared, vera.sharing):
        with pytest.raises(ClaimFailed):
            claim()


def test_a_seed_that_is_ignored_is_found(monkeypatch):
    monkeypatch.setattr("deltaw.adapters.vera.draw_projection",
                        lambda rank, wide, tall, seed, layers: (torch.rand(rank, wide), torch.rand(tall, rank)))  # fmt: skip
    with pytest.raises(ClaimFailed, match="not the same"):
        vera.seed()


def test_a_fan_in_that_does_nothing_is_found(monkeypatch):
    plain = vera.projected_std
    monkeypatch.setattr(vera, "projected_std", lambda fan_in: plain("shared"))
    with pytest.raises(ClaimFailed, match="by layer"):
        vera.fan_in()


def test_another_scaling_is_found(monkeypatch):
    """Entries of B that do not shrink with the rank."""
    plain = vera.parts
    monkeypatch.setattr(vera, "parts", lambda one: (*plain(one)[:3], plain(one)[3] * plain(one)[1].numel() ** 0.5))
    with pytest.raises(ClaimFailed, match="exponents"):
        vera.rank_and_rate()


def test_products_are_counted_also_in_place():
    x, w = torch.randn(3, 5), torch.randn(7, 5)
    total = torch.zeros(3, 7)
    with vera.Products() as counted:
        x @ w.mT
        total.addmm_(x, w.mT)
        torch.bmm(x.expand(2, 3, 5), w.mT.expand(2, 5, 7))
    assert counted.multiplications == 4 * 3 * 5 * 7


def test_a_dearer_adapter_is_found(monkeypatch):
    plain = vera.cost
    monkeypatch.setattr(vera, "cost", lambda spec, *shape: plain(dataclasses.replace(spec, rank=spec.rank + 1), *shape))
    with pytest.raises(ClaimFailed, match="VeRA"):
        vera.costs()


def test_a_file_with_more_in_it_is_found(monkeypatch):
    plain = vera.file_bytes
    monkeypatch.setattr(vera, "file_bytes", lambda model, **options: plain(model, projections=isinstance(
        model[0].adapter, dw.adapters.vera.VeRAAdapter)))  # fmt: skip
    with pytest.raises(ClaimFailed, match="by formula"):
        vera.files()


def test_counts_that_differ_are_found(monkeypatch):
    """Of the note: two numbers a layer, and a VeRA larger than LoRA."""
    monkeypatch.setattr(vera, "widths", lambda: nn.Sequential(nn.Linear(6, 24)))
    with pytest.raises(ClaimFailed):
        vera.note_two()
    plain = vera.layer
    monkeypatch.setattr(vera, "layer", lambda spec, *shape: plain(dw.VeRA(rank=1), *shape))
    with pytest.raises(ClaimFailed):
        vera.note_fewer()
