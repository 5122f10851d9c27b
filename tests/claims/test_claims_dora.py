"""DoRA's claims: what they compute with is right, and a wrong formula or number makes them fail."""

import math

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.claims import ClaimFailed, dora
from deltaw.tasks import digits

# --- a wrong formula is found ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, wrong, claims",
    [
        ("exact", lambda v, m, g: -dora.detached(v, m, g), [dora.equation_6]),
        ("exact", lambda v, m, g: dora.detached(v, m, g) + dora.radial_part(v, m, g), [dora.equation_6]),
        ("exact", lambda v, m, g: m[:, None] / dora.length(v) * g, [dora.equation_6, dora.equation_11]),
        ("detached", lambda v, m, g: m[:, None] * g, [dora.equation_11]),
        ("of_magnitude", lambda v, g: -dora.along(g, v / dora.length(v))[:, 0], [dora.equation_7, dora.detaching_v]),
        ("of_magnitude", lambda v, g: dora.along(g, v)[:, 0], [dora.equation_7, dora.detaching_v]),
        ("radial_part", lambda v, m, g: -m[:, None] / dora.length(v) ** 3 * dora.along(g, v) * v, [dora.detaching_factors]),
        ("radial_part", lambda v, m, g: dora.along(g, v) * v / dora.length(v) ** 2, [dora.detaching_factors]),
        ("length", lambda v: v.norm(dim=0, keepdim=True).mT[: len(v)], [dora.equation_6, dora.equation_7, dora.two_matrices]),
        ("EXAMPLE_A", [[1.0, 1.0]], [dora.stationary]),
        ("merged_norm", dora.formed_norm, [dora.factored_norm, dora.memory, dora.norm_precision]),
        ("merged_norm", lambda w, norm, down, up: (norm.square() + (w @ down.mT * up).sum(-1)).sqrt(), [dora.factored_norm]),
        ("turn", lambda size, cosine: size**2 * (1 - cosine**2) / 2, [dora.equation_10]),
        ("rank_error", lambda delta, k: 0.0, [dora.not_lora]),
    ],
)
def test_a_wrong_formula_makes_the_claim_fail(monkeypatch, name, wrong, claims):
    monkeypatch.setattr(dora, name, wrong)
    for claim in claims:
        with pytest.raises(ClaimFailed):
            claim()


@pytest.mark.parametrize("detach", [True, False])
def test_a_layer_that_ignores_detach_makes_claims_fail(monkeypatch, detach):
    build = dora.dora
    monkeypatch.setattr(dora, "dora", lambda w, a, b, m=None, _=True, s=1.0, **__: build(w, a, b, m, detach, s))
    for claim in (dora.detaching_factors, dora.stationary, dora.equation_6 if detach else dora.equation_11):
        with pytest.raises(ClaimFailed):
            claim()


@pytest.mark.parametrize("cell, printed", [(1, "0.85"), (5, "0.36"), (7, "0.70"), (8, "0.36")])
def test_another_printed_digit_makes_table_1_fail(monkeypatch, cell, printed):
    cells = list(dora.PRINTED)
    assert cells[cell][0] == "Table 1" and cells[cell][4]
    cells[cell] = (*cells[cell][:5], printed)
    monkeypatch.setattr(dora, "PRINTED", cells)
    if cell == 8:  # what the shapes give: then the verdict is as it was, since the claim says 0.36
        assert dora.table_1()
        return
    with pytest.raises(ClaimFailed, match="the shapes give"):
        dora.table_1()


def test_cells_that_decide_make_the_axis_claim_fail(monkeypatch):
    decided = []
    for *cell, _ in dora.PRINTED:
        decided.append((*cell, f"{dora.percent(dora.trained(*cell[1:]), 'rows'):.2f}"))
    monkeypatch.setattr(dora, "PRINTED", decided)
    monkeypatch.setattr(dora.printed_percentages, "__defaults__", (decided,))
    with pytest.raises(ClaimFailed, match="cells that fit"):
        dora.axis()


