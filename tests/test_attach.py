"""Attaching: which layers, what is trained, several adapters at once, and that nothing refused leaves a trace."""

import contextlib
import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import deltaw as dw
from deltaw.adapters import Spec
from deltaw.attach import TrainedCopy, trained_copies


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + self.value(torch.tanh(self.query(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


QUERIES = ["blocks.0.query", "blocks.1.query"]
ATTENTION = ["blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
SPECS = [dw.LoRA(2), dw.LoRA(2, init="pissa"), dw.MoSLoRA(2), dw.VeRA(8), dw.LoRAXS(2), dw.DoRA(dw.LoRA(2))]
by_name = dict(ids=lambda spec: type(spec).__name__)


def net():
    torch.manual_seed(0)
    return Net()


def nudge(model, seed=0):
    """Move what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def adapted(spec=dw.LoRA(2), model=None, seed=0, **options):
    return nudge(dw.attach(net() if model is None else model, spec, seed=seed, **options), seed).eval()


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
                         tie_word_embeddings=tied)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=16)).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    return BertForSequenceClassification(config).eval()


def trained(model):
    return {key for key, parameter in model.named_parameters() if parameter.requires_grad}


# --- as it was -------------------------------------------------------------------------------------------


def portrait(model):
    """All that attaching could change: module objects and modes, parameter objects, flags and values, our state."""
    state = getattr(model, "_deltaw", None)
    return {
        "modules": [(key, id(module), module.training) for key, module in model.named_modules(remove_duplicate=False)],
        "parameters": [(key, id(p), p.requires_grad) for key, p in model.named_parameters(remove_duplicate=False)],
        "active": [module.active for module in model.modules() if hasattr(module, "adapters")],
        "state": state and (dict(state.attachments), state.active, state.merged),
        "tensors": {key: (id(t), t._version) for key, t in model.state_dict(keep_vars=True).items()},
    }


@contextlib.contextmanager
def unchanged(model):
    values = copy.deepcopy(model.state_dict())
    before, random = portrait(model), torch.get_rng_state()
    yield
    assert portrait(model) == before
    assert all(tensor.is_meta or torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def refused(model, call, match, error=ValueError):
    with unchanged(model), pytest.raises(error, match=match):
        call(model)


# --- which layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all-linear", [*ATTENTION, "head.0", "head.2"]),
        ("query", QUERIES),
        (["query"], QUERIES),
        (("value", "query"), ATTENTION),
        ((name for name in QUERIES), QUERIES),
        ("blocks.0.query", QUERIES[:1]),
        ("1.query", QUERIES[1:]),
        (r"blocks\.\d\.(query|value)", ATTENTION),
        (r".*\.0\.query|head\.2", [QUERIES[0], "head.2"]),
    ],
)
def test_targets(targets, expected):
    model = dw.attach(net(), dw.LoRA(2), targets=targets)
    assert sorted(dw.adapted_layers(model)) == sorted(expected)
    assert trained(model) == {f"{key}.adapters.default.{factor}" for key in expected for factor in "AB"}


@pytest.mark.parametrize("make, layers", [(llama, 14), (lambda: llama(tied=True), 14), (gpt2, 4)], ids=["llama", "tied", "gpt2"])
def test_all_linear_leaves_out_the_output_embedding(make, layers):
    model = dw.attach(make(), dw.LoRA(2))
    assert len(dw.adapted_layers(model)) == layers and "lm_head" not in dw.adapted_layers(model)


def test_all_linear_leaves_out_a_layer_tied_to_an_embedding_in_any_model():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False))
    model[2].weight = model[0].weight
    assert list(dw.adapted_layers(dw.attach(model, dw.LoRA(2)))) == ["1"]


def test_all_linear_leaves_out_what_is_trained_in_full():
    model = dw.attach(bert(), dw.LoRA(2), train_also=["classifier", "pooler"])
    assert list(trained_copies(model)) == ["bert.pooler", "classifier"]
    assert len(dw.adapted_layers(model)) == 6


def test_an_output_embedding_can_be_named():
    model = dw.attach(llama(), dw.LoRA(2), targets=["q_proj", "lm_head"])
    assert "lm_head" in dw.adapted_layers(model)


def test_the_state_dict_gains_one_level():
    before, model = net().state_dict(), dw.attach(net(), dw.LoRA(2), targets="query")
    after = {key.replace(".base.", "."): tensor for key, tensor in model.state_dict().items() if ".adapters." not in key}
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


class Shared(nn.Module):
    """One layer in two places of one parent, and in another parent."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8)
        self.chain = nn.Sequential(layer, nn.Tanh(), layer)
        self.last = layer

    def forward(self, x):
        return self.last(self.chain(x))


def test_a_layer_in_several_places_is_adapted_in_all_of_them():
    model = Shared()
    layer = model.last
    adapted(model=model)
    assert model.chain[0] is model.chain[2] is model.last and isinstance(model.last, dw.AdaptedLinear)
    assert len(dw.adapted_layers(model)) == 1
    assert dw.count(model).loc["(total)"].tolist() == [32, 1, 72]
    merged = model.last.merged_weight()
    expected = nn.functional.linear(X, merged, layer.bias)
    for activation in (torch.tanh, nn.Identity()):
        expected = nn.functional.linear(activation(expected), merged, layer.bias)
    torch.testing.assert_close(model(X), expected)
    dw.detach(model)
    assert model.chain[0] is model.chain[2] is model.last is layer


def test_a_compiled_model_is_the_model_inside():
    model = net()
    model.head.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    compiled = torch.compile(model, backend="eager")
    assert dw.attach(compiled, dw.LoRA(2), targets="query") is compiled
    assert list(dw.adapted_layers(compiled)) == list(dw.adapted_layers(model)) == QUERIES  # and so in files
    nudge(model)
    expected = model(X)
    torch.testing.assert_close(dw.merge(compiled)(X), expected)
    dw.detach(compiled)
    assert [p.requires_grad for p in model.parameters()] == flags and not hasattr(model, "_deltaw")


# --- frozen, trained, and as before ----------------------------------------------------------------------


@pytest.mark.parametrize("leave", [dw.detach, lambda model: dw.merge(model, permanently=True)], ids=["detach", "merge"])
def test_parameters_are_trainable_afterwards_as_they_were(leave):
    model = net()
    model.blocks[0].requires_grad_(False)
    model.head[2].bias.requires_grad_(False)
    model.head.eval()
    before = portrait(model)
    dw.attach(model, dw.LoRA(2), train_also=["head"])
    assert trained(model) == {key for key in model.state_dict() if ".adapters.default." in key}
    leave(model)
    after = portrait(model)
    assert [flag for *_, flag in after["parameters"]] == [flag for *_, flag in before["parameters"]]
    assert [mode for *_, mode in after["modules"]] == [mode for *_, mode in before["modules"]]
    assert after["state"] is None


def test_detach_gives_the_same_objects_back():
    model = net()
    with unchanged(model):
        dw.attach(model, dw.DoRA(dw.LoRA(2)), train_also=["head.2"])
        dw.attach(model, dw.VeRA(8), targets="query", name="second", train_also=["blocks.1.norm"])
        dw.merge(nudge(model))
        dw.detach(model)


def test_what_is_added_later_is_left_alone():
    model = dw.attach(net(), dw.LoRA(2))
    model.extra = nn.Linear(2, 2).requires_grad_(False)
    assert not any(p.requires_grad for p in dw.detach(model).extra.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_is_in_the_models_mode(training):
    model = dw.attach(net().train(training), dw.LoRA(2, dropout=0.5), train_also=["head"])
    assert all(module.training == training for layer in dw.adapted_layers(model).values() for module in layer.modules())
    nudge(model)
    assert torch.equal(model(X), model(X)) != training  # dropout
    assert torch.equal(model.eval()(X), model(X))


def test_modes_inside_a_module_trained_in_full_are_kept():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)))
    model[1][0].eval()
    dw.attach(model, dw.LoRA(2), train_also=["1"])
    assert not model[1].base[0].training and not model[1].current[0].training and model[1].current[1].training


@pytest.mark.parametrize("spec", SPECS, **by_name)
def test_everything_trained_gets_a_gradient(spec):
    """So that distributed training waits for no parameter."""
    model = adapted(spec, train_also=["head.2"])
    dw.attach(model, dw.LoRA(2), name="other")
    dw.use(model, "default")(X).sum().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_distributed_data_parallel():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted(dw.DoRA(dw.VeRA(8)), train_also=["head"])
        dw.attach(model, dw.LoRA(2), targets="query", name="other")
        dw.use(model, "default")
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a second step raises if a parameter of the first had no gradient
            parallel(X).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
@pytest.mark.parametrize("spec", [dw.LoRA(2), dw.DoRA(dw.LoRA(2))], **by_name)
def test_an_activation_in_place_behind_an_adapted_layer(spec, shape):
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = adapted(spec, nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace), nn.Linear(8, 3)))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # renamed in transformers 5
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant):
    model = adapted(dw.DoRA(dw.LoRA(2)), llama(), train_also=["lm_head"]).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# --- trained in full beside the adapter ------------------------------------------------------------------


