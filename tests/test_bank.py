"""A bank's slots against the same slots trained alone, and what a bank promises beside that."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import pickle
import re
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from contract import Net, relative
from torch import nn
from torch.nn import functional as F

import deltaw as dw
from deltaw import Bank, Halving, Recipe
from deltaw.adapters.lora import LoRAAdapter
from deltaw.tasks import ClassificationTask

fit = partial(dw.fit, device="cpu", progress=False)


class Toy(ClassificationTask):
    """Four classes of noisy vectors, or of short sequences of them, and the net that is to tell them apart."""

    def __init__(self, net=None, dtype=torch.float64, shape=(12,), n=96):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(n) % 4  # (n,)
        centers = torch.randn(4, *shape, generator=generator)  # (4, …)
        x = centers[labels] + torch.randn(n, *shape, generator=generator)  # (n, …)
        train, held_out = ({"x": x[rows], "labels": labels[rows]} for rows in (slice(n // 2), slice(n // 2, n)))
        super().__init__(train, held_out, num_labels=4)
        self.net, self.dtype = net or Net, dtype

    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.net().to(self.dtype)


class Transformer(nn.Module):
    """One block with attention over (batch, tokens, width)."""

    def __init__(self, width=12):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def tokens(**options):
    return Toy(Transformer, shape=(5, 12), **options)


RECIPE = Recipe(steps=30, batch_size=8, learning_rate=3e-3)
SHORT = dataclasses.replace(RECIPE, steps=12)
SPECS = {
    "LoRA": dw.LoRA(4, alpha=8),
    "LoRA B": dw.LoRA(4, init="B"),
    "LoRA gaussian": dw.LoRA(2, init="gaussian"),
    "LoRA pissa": dw.LoRA(4, alpha=2, init="pissa"),
    "rsLoRA": dw.LoRA(3, alpha=8, scaling="rslora"),
    "MoSLoRA": dw.MoSLoRA(4),
    "MoSLoRA fixed": dw.MoSLoRA(4, mixer="orthogonal", train_mixer=False),
    "LoRA-XS": dw.LoRAXS(4, alpha=8),
    "VeRA": dw.VeRA(16),
    "VeRA fan-in": dw.VeRA(6, fan_in="layer", projection_seed=3),
    "DoRA": dw.DoRA(dw.LoRA(4)),
    "DoRA exact": dw.DoRA(dw.LoRA(4), detach_norm=False),
    "DoRA MoSLoRA": dw.DoRA(dw.MoSLoRA(4, init="orthogonal-pair")),
    "DoRA LoRA-XS": dw.DoRA(dw.LoRAXS(3)),
    "DVoRA": dw.DoRA(dw.VeRA(8)),
}


def recipes(**common):
    """Recipes that differ in all that may differ, one a spec."""
    base = dataclasses.replace(RECIPE, **common)
    rate, momentum = (0.05, 0.9) if base.optimizer == "sgd" else (4e-3, 0.0)
    for i, schedule in zip(range(len(SPECS)), ["constant", "linear", "cosine"] * len(SPECS)):
        yield dataclasses.replace(
            base, learning_rate=rate * (1 + i % 4), schedule=schedule, warmup_steps=3 * (i % 3), seed=i // 2,
            weight_decay=0.1 * (i % 2), clip_norm=0.5 if i % 5 == 0 else None, momentum=momentum,
            betas=(0.9, 0.999 if i % 2 else 0.99),
        )


def alone(task, spec, recipe, targets="all-linear", **options):
    model = dw.attach(task.model(), spec, targets=targets, seed=recipe.seed, **options)
    return model, fit(model, task, recipe)


def bank_of(task, slots, fit_options=None, **options):
    bank = Bank(task.model(), slots, **options)
    return bank, bank.fit(task, progress=False, device="cpu", **(fit_options or {}))


def difference(history, reference, floor=0.0):
    """Of the losses and the gradient norms: |a − b| / max(|b|, floor), the largest."""
    assert len(history.loss) == len(reference.loss) and history.learning_rate == reference.learning_rate
    assert history.recipe == reference.recipe and not history.stopped
    pairs = [*zip(history.loss, reference.loss), *zip(history.grad_norm, reference.grad_norm)]
    pairs += [(history.metrics["loss"], reference.metrics["loss"])]
    return max(abs(a - b) / max(abs(b), floor) for a, b in pairs)


def check(task, slots, bound=1e-9, floor=0.0, fit_options=None, **options):
    bank, histories = bank_of(task, slots, fit_options, **options)
    for slot, ((spec, recipe), history) in enumerate(zip(slots, histories, strict=True)):
        _, reference = alone(task, spec, recipe, **options)
        assert reference.loss[-1] != reference.loss[0]
        assert difference(history, reference, floor) <= bound, (slot, spec)
        assert history.metrics["accuracy"] == reference.metrics["accuracy"]
    return bank, histories


# --- Bar 1: a slot is what it is alone


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_family_is_what_it_is_alone(spec):
    slots = [(spec, dataclasses.replace(RECIPE, seed=seed, learning_rate=rate)) for seed, rate in [(0, 1e-3), (1, 4e-3)]]
    check(Toy(), slots)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_mixed_bank_is_its_slots_alone(optimizer):
    """All families, ranks, starts, rates, schedules, clipping, decay: on a net that takes vectors."""
    slots = list(zip(SPECS.values(), recipes(optimizer=optimizer)))[:: 1 if optimizer == "adamw" else 2]
    check(Toy(), slots, train_also=["head"], reset_also=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mixed_bank_on_a_transformer(dtype):
    """The same over (batch, tokens, width), with a head of two modules and a norm within."""
    slots = list(zip(SPECS.values(), recipes()))[1::2] + [(SPECS["LoRA"], RECIPE)]
    bound, floor = (1e-9, 0.0) if dtype == torch.float64 else (1e-3, 1e-3)
    check(tokens(dtype=dtype), slots, bound, floor, train_also=["head", "norm2"])


def test_accumulation():
    common = dataclasses.replace(RECIPE, accumulation=4, clip_norm=0.5)
    slots = [(dw.LoRA(4), common), (dw.DoRA(dw.LoRA(2)), dataclasses.replace(common, seed=1, learning_rate=1e-3))]
    check(Toy(), slots, train_also=["head"])


def test_lora_plus():
    slots = [(spec, dataclasses.replace(RECIPE, lora_plus_ratio=ratio, weight_decay=0.1))
             for spec, ratio in [(dw.LoRA(4), 1.0), (dw.LoRA(4), 4.0), (dw.DoRA(dw.MoSLoRA(2)), 2.0), (dw.VeRA(8), 4.0)]]
    check(Toy(), slots, train_also=["head"])


def test_heads_have_their_own_rates():
    slots = [(spec, dataclasses.replace(RECIPE, head_learning_rate=rate, lora_plus_ratio=ratio, weight_decay=0.1))
             for spec, rate, ratio in [(dw.LoRA(4), None, 1.0), (dw.LoRA(4), 1e-2, 4.0), (dw.VeRA(8), 1e-4, 1.0)]]
    check(Toy(), slots, train_also=["head"])


@pytest.mark.parametrize("at_once", [1, 4])
def test_slots_may_go_through_the_model_a_few_at_a_time(at_once):
    specs = ["LoRA", "VeRA", "DoRA", "LoRA B", "LoRA-XS", "MoSLoRA"]
    slots = [(SPECS[name], dataclasses.replace(SHORT, seed=i // 2)) for i, name in enumerate(specs)]
    _, whole = bank_of(Toy(), slots, train_also=["head"])
    _, parts = bank_of(Toy(), slots, {"slots_at_once": at_once}, train_also=["head"])
    assert max(difference(a, b) for a, b in zip(parts, whole, strict=True)) < 1e-11


def test_evaluations_on_the_way_and_a_second_fit():
    """Called again, a bank goes on from where it is, as `fit` does."""
    task, spec, recipe = Toy(), dw.LoRA(4), dataclasses.replace(SHORT, steps=10)
    bank, histories = bank_of(task, [(spec, recipe), (dw.VeRA(8), recipe)], {"evaluate_every": 4}, train_also=["head"])
    model = dw.attach(task.model(), spec, seed=recipe.seed, train_also=["head"])
    reference = fit(model, task, recipe, evaluate_every=4)
    assert list(histories[0].evaluations) == [0, 4, 8, 10] == list(reference.evaluations)
    for step, metrics in reference.evaluations.items():
        assert histories[0].evaluations[step] == pytest.approx(metrics, rel=1e-9)
    again = bank.fit(task, progress=False, device="cpu")
    assert difference(again[0], fit(model, task, recipe)) < 1e-9


def test_a_table_per_slot():
    task = Toy()
    _, (history, _) = bank_of(task, [(dw.LoRA(2), RECIPE), (dw.LoRA(4), RECIPE)])
    _, reference = alone(task, dw.LoRA(2), RECIPE)
    ours, theirs = history.table, reference.table
    assert ours.drop(columns="value").equals(theirs.drop(columns="value"))
    assert "stopped" not in repr(history) and repr(history) == repr(reference)


# --- Precision and dropout


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_bf16_is_near_what_it_is_alone(base):
    """Under autocast, and on a bf16 base whose head is bf16 as well."""
    precision = "bf16" if base == torch.float32 else "fp32"
    slots = [(SPECS[name], dataclasses.replace(RECIPE, precision=precision)) for name in ("LoRA", "DoRA", "VeRA")]
    _, histories = bank_of(tokens(dtype=base), slots, train_also=["head"])
    for (spec, recipe), history in zip(slots, histories):
        _, reference = alone(tokens(dtype=base), spec, recipe, train_also=["head"])
        assert difference(history, reference, floor=1.0) < 0.1


def test_each_slot_drops_at_its_own_rate():
    rates = torch.tensor([0.1, 0.5], dtype=torch.float64)[:, None, None]
    down, up = torch.eye(50).double().expand(2, 50, 50), torch.eye(50).double().expand(2, 50, 50)
    x, weight = torch.ones(2 * 200, 50).double(), torch.zeros(50, 50).double()
    y = dw.adapted_linear(x, weight, None, down, up, dropout=rates).unflatten(0, (2, 200))
    for part, rate in zip(y, (0.1, 0.5)):
        assert ((part == 0) | ((part - 1 / (1 - rate)).abs() < 1e-12)).all()
        assert (part == 0).double().mean().item() == pytest.approx(rate, abs=4 * (0.25 / 10_000) ** 0.5)


def test_with_dropout_the_mean_is_the_same():
    """20 seeds at each of two rates: paired differences of the last losses, within three standard errors of zero."""
    task = Toy(dtype=torch.float32)
    slots = [(dw.LoRA(4, dropout=rate), Recipe(steps=12, batch_size=16, learning_rate=2e-2, seed=seed))
             for rate in (0.2, 0.6) for seed in range(20)]
    _, histories = bank_of(task, slots)
    ours = torch.tensor([sum(history.loss[-5:]) / 5 for history in histories]).view(2, 20)
    theirs = torch.tensor([sum(alone(task, *slot)[1].loss[-5:]) / 5 for slot in slots]).view(2, 20)
    _, plain = bank_of(task, [(dw.LoRA(4), recipe) for _, recipe in slots[:20]])
    without = torch.tensor([sum(history.loss[-5:]) / 5 for history in plain])
    for mine, other in zip(ours, theirs):
        gap = mine - other
        assert gap.abs().min() > 0  # other masks
        assert gap.mean().abs() < 3 * gap.std() / 20**0.5
    assert (ours.mean(1) - without.mean() > 3 * (ours - theirs).std(1) / 20**0.5).all()  # and dropout is seen at all


# --- A slot that fails, and slots that are dropped


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_slot_that_diverges_is_frozen_and_the_others_do_not_notice(optimizer, dtype):
    specs = [SPECS[name] for name in ("LoRA", "DoRA", "VeRA", "LoRA B")]

    def run(rate):
        recipes = [dataclasses.replace(SHORT, optimizer=optimizer, seed=i, learning_rate=1e-3) for i in range(4)]
        recipes[1] = dataclasses.replace(recipes[1], learning_rate=rate, warmup_steps=4)
        return bank_of(tokens(dtype=dtype), list(zip(specs, recipes)), {"evaluate_every": 10}, train_also=["head"])

    (_, calm), (bank, wild) = run(1e-3), run(1e200 if dtype == torch.float64 else 1e30)
    for slot in (0, 2, 3):
        assert wild[slot].loss == calm[slot].loss and wild[slot].grad_norm == calm[slot].grad_norm
        assert wild[slot].evaluations == calm[slot].evaluations and not wild[slot].stopped
    history = wild[1]
    step = len(history.loss) - 1
    assert 0 < step < 10 and list(history.evaluations) == [0] and "stopped=" in repr(history)
    assert len(history.learning_rate) == len(history.grad_norm) == step + 1
    assert re.search(r"is (nan|inf|-inf) at step", history.stopped)
    assert f" at step {step}, learning rate {history.learning_rate[step]:.3g}" in history.stopped
    bank.adapter(1)
    assert all(torch.isfinite(parameter).all() for parameter in bank.model.parameters())


def test_it_stops_at_the_step_where_fit_raises():
    task, recipe = Toy(), dataclasses.replace(RECIPE, optimizer="sgd", learning_rate=1e100, warmup_steps=3)
    _, (history, _) = bank_of(task, [(dw.LoRA(4), recipe), (dw.LoRA(4), dataclasses.replace(recipe, learning_rate=1e-3))])
    with pytest.raises(FloatingPointError) as raised:
        alone(task, dw.LoRA(4), recipe)
    steps = [int(re.search(r"at step (\d+)", str(text)).group(1)) for text in (history.stopped, raised.value)]
    assert steps[0] in (steps[1], steps[1] - 1)  # `fit` looks at the loss alone, the bank at the gradient too


def test_a_gradient_that_is_not_finite_is_not_followed():
    class Cornered(Toy):
        def losses(self, model, batch):
            losses = super().losses(model, batch)
            return losses + (0 * losses).sqrt()  # finite, with a slope that is not

    bank, (history, _) = bank_of(Cornered(), [(dw.LoRA(4), RECIPE)] * 2)
    assert history.stopped.startswith("the gradient's norm is nan at step 0") and len(history.loss) == 1
    start = dw.attach(Toy().model(), dw.LoRA(4), name="slot0").state_dict()
    assert all(torch.equal(tensor, start[key]) for key, tensor in bank.adapter(0).state_dict().items())


def test_a_bank_whose_slots_have_all_failed_ends():
    slots = [(dw.LoRA(4, init="orthogonal-pair"), dataclasses.replace(RECIPE, steps=60, learning_rate=1e200))] * 2
    _, histories = bank_of(Toy(), slots)
    assert all(history.stopped and len(history.loss) < 10 and not history.evaluations for history in histories)


class Watched(Toy):
    """Notes how many examples go through the model at each training step."""

    sizes: list

    def losses(self, model, batch):
        if model.training:
            self.sizes.append(len(batch["labels"]))
        return super().losses(model, batch)


@pytest.mark.parametrize("at_once", [None, 3])
def test_halving_drops_the_worse_and_leaves_the_others_alone(at_once):
    task = Watched()
    task.sizes = []
    slots = [(SPECS[name], dataclasses.replace(RECIPE, learning_rate=rate, seed=seed, clip_norm=0.5))
             for name in ("LoRA", "VeRA", "DoRA") for seed, rate in [(0, 1e-4), (1, 3e-3)]]
    slots.append((dw.LoRA(4), dataclasses.replace(RECIPE, learning_rate=1e308)))
    options = {"halving": Halving((6, 12), keep=0.5), "slots_at_once": at_once}
    bank, histories = bank_of(task, slots, options, train_also=["head"])
    if at_once is None:
        assert task.sizes == [7 * 8] * 6 + [4 * 8] * 6 + [2 * 8] * 18
    references = [alone(Toy(), *slot, train_also=["head"]) for slot in slots[:6]]
    for history, (_, reference) in zip(histories, references):
        assert history.loss == pytest.approx(reference.loss[: len(history.loss)], rel=1e-9)
    lengths = [len(history.loss) for history in histories]
    assert sorted(lengths[:6]) == [6, 6, 12, 12, 30, 30] and "is nan at step 1," in histories[6].stopped
    for rung, kept in ((6, 4), (12, 2)):
        raced = [slot for slot, history in enumerate(histories) if rung in history.evaluations]
        at = {slot: histories[slot].evaluations[rung]["loss"] for slot in raced}
        best = sorted(at, key=at.get)[:kept]
        assert all((lengths[slot] > rung) == (slot in best) for slot in at)
        assert all(f"dropped before step {rung}" in histories[slot].stopped for slot in at if slot not in best)
    for slot, history in enumerate(histories[:6]):
        assert bool(history.stopped) == (len(history.loss) < 30)
        if not history.stopped:
            x, (model, _) = task.held_out["x"].double(), references[slot]
            assert relative(bank.adapter(slot)(x), model(x)) < 1e-9


def test_halving_needs_a_loss():
    task = Toy()
    task.metrics = lambda predictions, labels: {"accuracy": 0.5}
    with pytest.raises(ValueError, match=r"metrics are \['accuracy'\]"):
        bank_of(task, [(dw.LoRA(2), RECIPE)], {"halving": Halving((5,))})


# --- A slot is an ordinary adapter


@pytest.mark.parametrize("name", ["LoRA", "LoRA pissa", "MoSLoRA", "MoSLoRA fixed", "LoRA-XS", "VeRA", "DoRA", "DVoRA"])
def test_a_slot_can_be_saved_merged_and_converted(name, tmp_path):
    task = Toy(dtype=torch.float32)
    slots = [(dw.LoRA(2), SHORT), (SPECS[name], dataclasses.replace(SHORT, seed=3))]
    bank, _ = bank_of(task, slots, train_also=["head"], reset_also=True)
    reference, _ = alone(task, *slots[1], train_also=["head"], reset_also=True)
    x = task.held_out["x"]
    model = bank.adapter(1).eval()
    assert model is bank.model and relative(model(x), reference.eval()(x)) < 1e-4
    expected = model(x)
    dw.save(model, tmp_path)
    assert torch.equal(dw.load(task.model(), tmp_path).eval()(x), expected)
    assert relative(dw.merge(copy.deepcopy(model))(x), expected) < 1e-5
    if not isinstance(SPECS[name], dw.DoRA):
        assert relative(dw.convert(copy.deepcopy(model), dw.LoRA)(x), expected) < 1e-5
    bank.adapter(0, name="first")
    assert relative(model(x), expected) > 1e-4
    assert torch.equal(dw.use(model, "slot1")(x), expected)
    assert torch.equal(dw.detach(model)(x), task.model().eval()(x))


def test_before_training_a_slot_is_its_start():
    task = Toy()
    bank = Bank(task.model(), [(dw.LoRA(2), RECIPE), (dw.MoSLoRA(4), dataclasses.replace(RECIPE, seed=5))])
    start = dw.attach(task.model(), dw.MoSLoRA(4), seed=5, name="slot1")
    ours, theirs = bank.adapter(1).state_dict(), start.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(IndexError, match="0 … 1, not 2"):
        bank.adapter(2)


# --- The model is afterwards what it was


def snapshot(model):
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return state, dict(model.named_modules()), flags, [module.training for module in model.modules()], set(vars(model))


def unchanged(model, before):
    now = snapshot(model)
    same = all(torch.equal(tensor, before[0][key]) for key, tensor in now[0].items())
    same &= all(module is before[1][key] for key, module in now[1].items())
    hooks = any(module._forward_pre_hooks for module in model.modules())
    gradients = any(parameter.grad is not None for parameter in model.parameters())
    return same and now[0].keys() == before[0].keys() and now[2:] == before[2:] and not hooks and not gradients


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_back_bit_for_bit(fails):
    task = tokens(dtype=torch.float32)
    model = task.model()
    model.norm1.requires_grad_(False)
    model.up.eval()
    before, random = snapshot(model), torch.get_rng_state()
    bank = Bank(model, [(dw.LoRA(2, dropout=0.1), RECIPE), (dw.DoRA(dw.LoRA(4)), RECIPE)], train_also=["head"])
    assert unchanged(model, before)
    if fails:
        task.metrics = lambda predictions, labels: 1 / 0
        with pytest.raises(ZeroDivisionError):
            bank.fit(task, progress=False, device="cpu", evaluate_every=7)
    else:
        bank.fit(task, progress=False, device="cpu", evaluate_every=7)
    assert unchanged(model, before) and torch.equal(torch.get_rng_state(), random)


# --- What is refused


def differing(**settings):
    """Two slots, the second with other settings."""
    return [(dw.LoRA(2), RECIPE), (dw.LoRA(2), dataclasses.replace(RECIPE, **settings))]


@pytest.mark.parametrize(("slots", "error", "message"), [
    ([], ValueError, "at least one slot"),
    ([(dw.LoRA, RECIPE)], TypeError, r"slot 0 must be a \(spec, recipe\) pair"),
    ([(dw.LoRA(2), RECIPE), dw.LoRA(2)], TypeError, "slot 1 must be"),
    (differing(steps=31), ValueError, "slot 1: steps must be that of slot 0, 30, not 31"),
    (differing(batch_size=32), ValueError, "slot 1: batch_size must be that of slot 0, 8, not 32"),
    (differing(accumulation=2), ValueError, "slot 1: accumulation"),
    (differing(optimizer="sgd"), ValueError, "slot 1: optimizer.*'adamw', not 'sgd'"),
    (differing(precision="bf16"), ValueError, "slot 1: precision"),
    (differing(precision="fp16"), ValueError, "slot 1: the precision.*'fp16'"),
    (differing(optimizer=torch.optim.Adam), ValueError, "slot 1: the optimizer.*'sgd'.*not <class"),
    ([(dw.LoRA(2), RECIPE), (dw.LoRA(40, init="pissa"), RECIPE)], ValueError, "slot 1: pissa needs a rank"),
    ([(dw.LoRAXS(2), dataclasses.replace(RECIPE, lora_plus_ratio=4.0))], ValueError, "slot 0: lora_plus_ratio=4"),
    ([(dw.LoRA(2), dataclasses.replace(RECIPE, head_learning_rate=4.0))], ValueError, "slot 0: head_learning_rate=4"),
])
def test_slots_that_cannot_share_a_bank_are_named(slots, error, message):
    model = Toy().model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        Bank(model, slots)
    assert unchanged(model, before)


def test_targets_that_do_not_exist_are_named():
    model = Toy().model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="slot 0: targets has 'query'"):
        Bank(model, [(dw.LoRA(2), RECIPE)], targets=["query"])
    assert unchanged(model, before)


@pytest.mark.parametrize(("options", "message"), [
    ({"evaluate_every": 0}, "evaluate_every"), ({"slots_at_once": 0}, "slots_at_once"),
    ({"halving": Halving((10, 30))}, r"less than steps=30, not \(10, 30\)"), ({"device": "tpu"}, "tpu")])
def test_options_that_are_not_allowed(options, message):
    task = Toy()
    bank = Bank(task.model(), [(dw.LoRA(2), RECIPE)])
    before = snapshot(bank.model)
    with pytest.raises(ValueError, match=message):
        bank.fit(task, **{"progress": False, "device": "cpu", **options})
    assert unchanged(bank.model, before)


@pytest.mark.parametrize("settings", [{"rungs": ()}, {"rungs": (2, 2)}, {"rungs": (0, 2)}, {"rungs": [5]},
                                      {"rungs": (5,), "keep": 1.0}, {"rungs": (5,), "keep": 0}])
def test_halving_is_checked_when_made(settings):
    with pytest.raises(ValueError, match="keep" if "keep" in settings else "rungs"):
        Halving(**settings)


def test_a_model_with_adapters_is_refused():
    model = dw.attach(Toy().model(), dw.LoRA(2))
    with pytest.raises(ValueError, match="detach"):
        Bank(model, [(dw.LoRA(2), RECIPE)])
    task = Toy()
    bank = Bank(task.model(), [(dw.LoRA(2), RECIPE)])
    bank.adapter(0)
    with pytest.raises(ValueError, match="detach"):
        bank.fit(task)


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        return super().forward(self.norm(x))


class TokensFirst(Transformer):
    """(tokens, batch, width) within."""

    def forward(self, x):
        x = torch.tanh(self.up(x.transpose(0, 1)))  # (tokens, batch, 24)
        return self.head(self.down(x).mean(0))


class Mixing(Transformer):
    """Each example sees the mean of the batch."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Constant(Net):
    """One layer gets the same input whatever the batch."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Linear(12, 12)

    def forward(self, x):
        return super().forward(x + self.offset(x.new_ones(1, 12)))


class Routed(Net):
    """One layer sees some of the examples."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(12, 12)

    def forward(self, x):
        chosen = x[:, 0] > 0
        return super().forward(x.masked_scatter(chosen[:, None], self.expert(x[chosen])))