def test_a_gain_in_bf16_makes_the_claim_fail(monkeypatch):
    keep = dw.AdaptedLinear.factors
    monkeypatch.setattr(dw.AdaptedLinear, "factors", lambda self, adapter: tuple(t.bfloat16() for t in keep(self, adapter)))
    with pytest.raises(ClaimFailed, match="rounds its gain"):
        dora.bf16()


@pytest.mark.parametrize("results", [{True: 0.7, False: 0.9}, {True: 0.9, False: 0.9}])
def test_other_results_of_training_make_the_claim_fail(monkeypatch, results):
    monkeypatch.setattr(dora, "on_digits", lambda angle, detach, *_, **__: {"accuracy": results[detach], "rows of V longer by": 2.0})
    with pytest.raises(ClaimFailed):
        dora.detaching_magnitude()


@pytest.mark.parametrize("moved", [lambda shuffled, rate: rate / 2 if shuffled else rate, lambda shuffled, rate: 0.01])
def test_magnitudes_that_tell_what_is_learnt_make_the_claim_fail(monkeypatch, moved):
    monkeypatch.setattr(dora, "magnitudes_moved", lambda shuffled, rate, steps: moved(shuffled, rate))
    with pytest.raises(ClaimFailed):
        dora.magnitude_clock()


# --- changes of length and direction ---------------------------------------------------------------------


def test_changes_by_hand():
    before = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[3.0, 4.0], [0.0, 1.0]])  # lengths 3 → 5 and 2 → 1, cosines 3/5 and 1
    assert dora.changes(before, after) == pytest.approx((1.5, 0.2))
    assert dora.changes(before, after, relative=True) == pytest.approx(((2 / 3 + 1 / 2) / 2, 0.2))
    assert dora.changes(before, before) == pytest.approx((0, 0))
    assert dora.changes(before, 3 * before)[1] == pytest.approx(0)


def test_radial_share():
    before = torch.eye(2, 5)
    assert dora.radial_share(before, 1.5 * before) == pytest.approx(1)
    assert dora.radial_share(before, before + torch.eye(2, 5).roll(2, 1)) == pytest.approx(0)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 100, generator=g)
    for rank in (8, None):
        assert dora.radial_share(weight, weight + dora.random_change(weight, rank, 3.0, g)) * 100 == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("rank", [3, None])
def test_a_random_change_has_the_size_and_the_rank_asked_for(rank):
    weight = torch.empty(20, 10, dtype=torch.float64)
    change = dora.random_change(weight, rank, 2.5, torch.Generator().manual_seed(0))
    assert change.shape == weight.shape and change.dtype == weight.dtype
    assert change.norm().item() == pytest.approx(2.5)
    assert torch.linalg.matrix_rank(change) == (rank or 10)


@pytest.mark.parametrize("rho", [0.01, 0.08, 0.5, 2.0])
def test_the_null_is_what_random_changes_give(rho):
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=g, dtype=torch.float64))
    change = torch.nn.functional.normalize(torch.randn(20_000, 64, generator=g, dtype=torch.float64)) * rho
    assert dora.changes(weight, weight + change) == pytest.approx(dora.expected(rho, 64), rel=0.03)


def test_turn_is_the_change_of_direction():
    row = torch.tensor([[1.0, 0.0]])
    for size, cosine in ((0.5, 0.3), (2.0, -0.6)):
        update = size * torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])
        assert dora.changes(row, row + update)[1] == pytest.approx(dora.turn(size, cosine))


# --- counting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, total", [("LLaMA-7B", 6_738_415_616), ("LLaMA-13B", 13_015_864_320), ("LLaMA-3-8B", 8_030_261_248)])
def test_the_shapes_are_those_of_the_models(name, total):
    counts = dora.trained(name, 4, dora.FIVE, dora.FIVE)
    assert counts["base"] == total
    with_lora = dora.trained(name, 4, dora.FIVE)
    assert with_lora["A and B"] == counts["A and B"] and with_lora["m by rows"] == with_lora["m by columns"] == 0


