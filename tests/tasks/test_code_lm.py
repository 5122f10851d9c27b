"""Code as a language: a base that knows Python, a loss that is transformers' own, a bank like single runs."""

import copy
import dataclasses

import pytest
import torch

import deltaw as dw
from deltaw.tasks import code_base, code_lm
from deltaw.tasks.code_base import SHAPES, Base, compiled, decoder, deterministic
from deltaw.tasks.code_tokens import Options, corpus
from deltaw.train import evaluate, predict

OPTIONS = Options(("filelock", "fsspec", "jinja2", "packaging"), ("numpy", "pyarrow"), 400, 0.15)
BASE = Base("tiny", steps=30, batch_size=8, length=24)


@pytest.fixture(scope="module")
def made():
    return corpus(OPTIONS)


@pytest.fixture(scope="module")
def task():
    return code_lm(BASE, OPTIONS, windows=32, device="cpu")


def test_batches_are_windows_and_depend_on_the_seed_alone(task, made):
    stream = task.batches(3, 8)
    one, two = next(stream), next(stream)
    big = next(task.batches(3, 16))
    assert torch.equal(torch.cat([one["ids"], two["ids"]]), big["ids"]) and big["ids"].shape == (16, 25)
    assert big["ids"].dtype == torch.int64 and not torch.equal(big["ids"], next(task.batches(4, 16))["ids"])
    cpp = made.streams["cpp"]
    assert torch.equal(task.train[0], cpp[:25]) and torch.equal(task.train[1], cpp[24:49])  # each token is predicted once
    assert len(task.train) == (len(cpp) - 1) // 24


def test_every_set_is_measured_once_in_one_pass(task):
    batches = list(task.validation(10))
    labels, ids = (torch.cat([batch[name] for batch in batches]) for name in ("labels", "ids"))
    assert labels.tolist() == [0] * 32 + [1] * 32
    assert torch.equal(ids, torch.cat(list(task.held_out.values())).long())
    metrics = task.metrics(torch.arange(64.0), labels)
    assert metrics == {"loss": 15.5, "target/loss": 15.5, "python/loss": 47.5}


def test_blocks_are_parts_of_a_set(task):
    blocks = code_lm(BASE, OPTIONS, sets=("tune", "python"), windows=32, blocks=4, device="cpu")
    metrics = blocks.metrics(torch.arange(64.0), torch.tensor([0] * 32 + [1] * 32))
    assert metrics == {"loss": 15.5, "tune/loss": 15.5, "python/loss": 47.5}
    assert metrics.examples.keys() == {"tune/blocks", "python/blocks"}
    assert metrics.examples["python/blocks"] == "35.500000 43.500000 51.500000 59.500000"


def test_the_target_is_reported_under_the_search_s_name_too(task):
    both = code_lm(BASE, OPTIONS, sets=("report", "tune"), windows=32, device="cpu")
    assert torch.equal(both.held_out["report"], task.held_out["target"]) and list(both.held_out) == ["report", "tune"]


def test_the_loss_is_transformers_own(task):
    model, batch = task.model().eval(), next(task.batches(0, 4))
    losses = task.losses(model, batch)
    for ids, loss in zip(batch["ids"], losses, strict=True):
        assert loss.item() == pytest.approx(model(input_ids=ids[None], labels=ids[None]).loss.item(), rel=1e-5)


def test_our_attention_is_transformers_own(task):
    ids = next(task.batches(0, 2))["ids"]
    model = task.model().double()
    ours = model(input_ids=ids).logits
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)  # its softmax is in fp32
    model.config._attn_implementation = "deltaw_causal"
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 25, 25, dtype=torch.float64))


def test_the_base_has_learnt_python_and_is_the_same_each_time(task):
    one, two, base = task.model(), task.model(), task.pretrained
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with torch.no_grad():
        one.lm_head.weight.zero_()
    assert task.model().lm_head.weight.any()
    first, last = base.history.evaluations[0]["python/loss"], base.history.metrics["python/loss"]
    assert last < first - 0.5 and evaluate(two, task.pretraining)["loss"] == pytest.approx(last)
    assert code_lm(BASE, OPTIONS, device="cpu").pretrained is base and base.tokens_per_second > 0 < base.seconds
    other = dataclasses.replace(BASE, steps=2)
    fresh = [code_lm(dataclasses.replace(other, seed=seed), OPTIONS, device="cpu").pretrained for seed in (0, 0, 1)]
    assert fresh[0].fingerprint == fresh[1].fingerprint != fresh[2].fingerprint