class Contrastive(Toy):
    def losses(self, model, batch):
        logits = self.predict(model, batch)
        return (logits @ logits.T).logsumexp(1)


@pytest.mark.parametrize(("task", "message"), [
    (Toy(TokensFirst, shape=(5, 12)), "the input of 'up'"), (Toy(TokensFirst, shape=(4, 12)), "the input of 'up'"),
    (Toy(Mixing, shape=(5, 12)), "the input of 'qkv'"), (Toy(Constant), "the input of 'offset'"),
    (Toy(Routed), "the input of 'expert'"),
    (Contrastive(), "the loss of each example")])
def test_what_cannot_be_folded_is_named(task, message):
    bank = Bank(task.model(), [(dw.LoRA(2), RECIPE)] * 2)
    before = snapshot(bank.model)
    with pytest.raises(ValueError, match=message):
        bank.fit(task, progress=False, device="cpu")
    assert unchanged(bank.model, before)


def test_batch_norm_is_named():
    with pytest.raises(ValueError, match="'norm' is a BatchNorm1d"):
        Bank(Toy(Normed).model(), [(dw.LoRA(2), RECIPE)])


def test_a_layer_that_no_gradient_reaches_is_reported():
    class ReadsTheWeight(Net):
        def forward(self, x):
            return super().forward(x) + 0 * self.unused.weight.sum()

        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)

    with pytest.warns(UserWarning, match="no gradient reached .'unused"):
        bank_of(Toy(ReadsTheWeight), [(dw.LoRA(2), dataclasses.replace(RECIPE, steps=1))] * 2)