def test_the_totals_are_transformers_own():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dora.LLAMA["LLaMA-3-8B"]
    config = LlamaConfig(hidden_size=shape["hidden"], intermediate_size=shape["inner"], num_hidden_layers=1, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=shape["vocabulary"], tie_word_embeddings=False)  # fmt: skip
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
        block = dora.Block(shape["hidden"], shape["inner"], shape["keys"])
    expected = sum(p.numel() for p in block.parameters()) + 2 * shape["vocabulary"] * shape["hidden"] + shape["hidden"]
    assert sum(p.numel() for p in theirs.parameters()) == expected


def test_what_a_norm_makes_and_keeps():
    made = dora.made_by(dora.formed_norm, 40, 30, 2)
    assert sorted(made) == [40, 40 * 30, 40 * 30]
    assert max(dora.made_by(dora.merged_norm, 40, 30, 2)) == 40 * 2
    assert dora.kept_by(dora.formed_norm, 40, 30, 2, detach=True) == 4 * 40  # the norm, for ∂L/∂m
    exact = dora.kept_by(dora.formed_norm, 40, 30, 2, detach=False)
    assert 4 * (40 * 30 + 40) <= exact <= 4 * (40 * 30 + 3 * 40)
    assert dora.kept_by(dora.merged_norm, 400, 300, 2, detach=False) < 0.1 * 4 * 400 * 300


def test_rank_error_by_hand():
    delta = torch.diag(torch.tensor([4.0, 3.0, 0.0]))
    assert [dora.rank_error(delta, k) for k in (0, 1, 2, 3)] == pytest.approx([1, 0.6, 0, 0])


def test_norm_errors_are_those_of_the_rounding():
    for norm in (dora.merged_norm, dora.formed_norm):
        assert dora.norm_error(norm, 1.0) < 1e-6
        assert 1e-6 < dora.norm_error(norm, 1.0, dtype=torch.bfloat16) < 1e-2
    assert dora.norm_error(dora.formed_norm, 0.1, cancelling=True) < dora.norm_error(dora.merged_norm, 0.1, cancelling=True) < 1e-3


# --- training, watched -----------------------------------------------------------------------------------


def attached(detach=True):
    task = digits(angle=90)
    return task, dw.attach(task.model(), dw.DoRA(dw.LoRA(rank=2), detach_norm=detach))


def test_a_watched_task_looks_where_it_is_told_and_changes_nothing():
    recipe = dw.Recipe(steps=5, learning_rate=0.01, batch_size=8)
    seen = []
    runs = []
    for watching in (False, True):
        task, model = attached()
        on = dora.watched(task, lambda step, model: seen.append((step, dora.row_growth(model))), {0, 3}) if watching else task
        runs.append(dw.fit(model, on, recipe, progress=False, device="cpu").loss)
    assert runs[0] == runs[1]
    assert [step for step, _ in seen] == [0, 3] and seen[0][1] == 1.0 != seen[1][1]
    assert "losses" not in vars(task)


def test_magnitudes_faster_is_a_rate_for_vectors_alone():
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(5, 2))]
    optimizer = dora.magnitudes_faster(10.0)([{"params": parameters, "lr": 0.1, "weight_decay": 0.0}])
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in parameters] == [0.1, 1.0, 0.1]
    only_matrices = dora.magnitudes_faster(10.0)([{"params": parameters[:1], "lr": 0.1, "weight_decay": 0.0}])
    assert len(only_matrices.param_groups) == 1


def test_two_gradients_leaves_the_model_and_finds_the_difference():
    task, model = attached()
    with torch.no_grad():
        for layer in dw.adapted_layers(model).values():
            layer.adapter.inner.B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = dora.two_gradients(model, task, next(task.batches(seed=0, batch_size=32)))
    assert set(found) == set(dw.adapted_layers(model))
    assert all(size > 0 and difference > 0.001 for size, difference in found.values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(layer.adapter.detach_norm for layer in dw.adapted_layers(model).values())


def test_direction_after_is_of_unit_length():
    for detach in (True, False):
        torch.testing.assert_close(dora.direction_after(detach, 0.1).norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_correlation_is_pearsons():
    assert dora.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert dora.correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0, abs=1e-12)
