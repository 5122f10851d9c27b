"""The runs tell symmetries apart from what are none."""

import pytest
import torch

from deltaw.claims import ClaimFailed
from deltaw.claims import moslora_symmetry as symmetry


def test_the_mixers_are_what_they_are_called():
    identity = torch.eye(symmetry.RANK, dtype=torch.float64)
    for mixer in (symmetry.orthogonal(), symmetry.signed_permutation()):
        torch.testing.assert_close(mixer @ mixer.mT, identity)
    assert (symmetry.signed_permutation().abs().sum(0) == 1).all()
    assert symmetry.orthogonal().abs().max() < 0.99
    assert (symmetry.any_mixer() @ symmetry.any_mixer().mT - identity).norm() > 0.1


@pytest.mark.parametrize("claim", [symmetry.rotations, symmetry.signed_permutations])
def test_a_mixer_that_is_no_symmetry_makes_the_claim_fail(claim, monkeypatch):
    for name in ("orthogonal", "signed_permutation"):
        monkeypatch.setattr(symmetry, name, symmetry.any_mixer)
    with pytest.raises(ClaimFailed, match="apart"):
        claim()


def test_the_identity_is_no_counterexample(monkeypatch):
    monkeypatch.setattr(symmetry, "orthogonal", lambda: torch.eye(symmetry.RANK, dtype=torch.float64))
    with pytest.raises(ClaimFailed, match="not apart"):
        symmetry.appendix_conclusion()