def test_train_also_trains_a_copy():
    model = net()
    head, base = model.head, copy.deepcopy(model.head.state_dict())
    adapted(model=model, targets="query", train_also="head")
    assert isinstance(model.head, TrainedCopy) and model.head.base is head and model.head.current is not head
    assert all(torch.equal(tensor, base[key]) for key, tensor in head.state_dict().items())
    assert not torch.equal(model.head.current[2].weight, head[2].weight)
    with dw.disabled(model):
        assert torch.equal(model(X), net()(X))


def test_merging_for_good_keeps_the_trained_head():
    model = adapted(targets="query", train_also=["head"])
    expected, copied = model(X), model.head.current
    dw.merge(model, permanently=True)
    assert model.head is copied and type(model.blocks[0].query) is nn.Linear
    torch.testing.assert_close(model(X), expected)


def test_each_adapter_has_its_own_copy():
    model = adapted(targets="query", train_also=["head"])
    first = model(X)
    adapted(model=model, targets="query", train_also=["head"], name="second", seed=1)
    second = model(X)
    assert not torch.equal(first, second)
    assert torch.equal(dw.use(model, "default")(X), first)
    assert trained(model) == {key for key in model.state_dict() if ".adapters.default." in key}
    adapted(model=model, targets="query", name="headless")
    assert torch.equal(model.head(X), net().head(X))  # it has none, so the base's is used
    assert torch.equal(dw.detach(model, "headless")(X), second)  # the one attached last among the others


