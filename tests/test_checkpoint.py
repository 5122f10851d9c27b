"""Files: PEFT's both ways, with PEFT itself as the oracle, and what is refused."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import deltaw as dw


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)).eval()


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
}
PATTERNS = {
    "llama": dict(rank_pattern={"v_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, alpha_pattern={"q_proj": 5}),
    "gpt2": dict(rank_pattern={"c_fc": 2, r"h\.1\.attn\.c_attn": 3}, alpha_pattern={"c_attn": 5}),
}


def families(model):
    """Ours and PEFT's name for the same thing."""
    return {
        "LoRA": (dw.LoRA(4, 8), dict(r=4, lora_alpha=8)),
        "rsLoRA": (dw.LoRA(4, 8, scaling="rslora"), dict(r=4, lora_alpha=8, use_rslora=True)),
        "patterns": (dw.LoRA(4, 8, **PATTERNS[model]), dict(r=4, lora_alpha=8, **PATTERNS[model])),
        "DoRA": (dw.DoRA(dw.LoRA(4, 8)), dict(r=4, lora_alpha=8, use_dora=True)),
        "VeRA stored": (dw.VeRA(16, projection_seed=7), dict(r=16, projection_prng_key=7, save_projection=True)),
        "VeRA by seed": (dw.VeRA(16, projection_seed=7), dict(r=16, projection_prng_key=7, save_projection=False)),
    }


CASES = [(model, family) for model in MODELS for family in families("llama")]
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def shake(model):
    """Move what is trained away from the start."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters(), key=lambda item: canonical(item[0])):
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def canonical(key):
    """One name for a parameter here and in PEFT."""
    for theirs, ours in {
        "base_model.model.": "", ".adapters.default": "", ".inner": "", ".default": "", ".weight": "", "lora_": "",
        "magnitude_vector": "magnitude", "vera_lambda_": "", ".modules_to_save": "",
    }.items():  # fmt: skip
        key = key.replace(theirs, ours)
    return key


def outputs_and_gradients(model):
    logits = model(TOKENS).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6))
    (logits * weights).sum().backward()
    return logits, {canonical(key): p.grad for key, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, theirs):
    (y, gradients), (y_peft, gradients_peft) = outputs_and_gradients(ours), outputs_and_gradients(theirs)
    assert (y - y_peft).abs().max() <= 2e-5
    assert gradients.keys() == gradients_peft.keys() and gradients
    for key, reference in gradients_peft.items():
        assert (gradients[key] - reference).abs().max() <= 1e-4 * reference.abs().max(), key


def peft_model(model, options):
    make, targets = MODELS[model]
    config = peft.VeraConfig if "projection_prng_key" in options else peft.LoraConfig
    wrapped = peft.get_peft_model(make(), config(target_modules=targets, **options))
    shake(wrapped)
    return wrapped.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, family", CASES)
def test_peft_to_deltaw(model, family, tmp_path):
    spec, options = families(model)[family]
    theirs = peft_model(model, options)
    theirs.save_pretrained(tmp_path)
    ours = dw.load(MODELS[model][0](), tmp_path).eval()
    assert_same(ours, theirs)
    dw.save(ours, tmp_path / "again", projections="stored" in family)
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, family", CASES)
def test_deltaw_to_peft(model, family, tmp_path):
    spec, options = families(model)[family]
    make, targets = MODELS[model]
    ours = dw.attach(make(), spec, targets=targets).eval()
    shake(ours)
    dw.save(ours, tmp_path, projections="stored" in family)
    assert_same(ours, peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model, family", CASES)
def test_the_same_start_gives_the_same_first_step(model, family):
    """No file between: PEFT's tensors copied into ours by name."""
    spec, options = families(model)[family]
    make, targets = MODELS[model]
    theirs = peft_model(model, options)
    ours = dw.attach(make(), spec, targets=targets).eval()
    values = {canonical(key): p for key, p in theirs.named_parameters()}
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[canonical(key)])
    assert_same(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_modules_to_save_both_ways(tmp_path):
    spec = dw.LoRA(4, 8)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    assert_same(dw.load(llama(), tmp_path / "theirs").eval(), theirs)
    ours = dw.attach(llama(), spec, targets=["q_proj"], train_also=["lm_head"]).eval()
    shake(ours)
    dw.save(ours, tmp_path / "ours")
    assert_same(ours, peft.PeftModel.from_pretrained(llama(), tmp_path / "ours", is_trainable=True).eval())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [dw.MoSLoRA(4), dw.VeRA(16), dw.LoRAXS(4), dw.LoRA(4, init="pissa")], ids=lambda s: type(s).__name__)
def test_as_lora_is_served_by_peft(spec, tmp_path):
    ours = dw.attach(llama(), spec, targets=["q_proj", "down_proj"]).eval()
    shake(ours)
    dw.save(ours, tmp_path, as_lora=True)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert (ours(TOKENS).logits - theirs(TOKENS).logits).abs().max() <= 2e-5


