"""VeRA: projections that PEFT draws alike, that all layers share, and their scale."""

import copy
import math
import pickle

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from torch import nn

import deltaw as dw
from deltaw.adapters import Layer

SHAPES = {"wide": (10, 30), "tall": (40, 12), "small": (8, 6)}  # the largest out and in are of different layers


def built(spec, dtype=torch.float32, device="cpu", **shapes):
    layers = {key: Layer(key, torch.zeros(shape, dtype=dtype, device=device)) for key, shape in (shapes or SHAPES).items()}
    return spec.build(layers, torch.Generator())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def storages(adapters):
    return {tensor.untyped_storage().data_ptr() for adapter in adapters for tensor in (adapter.projection.A, adapter.projection.B)}


@pytest.mark.parametrize("seed", [0, 7])
def test_the_projections_are_pefts_for_the_same_seed(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = _kaiming_init((16, 30), generator), _kaiming_init((40, 16), generator)
    for name, adapter in built(dw.VeRA(16, projection_seed=seed)).items():
        out, in_ = SHAPES[name]
        adapter.b.data.fill_(1), adapter.d.data.fill_(1)
        down, up = adapter.factors()
        assert torch.equal(down, a[:, :in_]) and torch.equal(up, b[:out])


def test_the_seed_of_attach_changes_nothing():
    projections = [dw.attach(net(), dw.VeRA(16), seed=seed)[0].adapter.projection.A for seed in (0, 1)]
    assert torch.equal(*projections)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_formula(dtype):
    """ΔW = diag(b) B diag(d) A, with b zero and d constant at the start; d_init in the parameters' precision."""
    for adapter in built(dw.VeRA(16, d_init=0.1), dtype).values():
        assert not adapter.b.any() and torch.equal(adapter.d, torch.full((16,), 0.1, dtype=dtype))
        adapter.b.data.normal_(), adapter.d.data.normal_()
        a, b = adapter.projection.A[:, : adapter.in_features], adapter.projection.B[: adapter.out_features]
        down, up = adapter.factors()
        torch.testing.assert_close(up @ down, adapter.b.diag() @ b @ adapter.d.diag() @ a)


def test_it_trains_r_plus_out_numbers_a_layer():
    for name, adapter in built(dw.VeRA(16)).items():
        assert sum(p.numel() for p in adapter.parameters()) == 16 + SHAPES[name][0]
        assert set(adapter.state_dict()) == {"b", "d"}  # the seed gives A and B back


def test_all_layers_share_one_a_and_one_b():
    model = dw.attach(net(), dw.VeRA(16))

    def shared(model):
        return len(storages(layer.adapter for layer in dw.adapted_layers(model).values()))

    assert shared(model) == 2
    assert shared(copy.deepcopy(model)) == 2
    assert shared(pickle.loads(pickle.dumps(model))) == 2
    assert shared(model.to(torch.float64)) == 2 and model[0].adapter.projection.A.dtype == torch.float64
    table = dw.count(model)
    assert table.loc["(total)", "fixed"] == 16 * 10 + 10 * 16 + 2  # A and B once, and each layer's scale


def test_layers_of_two_dtypes_share_two():
    model = net()
    model[2].double()
    layers = dw.adapted_layers(dw.attach(model, dw.VeRA(16)))
    assert len(storages(layer.adapter for layer in layers.values())) == 4
    assert torch.equal(layers["0"].adapter.projection.A.double(), layers["2"].adapter.projection.A)


@pytest.mark.parametrize("fan_in", ["shared", "layer"])
def test_which_fan_in_scales_a(fan_in):
    """Variance 2 / fan-in: the largest of all layers', or the layer's own. (What scales A is kept in up.)"""
    shapes = {"narrow": (4, 100), "wide": (4, 1600)}
    for name, adapter in built(dw.VeRA(512, fan_in=fan_in), **shapes).items():
        expected = 2 / (1600 if fan_in == "shared" else shapes[name][1])
        variance = (adapter.factors()[0] * adapter.scale).var()
        assert abs(variance / expected - 1) < 0.03, name


def test_given_projections_are_used_and_only_read():
    a, b = torch.randn(3, 30), torch.randn(40, 3)
    adapter = built(dw.VeRA(3, projection=(a, b)))["small"]
    assert torch.equal(adapter.factors()[0], a[:, :6])
    assert adapter.projection.A.data_ptr() != a.data_ptr()


def test_on_the_meta_device():
    assert all(tensor.is_meta for adapter in built(dw.VeRA(16), device="meta").values() for tensor in adapter.factors())


REFUSED = {
    "rank": (dict(rank=0), "rank must be"),
    "d_init 0": (dict(d_init=0), "d_init must be a finite number above 0, not 0"),
    "d_init nan": (dict(d_init=math.nan), "not nan"),
    "seed": (dict(projection_seed=0.5), "projection_seed must be a whole number, not 0.5"),
    "seed True": (dict(projection_seed=True), "not True"),
    "fan_in": (dict(fan_in="own"), "fan_in must be one of 'shared', 'layer', not 'own'"),
    "dropout": (dict(dropout=1), r"dropout must be a number in \[0, 1\), not 1"),
    "projection's rank": (
        dict(rank=4, projection=(torch.ones(3, 5), torch.ones(6, 3))),
        r"A \(4, in\) and B \(out, 4\), not \(3, 5\) and \(6, 3\)",
    ),
}


@pytest.mark.parametrize("settings, match", REFUSED.values(), ids=REFUSED)
def test_settings_that_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        dw.VeRA(**settings)


def test_a_given_projection_that_is_too_small():
    with pytest.raises(ValueError, match="reaches 29 inputs and 40 outputs; the layers have up to 30 and 40"):
        built(dw.VeRA(2, projection=(torch.ones(2, 29), torch.ones(40, 2))))
