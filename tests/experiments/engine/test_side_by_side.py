"""A row is the run it would be alone, whatever its optimizer and its neighbours' are."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import deltaw as dw
from deltaw.adapters import MoSLoRA
from deltaw.claims import measure, two_forms
from deltaw.experiments.engine.merged_runs import HEAD_RATE, MIXERS, OPTIMIZERS, orthogonal, signed_permutation, slot
from deltaw.experiments.engine.side_by_side import Heads, Muon, SideBySide, clip_by_norm, clip_by_value
from deltaw.tasks import digits

LAYERS, RANK, STEPS = ("hidden1", "hidden2"), 4, 4
NORM, VALUE = 0.05, 1e-3  # at which clipping acts on the digits


@pytest.fixture(scope="module")
def task():
    return digits(angle=90)


def start(seed):
    """A, M and B of each layer, B not zero, so that all factors move at once."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return {f"{name}.adapters.default.{factor}": value for name, width in zip(LAYERS, (64, 128))
            for factor, value in (("A", draw(RANK, width) / 8), ("M", orthogonal(RANK, g, None)), ("B", draw(128, RANK) / 9))}


def model(task):
    return task.model().double()


def side_by_side(task, slots):
    net = model(task)
    head = {f"classifier.{name}": tensor.detach() for name, tensor in net.classifier.named_parameters()}
    net.classifier = Heads(net.classifier)
    return SideBySide(dw.attach(net, MoSLoRA(RANK), targets=LAYERS), slots, head, HEAD_RATE, "cpu")


def clips(name):
    return {"SGD, norm clip": clip_by_norm(NORM), "SGD, value clip": clip_by_value(VALUE)}.get(name)


@pytest.fixture(scope="module")
def together(task):
    """Every optimizer, fixed and trained, and a run that is lost at once: the losses `(steps, K)`, and the runs after them."""
    slots = [replace(slot((name, trained), name, OPTIMIZERS[name].rate / 10, start(i), trained), clip=clips(name))
             for i, name in enumerate(OPTIMIZERS) for trained in (False, True)]
    slots.insert(3, slot(("lost",), "SGD", 1e200, start(0)))
    side = side_by_side(task, slots)
    batches = task.batches(0, 8)
    return SimpleNamespace(losses=torch.stack([side.step(task, next(batches)) for _ in range(STEPS)]), side=side)


@pytest.mark.parametrize("trained", (False, True))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_is_its_run_alone(task, together, name, trained):
    net = dw.attach(model(task), MoSLoRA(RANK, train_mixer=trained), targets=LAYERS, train_also=["classifier"])
    adapters = [getattr(net, layer).adapter for layer in LAYERS]
    with torch.no_grad():
        for key, value in start(list(OPTIMIZERS).index(name)).items():
            layer, _, _, factor = key.split(".")
            getattr(getattr(net, layer).adapter, factor).copy_(value)
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    rate = OPTIMIZERS[name].rate / 10
    make = two_forms.Muon if name == "Muon" else two_forms.RULES[name].make
    optimizer = make(parameters, lr=rate, **dict(OPTIMIZERS[name].options))
    head = torch.optim.Adam(net.classifier.current.parameters(), lr=HEAD_RATE)
    batches, losses = task.batches(0, 8), []
    for _ in range(STEPS):
        loss = task.losses(net, next(batches)).mean()
        loss.backward()
        before = nn.utils.get_total_norm([p.grad for p in parameters])
        if name == "SGD, norm clip":
            assert before > NORM
            nn.utils.clip_grad_norm_(parameters, NORM)
        elif name == "SGD, value clip":
            nn.utils.clip_grad_value_(parameters, VALUE)
        for each in (optimizer, head):
            each.step()
            each.zero_grad()
        losses.append(loss.item())
    place = together.side.places[name, trained]
    assert together.losses[:, place].tolist() == pytest.approx(losses, rel=1e-10)
    for product, layer in zip(together.side.products(), LAYERS):
        assert measure.apart(product[place], getattr(net, layer).delta_weight()) < 1e-9
    assert (together.side.clipped()[place] > 0) == ("clip" in name)


def test_distances_are_of_all_layers_together(together):
    products = [product[[0, 4]] for product in together.side.products()]
    whole = torch.cat([product.flatten(1) for product in products], dim=1)  # (2, P)
    (apart, none), (size, same) = together.side.distances([0, 4], [4, 4])
    assert none == 0 and size == pytest.approx(whole[0].norm().item()) and same == pytest.approx(whole[1].norm().item())
    assert apart == pytest.approx(((whole[0] - whole[1]).norm() / whole[0].norm()).item())


def test_a_fixed_mixer_stays_and_a_trained_one_moves(together):
    numbers, names = together.side.numbers(), list(OPTIMIZERS)
    for name, trained in (name for name in together.side.places if len(name) == 2):
        place = together.side.places[name, trained]
        for key, value in start(names.index(name)).items():
            if key.endswith(".M"):
                assert torch.equal(numbers[key][place], value) != trained


def test_names_have_to_differ(task):
    with pytest.raises(ValueError, match="names must differ"):
        side_by_side(task, [slot(("SGD",), "SGD", 0.1, start(i)) for i in range(2)])


def test_a_run_that_is_lost_harms_no_other(together):
    lost = together.side.places["lost",]
    fine = together.losses.isfinite().all(dim=0)  # (K,)
    assert lost == 3 and not fine[lost] and fine.sum() == 24


def test_clipping_is_torch_s_row_by_row():
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.01], [100.0]])
    by_norm, by_value = rows.clone(), rows.clone()
    assert clip_by_norm(1.0)(by_norm).tolist() == [1, 0, 1]
    shares = clip_by_value(0.5)(by_value)
    for row, norm, value, share in zip(rows, by_norm, by_value, shares):
        one, other = (nn.Parameter(row.clone()) for _ in range(2))
        one.grad, other.grad = row.clone(), row.clone()
        nn.utils.clip_grad_norm_([one], 1.0)
        nn.utils.clip_grad_value_([other], 0.5)
        torch.testing.assert_close(norm, one.grad)
        torch.testing.assert_close(value, other.grad)
        assert share == pytest.approx((row.abs() > 0.5).float().mean().item())


def test_muon_takes_matrices_of_several_shapes():
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 9), (9, 4), (4, 9), (3, 3)]
    rows = nn.Parameter(torch.randn(2, 2 * 36 + 36 + 9, generator=g, dtype=torch.float64))
    alone = [[nn.Parameter(part.reshape(shape).clone()) for part, shape in zip(row.split([36, 36, 36, 9]), shapes)]
             for row in rows.detach()]
    optimizers = [Muon(rows, shapes, lr=0.1), *(two_forms.Muon(matrices, lr=0.1) for matrices in alone)]
    for _ in range(3):
        rows.grad = torch.randn(rows.shape, generator=g, dtype=torch.float64)
        for row, matrices in zip(rows.grad, alone):
            for matrix, part in zip(matrices, row.split([36, 36, 36, 9])):
                matrix.grad = part.reshape(matrix.shape).clone()
        for optimizer in optimizers:
            optimizer.step()
    for row, matrices in zip(rows, alone):
        torch.testing.assert_close(row, torch.cat([matrix.flatten() for matrix in matrices]))


def test_the_mixers_are_what_they_are_called():
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        p, q = signed_permutation(8, g, None).double(), orthogonal(8, g, None)
        assert two_forms.is_signed_permutation(p) and two_forms.is_orthogonal(q) and not two_forms.is_signed_permutation(q)
    assert set(OPTIMIZERS) == set(two_forms.RULES) and len(MIXERS) == 3
