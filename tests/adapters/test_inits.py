"""Starts against theory: variances, orthonormality, Haar moments, Eckart–Young, and what a seed means."""

import math

import pytest
import torch

import deltaw as dw
from deltaw.adapters import Layer, inits
from deltaw.adapters.adapter import draw_start

NAMES = sorted(inits.INITS)


def layer(out=48, in_=32, dtype=torch.float32, device="cpu"):
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(9))
    return Layer("name", weight.to(device, dtype))


def draw(init, at, rank=8, scale=1.0, seed=0):
    return draw_start(init, at, rank, scale, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "init, which, variance, uniform",
    [("A", 0, lambda in_, rank: 1 / (3 * in_), True), ("B", 1, lambda in_, rank: 1 / (3 * rank), True),
     ("gaussian", 0, lambda in_, rank: 1 / rank**2, False)],
)  # fmt: skip
@pytest.mark.parametrize("rank", [8, 64])
def test_the_variance_of_the_random_factor(init, which, variance, uniform, rank):
    """About 2·10⁵ entries: the standard error of their variance is under half a per cent."""
    at = Layer("name", torch.zeros(()).expand(200_000 // rank, 200_000 // rank))
    factors = draw(init, at, rank)
    expected = variance(at.in_features, rank)
    random, zero = factors[which], factors[1 - which]
    assert not zero.any()
    assert abs(random.mean()) < 5 * math.sqrt(expected / random.numel())
    assert abs(random.var() / expected - 1) < 0.02
    kurtosis = (random.double() ** 4).mean() / expected**2
    assert abs(kurtosis - (9 / 5 if uniform else 3)) < 0.1
    if uniform:
        assert random.abs().max() <= math.sqrt(3 * expected) * (1 + 1e-6)


def test_orthogonal_factors_are_orthonormal():
    identity = torch.eye(8)
    a, b = draw("orthogonal", layer())
    torch.testing.assert_close(a @ a.mT, identity, atol=1e-6, rtol=0)
    assert not b.any()
    a, b = draw("orthogonal-pair", layer())
    torch.testing.assert_close(a @ a.mT, identity, atol=1e-6, rtol=0)
    torch.testing.assert_close(b.mT @ b, identity, atol=1e-6, rtol=0)


def test_haar_moments():
    """An entry q of a uniformly distributed orthogonal n × n matrix: E q = 0, E q² = 1/n, E q⁴ = 3/(n(n+2)), and
    two entries of a row are uncorrelated. Without the signs from R, E of the diagonal would not be 0."""
    n, generator = 4, torch.Generator().manual_seed(0)
    q = torch.stack([inits.haar(n, n, generator, layer()) for _ in range(8000)]).double()
    torch.testing.assert_close(q[0] @ q[0].mT, torch.eye(n, dtype=torch.float64), atol=1e-6, rtol=0)
    assert q.mean(0).abs().max() < 0.03
    assert (q.square().mean(0) * n - 1).abs().max() < 0.06
    assert ((q**4).mean(0) * n * (n + 2) / 3 - 1).abs().max() < 0.12
    assert (q[:, :, 0] * q[:, :, 1]).mean(0).abs().max() < 0.015
    assert abs((torch.linalg.det(q) > 0).double().mean() - 0.5) < 0.03  # both halves of O(n)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_pissa_is_the_best_part_of_that_rank(shape, scale):
    """Eckart–Young: nothing of rank r is closer to W than what misses the singular values behind the r-th."""
    weight = torch.randn(shape, dtype=torch.float64)
    a, b = draw("pissa", Layer("name", weight), 3, scale)
    sigma = torch.linalg.svdvals(weight)
    missed = (weight - scale * b @ a).square().sum()
    torch.testing.assert_close(missed, sigma[3:].square().sum())
    torch.testing.assert_close(a @ a.mT, torch.diag(sigma[:3] / scale))  # and both factors hold half of it
    torch.testing.assert_close(b.mT @ b, torch.diag(sigma[:3] / scale))


# --- what a seed means -----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [name for name in NAMES if name != "pissa"])
def test_the_same_numbers_for_every_dtype(init):
    reference = draw(init, layer())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for ours, expected in zip(draw(init, layer(dtype=dtype)), reference):
            assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(ours, expected.to(ours.dtype))


@pytest.mark.parametrize("init", NAMES)
def test_a_seed_gives_the_same_numbers_and_leaves_torchs_alone(init):
    before = torch.get_rng_state()
    first, again, other = (draw(init, layer(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert all(torch.equal(x, y) for x, y in zip(first, other)) == (init == "pissa")  # which draws nothing


@pytest.mark.parametrize("init", NAMES)
def test_on_the_meta_device(init):
    a, b = draw(init, layer(device="meta"))
    assert a.is_meta and b.is_meta and (a.shape, b.shape) == ((8, 32), (48, 8))


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("init, shape", [("orthogonal", (9, 4)), ("orthogonal-pair", (4, 9)), ("pissa", (4, 9))])
def test_a_rank_with_too_few_directions(init, shape):
    with pytest.raises(ValueError, match=f"{init} needs a rank of at most 4 on layer 'name'; rank is 5"):
        draw(init, layer(*shape), 5)


def test_a_callable_gets_what_it_needs():
    seen = []

    def start(*arguments):
        seen.extend(arguments)
        return torch.ones(2, 32), torch.zeros(48, 2)

    dw.LoRA(2, 6, init=start).build({"name": layer()}, torch.Generator())
    assert seen[0].name == "name" and seen[1:3] == [2, 3.0] and isinstance(seen[3], torch.Generator)


def given(a, b):
    return lambda *_: (a, b)


WRONG = {
    "A transposed": (given(torch.ones(32, 2), torch.ones(48, 2)), r"gave A of shape \(32, 2\) for layer 'name'; it must be \(2, 32\)"),
    "B of another rank": (given(torch.ones(2, 32), torch.ones(48, 3)), r"gave B of shape \(48, 3\).* must be \(48, 2\)"),
    "A not finite": (given(torch.full((2, 32), math.nan), torch.ones(48, 2)), "gave A numbers that are not finite for layer 'name'"),
    "B not finite": (given(torch.ones(2, 32), torch.full((48, 2), math.inf)), "gave B numbers that are not finite"),
}


@pytest.mark.parametrize("init, match", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("family", [dw.LoRA, dw.MoSLoRA, dw.LoRAXS])
def test_a_callable_with_a_wrong_result(family, init, match):
    with pytest.raises(ValueError, match=match):
        family(2, init=init).build({"name": layer()}, torch.Generator())
