"""What every spec has in common: settings that are checked when made, patterns, scales, and the way to a file."""

import dataclasses
import json
import math

import pytest
import torch

import deltaw as dw
from deltaw.adapters import Layer, Spec
from deltaw.adapters.adapter import LowRankAdapter, LowRankSpec

LOW_RANK = [dw.LoRA, dw.MoSLoRA, dw.LoRAXS]


def layers(**shapes):
    return {name: Layer(name, torch.randn(shape)) for name, shape in shapes.items()}


def build(spec, **shapes):
    return spec.build(layers(**shapes), torch.Generator().manual_seed(0))


# --- settings --------------------------------------------------------------------------------------------

REFUSED = {
    "rank 0": (dict(rank=0), "rank must be a whole number of at least 1, not 0"),
    "rank -1": (dict(rank=-1), "not -1"),
    "rank 1.5": (dict(rank=1.5), "not 1.5"),
    "rank True": (dict(rank=True), "not True"),
    "rank text": (dict(rank="8"), "not '8'"),
    "alpha 0": (dict(alpha=0), "alpha must be a finite number above 0, not 0"),
    "alpha inf": (dict(alpha=math.inf), "not inf"),
    "alpha nan": (dict(alpha=math.nan), "not nan"),
    "dropout 1": (dict(dropout=1.0), r"dropout must be a number in \[0, 1\), not 1.0"),
    "dropout -0.1": (dict(dropout=-0.1), "not -0.1"),
    "dropout None": (dict(dropout=None), "not None"),
    "scaling": (dict(scaling="sqrt"), "scaling must be one of 'standard', 'rslora', not 'sqrt'"),
    "rslora without alpha": (dict(scaling="rslora"), "needs an alpha"),
    "no mapping": (dict(rank_pattern=["q"]), r"rank_pattern must map patterns to values.*\['q'\]"),
    "no expression": (dict(rank_pattern={"(": 2}), r"the key '\(', which is not a regular expression"),
    "key no text": (dict(alpha_pattern={3: 2}), "the key 3"),
    "rank of a pattern": (dict(rank_pattern={"q": 0}), r"rank_pattern\['q'\] must be a whole number.*not 0"),
    "alpha of a pattern": (dict(alpha_pattern={"q": -2}), r"alpha_pattern\['q'\] must be .* not -2"),
    "init": (dict(init="C"), "init .* must be one of .*'pissa', not 'C'"),
}


@pytest.mark.parametrize("family", LOW_RANK)
@pytest.mark.parametrize("settings, match", REFUSED.values(), ids=REFUSED)
def test_bad_settings_are_refused_when_made(family, settings, match):
    with pytest.raises((ValueError, TypeError), match=match):
        family(**settings)


def test_a_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dw.LoRA(8).rank = 4


@pytest.mark.parametrize("family", LOW_RANK)
def test_dropout_reaches_every_adapter(family):
    for spec in (family(2, dropout=0.25), dw.DoRA(family(2, dropout=0.25))):
        assert [adapter.dropout for adapter in build(spec, a=(4, 3), b=(5, 4)).values()] == [0.25, 0.25]


# --- scale and patterns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LOW_RANK)
def test_the_scale(family):
    assert family(8).scale_of("q") == 1
    assert family(8, 16).scale_of("q") == 16 / 8
    assert family(8, 16, scaling="rslora").scale_of("q") == 16 / math.sqrt(8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_scale_is_in_up_in_the_parameters_precision(dtype):
    spec = dw.LoRA(3, 16, init="B")
    layer = Layer("a", torch.randn(5, 4, dtype=dtype))
    adapter = spec.build({"a": layer}, torch.Generator().manual_seed(0))["a"]
    _, up = adapter.factors()
    assert up.dtype == layer.dtype
    assert torch.equal(up, torch.tensor(16 / 3, dtype=layer.dtype) * adapter.B)


def test_a_pattern_matches_the_end_of_a_name_from_a_dot_on():
    spec = dw.LoRA(8, 8, rank_pattern={"query": 2, r"layer\.\d+\.value": 3}, alpha_pattern={"query": 4})
    assert [spec.rank_of(name) for name in ("query", "layer.0.query", "subquery", "query.key")] == [2, 2, 8, 8]
    assert [spec.rank_of(name) for name in ("layer.1.value", "bert.layer.12.value", "value")] == [3, 3, 8]
    assert [spec.scale_of(name) for name in ("a.query", "a.key")] == [4 / 2, 8 / 8]


def test_of_two_patterns_the_first_one_counts():
    assert dw.LoRA(8, rank_pattern={"a|b": 2, "b|c": 3}).rank_of("b") == 2


def test_an_anchored_pattern_matches_the_whole_name():
    spec = dw.LoRA(8, rank_pattern={"^0": 2})
    assert [spec.rank_of(name) for name in ("0", "1.0")] == [2, 8]


@pytest.mark.parametrize("which", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_layer_is_refused(which):
    with pytest.raises(ValueError, match="the pattern 'value' matches none of the adapted layers 'query', 'key'"):
        build(dw.LoRA(2, 2, **{which: {"value": 1}}), query=(4, 3), key=(4, 3))


@pytest.mark.parametrize("family", LOW_RANK)
def test_ranks_can_differ_by_layer(family):
    adapters = build(family(2, rank_pattern={"b": 3}), a=(6, 5), b=(6, 5))
    assert [adapter.factors()[0].shape for adapter in adapters.values()] == [(2, 5), (3, 5)]


# --- to a file and back ----------------------------------------------------------------------------------

SPECS = [
    dw.LoRA(4, 8, scaling="rslora", dropout=0.1, rank_pattern={"q": 2}, alpha_pattern={"v": 3.5}, init="orthogonal"),
    dw.MoSLoRA(4, mixer="two-subspace", train_mixer=False),
    dw.LoRAXS(4, init="orthogonal-pair"),
    dw.VeRA(16, d_init=0.3, projection_seed=5, fan_in="layer", dropout=0.1),
    dw.DoRA(dw.MoSLoRA(4, 2.0), detach_norm=False),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_to_json_and_back(spec):
    tensors = {}
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict(tensors))), tensors) == spec
    assert not tensors