def test_names_inside_one_another_mean_the_outer_one():
    model = net()
    with unchanged(model):
        dw.attach(model, dw.LoRA(2), targets="query", train_also=["head.0", r"head.*"])
        assert list(trained_copies(model)) == ["head"]
        dw.detach(model)


def test_a_copy_passes_for_what_it_copies():
    model = dw.attach(bert(), dw.LoRA(2), train_also=["classifier", "word_embeddings"])
    assert model.classifier.out_features == 2 and model.classifier.weight is model.classifier.current.weight
    assert model.get_input_embeddings().weight.requires_grad
    with pytest.raises(AttributeError, match="colour"):
        model.classifier.colour
    model(TOKENS).logits.sum().backward()
    assert model.classifier.weight.grad is not None and model.classifier.base.weight.grad is None


def test_reset_also_draws_anew_from_the_seed_alone():
    def heads(seed, **options):
        model, random = net(), torch.get_rng_state()
        dw.attach(model, dw.LoRA(2), targets="query", train_also=["head"], seed=seed, **options)
        assert torch.equal(torch.get_rng_state(), random)
        return model.head.current[2].weight

    assert torch.equal(heads(0), net().head[2].weight)
    assert torch.equal(heads(0, reset_also=True), heads(0, reset_also=True))
    assert not torch.equal(heads(0, reset_also=True), heads(1, reset_also=True))
    assert not torch.equal(heads(0, reset_also=True), heads(0))
    assert torch.equal(dw.attach(net(), dw.LoRA(2), train_also=["head"], reset_also=True).head.base[2].weight, heads(0))


# --- several adapters ------------------------------------------------------------------------------------


def three():
    """a on all attention layers, b on the queries, c on the head; each with its output alone."""
    model, outputs = net(), {}
    for name, targets in (("a", ATTENTION), ("b", "query"), ("c", ["head.0"])):
        outputs[name] = nudge(dw.attach(model, dw.LoRA(2), targets=targets, name=name, seed=len(outputs)), len(outputs))(X)
    return model.eval(), outputs