def test_pissa_keeps_its_start_to_resume_and_is_rank_2r_as_lora(tmp_path):
    model = dw.attach(llama(), dw.LoRA(4, init="pissa"), targets=["q_proj"])
    dw.save(model, tmp_path / "own")
    assert any(key.endswith("/A0") for key in load_file(tmp_path / "own" / "deltaw_model.safetensors"))
    dw.save(model, tmp_path / "lora", as_lora=True)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 8


def test_stored_projections_that_no_seed_gives_are_used_and_kept(tmp_path):
    model = dw.attach(llama(), dw.VeRA(8), targets=["q_proj"])
    shake(model)
    dw.save(model, tmp_path / "a", projections=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vera_A"] *= 2
    save_file(tensors, file)
    loaded = dw.load(llama(), tmp_path / "a").eval()
    assert not torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)
    dw.save(loaded, tmp_path / "b")  # without being asked to: nothing else gives them back
    assert torch.equal(dw.load(llama(), tmp_path / "b").eval()(TOKENS).logits, loaded(TOKENS).logits)


@pytest.mark.parametrize("spec", [dw.LoRA(np.int64(4), np.float32(8)), dw.MoSLoRA(np.int64(4))], ids=lambda s: type(s).__name__)
def test_settings_may_be_numpys(spec, tmp_path):
    dw.save(dw.attach(llama(), spec, targets=["q_proj"]), tmp_path)
    assert dw.load(llama(), tmp_path)._deltaw.attachments["default"].spec.rank == 4


def test_a_compiled_models_file_is_the_plain_ones(tmp_path):
    model = torch.compile(dw.attach(llama(), dw.LoRA(4), targets=["q_proj"]), backend="eager")
    dw.save(model, tmp_path)
    assert list(dw.adapted_layers(dw.load(llama(), tmp_path))) == list(dw.adapted_layers(model))


def test_names_that_end_alike_are_told_apart(tmp_path):
    """In nested Sequentials "0" is the end of "1.0", too."""

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))

    model = dw.attach(net(), dw.LoRA(2, rank_pattern={"^0": 1}), targets=["^[02]"])
    assert list(dw.adapted_layers(model)) == ["0", "2"]
    shake(model)
    dw.save(model, tmp_path)
    loaded = dw.load(net(), tmp_path)
    assert list(dw.adapted_layers(loaded)) == ["0", "2"]
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x))


# --- what is refused -------------------------------------------------------------------------------------


