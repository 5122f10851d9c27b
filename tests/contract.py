"""What every family must do, as checks that take a spec. `test_contract.py` runs them over the library's
families, `test_new_family.py` over one that it adds."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from transformers.pytorch_utils import Conv1D

import deltaw as dw
from deltaw.attach import adapted_layers


class Net(nn.Module):
    """Linear layers of different shapes, a Conv1D, one without a bias, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.conv = Conv1D(20, 16)  # 16 in, 20 out
        self.bare = nn.Linear(20, 10, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.conv(x))
        return self.head(torch.tanh(self.bare(x)))


TARGETS = ["first", "conv", "bare"]


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def inputs(dtype=torch.float64, n=6):
    return torch.randn(2, n // 2, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def moved(spec, dtype=torch.float64, seed=0, **options):
    """A net with the adapter attached and its parameters moved away from the start."""
    model = dw.attach(net(dtype), spec, targets=TARGETS, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def trained(model):
    return {key: p for key, p in model.named_parameters() if p.requires_grad}


def gradients(model, x):
    x = x.clone().requires_grad_(True)
    parameters = trained(model)
    weights = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    grads = torch.autograd.grad((model(x) * weights).sum(), [x, *parameters.values()])
    return dict(zip(["x", *parameters], grads))


def explicit(model, x):
    """The same net with every adapted layer as a dense W′ = g ⊙ (W + up·down): no kernel."""

    def dense(layer, x):
        weight = layer.weight
        down, up = layer.adapter.factors()
        gain = layer.adapter.gain(weight, down, up)
        merged = weight + up @ down
        merged = merged if gain is None else gain[:, None] * merged
        y = x @ merged.mT
        return y if layer.bias is None else y + layer.bias

    x = torch.tanh(dense(model.first, x))
    x = torch.tanh(dense(model.conv, x))
    return model.head(torch.tanh(dense(model.bare, x)))


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def check_starts_as_the_base(spec, tmp_path):
    base, model = net(), dw.attach(net(), spec, targets=TARGETS).eval()
    torch.testing.assert_close(model(inputs()), base(inputs()), rtol=1e-12, atol=1e-12)


def check_the_start_is_not_a_dead_end(spec, tmp_path):
    model = dw.attach(net(), spec, targets=TARGETS).eval()
    assert any(grad.abs().max() > 1e-8 for key, grad in gradients(model, inputs()).items() if key != "x")


def check_outputs_and_gradients_against_dense_algebra(spec, tmp_path):
    model = moved(spec).eval()
    x = inputs()
    assert relative(model(x), explicit(model, x)) < 1e-9
    ours = gradients(model, x)
    x = x.clone().requires_grad_(True)
    parameters = trained(model)
    weights = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)).to(x.dtype)
    dense = torch.autograd.grad((explicit(model, x) * weights).sum(), [x, *parameters.values()])
    assert parameters
    for key, reference in zip(["x", *parameters], dense):
        assert relative(ours[key], reference) < 1e-9, key


def check_gradients_against_finite_differences(spec, tmp_path):
    """Sixth-order differences of the loss along a random direction of each tensor; with a detached norm the
    function that the gradient belongs to holds the norm fixed."""
    model = moved(spec).eval()
    if isinstance(spec, dw.DoRA) and spec.detach_norm:
        hold_norms(model)
    x = inputs()
    analytic = gradients(model, x)
    weights = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        for key, tensor in {"x": x, **trained(model)}.items():
            direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)).double()
            direction /= direction.norm()
            start = tensor.clone()

            def loss(t):
                tensor.copy_(start + t * direction)
                return (model(x) * weights).sum().item()

            h = 2e-3
            first, second, third = (loss(n * h) - loss(-n * h) for n in (1, 2, 3))
            numeric = (45 * first - 9 * second + third) / (60 * h)
            tensor.copy_(start)
            exact = (analytic[key] * direction).sum().item()
            assert abs(numeric - exact) <= 1e-9 * max(analytic[key].norm().item(), 1e-3), key


def hold_norms(model):
    for layer in adapted_layers(model).values():
        adapter = layer.adapter
        with torch.no_grad():
            norm = adapter.magnitude / adapter.gain(layer.weight, *adapter.factors())
        adapter.gain = lambda weight, down, up, adapter=adapter, norm=norm: adapter.magnitude / norm


def check_merging_changes_nothing(spec, tmp_path):
    model = moved(spec).eval()
    before = model(inputs())
    assert relative(before, net()(inputs())) > 1e-4
    dw.merge(model)
    torch.testing.assert_close(model(inputs()), before, rtol=1e-11, atol=1e-11)
    assert not trained(model)
    dw.unmerge(model)
    assert torch.equal(model(inputs()), before)
    dw.merge(model, permanently=True)
    torch.testing.assert_close(model(inputs()), before, rtol=1e-11, atol=1e-11)
    assert type(model.first) is nn.Linear and list(model.state_dict()) == list(net().state_dict())


