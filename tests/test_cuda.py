"""What only a GPU can show; skipped where there is none."""

from dataclasses import replace

import pytest
import torch
from contract import Net, explicit, inputs, moved, relative, trained
from test_bank import RECIPE, Toy
from test_bank import SPECS as BANK_SPECS
from test_contract import SPECS

import deltaw as dw
from deltaw.linear import adapted_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_outputs_and_gradients_are_the_cpus(spec):
    model = moved(spec).eval()
    parameters = trained(model)
    expected = torch.autograd.grad(explicit(model, inputs()).square().sum(), list(parameters.values()))
    model.cuda()
    y = model(inputs().cuda())
    assert relative(y.cpu(), explicit(moved(spec).eval(), inputs())) < 1e-9
    for ours, reference in zip(torch.autograd.grad(y.square().sum(), list(trained(model).values())), expected):
        assert relative(ours.cpu(), reference) < 1e-9


@pytest.mark.parametrize("spec", [dw.LoRA(8, dropout=0.1), dw.DoRA(dw.LoRA(8)), dw.VeRA(64)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_with_and_without_autocast(spec, dtype):
    torch.manual_seed(0)
    model = dw.attach(Net().to("cuda", dtype), spec, targets=["first", "conv", "bare"]).train()
    x = torch.randn(8, 12, device="cuda", dtype=dtype)
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().sum()
        loss.backward()
        for parameter in trained(model).values():
            assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("slots", [(), (3,)])
def test_bf16_factor_gradients_are_not_rounded_to_bf16(slots, gain):
    g = torch.Generator("cuda").manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device="cuda", generator=g)
    x, weight = make(96, 64).bfloat16(), make(128, 64).bfloat16()
    down, up = make(*slots, 8, 64).requires_grad_(), make(*slots, 128, 8).requires_grad_()
    gain = (1 + 0.1 * make(*slots, 128)).requires_grad_() if gain else None
    y = adapted_linear(x, weight, None, down, up, gain)
    y.backward(make(*y.shape).bfloat16())
    for factor in (down, up):
        assert factor.grad.dtype == torch.float32
        assert (factor.grad != factor.grad.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("spec", [dw.LoRA(8), dw.LoRA(8, dropout=0.1), dw.DoRA(dw.LoRA(8)), dw.VeRA(64)], ids=str)
def test_inductor_compiles_it_whole(spec):
    torch.manual_seed(0)
    model = dw.attach(torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 32)).cuda(), spec)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    x = torch.randn(32, 64, device="cuda")
    results = []
    for run in (torch.compile(model, fullgraph=True), model):
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), list(trained(model).values()))])
    for compiled, eager in zip(*results):
        assert eager.abs().max() > 0
        if not spec.to_dict({}).get("dropout"):
            assert relative(compiled.double(), eager.double()) < 2e-2
        else:
            assert 0.5 < compiled.norm() / eager.norm() < 2


def test_merging_and_files_on_the_gpu(tmp_path):
    model = moved(dw.DoRA(dw.LoRA(4)), torch.bfloat16).cuda().eval()
    state = {key: tensor.clone() for key, tensor in Net().cuda().bfloat16().state_dict().items()}
    dw.save(model, tmp_path)
    loaded = dw.load(Net().cuda().bfloat16(), tmp_path)
    assert all(parameter.is_cuda for parameter in loaded.parameters())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    dw.unmerge(dw.merge(model))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert state.keys() == dw.detach(model).state_dict().keys()


@pytest.mark.parametrize("options", [{}, {"slots_at_once": 4}, {"halving": dw.Halving((9, 18))}], ids=str)
def test_a_banks_cuda_graph_is_the_eager_bank(options):
    slots = [(spec, replace(RECIPE, seed=seed, learning_rate=rate))
             for spec, seed, rate in zip(BANK_SPECS.values(), range(20), [1e-3, 3e-3] * 10)]
    eager, replayed = (dw.Bank(Toy().model(), slots).fit(Toy(), progress=False, cuda_graph=graph, **options)
                       for graph in (False, True))
    for one, other in zip(eager, replayed, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-9) and one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-9)


def test_a_banks_slot_that_diverges_under_a_cuda_graph_leaves_the_others_alone():
    slots = [(dw.LoRA(4), replace(RECIPE, optimizer="sgd", learning_rate=rate)) for rate in (1e-2, 1e30, 1e-2)]
    first, stopped, last = dw.Bank(Toy().model(), slots).fit(Toy(), progress=False, cuda_graph=True)
    assert stopped.stopped and not first.stopped and first.loss == last.loss and len(first.loss) == RECIPE.steps