def saved(tmp_path, spec=dw.LoRA(4, 8)):
    dw.save(dw.attach(llama(), spec, targets=["q_proj"], train_also=["lm_head"]), tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    file = next(folder.glob("*_config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def a_tensor(tensors, end):
    return next(key for key in sorted(tensors) if key.endswith(end))


def truncate(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def pickle_only(folder):
    file = next(folder.glob("*.safetensors"))
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


MALFORMED = {
    "cut short": (truncate, "not a whole safetensors file"),
    "not safetensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"hello" * 100), "not a whole safetensors file"),
    "pickle only": (pickle_only, "a pickle can run code"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not JSON"),
    "a JSON list": (lambda f: (f / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
    "unknown peft_type": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "no rank": (lambda f: edit_config(f, r=None), "lacks 'r'"),
    "bad rank": (lambda f: edit_config(f, r=0), "rank must be a whole number of at least 1, not 0"),
    "another rank": (lambda f: edit_config(f, r=5, lora_alpha=5), r"rank 5; its tensors have \(4, 4\)"),
    "biases": (lambda f: edit_config(f, bias="all"), "bias='all'"),
    "a start that changes the base": (lambda f: edit_config(f, init_lora_weights="pissa"), "changes the base"),
    "target parameters": (lambda f: edit_config(f, target_parameters=["w"]), r"target_parameters=\['w'\]"),
    "DoRA without magnitudes": (lambda f: edit_config(f, use_dora=True), "lora_magnitude_vector"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(a_tensor(t, "lora_B.weight"))), "lacks the tensors 'lora_B.weight'"),
    "extra tensor": (lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.x.y": torch.ones(1)})), "unexpected tensor"),
    "foreign tensor": (lambda f: edit_tensors(f, lambda t: t.update(stranger=torch.ones(1))), "unexpected tensor 'stranger'"),
    "misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update({a_tensor(t, "lora_A.weight"): torch.ones(4, 31)})),
        r"shape \(4, 31\)",
    ),
    "head misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update({a_tensor(t, "lm_head.weight"): torch.ones(3, 3)})),
        r"shape \(3, 3\); it must be \(64, 32\)",
    ),
    "not finite": (
        lambda f: edit_tensors(f, lambda t: t[a_tensor(t, "lora_A.weight")].fill_(float("nan"))),
        "not finite",
    ),
    "no layers": (lambda f: edit_tensors(f, lambda t: [t.pop(k) for k in list(t) if "lora" in k]), "holds no tensor called"),
    "two layouts": (lambda f: (f / "deltaw_config.json").write_text("{}"), "two adapters"),
}
MALFORMED_OWN = {
    "unknown family": (lambda f: edit_config(f, spec={"family": "Nope"}), "unknown family 'Nope'"),
    "unknown setting": (lambda f: edit_config(f, spec={"family": "MoSLoRA", "colour": 1}), r"no settings \['colour'\]"),
    "bad setting": (lambda f: edit_config(f, spec={"family": "MoSLoRA", "rank": -1}), "not -1"),
    "another format": (lambda f: edit_config(f, format=99), "format is 99"),
    "no targets": (lambda f: edit_config(f, targets=None), "malformed"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(a_tensor(t, "/A"))), "missing"),
    "another missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(a_tensor(t, "/M"))), "lacks the tensors"),
    "extra tensor": (lambda f: edit_tensors(f, lambda t: t.update(stranger=torch.ones(1))), "unexpected tensor 'stranger'"),
    "misshapen": (lambda f: edit_tensors(f, lambda t: t.update({a_tensor(t, "/A"): torch.ones(4, 31)})), r"shape \(4, 31\)"),
    "one module twice": (
        lambda f: edit_config(f, train_also=["lm_head", "model.layers.0.self_attn.q_proj"]),
        "in targets and in train_also",
    ),
    "another rank": (
        lambda f: edit_config(f, spec={"family": "MoSLoRA", "rank": 3}),
        r"must be \(3, 32\)",
    ),
}


def assert_untouched(model, load, error, match):
    state, modules = copy.deepcopy(model.state_dict()), list(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        load(model)
    assert [(k, id(m)) for k, m in model.named_modules()] == [(k, id(m)) for k, m in modules]
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("spoil, match", MALFORMED.values(), ids=MALFORMED)
def test_malformed_files_leave_the_model_as_it_was(spoil, match, tmp_path):
    folder = saved(tmp_path)
    spoil(folder)
    assert_untouched(llama(), lambda model: dw.load(model, folder), (ValueError, FileNotFoundError), match)
    adapted = dw.attach(llama(), dw.LoRA(2), name="mine")
    assert_untouched(adapted, lambda model: dw.load(model, folder), (ValueError, FileNotFoundError), match)
    assert adapted._deltaw.active == "mine"


@pytest.mark.parametrize("spoil, match", MALFORMED_OWN.values(), ids=MALFORMED_OWN)
def test_malformed_files_of_our_own_layout(spoil, match, tmp_path):
    folder = saved(tmp_path, dw.MoSLoRA(4))
    spoil(folder)
    assert_untouched(llama(), lambda model: dw.load(model, folder), (ValueError, FileNotFoundError), match)


def test_another_models_adapter(tmp_path):
    assert_untouched(gpt2(), lambda model: dw.load(model, saved(tmp_path)), ValueError, "does not have")


def test_a_folder_without_an_adapter(tmp_path):
    assert_untouched(llama(), lambda model: dw.load(model, tmp_path), FileNotFoundError, "holds no adapter")
    assert_untouched(llama(), lambda model: dw.load(model, tmp_path / "nowhere"), FileNotFoundError, "nowhere")


def test_a_name_that_is_taken(tmp_path):
    folder = saved(tmp_path)
    model = dw.load(llama(), folder)
    assert_untouched(model, lambda model: dw.load(model, folder), ValueError, "'default' already")


@pytest.mark.parametrize("name", ["a.b", "", "keys", None])
def test_a_name_that_cannot_be_one(name, tmp_path):
    assert_untouched(llama(), lambda model: dw.load(model, saved(tmp_path), name), ValueError, "an adapter's name must be")


def test_saving_nothing_and_saving_nonsense(tmp_path):
    with pytest.raises(ValueError, match="no adapter is attached"):
        dw.save(llama(), tmp_path)
    model = dw.attach(llama(), dw.LoRA(2), targets=["q_proj"])
    with pytest.raises(ValueError, match="no adapter 'x'; there are 'default'"):
        dw.save(model, tmp_path, name="x")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        dw.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_the_other_layout_is_not_mixed(tmp_path):
    folder = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match="another layout"):
        dw.save(dw.attach(llama(), dw.MoSLoRA(4), targets=["q_proj"]), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_convert_refuses_other_families():
    with pytest.raises(ValueError, match="can be converted to LoRA"):
        dw.convert(dw.attach(llama(), dw.LoRA(2)), dw.VeRA)


def test_converting_under_autocast_is_exact():
    model = dw.attach(llama(), dw.MoSLoRA(4), targets=["q_proj"]).eval()
    shake(model)
    before = model(TOKENS).logits
    with torch.autocast("cpu", torch.bfloat16):
        dw.convert(model, dw.LoRA)
    assert (model(TOKENS).logits - before).abs().max() <= 1e-5