def test_use_switches_and_only_the_active_one_is_trained():
    model, outputs = three()
    for name, output in outputs.items():
        assert dw.use(model, name) is model and torch.equal(model(X), output)
        assert trained(model) == {key for key in model.state_dict() if f".adapters.{name}." in key}
        assert all(layer.active == name for layer in dw.adapted_layers(model).values())


@pytest.mark.parametrize("name", "abc")
def test_merging_one_of_several_on_different_layers(name):
    model, outputs = three()
    dw.merge(dw.use(model, name))
    torch.testing.assert_close(model(X), outputs[name])
    refused(model, lambda model: dw.use(model, "a"), f"merged with '{name}'; unmerge it")
    dw.unmerge(model)
    assert all(torch.equal(dw.use(model, other)(X), outputs[other]) for other in outputs)
    dw.merge(dw.use(model, name), permanently=True)
    torch.testing.assert_close(model(X), outputs[name])
    assert list(model.state_dict()) == list(net().state_dict())


def test_detach_one_of_several():
    model, outputs = three()
    dw.detach(model, "b")
    assert torch.equal(model(X), outputs["c"])  # which stays active
    dw.detach(model, "c")
    assert torch.equal(model(X), outputs["a"]) and type(model.head[0]) is nn.Linear
    refused(model, lambda model: dw.detach(model, "b"), "no adapter 'b'; there are 'a'")
    dw.merge(model)
    dw.detach(model, "a")
    assert torch.equal(model(X), net()(X)) and not hasattr(model, "_deltaw")


def test_detaching_while_another_one_is_merged():
    model, outputs = three()
    dw.merge(model)
    dw.detach(model, "a")
    torch.testing.assert_close(model(X), outputs["c"])
    dw.detach(model, "c")
    assert torch.equal(model(X), outputs["b"])


# --- merging ---------------------------------------------------------------------------------------------


def test_merging_a_tied_output_leaves_the_embedding_alone():
    model = adapted(model=llama(tied=True), targets=["lm_head", "q_proj"])
    embedding = model.get_input_embeddings().weight
    values, expected = embedding.clone(), model(TOKENS).logits
    for merge in (lambda: dw.merge(model), lambda: dw.unmerge(model), lambda: dw.merge(model, permanently=True)):
        merge()
        torch.testing.assert_close(model(TOKENS).logits, expected)
        assert model.get_input_embeddings().weight is embedding and torch.equal(embedding, values)
    assert model.lm_head.weight is not embedding


@pytest.mark.parametrize("trainable", [True, False])
def test_a_tied_weight_is_trainable_afterwards_as_it_was(trainable):
    model = llama(tied=True).requires_grad_(trainable)
    dw.merge(dw.attach(model, dw.LoRA(2), targets=["lm_head"]), permanently=True)
    assert all(parameter.requires_grad == trainable for parameter in model.parameters())


def test_merging_twice_and_unmerging_twice():
    model = adapted()
    expected = model(X)
    merged = dw.merge(dw.merge(model))(X)
    torch.testing.assert_close(merged, expected)
    assert torch.equal(dw.unmerge(dw.unmerge(model))(X), expected)


@pytest.mark.parametrize("value", [float("inf"), 1e5], ids=["inf", "overflow in fp16"])
def test_a_merge_that_is_not_finite_leaves_everything_as_it_was(value):
    model = dw.attach(net().half(), dw.LoRA(2), train_also=["head.2"])
    last = list(dw.adapted_layers(model))[-1]
    with torch.no_grad():
        dw.adapted_layers(model)[last].adapter.A.fill_(1)
        dw.adapted_layers(model)[last].adapter.B.fill_(value)
    message = f"'default' cannot be merged into layer '{last}': the merged weight is not finite in torch.float16"
    refused(model, dw.merge, message)
    refused(model, lambda model: dw.merge(model, permanently=True), message)


def test_a_merge_that_fails_half_way_is_taken_back(monkeypatch):
    model, merged_weight = adapted(), dw.AdaptedLinear.merged_weight

    def out_of_memory(layer, dtype=None):
        if layer is model.head[2]:
            raise torch.OutOfMemoryError("out of memory")
        return merged_weight(layer, dtype)

    monkeypatch.setattr(dw.AdaptedLinear, "merged_weight", out_of_memory)
    refused(model, dw.merge, "out of memory", torch.OutOfMemoryError)


