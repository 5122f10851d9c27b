"""A family that the library does not have, added here alone, passes everything a family must do."""

import inspect
import sys

# --- the family: LoRA with a trained diagonal mixer, down = A, up = s·B·diag(c) ---------------------------
from dataclasses import dataclass

import pytest
import torch
from contract import CHECKS
from torch import nn

from deltaw.adapters import LowRankAdapter, LowRankSpec
from deltaw.adapters.adapter import draw_start


@dataclass(frozen=True)
class DiagonalLoRA(LowRankSpec):
    init: str = "A"

    def build_layer(self, layer, rank, scale, generator):
        return DiagonalLoRAAdapter(layer, *draw_start(self.init, layer, rank, scale, generator), scale)


class DiagonalLoRAAdapter(LowRankAdapter):
    up_parameters = ("B",)

    def __init__(self, layer, a, b, scale):
        super().__init__(layer, scale)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        self.c = nn.Parameter(layer.new(torch.ones(a.shape[0])))

    def factors(self):
        return self.since_start(self.A, self.B * self.c[..., None, :])


# --- end of the family -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_contract(check, tmp_path):
    check(DiagonalLoRA(rank=4, alpha=8), tmp_path)


def test_it_took_fewer_than_40_lines():
    source = inspect.getsource(sys.modules[__name__])
    family = source.split("# --- the family")[1].split("# --- end of the family")[0]
    assert len([line for line in family.splitlines() if line.strip()]) < 40
