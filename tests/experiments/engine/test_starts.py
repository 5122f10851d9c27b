"""A start that is remembered is the start."""

import pytest
import torch

import deltaw as dw
from deltaw.adapters import inits, lora_xs
from deltaw.experiments.engine.starts import Once
from deltaw.tasks import digits


def factors(spec, model):
    dw.attach(model, spec, seed=1)
    return [adapted.adapters["default"].state_dict() for adapted in (model.hidden1, model.hidden2)]


@pytest.mark.parametrize(("given", "once"), [
    (dw.LoRA(4, init="pissa"), lambda init: dw.LoRA(4, init=init)), (dw.LoRAXS(4), lambda init: dw.LoRAXS(4, init=init))])
def test_it_is_computed_once_for_each_weight_and_nobody_can_change_it(given, once, monkeypatch):
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: calls.append(1) or svd(*args, **options))
    init = Once(inits.pissa if isinstance(given, dw.LoRA) else lora_xs.svd)
    task = digits(base_steps=2)
    expected = factors(given, task.model())
    calls.clear()
    for _ in range(3):
        found = factors(once(init), task.model())
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        with torch.no_grad():
            found[0]["A"].zero_()
    assert len(calls) == 3  # layers
    other = task.model()
    with torch.no_grad():
        other.hidden1.weight.mul_(2)
    assert not torch.equal(factors(once(init), other)[0]["B"], expected[0]["B"]) and len(calls) == 4