def test_tensors_are_kept_beside_the_json():
    spec = dw.DoRA(dw.VeRA(2, projection=(torch.randn(2, 5), torch.randn(6, 2))))
    tensors = {}
    again = Spec.from_dict(json.loads(json.dumps(spec.to_dict(tensors))), tensors)
    assert all(torch.equal(a, b) for a, b in zip(again.inner.projection, spec.inner.projection))
    mixer = torch.randn(3, 3)
    values = dw.MoSLoRA(3, mixer=mixer).to_dict(tensors)  # beside the others
    assert torch.equal(Spec.from_dict(values, tensors).mixer, mixer) and len(tensors) == 3


def test_a_callable_comes_back_as_the_default():
    values = dw.LoRAXS(2, init=lambda *_: None).to_dict({})
    assert values["init"] == "custom" and Spec.from_dict(values, {}).init == "svd"


@pytest.mark.parametrize(
    "values, match",
    [
        ({"family": "Nope"}, "unknown family 'Nope'; known: .*'LoRA'"),
        ({}, "unknown family None"),
        ({"family": "LoRA", "colour": "red"}, r"LoRA has no settings \['colour'\]"),
        ({"family": "LoRA", "rank": 0}, "rank must be"),
        ({"family": "DoRA", "inner": {"family": "Nope"}}, "unknown family 'Nope'"),
    ],
)
def test_what_from_dict_refuses(values, match):
    with pytest.raises(ValueError, match=match):
        Spec.from_dict(values, {})


def test_a_family_without_a_start_resumes_as_it_is():
    @dataclasses.dataclass(frozen=True)
    class Startless(LowRankSpec):
        pass

    try:
        assert Startless(4).resuming({}) == Startless(4)
    finally:
        del Spec.families["Startless"]


# --- layers and adapters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_layer_makes_tensors_of_its_own(dtype):
    layer = Layer("a", torch.zeros(5, 4, dtype=dtype))
    assert (layer.out_features, layer.in_features) == (5, 4)
    given = torch.randn(4, 5, requires_grad=True).mT
    new = layer.new(given)
    assert new.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert new.is_contiguous() and not new.requires_grad
    assert new.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()


def test_only_a_start_that_is_not_zero_is_subtracted():
    layer = Layer("a", torch.zeros(5, 4, dtype=torch.float64))
    a0, b0, a, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4), (5, 2), (2, 4), (5, 2)))
    adapter = LowRankAdapter(layer, 3.0)
    for zero in ((a0, 0 * b0), (0 * a0, b0)):
        adapter.keep_start(*zero)
        assert adapter.A0 is None
        down, up = adapter.since_start(a, b)
        assert torch.equal(down, a) and torch.equal(up, 3 * b)
    adapter.keep_start(a0, b0)
    down, up = adapter.since_start(a, b)
    assert down.shape == (4, 4) and up.shape == (5, 4)  # rank 2r
    torch.testing.assert_close(up @ down, 3 * (b @ a - b0 @ a0))


def test_an_adapter_has_to_say_its_factors():
    with pytest.raises(NotImplementedError):
        dw.Adapter().factors()
    with pytest.raises(NotImplementedError):
        Spec().build({}, torch.Generator())
