"""Steps in rounds: turns and counts; what is compiled for one arm is not undone by another; ratios within a round."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.experiments.engine import step
from deltaw.experiments.engine.step import BASE, SHAPES, costs, ours, own_code, theirs

SMALL = [SHAPES["small bert"], SHAPES["small llama"]]
ARMS = {BASE: lambda model, shape: model, "LoRA": ours(dw.LoRA),
        "PEFT": theirs(lambda peft, shape: peft.LoraConfig(r=shape.rank, target_modules=shape.targets))}


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.family)
def test_a_row_is_an_arm_s_round_with_what_it_trains(shape):
    rows = costs(ARMS, shape, compiled=False, rounds=2, steps=1, device="cpu")
    assert [(row["arm"], row["round"]) for row in rows] == [(arm, r) for arm in ARMS for r in range(2)]
    assert all(row["ms"] > 0 and row["graphs"] == 0 for row in rows)
    assert all(math.isnan(row[name]) for row in rows for name in ("kept_gib", "peak_gib"))
    widths = {"bert": 4 * (48 + 48) + 2 * (48 + 96), "llama": 3 * (48 + 48) + 2 * (48 + 96)}[shape.family]
    tensors = {"bert": 12, "llama": 10}[shape.family]
    for row in rows:
        expected = 0 if row["arm"] == BASE else 4 * widths
        assert row["parameters"] == expected  # and two moments, and the count of steps, in fp32
        assert row["optimizer_bytes"] == (0 if row["arm"] == BASE else 8 * expected + 4 * tensors)


def test_arms_take_turns_and_another_is_first_each_time(monkeypatch):
    ran = []
    monkeypatch.setattr(step, "_arm", lambda name, *_: (lambda: ran.append(name), {}))
    costs(ARMS, SMALL[0], compiled=False, rounds=2, steps=2, device="cpu")
    assert ran == [BASE, BASE, "LoRA", "LoRA", "PEFT", "PEFT", "LoRA", "LoRA", "PEFT", "PEFT", BASE, BASE]


def test_an_arm_without_a_gradient_has_no_backward_pass(monkeypatch):
    class Forward(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        @torch.no_grad()
        def forward(self, **inputs):
            return self.model(**inputs)

    ran, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: ran.append(1) or backward(self))
    for build, expected in ((lambda model, shape: Forward(model), 0), (ARMS[BASE], step.WARM_UP + 1)):
        ran.clear()
        (row,) = costs({"arm": build}, SMALL[0], compiled=False, rounds=1, steps=1, device="cpu")
        assert len(ran) == expected and row["ms"] > 0 and row["parameters"] == 0


def test_a_graph_that_breaks_does_not_break_the_others():
    """Three functions from one place, of which the last cannot be compiled whole."""
    ran = []

    def backend(graph, inputs):
        return lambda *args: ran.append(1) or graph(*args)

    def outer(inner):
        def call(x):
            try:  # where a graph that breaks inside is given up
                return inner(x)
            except KeyError:  # noqa: TRY203
                raise

        return call

    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    functions = {"whole, 1": torch.sin, "whole, 2": torch.cos, "broken": broken}
    made = {name: own_code(outer(inner), name) for name, inner in functions.items()}
    x = torch.ones(3, requires_grad=True)
    compiled = {name: torch.compile(function, backend=backend, dynamic=False) for name, function in made.items()}
    for run in compiled.values():
        run(x)
    graphs = step._graphs()
    for name, inner in functions.items():
        ran.clear()
        assert compiled[name](x).tolist() == inner(x).tolist()
        assert len(ran) == (2 if name == "broken" else 1), name
    assert step._graphs() == graphs > 0


# ---------------------------------------------------------------------------------------------------------------------
# The analysis, on a table of our own making


def rows(**columns):
    """Two shapes of two arms, three rounds; in the last round of the first shape something was compiled."""
    return pd.DataFrame([
        {"shape": shape, "compiled": True, "arm": arm, "round": i, "ms": ms * (1 + i), "graphs": int((shape, i) == ("a", 2)),
         **{name: values[arm] for name, values in columns.items()}}
        for shape, times in (("a", {BASE: 10, "LoRA": 12}), ("b", {BASE: 1, "LoRA": 3}))
        for arm, ms in times.items() for i in range(3)])


def test_a_ratio_is_taken_within_a_round():
    gib = {"kept_gib": {BASE: 1.0, "LoRA": 1.5}, "peak_gib": {BASE: 2.0, "LoRA": 2.25}}
    found = step.cost(rows(**gib)).set_index(["shape", "arm"])
    assert found["ratio"].tolist() == found["least"].tolist() == found["largest"].tolist() == pytest.approx([1, 1.2, 1, 3])
    assert found["ms"].tolist() == [15, 18, 2, 6] and found["above_base_gib"].tolist() == [0, 0.25] * 2
    assert found["compiled"].tolist() == [True] * 4 and "parameters" not in found


def test_counts_stay_whole_numbers():
    gib = {"kept_gib": {BASE: 1.0, "LoRA": 1.5}, "peak_gib": {BASE: 2.0, "LoRA": 2.25}}
    counts = {"parameters": {BASE: 0, "LoRA": 2**24 + 1}, "optimizer_bytes": {BASE: 0, "LoRA": 2**54 + 1}}
    found = step.cost(rows(**counts, **gib))
    assert found["parameters"].tolist() == [0, 2**24 + 1] * 2 and found["optimizer_bytes"].tolist() == [0, 2**54 + 1] * 2