def test_training_from_nothing_can_be_had_again(task):
    base = dataclasses.replace(BASE, steps=3)
    first = code_lm(base, OPTIONS, device="cpu").pretrained
    code_lm.__globals__["_pretrained"].cache_clear()
    again = code_lm(base, OPTIONS, device="cpu").pretrained
    assert again is not first and again.fingerprint == first.fingerprint


def test_a_folder_keeps_the_base_and_every_number_of_its_history(made, tmp_path, monkeypatch):
    base = dataclasses.replace(BASE, steps=3)

    def task(base=base, folder=tmp_path):
        code_lm.__globals__["_pretrained"].cache_clear()
        found = code_lm(base, OPTIONS, windows=32, device="cpu")  # whose corpus is there already
        found.folder = folder
        return found

    trained = task().pretrained
    (file,) = tmp_path.glob("base-tiny-*.safetensors")
    plain = task(folder=None).pretrained
    assert trained.fingerprint == plain.fingerprint and trained.history.evaluations == plain.history.evaluations
    assert trained.history.loss == plain.history.loss and trained.history.recipe == base.recipe
    monkeypatch.setattr(code_base, "pretrain", None)  # nothing is trained again
    again = task().pretrained
    assert again is not trained and (again.fingerprint, again.seconds) == (trained.fingerprint, trained.seconds)
    with pytest.raises(TypeError):
        _ = task(dataclasses.replace(base, seed=1)).pretrained  # another base has another file
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        _ = task().pretrained
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no base of this kind"):
        _ = task().pretrained


@pytest.mark.parametrize(("size", "millions"), [("10m", 10.6), ("45m", 46.9), ("100m", 97.5)])
def test_sizes(size, millions):
    with torch.device("meta"):
        model = decoder(SHAPES[size], 8192, 256)
    assert sum(each.numel() for each in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("specs", [[dw.LoRA(4), dw.LoRA(4)], [dw.DoRA(dw.LoRA(2)), dw.VeRA(8)]])
def test_a_bank_is_what_each_adapter_is_alone(task, specs):
    slots = [(spec, dw.Recipe(steps=4, batch_size=4, learning_rate=1e-2 / (seed + 1), seed=seed))
             for seed, spec in enumerate(specs)]
    bank = dw.Bank(task.model().double(), slots)
    histories = bank.fit(task, device="cpu", progress=False)
    for slot, (spec, recipe) in enumerate(slots):
        alone = dw.attach(task.model().double(), spec, seed=recipe.seed)
        history = dw.fit(alone, task, recipe, device="cpu", progress=False)
        assert histories[slot].loss == pytest.approx(history.loss, rel=1e-9)
        assert histories[slot].metrics == pytest.approx(history.metrics, rel=1e-9)
    assert histories[0].metrics["target/loss"] != histories[1].metrics["target/loss"]


def test_losses_of_single_examples_can_be_had(task):
    (losses,), labels = predict(task.model(), task, 16)
    assert losses.shape == labels.shape == (64,)
    assert evaluate(task.model(), task)["python/loss"] == pytest.approx(losses[labels == 1].mean().item())


def test_adaptation_learns_the_target(task):
    before = evaluate(task.model(), task)
    history = dw.fit(task.model(), task, dw.Recipe(steps=30, batch_size=8, learning_rate=3e-3), device="cpu")
    assert history.metrics["target/loss"] < before["target/loss"] - 0.1


def test_compiled_layers_compute_the_same(task, monkeypatch):
    model, batch = task.model(), next(task.batches(0, 2))
    expected = task.losses(model, batch)
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile(self, backend="eager", **how))
    torch.testing.assert_close(task.losses(compiled(model), batch), expected)
    assert all(layer._compiled_call_impl for layer in model.model.layers)
    again = copy.deepcopy(model)  # what a task gives of a base that was compiled is as plain as any
    assert not any(module._compiled_call_impl for module in again.modules())


def test_determinism_is_asked_for_within_the_block_only():
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def test_the_plain_loop_has_a_speed(task):
    assert code_base.plain_tokens_per_second(BASE, task.pretraining, 4, "cpu") > 0


@pytest.mark.parametrize(("options", "words"), [
    ({"sets": ()}, "sets"), ({"sets": ("target", "target")}, "sets"),
    ({"sets": ("c++",)}, "'target', 'report', 'tune', 'python'"),
    ({"windows": 0}, "windows"), ({"blocks": -1}, "blocks"), ({"blocks": 5, "windows": 4}, "4 examples only"),
    ({"base": dataclasses.replace(BASE, length=2_000_000)}, "too few")])
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        code_lm(**{"base": BASE, "options": OPTIONS, "device": "cpu", **options})


@pytest.mark.parametrize(("name", "value"), [("size", "7b"), ("length", 1), ("steps", 0), ("batch_size", 0)])
def test_bad_bases_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(BASE, **{name: value})
