"""Recipe, fit, evaluate and History: what they promise, on models small enough to train in milliseconds."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltaw as dw
from deltaw.tasks import ClassificationTask, Task
from deltaw.train import History, Recipe, evaluate
from deltaw.train import fit as fit_anywhere

fit = partial(fit_anywhere, device="cpu")  # where there is a GPU, it has its own tests below


class Blobs(ClassificationTask):
    """Three noisy classes in the plane; a hidden layer with dropout."""

    def __init__(self, n=96, dropout=0.0):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(n) % 3  # (n,)
        centers = torch.tensor([[2.0, 0.0], [-1.0, 2.0], [-1.0, -2.0]])  # (3, 2)
        points = centers[labels] + torch.randn(n, 2, generator=generator)  # (n, 2)
        super().__init__({"x": points[: n // 2], "labels": labels[: n // 2]},
                         {"x": points[n // 2:], "labels": labels[n // 2:]}, num_labels=3)
        self.dropout = dropout

    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Net(self.dropout)


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.hidden, self.dropout, self.out = nn.Linear(2, 16), nn.Dropout(dropout), nn.Linear(16, 3)
        self.dtypes = []

    def forward(self, x):
        x = self.dropout(F.relu(self.hidden(x)))
        self.dtypes.append(x.dtype)
        return self.out(x)


class Scripted(Task):
    """One scalar parameter and losses that a function of (parameter, step) gives: the optimizer laid bare."""

    def __init__(self, loss):
        self.loss = loss

    def model(self):
        model = nn.Module()
        model.p = nn.Parameter(torch.zeros(()))
        return model

    def batches(self, seed, batch_size):
        step = 0
        while True:
            yield {"step": torch.full((batch_size,), step), "labels": torch.zeros(batch_size)}
            step += 1

    def validation(self, batch_size):
        yield {"step": torch.zeros(1), "labels": torch.zeros(1)}

    def losses(self, model, batch):
        return torch.stack([self.loss(model.p, int(step)) for step in batch["step"]])

    def predict(self, model, batch):
        return model.p[None]

    def metrics(self, predictions, labels):
        return {"p": predictions.item()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_importing_is_cheap():
    heavy = ["accelerate", "transformers", "datasets", "pandas", "matplotlib", "sklearn", "scipy"]
    code = f"import sys, deltaw.train, deltaw.tasks; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- Recipe


@pytest.mark.parametrize(("name", "value", "error"), [
    ("steps", 0, ValueError), ("steps", 2.0, TypeError), ("steps", True, TypeError),
    ("learning_rate", 0, ValueError), ("learning_rate", -1.0, ValueError), ("learning_rate", math.nan, ValueError),
    ("learning_rate", math.inf, ValueError), ("learning_rate", "1e-3", TypeError),
    ("optimizer", "adamw8", ValueError), ("optimizer", None, ValueError),
    ("momentum", 1.0, ValueError), ("momentum", None, TypeError),
    ("betas", (0.9, 1.0), ValueError), ("betas", [0.9, 0.99], TypeError), ("betas", ("a", "b"), TypeError),
    ("eps", 0.0, ValueError), ("eps", -1e-8, ValueError),
    ("schedule", "step", ValueError),
    ("warmup_steps", -1, ValueError), ("warmup_steps", 500, ValueError), ("warmup_steps", 0.1, TypeError),
    ("weight_decay", -0.1, ValueError), ("weight_decay", math.inf, ValueError),
    ("clip_norm", 0.0, ValueError), ("clip_norm", "1", TypeError),
    ("batch_size", 0, ValueError), ("accumulation", 0, ValueError), ("accumulation", 5, ValueError),
    ("precision", "fp8", ValueError), ("seed", -1, ValueError), ("seed", 1.5, TypeError),
    ("head_learning_rate", 0.0, ValueError), ("head_learning_rate", "1e-3", TypeError), ("lora_plus_ratio", 0.0, ValueError), ("lora_plus_ratio", math.nan, ValueError),
])
def test_bad_settings_are_named(name, value, error):
    with pytest.raises(error, match=name) as raised:
        Recipe(**{name: value})
    assert repr(value) in str(raised.value)


def test_numbers_of_numpy_are_numbers():
    assert Recipe(steps=np.int64(3), learning_rate=np.float32(0.5)).learning_rate_at(0) == 0.5


def test_a_recipe_is_immutable_and_comparable():
    assert Recipe() == Recipe() and hash(Recipe()) == hash(Recipe())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().steps = 3


@pytest.mark.parametrize(("schedule", "shape"), [
    ("constant", lambda t: 1.0), ("linear", lambda t: 1 - t), ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2)])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_follow_their_closed_form(schedule, shape, warmup):
    recipe = Recipe(steps=20, learning_rate=0.5, schedule=schedule, warmup_steps=warmup)
    rates = [recipe.learning_rate_at(step) for step in range(20)]
    assert rates[:warmup] == pytest.approx([0.5 * (step + 1) / (warmup + 1) for step in range(warmup)])
    assert rates[warmup:] == pytest.approx([0.5 * shape(i / (20 - warmup)) for i in range(20 - warmup)])
    assert min(rates) > 0 and max(rates) == rates[warmup] == 0.5


def test_the_optimizer_gets_the_scheduled_rate():
    # SGD on the loss p moves p by −rate at each step.
    task = Scripted(lambda p, step: p)
    recipe = Recipe(steps=10, learning_rate=0.1, optimizer="sgd", schedule="cosine", warmup_steps=3, batch_size=2)
    model = task.model()
    history = fit(model, task, recipe)
    assert history.learning_rate == [recipe.learning_rate_at(step) for step in range(10)]
    assert model.p.item() == pytest.approx(-sum(history.learning_rate), rel=1e-5)


@pytest.mark.parametrize(("recipe", "reference"), [
    (Recipe(optimizer="adamw", weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
     lambda p: torch.optim.AdamW(p, 2e-4, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)),
    (Recipe(optimizer="adam", weight_decay=0.1), lambda p: torch.optim.Adam(p, 2e-4, weight_decay=0.1)),
    (Recipe(optimizer="sgd", momentum=0.9), lambda p: torch.optim.SGD(p, 2e-4, momentum=0.9)),
    (Recipe(optimizer=lambda groups: torch.optim.RMSprop(groups)), lambda p: torch.optim.RMSprop(p, 2e-4)),
], ids=["adamw", "adam", "sgd", "callable"])
def test_fit_is_the_loop_one_would_write(recipe, reference):
    task, recipe = Blobs(), dataclasses.replace(recipe, steps=15, batch_size=8)
    ours, theirs = task.model(), task.model()
    history = fit(ours, task, recipe)
    optimizer, batches, losses = reference(theirs.parameters()), task.batches(0, 8), []
    for _ in range(15):
        loss = task.losses(theirs, next(batches)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert history.loss == pytest.approx(losses, rel=1e-5)
    for name, weight in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], weight, rtol=1e-5, atol=1e-6)


def test_adam_with_nearly_no_eps_takes_sign_steps():
    task = Scripted(lambda p, step: 1e-10 * p)  # far below the usual eps, far above where fp32 squares vanish
    model = task.model()
    fit(model, task, Recipe(steps=3, learning_rate=0.1, optimizer="adam", eps=1e-30, batch_size=1))
    assert model.p.item() == pytest.approx(-0.3, rel=1e-4)


def test_a_callable_that_returns_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="torch.optim.Optimizer"):
        fit(Blobs().model(), Blobs(), Recipe(steps=1, optimizer=lambda groups: None))


# --- fit


def test_it_learns_and_says_so():
    task = Blobs()
    model = task.model()
    before = evaluate(model, task)
    history = fit(model, task, Recipe(steps=100, learning_rate=1e-2))
    assert history.metrics == evaluate(model, task)
    assert history.metrics["loss"] < before["loss"] / 2 and history.metrics["accuracy"] > 0.8


def test_the_seed_decides_the_run():
    task = Blobs(dropout=0.5)
    run = lambda seed: fit(task.model(), task, Recipe(steps=20, learning_rate=1e-2, seed=seed)).loss  # noqa: E731
    assert run(1) == run(1) != run(2)


def test_the_seed_decides_dropout_too():
    task = Blobs(n=16, dropout=0.5)
    task.batches = lambda seed, batch_size: iter(lambda: task.train, None)  # the same batch for ever
    run = lambda seed: fit(task.model(), task, Recipe(steps=5, batch_size=8, seed=seed)).loss  # noqa: E731
    assert run(1) == run(1) != run(2)


def test_random_state_and_modes_are_put_back():
    task = Blobs(dropout=0.5)
    model = task.model()
    model.hidden.eval()  # a mixture: the model in train mode, a part of it not
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    fit(model, task, Recipe(steps=3), evaluate_every=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_evaluation_during_training_does_not_change_it():
    task = Blobs(dropout=0.5)
    plain, watched = task.model(), task.model()
    recipe = Recipe(steps=10, learning_rate=1e-2)
    assert fit(plain, task, recipe).loss == fit(watched, task, recipe, evaluate_every=3).loss


def test_frozen_parameters_stay():
    task = Blobs()
    model = task.model()
    model.hidden.requires_grad_(False)
    before = weights(model)
    fit(model, task, Recipe(steps=5, learning_rate=0.1, weight_decay=0.1))
    after = weights(model)
    assert torch.equal(after["hidden.weight"], before["hidden.weight"])
    assert not torch.equal(after["out.weight"], before["out.weight"])


def test_nothing_to_train_is_refused_with_a_hint():
    model = Blobs().model().requires_grad_(False)
    with pytest.raises(ValueError, match="Attach an adapter"):
        fit(model, Blobs())


def test_gradients_of_the_caller_do_not_leak_in_and_none_is_left():
    task = Blobs()
    model, clean = task.model(), task.model()
    (1e3 * task.losses(model, next(task.batches(0, 4))).sum()).backward()
    assert fit(model, task, Recipe(steps=3)).loss == fit(clean, task, Recipe(steps=3)).loss
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("accumulation", [2, 4, 32])
def test_accumulation_changes_nothing(accumulation):
    task = Blobs()
    whole, parts = task.model().double(), task.model().double()
    recipe = Recipe(steps=10, learning_rate=1e-2, batch_size=32, clip_norm=0.5)
    one = fit(whole, task, recipe)
    many = fit(parts, task, dataclasses.replace(recipe, accumulation=accumulation))
    assert many.loss == pytest.approx(one.loss, abs=1e-12)
    assert many.grad_norm == pytest.approx(one.grad_norm, abs=1e-12)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, rtol=0, atol=1e-10)


def test_accumulation_is_the_recipe_s_under_accelerate_launch(monkeypatch):
    task, recipe = Blobs(), Recipe(steps=3, learning_rate=1e-2, accumulation=4)
    expected = fit(task.model(), task, recipe).grad_norm
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert fit(task.model(), task, recipe).grad_norm == expected


def test_clipping_bounds_the_update():
    task = Blobs()
    model = task.model()
    before = weights(model)
    history = fit(model, task, Recipe(steps=1, learning_rate=1.0, optimizer="sgd", clip_norm=1e-3))
    moved = math.sqrt(sum(((weights(model)[name] - before[name]) ** 2).sum().item() for name in before))
    assert moved == pytest.approx(1e-3, rel=1e-3)
    assert history.grad_norm[0] > 0.01  # what it was before clipping


def test_the_recorded_norm_is_the_gradients():
    task = Blobs()
    model = task.model()
    task.losses(model, next(task.batches(0, 32))).mean().backward()
    norm = math.sqrt(sum((parameter.grad ** 2).sum().item() for parameter in model.parameters()))
    assert fit(task.model(), task, Recipe(steps=1)).grad_norm == pytest.approx([norm], rel=1e-5)


# --- LoRA+


class Pair(nn.Module):
    """A stand-in for an adapter: it says which of its parameters is on the up side."""

    up_parameters = ("B",)

    def __init__(self):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 2))

    def forward(self, x):
        return x @ self.A.T @ self.B.T


def test_lora_plus_gives_the_up_side_its_ratio():
    task, pair = Blobs(), Pair()
    task.losses(pair, next(task.batches(0, 32))).mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in pair.named_parameters()}
    before = weights(pair)
    fit(pair, task, Recipe(steps=1, learning_rate=0.01, optimizer="sgd", lora_plus_ratio=16.0))
    after = weights(pair)
    torch.testing.assert_close(after["A"], before["A"] - 0.01 * gradients["A"])
    torch.testing.assert_close(after["B"], before["B"] - 0.16 * gradients["B"])


@pytest.mark.parametrize("spec", [dw.LoRA(rank=2), dw.DoRA(dw.LoRA(rank=2)), dw.MoSLoRA(rank=2)], ids=repr)
def test_lora_plus_finds_b_in_the_library_s_adapters(spec):
    task, moved = Blobs(), []
    for ratio in (1.0, 4.0):
        model = task.model()
        dw.attach(model, spec, targets=["hidden"], seed=0)
        fit(model, task, Recipe(steps=1, learning_rate=0.1, optimizer="sgd", lora_plus_ratio=ratio))
        moved.append(next(weight for name, weight in weights(model).items() if name.endswith(".B")))
    torch.testing.assert_close(moved[1], 4 * moved[0])  # B starts at zero
    assert moved[0].any()


def test_lora_plus_without_an_up_side_is_refused():
    with pytest.raises(ValueError, match="lora_plus_ratio=4"):
        fit(Blobs().model(), Blobs(), Recipe(steps=1, lora_plus_ratio=4))
    frozen = Pair()
    frozen.B.requires_grad_(False)
    with pytest.raises(ValueError, match="up_parameters"):
        fit(frozen, Blobs(), Recipe(steps=1, lora_plus_ratio=4))


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_head_has_its_own_rate(rate):
    task, moved = Blobs(), {}
    model = dw.attach(task.model(), dw.LoRA(rank=2), targets=["hidden"], train_also=["out"])
    task.losses(model, next(task.batches(0, 32))).mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = weights(model)
    model.zero_grad()
    fit(model, task, Recipe(steps=1, learning_rate=0.01, optimizer="sgd", head_learning_rate=rate))
    after = weights(model)
    for name, gradient in gradients.items():
        moved[name] = own = (rate or 0.01) if name.startswith("out") else 0.01
        torch.testing.assert_close(after[name], before[name] - own * gradient)
    assert set(moved.values()) == {0.01, rate or 0.01}


def test_a_rate_for_a_head_that_is_not_there_is_refused():
    model = dw.attach(Blobs().model(), dw.LoRA(rank=2), targets=["hidden"])
    with pytest.raises(ValueError, match="head_learning_rate=0.5.*train_also"):
        fit(model, Blobs(), Recipe(steps=1, head_learning_rate=0.5))


# --- precision and accelerate


def test_float64_stays_float64():
    task = Blobs()
    model = task.model().double()
    fit(model, task, Recipe(steps=2))
    assert set(model.dtypes) == {torch.float64} and model.out.weight.dtype == torch.float64


def test_precisions_can_alternate_in_one_process():
    task, seen = Blobs(), []
    for precision in ("fp32", "bf16", "auto", "bf16"):
        model = task.model()
        fit(model, task, Recipe(steps=2, precision=precision))
        seen.append(set(model.dtypes))
        assert model.out.weight.dtype == torch.float32
    assert seen == [{torch.float32}, {torch.bfloat16}, {torch.float32}, {torch.bfloat16}]


def test_the_model_is_plain_again_and_can_be_trained_again():
    task = Blobs()
    model = task.model()
    names = set(vars(model))
    for precision in ("bf16", "fp32", "bf16"):
        model.dtypes.clear()
        fit(model, task, Recipe(steps=2, precision=precision))
        assert set(vars(model)) == names  # no forward, no mark of accelerate's
        assert set(model.dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert copy.deepcopy(model)(torch.zeros(1, 2)).dtype == torch.float32


def test_accelerates_state_is_the_callers():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3, cpu=True)
        fit(Blobs().model(), Blobs(), Recipe(steps=2, precision="fp32", accumulation=2))
        assert theirs.mixed_precision == "bf16" and theirs.gradient_accumulation_steps == 3
    finally:
        for state, was in zip(states, before):
            state._shared_state.clear()
            state._shared_state.update(was)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_on_a_float64_model_is_refused(precision):
    with pytest.raises(ValueError, match=f"precision='{precision}'"):
        fit(Blobs().model().double(), Blobs(), Recipe(steps=1, precision=precision))


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="fp16"):
        fit(Blobs().model(), Blobs(), Recipe(steps=1, precision="fp16"))


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="tpu"):
        fit(Blobs().model(), Blobs(), Recipe(steps=1), device="tpu")


@pytest.mark.parametrize("steps", [30, 60])
def test_a_loss_that_is_not_finite_stops_the_run(steps):
    task = Scripted(lambda p, step: p if step < 27 else p * math.nan)
    recipe = Recipe(steps=steps, learning_rate=0.25, batch_size=1)
    model = task.model()
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 27, learning rate 0\.25"):
        fit(model, task, recipe)
    assert model.training and "forward" not in vars(model)
    fit(task.model(), Scripted(lambda p, step: p), recipe)  # and the next run is not disturbed


def test_a_wrong_evaluate_every_is_refused():
    with pytest.raises(ValueError, match="evaluate_every"):
        fit(Blobs().model(), Blobs(), evaluate_every=0)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
def test_on_a_gpu_the_model_trains_under_bf16_and_stays_there():
    task = Blobs(dropout=0.5)
    model, again = task.model(), task.model()
    state = torch.cuda.get_rng_state()
    recipe = Recipe(steps=60, learning_rate=1e-2, accumulation=2, clip_norm=1.0)
    history = fit_anywhere(model, task, recipe, evaluate_every=20)
    assert set(model.dtypes) == {torch.bfloat16} and model.out.weight.is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert history.loss == fit_anywhere(again, task, recipe).loss
    assert history.metrics["accuracy"] > 0.8


@gpu
def test_on_a_gpu_fp16_learns():
    task = Blobs()
    model = task.model()
    history = fit_anywhere(model, task, Recipe(steps=100, learning_rate=1e-2, precision="fp16", clip_norm=1.0))
    assert set(model.dtypes) == {torch.float16} and history.metrics["accuracy"] > 0.8


@gpu
def test_float64_is_the_same_run_on_gpu_and_cpu():
    task = Blobs()
    recipe = Recipe(steps=20, learning_rate=1e-2)
    on_cpu, on_gpu = fit(task.model().double(), task, recipe), fit_anywhere(task.model().double(), task, recipe)
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-9)


TWO_PROCESSES = r"""
import json, sys
from tests.test_train import Blobs, Recipe, fit
task, recipe = Blobs(), Recipe(**json.loads(sys.argv[1]))
fit(task.model(), task, recipe)  # a first run leaves nothing behind that the second would trip over
history = fit(task.model().double(), task, recipe)
with open(sys.argv[2], "a") as file:
    file.write(json.dumps([history.loss, history.grad_norm, history.metrics]) + "\n")