# --- How it is done


def test_what_all_slots_share_is_there_once():
    from deltaw.bank import Run
    from deltaw.stacked import Block

    bank = Bank(Toy().model(), [(dw.VeRA(8), RECIPE)] * 3)
    runs = [Run(slot, RECIPE, *modules) for slot, modules in enumerate(bank._modules)]
    block = Block("adapters", runs, slice(0, 3), torch.device("cpu"))
    assert all(module.projection is block.modules[0].projection for module in block.modules)
    assert block.modules[0].projection.A.shape == (3, 8, 20) and block.modules[0].projection.A.stride(0) == 0
    assert block.weights.shape == (3, sum(parameter.numel() for parameter in runs[0].adapters.parameters()))
    assert all(parameter.untyped_storage().data_ptr() == block.weights.untyped_storage().data_ptr()
               for parameter in block.modules.parameters())


def test_settings_that_are_no_tensors_keep_adapters_apart():
    class Shifted(LoRAAdapter):
        shift = 0.0

        def factors(self):
            down, up = super().factors()
            return down + self.shift, up

    @dataclasses.dataclass(frozen=True)
    class ShiftedLoRA(dw.LoRA):
        shift: float = 0.0

        def build_layer(self, layer, rank, scale, generator):
            lora = super().build_layer(layer, rank, scale, generator)
            adapter = Shifted(layer, lora.A.detach(), lora.B.detach(), scale)
            adapter.shift = self.shift
            return adapter

    check(Toy(), [(ShiftedLoRA(4, shift=shift), RECIPE) for shift in (0.0, 1.0, 0.0)])


