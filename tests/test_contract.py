import pytest
import torch
from contract import CHECKS

import deltaw as dw

SPECS = {
    "LoRA": dw.LoRA(rank=4),
    "LoRA alpha": dw.LoRA(rank=4, alpha=16),
    "rsLoRA": dw.LoRA(rank=4, alpha=8, scaling="rslora"),
    "LoRA patterns": dw.LoRA(rank=4, alpha=8, rank_pattern={"conv": 2}, alpha_pattern={"bare": 3}),
    "LoRA rank pattern": dw.LoRA(rank=4, rank_pattern={"conv": 2}),
    "LoRA B": dw.LoRA(rank=4, init="B"),
    "LoRA gaussian": dw.LoRA(rank=4, init="gaussian"),
    "LoRA orthogonal": dw.LoRA(rank=4, init="orthogonal"),
    "LoRA orthogonal-pair": dw.LoRA(rank=4, init="orthogonal-pair"),
    "LoRA pissa": dw.LoRA(rank=4, alpha=8, init="pissa"),
    "LoRA callable": dw.LoRA(rank=4, init=lambda layer, r, s, g: (torch.ones(r, layer.in_features), torch.zeros(layer.out_features, r))),
    "MoSLoRA": dw.MoSLoRA(rank=4),
    "MoSLoRA orthogonal fixed": dw.MoSLoRA(rank=4, mixer="orthogonal", train_mixer=False),
    "MoSLoRA two-subspace": dw.MoSLoRA(rank=4, mixer="two-subspace", train_mixer=False),
    "MoSLoRA given": dw.MoSLoRA(rank=4, alpha=2, mixer=torch.arange(16.0).reshape(4, 4)),
    "MoSLoRA pissa": dw.MoSLoRA(rank=4, mixer="identity", init="pissa"),
    "VeRA": dw.VeRA(rank=24),
    "VeRA fan-in": dw.VeRA(rank=6, fan_in="layer", projection_seed=3),
    "VeRA given": dw.VeRA(rank=6, projection=(torch.randn(6, 30), torch.randn(30, 6))),
    "LoRA-XS": dw.LoRAXS(rank=4, alpha=8),
    "DoRA": dw.DoRA(dw.LoRA(rank=4, alpha=8)),
    "DoRA exact": dw.DoRA(dw.LoRA(rank=4), detach_norm=False),
    "DoRA pissa": dw.DoRA(dw.LoRA(rank=4, init="pissa")),
    "DVoRA": dw.DoRA(dw.VeRA(rank=24)),
    "DVoRA given": dw.DoRA(dw.VeRA(rank=6, projection=(torch.randn(6, 30), torch.randn(30, 6)))),
    "DoRA MoSLoRA": dw.DoRA(dw.MoSLoRA(rank=4), detach_norm=False),
    "DoRA LoRA-XS": dw.DoRA(dw.LoRAXS(rank=4)),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_contract(spec, check, tmp_path):
    check(spec, tmp_path)