def test_merging_under_autocast_is_exact():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        merged = [layer.merged_weight() for layer in dw.adapted_layers(model).values()]
    assert all(torch.equal(ours, layer.merged_weight()) for ours, layer in zip(merged, dw.adapted_layers(model).values()))


def test_disabled_ends_with_an_error_too():
    model = adapted()
    expected = model(X)
    for prepare in (lambda: None, lambda: dw.merge(model)):
        prepare()
        with pytest.raises(KeyError), dw.disabled(model), dw.disabled(model):
            assert torch.equal(model(X), net()(X))
            raise KeyError
        torch.testing.assert_close(model(X), expected)
    dw.unmerge(model)
    with dw.disabled(model):
        refused(model, dw.merge, "disabled here; merge outside of the block")


# --- copies, files of torch's, devices and dtypes --------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_independent(again, merged):
    model = adapted(dw.DoRA(dw.VeRA(8)), train_also=["head.2"])
    adapted(model=model, targets="query", name="second")
    outputs = {name: dw.use(model, name)(X) for name in ("default", "second")}
    expected = (dw.merge(model) if merged else model)(X)
    twin = again(model)
    with unchanged(model):
        assert torch.equal(twin(X), expected)
        assert torch.equal(dw.use(dw.unmerge(twin), "default")(X), outputs["default"])
        nudge(twin)
        assert torch.equal(dw.detach(twin)(X), net()(X))
    assert torch.equal(dw.unmerge(model)(X), outputs["second"])


@pytest.mark.parametrize("spec", SPECS, **by_name)
def test_load_state_dict_gives_the_whole_model_back(spec):
    """Onto another base, too: what an adapter derived from the weight is derived from the loaded one."""
    model = adapted(spec, train_also=["head.2"])
    torch.manual_seed(1)
    other = dw.attach(Net(), spec, train_also=["head.2"], seed=5).eval()
    if isinstance(spec, dw.LoRA) and spec.init == "pissa":
        assert any(key.endswith("A0") for key in model.state_dict())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("spec", SPECS, **by_name)
def test_moving_to_another_dtype(spec):
    model = adapted(spec)
    expected = model(X)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.2)):
        moved = copy.deepcopy(model).to(dtype)
        inside = {id(t) for m in moved.modules() if isinstance(m, dw.Adapter) for t in [*m.parameters(), *m.buffers()]}
        for tensor in [*moved.parameters(), *moved.buffers()]:  # an adapter's stay in fp32 at least
            assert tensor.dtype == (torch.promote_types(dtype, torch.float32) if id(tensor) in inside else dtype)
        y = moved(X.to(dtype))
        assert y.dtype == dtype and (y - expected).abs().max() < tolerance
        y.sum().backward()


@pytest.mark.parametrize("spec", [*SPECS, dw.MoSLoRA(2, mixer="orthogonal"), dw.LoRA(2, init="orthogonal-pair")], **by_name)
def test_the_meta_device_is_enough_to_count(spec):
    """Nothing is allocated for a model that would not fit."""
    with torch.device("meta"):
        model = Net()
    dw.attach(model, spec, train_also=["head"])
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    columns = ["trainable", "frozen"]  # whether a start is to be kept, as PiSSA's, cannot be seen without numbers
    assert dw.count(model)[columns].equals(dw.count(dw.attach(net(), spec, train_also=["head"]))[columns])


def test_a_detached_adapter_is_not_kept():
    model = adapted()
    adapter = weakref.ref(model.head[0].adapter)
    dw.detach(model)
    assert adapter() is None


def test_a_hook_on_the_adapted_layer_fires():
    model, seen = adapted(targets="query"), []
    model.blocks[0].query.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(X)
    assert len(seen) == 1


# --- counting --------------------------------------------------------------------------------------------


def test_count_by_layers():
    table = dw.count(dw.attach(net(), dw.LoRA(2), targets="query", train_also=["head.2"]))
    assert table.columns.tolist() == ["trainable", "fixed", "frozen"]
    assert table.loc["blocks.0.query"].tolist() == [2 * 8 + 8 * 2, 1, 8 * 8 + 8]  # A and B, the scale, W and b
    assert table.loc["head.2"].tolist() == [8 * 3 + 3, 0, 8 * 3 + 3]
    assert table.loc["(everything else)"].tolist() == [0, 0, 2 * (16 + 64) + 72]
    assert (table.iloc[:-1].sum() == table.loc["(total)"]).all()


