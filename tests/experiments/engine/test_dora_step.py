"""The arms of the cost: they adapt the same layers and begin as the base; the formed norm is the factored one."""

import pytest
import torch

import deltaw as dw
from deltaw.adapters.dora import DoRAAdapter
from deltaw.experiments.engine import dora_step
from deltaw.experiments.engine.dora_step import ARMS, DETACHED, EXACT, FORMED, FORMED_EXACT, FormedDoRA, arms
from deltaw.experiments.engine.step import BASE, SHAPES, base

SMALL = [SHAPES["small bert"], SHAPES["small llama"]]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.family)
def test_every_arm_trains_the_same_layers(shape):
    expected = {"bert": 6, "llama": 5}[shape.family]
    numbers = {}
    for name, build in ARMS.items():
        model = build(base(shape, "cpu"), shape)
        trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
        factors = [p for key, p in trained.items() if p.dim() == 2]
        assert len(factors) == (0 if name == BASE else 2 * expected), name
        numbers[name] = sum(p.numel() for p in trained.values())
    assert numbers[BASE] == 0 < numbers["LoRA"] < numbers[DETACHED]
    assert len({numbers[name] for name in ARMS if name not in (BASE, "LoRA")}) == 1


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.family)
def test_all_arms_begin_as_the_base_and_pass_a_gradient_to_the_input(shape):
    torch.manual_seed(0)
    x = torch.randn(shape.batch, shape.length, shape.width, requires_grad=True)
    outputs = {name: build(base(shape, "cpu"), shape)(inputs_embeds=x).last_hidden_state for name, build in ARMS.items()}
    for name, y in outputs.items():
        assert torch.allclose(y, outputs[BASE], atol=1e-5), name
        (grad,) = torch.autograd.grad(y.square().mean(), x)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("detach", [True, False])
def test_the_formed_norm_is_the_factored_one(detach):
    found = []
    for family in (dw.DoRA, FormedDoRA):
        model = dw.attach(base(SMALL[0], "cpu").double(), family(dw.LoRA(3), detach_norm=detach), targets=SMALL[0].targets)
        with torch.no_grad():
            for layer in dw.adapted_layers(model).values():
                layer.adapter.inner.B.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        x = torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        loss = model(inputs_embeds=x).last_hidden_state.tanh().sum()
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        assert all(isinstance(layer.adapter, DoRAAdapter) for layer in dw.adapted_layers(model).values())
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found, strict=True))


def test_which_arms_are_left_out():
    bert, llama = SMALL
    assert set(ARMS) - set(arms(bert, False)) == {FORMED, FORMED_EXACT} and arms(llama, False) == list(ARMS)
    assert set(ARMS) - set(arms(llama, True)) == {"PEFT DoRA bf16"}


def test_a_row_has_the_record_s_columns():
    rows = dora_step.costs(SMALL[0], compiled=False, rounds=2, steps=1, device="cpu")
    assert [(row["arm"], row["round"]) for row in rows] == [(arm, r) for arm in arms(SMALL[0], False) for r in range(2)]
    assert all(list(row) == ["arm", "round", "ms", "graphs", "kept_gib", "peak_gib"] for row in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_formed_norm_keeps_the_merged_weights_for_the_exact_gradient_and_the_factored_one_does_not():
    shape = SHAPES["Llama-2-7B, 4 × 2048"]._replace(width=1024, inner=2048, heads=8, length=64)
    kept = {row["arm"]: row["kept_gib"] * 2**30 for row in dora_step.costs(shape, False, 1, 1, "cuda")}
    formed = 2 * (3 * 1024**2 + 2 * 1024 * 2048)  # bytes
    assert kept[FORMED_EXACT] - kept[FORMED] == pytest.approx(formed, rel=0.1)
    assert abs(kept[EXACT] - kept[DETACHED]) < 0.2 * formed
