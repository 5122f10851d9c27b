"""In bf16 the errors of outputs and gradients, against float64, are no larger than PEFT's on the same weights."""

import peft
import pytest
import torch
from torch import nn

import deltaw as dw

OPTIONS = {"r": 8, "lora_alpha": 16, "target_modules": ["linear"]}
FAMILIES = {
    "LoRA": (dw.LoRA(8, 16), peft.LoraConfig(**OPTIONS)),
    "DoRA": (dw.DoRA(dw.LoRA(8, 16)), peft.LoraConfig(**OPTIONS, use_dora=True)),
    "VeRA": (dw.VeRA(64), peft.VeraConfig(r=64, target_modules=["linear"])),
}
OURS = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude", "vera_lambda_b": "b", "vera_lambda_d": "d"}


class One(nn.Module):
    """One layer of bf16 weights, held in `dtype`."""

    def __init__(self, seed, dtype):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(96, 128, bias=False).bfloat16().to(dtype)

    def forward(self, x):
        return self.linear(x)


def trained(model):
    """Parameters by the last part of their names that means something here and in PEFT."""
    found = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = next(part for part in reversed(key.split(".")) if part in OURS or part in OURS.values())
            found[OURS.get(name, name)] = parameter
    return found


def run(model, x, weights, autocast):
    x = x.clone().requires_grad_(True)
    parameters = trained(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    grads = torch.autograd.grad((y * weights.to(y.dtype)).sum(), [x, *parameters.values()])
    return {"y": y.detach(), "x": grads[0], **dict(zip(parameters, grads[1:]))}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_no_less_exact_than_peft(family):
    spec, config = FAMILIES[family]
    squares = {}
    for seed in range(40):
        reference = dw.attach(One(seed, torch.float64), spec)
        ours, theirs = dw.attach(One(seed, torch.bfloat16), spec), peft.get_peft_model(One(seed, torch.bfloat16), config)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in sorted(trained(reference).items()):
                parameter.copy_((parameter + 0.05 * torch.randn(parameter.shape, generator=g)).float())  # the same in each
                trained(ours)[key].copy_(parameter), trained(theirs)[key].copy_(parameter)
        x, weights = torch.randn(64, 96, generator=g).bfloat16(), torch.randn(64, 128, generator=g).bfloat16()
        exact = run(reference, x.double(), weights, False)
        for name, result in (("ours", run(ours, x, weights, True)), ("PEFT's", run(theirs, x, weights, True))):
            for key, tensor in result.items():
                error = ((tensor.double() - exact[key]).norm() / exact[key].norm()).item()
                squares.setdefault(key, {}).setdefault(name, []).append(error**2)
    for key, of in squares.items():
        ours, theirs = ((sum(of[name]) / len(of[name])) ** 0.5 for name in ("ours", "PEFT's"))
        print(f"{family} {key}: ours {ours:.2e}, PEFT's {theirs:.2e}, ratio {ours / theirs:.3f}")
        assert ours <= 1.01 * theirs, key  # one hundredth: the spread over the seeds