def test_count_is_of_the_active_adapter():
    model = dw.attach(net(), dw.LoRA(2), targets="query")
    alone = dw.count(model)
    dw.attach(model, dw.LoRA(4), targets="query", name="second")
    assert dw.count(dw.use(model, "default")).equals(alone)
    assert dw.count(dw.use(model, "second")).loc["(total)", "trainable"] == 2 * alone.loc["(total)", "trainable"]


def test_count_without_adapters():
    model = net()
    model.head.requires_grad_(False)
    table = dw.count(model)
    assert table.index.tolist() == ["(everything else)", "(total)"]
    assert table.loc["(total)"].tolist() == [304, 0, 99]


# --- what is refused, and leaves no trace ----------------------------------------------------------------


def put(module):
    """A net with `module` as the first block's query."""
    model = net()
    model.blocks[0].query = module
    return model


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def hooked(kind):
    linear = nn.Linear(8, 8)
    getattr(linear, f"register_{kind}_hook")(lambda *_: None)
    return linear


def with_forward():
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: x
    return linear


def pruned():
    from torch.nn.utils import prune

    return prune.l1_unstructured(nn.Linear(8, 8), "weight", amount=0.5)


def compiled():
    return torch.compile(nn.Linear(8, 8), backend="eager")


def parametrized(linear):
    return nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())


def with_weight(dtype):
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    return linear


MODELS = {
    "a subclass with its own forward": (lambda: put(Own(8, 8)), "'blocks.0.query' is a Own, which computes its output"),
    "a forward of its own": (lambda: put(with_forward()), "computes its output in a way of its own"),
    "parametrized": (lambda: put(parametrized(nn.Linear(8, 8))), "in a way of its own"),
    "a parametrized Conv1D": (lambda: put(parametrized(Conv1D(8, 8))), "in a way of its own"),
    "pruned": (lambda: put(pruned()), "in a way of its own"),
    "lazy": (lambda: put(nn.LazyLinear(8)), "LazyLinear without a shape yet; call the model once"),
    "compiled": (lambda: put(compiled()), "belongs to an OptimizedModule"),
    "forward hook": (lambda: put(hooked("forward")), "'blocks.0.query' has hooks, which an adapter would bypass"),
    "forward pre-hook": (lambda: put(hooked("forward_pre")), "has hooks"),
    "backward hook": (lambda: put(hooked("full_backward")), "has hooks"),
    "integers": (lambda: put(with_weight(torch.int8)), "has a weight of torch.int8; adapters go on float64, float32"),
    "eight bits": (lambda: put(with_weight(torch.float8_e4m3fn)), "has a weight of torch.float8_e4m3fn"),
    "attention": (lambda: put(nn.MultiheadAttention(8, 2)), "'blocks.0.query.out_proj' belongs to an MultiheadAttention"),
    "encoder layer": (lambda: put(nn.TransformerEncoderLayer(8, 2, 16)), "belongs to an .*silently do nothing"),
    "nothing linear": (lambda: nn.Sequential(nn.Tanh(), nn.LayerNorm(8)), "finds no nn.Linear or Conv1D to adapt"),
    "the model itself": (lambda: nn.Linear(8, 8), "the model itself is a Linear; put it into an nn.Sequential"),
}