"""


def test_two_processes_are_one_run(tmp_path):
    settings = dict(steps=8, learning_rate=1e-2, accumulation=2, clip_norm=0.5)
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                    str(script), json.dumps(settings), str(out)],
                   check=True, timeout=120, capture_output=True, cwd=tmp_path,
                   env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}", "OMP_NUM_THREADS": "1"})
    alone = fit(Blobs().model().double(), Blobs(), Recipe(**settings))
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(runs) == 2
    for loss, norm, metrics in runs:
        assert loss == pytest.approx(alone.loss, abs=1e-12) and norm == pytest.approx(alone.grad_norm, abs=1e-12)
        assert metrics == pytest.approx(alone.metrics)


# --- evaluate


def test_evaluate_uses_every_example_whatever_the_batch_size():
    task = Blobs(n=98, dropout=0.5)
    model = task.model().double()
    whole = evaluate(model, task, batch_size=1000)
    for batch_size in (1, 7, 49):
        assert evaluate(model, task, batch_size=batch_size) == pytest.approx(whole)
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(task.held_out["x"].double())
    assert whole["loss"] == pytest.approx(F.cross_entropy(logits, task.held_out["labels"]).item())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_evaluate_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(Blobs().model(), Blobs(), batch_size=0)


# --- History


@pytest.fixture(scope="module")
def history():
    task = Blobs()
    return fit(task.model(), task, Recipe(steps=10, learning_rate=1e-2), evaluate_every=4)


def test_a_history_has_a_value_for_each_step(history):
    assert len(history.loss) == len(history.learning_rate) == len(history.grad_norm) == 10
    assert all(isinstance(loss, float) for loss in history.loss)
    assert list(history.evaluations) == [0, 4, 8, 10]
    assert history.metrics is history.evaluations[10]


def test_the_table_is_tidy(history):
    table = history.table
    assert list(table.columns) == ["step", "split", "metric", "value"]
    assert not table.duplicated(["step", "split", "metric"]).any()
    loss = table.query("split == 'train' and metric == 'loss'")
    assert loss["value"].tolist() == history.loss and loss["step"].tolist() == list(range(10))
    accuracy = table.query("split == 'validation' and metric == 'accuracy'")
    assert accuracy["step"].tolist() == [0, 4, 8, 10]


def test_the_plot_shows_both_splits(history):
    import matplotlib

    matplotlib.use("Agg")
    ax = history.plot()
    train, validation = ax.get_lines()
    assert list(train.get_ydata()) == history.loss
    assert list(validation.get_xdata()) == [0, 4, 8, 10]
    assert history.plot(ax=ax, metric="accuracy") is ax
    with pytest.raises(ValueError, match="f1"):
        history.plot(ax=ax, metric="f1")


def test_what_a_notebook_shows_is_short_and_the_same_each_time(history):
    again = History(history.recipe, history.loss, history.learning_rate, history.grad_norm, history.evaluations)
    assert repr(history) == repr(again) and len(repr(history)) < 120
    html = history._repr_html_()
    assert html == again._repr_html_() and "<svg" in html and "accuracy" in html and len(html) < 2500


def test_an_adapter_that_no_gradient_reaches_is_reported():
    class ReadsTheWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.read = nn.Linear(64, 10), nn.Linear(64, 10)

        def forward(self, pixels):
            return self.called(pixels) + pixels @ self.read.weight.T

    from deltaw.tasks import digits

    task = digits()
    model = dw.attach(ReadsTheWeight(), dw.LoRA(2))
    with pytest.warns(UserWarning, match="no gradient reached .'read.adapters.default.A'"):
        fit(model, task, Recipe(steps=1), progress=False)