def check_the_base_comes_back_bit_for_bit(spec, tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = net(dtype)
        modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
        dw.attach(model, spec, targets=TARGETS)
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter += 0.1 * torch.randn_like(parameter)
        dw.detach(dw.unmerge(dw.merge(model)))
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert all(module is modules[key] for key, module in model.named_modules())
        assert all(parameter.requires_grad for parameter in model.parameters())


def check_disabled_is_the_base(spec, tmp_path):
    model = moved(spec).eval()
    base, adapted = net()(inputs()), model(inputs())
    for prepare in (lambda: None, lambda: dw.merge(model)):
        prepare()
        with dw.disabled(model):
            assert torch.equal(model(inputs()), base)
        torch.testing.assert_close(model(inputs()), adapted, rtol=1e-11, atol=1e-11)


def check_several_adapters_by_name(spec, tmp_path):
    model = moved(spec).eval()
    first = model(inputs())
    dw.attach(model, dw.LoRA(rank=2), targets=["conv"], name="second")
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.1
    second = model(inputs())
    assert relative(first, second) > 1e-4
    assert torch.equal(dw.use(model, "default")(inputs()), first)
    assert torch.equal(dw.use(model, "second")(inputs()), second)
    dw.detach(model, "second")
    assert torch.equal(model(inputs()), first)


def check_save_and_load(spec, tmp_path):
    model = moved(spec, torch.float32, train_also=["head"]).eval()
    dw.save(model, tmp_path)
    loaded = dw.load(net(torch.float32), tmp_path).eval()
    assert torch.equal(loaded(inputs(torch.float32)), model(inputs(torch.float32)))
    ours, theirs = gradients(model, inputs(torch.float32)), gradients(loaded, inputs(torch.float32))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def check_conversion_is_exact_or_refused(spec, tmp_path):
    model = moved(spec, torch.float32).eval()
    before = model(inputs(torch.float32))
    if isinstance(spec, dw.DoRA):
        with pytest.raises(ValueError, match=r"best LoRA of rank \d+ would miss"):
            dw.convert(model, dw.LoRA)
        with pytest.raises(ValueError, match="no LoRA does exactly"):
            dw.save(model, tmp_path / "lora", as_lora=True)
        assert torch.equal(model(inputs(torch.float32)), before) and not (tmp_path / "lora").exists()
        return
    dw.save(model, tmp_path / "lora", as_lora=True)
    for lora in (dw.load(net(torch.float32), tmp_path / "lora"), dw.convert(model, dw.LoRA)):
        assert relative(lora.eval()(inputs(torch.float32)), before) < 1e-5
        dw.save(lora, tmp_path / "again")
        assert (tmp_path / "again" / "adapter_config.json").exists()


def check_parameters_keep_their_precision(spec, tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = moved(spec, dtype)
        assert all(parameter.dtype == torch.float32 for parameter in trained(model).values())
        assert model(inputs(dtype)).dtype == dtype
    assert all(parameter.dtype == torch.float64 for parameter in trained(moved(spec)).values())


def check_the_same_seed_gives_the_same_start(spec, tmp_path):
    starts = [dw.attach(net(), spec, targets=TARGETS, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(tensor, starts[1][key]) for key, tensor in starts[0].items())


def check_count(spec, tmp_path):
    model = dw.attach(net(), spec, targets=TARGETS, train_also=["head"])
    table = dw.count(model)
    assert table.loc["(total)", "trainable"] == sum(p.numel() for p in trained(model).values())
    assert table.loc["(total)", "frozen"] == sum(p.numel() for p in net().parameters())
    assert set(TARGETS) | {"head"} < set(table.index)
    dw.detach(model)
    assert dw.count(model).loc["(total)", "trainable"] == sum(p.numel() for p in net().parameters())


class Factors(nn.Module):
    """`functional_call` calls `forward`: here it gives the factors and the gain."""

    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, weight):
        down, up = self.adapter.factors()
        return down, up, self.adapter.gain(weight, down, up)


def stacked(adapter, parameters, buffers, weight):
    state = {f"adapter.{key}": tensor for key, tensor in {**parameters, **buffers}.items()}
    return functional_call(Factors(adapter), state, (weight,))


def check_adapters_stack(spec, tmp_path):
    """K adapters with a leading axis on every tensor compute what each computes alone, gradients too."""
    models = [moved(spec, seed=seed).eval() for seed in (0, 1, 2)]
    for key in TARGETS:
        layers = [adapted_layers(model)[key] for model in models]
        adapters = [layer.adapter for layer in layers]
        parameters, buffers = stack_module_state(adapters)
        weight, bias = layers[0].weight, layers[0].bias
        x = torch.randn(3 * 5, 7, weight.shape[1], dtype=torch.float64, requires_grad=True)
        down, up, gain = stacked(adapters[0], parameters, buffers, weight)
        y = dw.adapted_linear(x, weight, bias, down, up, gain)
        alone = torch.cat([layer(part) for layer, part in zip(layers, x.chunk(3))])
        assert relative(y, alone) < 1e-12
        weights = torch.randn_like(y)
        (grad,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
        (reference,) = torch.autograd.grad((alone * weights).sum(), x, retain_graph=True)
        assert relative(grad, reference) < 1e-12
        together = torch.autograd.grad((y * weights).sum(), list(parameters.values()))
        for k, adapter in enumerate(adapters):
            names = dict(adapter.named_parameters())
            single = torch.autograd.grad((alone * weights).sum(), [names[n] for n in parameters], retain_graph=True)
            for name, a, b in zip(parameters, together, single):
                assert relative(a[k], b) < 1e-12, name


def check_it_trains_under_autocast(spec, tmp_path):
    model = moved(spec, torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(inputs(torch.float32))
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    for key, parameter in trained(model).items():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), key


CHECKS = [check for name, check in list(globals().items()) if name.startswith("check_")]