@pytest.mark.parametrize("make, match", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layers_that_are_refused(make, match):
    model = make()
    before = portrait(model)
    with pytest.raises(ValueError, match=match):
        dw.attach(model, dw.LoRA(2))
    assert portrait(model) == before


def test_the_feed_forward_of_an_encoder_layer():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    refused(model, lambda model: dw.attach(model, dw.LoRA(2), targets="linear1"), "'layers.0.linear1' belongs to an TransformerEncoderLayer")
    decoder = nn.TransformerDecoderLayer(8, 2, 16)  # which calls its layers
    assert list(dw.adapted_layers(dw.attach(nn.ModuleDict({"decoder": decoder}), dw.LoRA(2), targets="linear1"))) == ["decoder.linear1"]


LORA = dw.LoRA(2)
CALLS = {
    "a class": (dict(spec=dw.LoRA), r"needs a spec, such as LoRA\(...\), not the class LoRA", TypeError),
    "no spec": (dict(spec="lora"), "such as LoRA\\(rank=8\\), not 'lora'", TypeError),
    "name with a dot": (dict(name="a.b"), "of letters, digits, '_' and '-', and no method's name, not 'a.b'", ValueError),
    "empty name": (dict(name=""), "not ''", ValueError),
    "a method's name": (dict(name="keys"), "not 'keys'", ValueError),
    "name None": (dict(name=None), "not None", ValueError),
    "unknown target": (dict(targets="key"), "'key', which matches no module; linear layers here are called '0', '2', 'query', 'value'", ValueError),
    "a part of a name": (dict(targets="uery"), "'uery', which matches no module", ValueError),
    "one of two": (dict(targets=["query", "key"]), "'key', which matches no module", ValueError),
    "no expression": (dict(targets="("), r"'\(', which matches no module", ValueError),
    "no targets": (dict(targets=[]), "targets is empty; name layers, or say 'all-linear'", ValueError),
    "an empty target": (dict(targets=[""]), r"targets must be names of modules, not \[''\]", ValueError),
    "targets None": (dict(targets=None), "targets must be names of modules, not None", ValueError),
    "targets a number": (dict(targets=[3]), r"names of modules, not \[3\]", ValueError),
    "a norm": (dict(targets=["query", "norm"]), "'norm', which matches 'blocks.0.norm', a LayerNorm; adapters go on", ValueError),
    "seed None": (dict(seed=None), "seed must be a whole number, not None", ValueError),
    "seed 0.5": (dict(seed=0.5), "not 0.5", ValueError),
    "also None": (dict(train_also=None), "train_also must be names of modules, not None", ValueError),
    "also unknown": (dict(train_also="classifier"), "'classifier', which matches no module; the model has 'blocks', 'head'", ValueError),
    "also a target": (dict(targets=["query"], train_also="query"), "'blocks.0.query' is in targets and in train_also", ValueError),
    "also around a target": (dict(targets=["head.0"], train_also="head"), "'head.0' is inside 'head', which is in train_also", ValueError),
    "also a list": (dict(targets=["head.0"], train_also="blocks"), "'blocks', a ModuleList, which is never called", ValueError),
    "also nothing to train": (dict(train_also="head.1"), "'head.1', a Tanh, which has no parameters to train", ValueError),
    "also everything": (dict(train_also=["blocks.0", "blocks.1", "head"]), "finds no nn.Linear", ValueError),
    "a pattern for nothing": (dict(spec=dw.LoRA(2, rank_pattern={"key": 4})), "the pattern 'key' matches none", ValueError),
    "too high a rank": (dict(spec=dw.LoRAXS(4)), "at most 3 on layer 'head.2'; rank is 4", ValueError),
    "a bad start": (dict(spec=dw.LoRA(2, init=lambda *_: (torch.ones(1), torch.ones(1)))), "gave A of shape", ValueError),
}  # fmt: skip


@pytest.mark.parametrize("options, match, error", CALLS.values(), ids=CALLS)
def test_bad_calls_leave_no_trace(options, match, error):
    options = {"spec": LORA} | options
    refused(net(), lambda model: dw.attach(model, **options), match, error)
    refused(adapted(name="first", targets=["query"]), lambda model: dw.attach(model, **options), ".", Exception)


def test_a_name_that_is_taken():
    model = dw.attach(net(), dw.LoRA(2), name="mine")
    refused(model, lambda model: dw.attach(model, dw.LoRA(2), name="mine"), "'mine' already; names taken: 'mine'")


def test_a_merged_model():
    refused(dw.merge(adapted()), lambda model: dw.attach(model, dw.LoRA(2), name="b"), "is merged; unmerge it")


def test_a_model_and_a_part_of_it():
    """Which of them would know what the layers hold?"""
    model = dw.attach(net(), dw.LoRA(2), targets="query")
    for name in ("default", "other"):
        refused(model.blocks, lambda part: dw.attach(part, dw.LoRA(2), name=name), "hold the adapters 'default', attached to")
    model = net()
    dw.attach(model.head, dw.LoRA(2))
    refused(model, lambda model: dw.attach(model, dw.LoRA(2)), "attached to a part of this model")


def test_adapters_and_copies_inside_one_another():
    model = dw.attach(net(), dw.LoRA(2), name="a")
    refused(model, lambda m: dw.attach(m, dw.LoRA(2), targets="query", train_also="head", name="b"), "'head', which has an adapter")
    model = dw.attach(net(), dw.LoRA(2), targets="query", train_also="head", name="a")
    refused(model, lambda m: dw.attach(m, dw.LoRA(2), targets="head.0", name="b"), "'head.0', which matches no module")


def test_a_copy_that_cannot_be_drawn_anew():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    model = nn.Sequential(nn.Linear(8, 3), Scale())
    options = dict(train_also="1", reset_also=True)
    refused(model, lambda model: dw.attach(model, dw.LoRA(2), **options), "cannot draw '1' anew: Scale has no reset_parameters")


def test_a_copy_of_integers():
    model = nn.Sequential(nn.Linear(8, 8), with_weight(torch.int8))
    refused(model, lambda model: dw.attach(model, dw.LoRA(2), train_also="1"), "'1', which has parameters of .*torch.int8")


def test_nothing_is_attached():
    match = r"no adapter is attached to this Net; attach\(model, LoRA\(rank=8\)\) puts one in"
    for call in (dw.merge, dw.unmerge, dw.detach, dw.adapted_layers, lambda m: dw.use(m, "a"), lambda m: dw.disabled(m).__enter__()):
        refused(net(), call, match)


def test_names_that_nothing_is_attached_under():
    model = adapted(name="a")
    for call in (dw.use, dw.detach):
        for name in ("b", "") if call is dw.detach else ("b", None):
            refused(model, lambda model: call(model, name), f"no adapter {name!r}; there are 'a'")


class Broken(Spec):
    """A family that does not keep the contract, in one way or another."""

    def __init__(self, change):
        object.__setattr__(self, "change", change)

    def build(self, layers, generator):
        adapters = dw.LoRA(2).build(layers, generator)
        return self.change(adapters)


del Spec.families["Broken"]


def misshapen(adapters):
    adapter = next(iter(adapters.values()))
    adapter.A = nn.Parameter(torch.ones(2, 7))
    return adapters


@pytest.mark.parametrize(
    "change, match, error",
    [
        (lambda adapters: dict(list(adapters.items())[1:]), "must give one adapter for each of 'blocks.0.query'", ValueError),
        (lambda adapters: list(adapters.values()), "must give one adapter for each", ValueError),
        (lambda adapters: {key: nn.Identity() for key in adapters}, r"gave Identity\(\) for 'blocks.0.query'; it must be an Adapter", TypeError),
        (misshapen, r"down of \(2, 7\) and up of \(8, 2\) for layer 'blocks.0.query'; they must be \(r, 8\) and \(8, r\)", ValueError),
    ],
)  # fmt: skip
def test_families_that_break_the_contract(change, match, error):
    refused(net(), lambda model: dw.attach(model, Broken(change)), match, error)


def test_casting_the_model_leaves_the_adapters_in_fp32():
    for cast in (lambda model: model.half(), lambda model: model.to(torch.bfloat16), lambda model: model.bfloat16()):
        model = cast(dw.attach(nn.Sequential(nn.Linear(8, 8)), dw.DoRA(dw.VeRA(4))))
        adapter = model[0].adapter
        assert model[0].weight.itemsize == 2
        assert {t.dtype for t in [*adapter.parameters(), *adapter.buffers()]} == {torch.float32}
        assert {t.dtype for t in model.double()[0].adapter.parameters()} == {torch.float64}


def test_an_adapter_chosen_within_disabled_is_the_one_afterwards():
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("one", "two"):
        dw.attach(model, dw.LoRA(2), name=name)
    with dw.disabled(model):
        dw.use(model, "one")
    assert model[0].active == "one"
    assert all(p.requires_grad for p in model[0].adapters["one"].parameters())
    assert not any(p.requires_grad for p in model[0].adapters["two"].parameters())


def test_counting_a_merged_model_counts_its_weights_once():
    model = dw.attach(nn.Sequential(nn.Linear(8, 8)), dw.LoRA(2))
    frozen = dw.count(model).frozen
    assert (dw.count(dw.merge(model)).frozen == frozen).loc[["0", "(everything else)"]].tolist() == [True, True]
