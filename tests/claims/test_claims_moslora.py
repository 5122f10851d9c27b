"""The claims about the paper's mixers fail for other mixers."""

import pytest
import torch

from deltaw.adapters import moslora as library
from deltaw.claims import ClaimFailed, moslora


@pytest.mark.parametrize(
    "claim, mixer, other",
    [
        (moslora.two_subspace_rank, "two-subspace", "identity"),
        (moslora.two_subspace_rate, "two-subspace", "identity"),
        (moslora.kaiming_slow, "kaiming", "orthogonal"),
        (moslora.kaiming_slow, "orthogonal", "kaiming"),
        (moslora.identity_is_lora, "identity", "kaiming"),
    ],
)
def test_another_mixer_makes_the_claim_fail(claim, mixer, other, monkeypatch):
    monkeypatch.setitem(library.MIXERS, mixer, library.MIXERS[other])
    with pytest.raises(ClaimFailed):
        claim()


def test_expressivity_fails_where_conversion_changes_the_outputs(monkeypatch):
    import deltaw as dw

    def convert(model, family):
        with torch.no_grad():
            model[0].adapter.B.mul_(1.001)

    monkeypatch.setattr(dw, "convert", convert)
    with pytest.raises(ClaimFailed, match="outputs differ"):
        moslora.no_expressivity()


def test_the_layout_fails_for_a_transposed_mixer(monkeypatch):
    def factors(self):
        return self.since_start(self.A, self.B @ self.M.mT)

    monkeypatch.setattr(library.MoSLoRAAdapter, "factors", factors)
    with pytest.raises(ClaimFailed, match="with W for Wᵀ"):
        moslora.official_layout()
