"""MoSLoRA's own mixers: two subspaces, Kaiming, identity, and what a mixer can express.

In the paper's notation ΔW = A W B; the library's M is Wᵀ.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from . import claim, require
from .measure import largest
from .two_forms import RANK, RULES, run, start_of_a

STEPS = 100


@claim("moslora-two-subspace-rank", "Mixing two subspaces, x (A₁ + A₂)(B₁ + B₂), halves the rank of ΔW.",
       "this book, of MoSLoRA's two-subspace mixer", "holds", "proved")  # fmt: skip
def two_subspace_rank() -> dict[str, Any]:
    """The mixer [[1, 1], [1, 1]] has rank r / 2, and so has the product."""
    import deltaw as dw

    g = torch.Generator().manual_seed(0)
    model = dw.attach(nn.Sequential(nn.Linear(12, 10, dtype=torch.float64)), dw.MoSLoRA(6, mixer="two-subspace"))
    with torch.no_grad():
        model[0].adapter.B.normal_(generator=g)
    ranks = {"the mixer": int(torch.linalg.matrix_rank(model[0].adapter.M.detach())),
             "ΔW": int(torch.linalg.matrix_rank(model[0].delta_weight(), rtol=1e-10))}  # fmt: skip
    require(set(ranks.values()) == {3}, f"at r = 6 the ranks are {ranks}")
    return {"r": 6, **ranks}


@claim("moslora-two-subspace-rate", "The fixed two-subspace mixer is LoRA of rank r / 2, from A₁ + A₂, at twice the learning rate.",
       "this book", "holds", "measured at this scale")  # fmt: skip
def two_subspace_rate() -> dict[str, Any]:
    """Both halves get the same gradient, so they take the same step, and what counts is their sum. Under SGD, with
    momentum, and under element-wise optimizers; under Muon the two halves share one norm, and it is not so."""
    import deltaw as dw

    makers = {"SGD": partial(torch.optim.SGD), "momentum": partial(torch.optim.SGD, momentum=0.9),
              "Adam": partial(torch.optim.Adam), "RMSprop": partial(torch.optim.RMSprop)}  # fmt: skip
    rates = {"SGD": 0.005, "momentum": 0.001, "Adam": 0.005, "RMSprop": 0.002}
    found, start = {}, start_of_a()
    summed = start[: RANK // 2] + start[RANK // 2 :]  # (r / 2, in)
    for name, make in makers.items():
        mixed = run(dw.MoSLoRA(RANK, mixer="two-subspace", train_mixer=False), partial(make, lr=rates[name]), STEPS, A=start)
        half = run(dw.LoRA(RANK // 2), partial(make, lr=2 * rates[name]), STEPS, A=summed)
        found[name] = largest(mixed.products, half.products)
        require(mixed.losses[-1] < mixed.losses[0], f"{name} does not learn")
    require(max(found.values()) < 1e-9, f"apart: {found}")
    muon = RULES["Muon"]
    mixed = run(dw.MoSLoRA(RANK, mixer="two-subspace", train_mixer=False), muon.make, STEPS, A=start)
    half = run(dw.LoRA(RANK // 2), partial(muon.make.func, lr=2 * muon.make.keywords["lr"]), STEPS, A=summed)
    require(largest(mixed.products, half.products) > 1e-2, "Muon does not tell them apart")
    return found


@claim("moslora-expressivity", "A learned mixer adds no expressivity: every ΔW it reaches is one of LoRA's at the same rank.",
       "this book, of MoSLoRA, equation 2", "holds", "proved")  # fmt: skip
def no_expressivity() -> dict[str, Any]:
    """B M is just another B: conversion to LoRA changes no output, and the identity mixer is the way back."""
    import deltaw as dw

    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 12, generator=g, dtype=torch.float64)  # (n, in)
    model = dw.attach(nn.Sequential(nn.Linear(12, 10, dtype=torch.float64)), dw.MoSLoRA(RANK))
    with torch.no_grad():
        for parameter in model[0].adapter.parameters():
            parameter.normal_(generator=g)
        before = model(x)
        dw.convert(model, dw.LoRA)
        after = model(x)
        back = dw.attach(nn.Sequential(nn.Linear(12, 10, dtype=torch.float64)), dw.MoSLoRA(RANK, mixer="identity"))
        back[0].base.load_state_dict(model[0].base.state_dict())
        for name in "AB":
            getattr(back[0].adapter, name).copy_(getattr(model[0].adapter, name))
        again = back(x)
    worst = max((after - before).abs().max().item(), (again - before).abs().max().item())
    require(worst < 1e-12, f"the outputs differ by {worst:.1e}")
    return {"largest difference of an output": worst}


@claim("moslora-kaiming-slow", "At one learning rate the Kaiming mixer's first step is shorter than LoRA's: B's gradient by 1/√3, ΔW by √2/3 "
       "under SGD and by √((1 + 2/π)/3) under sign-like steps, for large r.", "this book, of MoSLoRA's official code", "holds",
       "measured at this scale")  # fmt: skip
def kaiming_slow() -> dict[str, Any]:
    """From B = 0 the first ΔW is −η A W (Wᵀ Aᵀ Δ), or with the sign of the bracket. An orthogonal W changes the gradient's
    norm not at all. Ratios to LoRA, averaged over 200 draws at r = 16."""
    import deltaw as dw

    g = torch.Generator().manual_seed(0)
    r, layer = 16, dw.Layer("layer", torch.empty(256, 256))
    ratios = {"kaiming": [], "orthogonal": []}
    for _ in range(200):
        a = dw.LoRA(r).build({"layer": layer}, g)["layer"].A.detach().mT  # (in, r)
        delta = torch.randn(256, 256, generator=g)  # (in, out)
        plain = a.mT @ delta  # (r, out), LoRA's gradient of B
        for mixer, rows in ratios.items():
            w = dw.MoSLoRA(r, mixer=mixer).build({"layer": layer}, g)["layer"].M.detach().mT  # (r, r)
            gradient = w.mT @ plain  # (r, out)
            rows.append([(gradient.norm() / plain.norm()).item(),
                         ((a @ w @ gradient).norm() / (a @ plain).norm()).item(),
                         ((a @ w @ gradient.sign()).norm() / (a @ plain.sign()).norm()).item()])  # fmt: skip
    means = {mixer: torch.tensor(rows).mean(0).tolist() for mixer, rows in ratios.items()}
    gradient, sgd, sign = means["kaiming"]
    require(abs(gradient - 3**-0.5) < 0.03, f"B's first gradient is {gradient:.3f} of LoRA's")
    expected = 2**0.5 / 3, ((1 + 2 / math.pi) / 3) ** 0.5
    require(abs(sgd - expected[0]) < 0.04 and abs(sign - expected[1]) < 0.04, f"the first ΔW is {sgd:.2f} and {sign:.2f} of LoRA's")
    require(all(abs(value - 1) < 0.03 for value in means["orthogonal"]), f"the orthogonal mixer's ratios are {means['orthogonal']}")
    return {"gradient of B": gradient, "first ΔW, SGD": sgd, "first ΔW, sign": sign}


@claim("moslora-identity", "With a fixed identity mixer MoSLoRA is LoRA.", "MoSLoRA, section 3", "holds", "measured at this scale")  # fmt: skip
def identity_is_lora() -> dict[str, Any]:
    """Under every optimizer, for 20 steps."""
    import deltaw as dw

    found = {}
    for name, rule in RULES.items():
        mixed = run(dw.MoSLoRA(RANK, mixer="identity", train_mixer=False), rule.make, 20, rule.clip, A=start_of_a())
        plain = run(dw.LoRA(RANK), rule.make, 20, rule.clip, A=start_of_a())
        found[name] = largest(mixed.products, plain.products)
    require(max(found.values()) < 1e-12, f"apart: {found}")
    return {"largest distance": max(found.values())}


@claim("moslora-layout", "In the official layout, a linear layer lora_AB between lora_A and lora_B, the mixer's weight is Wᵀ.",
       "this book, of MoSLoRA's official code", "holds", "proved")  # fmt: skip
def official_layout() -> dict[str, Any]:
    """Three linear layers in a row, against the paper's x A W B and the library's M."""
    import deltaw as dw

    g = torch.Generator().manual_seed(0)
    lora_a, lora_ab, lora_b = (nn.Linear(i, o, bias=False, dtype=torch.float64) for i, o in ((12, 4), (4, 4), (4, 10)))
    x = torch.randn(7, 12, generator=g, dtype=torch.float64)  # (n, in)
    by_layers = lora_b(lora_ab(lora_a(x)))  # (n, out)
    a, w, b = (layer.weight.mT for layer in (lora_a, lora_ab, lora_b))  # the paper's A, W, B
    model = dw.attach(nn.Sequential(nn.Linear(12, 10, dtype=torch.float64)), dw.MoSLoRA(4))
    with torch.no_grad():
        for name, layer in (("A", lora_a), ("M", lora_ab), ("B", lora_b)):
            getattr(model[0].adapter, name).copy_(layer.weight)
        by_library = model(x) - model[0].base(x)
    worst = max((by_layers - x @ a @ w @ b).abs().max().item(), (by_layers - by_library).abs().max().item())
    transposed = (by_layers - x @ a @ w.mT @ b).abs().max().item()
    require(worst < 1e-12 and transposed > 1e-3, f"{worst:.1e}; with W for Wᵀ {transposed:.1e}")
    return {"largest difference": worst, "with W in its place": transposed}