def test_compiled(monkeypatch):
    """By the tracer alone, without the compiler that this machine may not have."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    slots = [(SPECS[name], dataclasses.replace(RECIPE, steps=2)) for name in ("LoRA", "LoRA B")]
    check(Toy(), slots, fit_options={"compile": True}, train_also=["head"])


def test_two_processes_share_the_slots(monkeypatch):
    """Two threads for two processes, each with a bank of its own; what they exchange is pickled as between processes."""
    slots = [(SPECS[name], dataclasses.replace(RECIPE, seed=i)) for i, name in enumerate(["LoRA", "VeRA", "DoRA", "LoRA B"])]
    options = {"halving": Halving((10,), keep=0.6)}
    bank, histories = bank_of(Toy(), slots, options, train_also=["head"])
    assert [bool(history.stopped) for history in histories].count(True) == 1

    banks = [Bank(Toy().model(), slots, train_also=["head"]) for _ in range(2)]
    process, barrier, sent = threading.local(), threading.Barrier(2, timeout=60), [b"", b""]

    @contextlib.contextmanager
    def accelerator_for(recipe, dtype, device):
        yield SimpleNamespace(process_index=process.index, num_processes=2, is_main_process=process.index == 0,
                              device=torch.device("cpu"), prepare_model=lambda model, evaluation_mode: model)

    def gather_object(objects):
        sent[process.index] = pickle.dumps(objects)
        barrier.wait()
        everyones = [item for one in sent for item in pickle.loads(one)]
        barrier.wait()
        return everyones

    def run(index):
        process.index = index
        return banks[index].fit(Toy(), progress=False, **options)

    monkeypatch.setattr("deltaw.train.accelerator_for", accelerator_for)
    monkeypatch.setattr("accelerate.utils.gather_object", gather_object)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for theirs, results in zip(banks, pool.map(run, (0, 1)), strict=True):
            for slot, (result, history) in enumerate(zip(results, histories, strict=True)):
                assert result.loss == pytest.approx(history.loss, rel=1e-9) and result.stopped == history.stopped
                assert result.metrics == pytest.approx(history.metrics, rel=1e-9)
                x = Toy().held_out["x"].double()
                assert relative(theirs.adapter(slot)(x), bank.adapter(slot, name=f"{slot}-{id(theirs)}")(x)) < 1e-9
