"""LoRA-XS: a fixed frame from the SVD of W, and r² trained numbers between."""

import pytest
import torch
from torch import nn

import deltaw as dw


def layer(spec, dtype=torch.float64):
    torch.manual_seed(0)
    return dw.attach(nn.Sequential(nn.Linear(12, 16)).to(dtype), spec)[0]


def test_the_frame_is_the_svd_of_w():
    """A = Vᵣᵀ and B = Uᵣ Σᵣ: with M = I and s = 1 the adapter would add the best rank-r part of W."""
    adapted = layer(dw.LoRAXS(5))
    adapter, weight = adapted.adapter, adapted.weight
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(adapter.A @ adapter.A.mT, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(adapter.B.mT @ adapter.B, torch.diag(sigma[:5] ** 2))
    torch.testing.assert_close((weight - adapter.B @ adapter.A).square().sum(), sigma[5:].square().sum())


def test_it_trains_r_squared_numbers():
    adapter = layer(dw.LoRAXS(5)).adapter
    assert {key: tuple(p.shape) for key, p in adapter.named_parameters()} == {"M": (5, 5)}
    assert set(adapter.state_dict()) == {"A", "B", "M"}


def test_it_trains_from_a_zero_mixer():
    """∂L/∂M = s Bᵀ Δ Aᵀ is not zero, because neither A nor B is: gradient descent finds a ΔW inside the frame."""
    adapted = layer(dw.LoRAXS(3, 6))
    adapter = adapted.adapter
    assert not adapter.M.any()
    x, g = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    (grad,) = torch.autograd.grad((adapted(x) * g).sum(), adapter.M)
    torch.testing.assert_close(grad, 2 * adapter.B.mT @ (g.mT @ x) @ adapter.A.mT)
    target = adapter.B @ torch.randn(3, 3, dtype=torch.float64) @ adapter.A
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
    for _ in range(1000):
        optimizer.zero_grad()
        down, up = adapter.factors()
        (up @ down - target).square().sum().backward()
        optimizer.step()
    assert (adapted.delta_weight() - target).norm() < 1e-3 * target.norm()


@pytest.mark.parametrize("init", ["A", "B", "gaussian", "orthogonal"])
def test_a_fixed_factor_of_zeros_is_refused(init):
    with pytest.raises(ValueError, match=f"init='{init}' makes a fixed factor zero on layer '0': M would never move"):
        layer(dw.LoRAXS(4, init=init))


def test_other_frames_of_two_factors():
    adapter = layer(dw.LoRAXS(4, init="orthogonal-pair")).adapter
    torch.testing.assert_close(adapter.B.mT @ adapter.B, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_rank_above_the_layers():
    with pytest.raises(ValueError, match="LoRAXS needs a rank of at most 12 on layer '0'; rank is 13"):
        layer(dw.LoRAXS(13))
