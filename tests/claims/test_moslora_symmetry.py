"""The claims fail when the mixers or the optimizers are others than they say."""

import pytest
import sympy
import torch

from deltaw.claims import ClaimFailed
from deltaw.claims import moslora_symmetry as symmetry
from deltaw.claims.two_forms import MIXERS, orthogonal


@pytest.fixture
def shifted(monkeypatch):
    """The comparison with one mixer's rows in another's place."""

    def shift(mixer, to):
        table = symmetry.compared().copy()
        rows = table.mixer == mixer
        table.loc[rows, "apart"] = table.loc[table.mixer == to, "apart"].to_numpy()
        table.loc[rows, "equal"] = table.loc[table.mixer == to, "equal"].to_numpy()
        monkeypatch.setattr(symmetry, "compared", lambda: table)

    return shift


@pytest.mark.parametrize(
    "claim, mixer, to",
    [
        (symmetry.rotations, "orthogonal", "random"),
        (symmetry.signed_permutations, "signed permutation", "orthogonal"),
        (symmetry.appendix_conclusion, "orthogonal", "signed permutation"),
        (symmetry.learnable, "orthogonal, trained", "orthogonal"),
        (symmetry.whole_table, "random", "signed permutation"),
    ],
)
def test_another_mixers_runs_make_the_claim_fail(claim, mixer, to, shifted):
    shifted(mixer, to)
    with pytest.raises(ClaimFailed):
        claim()


def test_every_cell_is_there():
    table = symmetry.compared()
    assert table.optimizer.nunique() >= 11 and table.mixer.nunique() == 5
    assert len(table) == table.optimizer.nunique() * 5
    assert 0 < table.equal.sum() < len(table)


def test_the_induction_needs_the_orthogonal_mixer(monkeypatch):
    monkeypatch.setattr(symmetry, "assuming_orthogonal", lambda expression, letter: sympy.expand(expression))
    with pytest.raises(ClaimFailed, match="A W after the step"):
        symmetry.induction()
    with pytest.raises(ClaimFailed, match="first-order"):
        symmetry.trained_step()


def test_a_wrong_flow_conserves_nothing(monkeypatch):
    wrong = {symmetry.A: 2}
    real = symmetry.gradient
    monkeypatch.setattr(symmetry, "gradient", lambda f, letter, up: wrong.get(letter, 1) * real(f, letter, up))
    with pytest.raises(ClaimFailed, match="AᵀA − W Wᵀ changes"):
        symmetry.conserved()


def test_the_defect_tells_symmetries_apart():
    for phi in symmetry.FIRST_STEPS.values():
        assert symmetry.defect(phi, torch.eye(4, dtype=torch.float64)) < 1e-12
        assert symmetry.defect(phi, MIXERS["random"].start()) > 1e-3
    assert symmetry.defect(torch.sign, orthogonal()) > 0.1


def test_the_only_if_claims_fail_for_other_steps(monkeypatch):
    monkeypatch.setitem(symmetry.FIRST_STEPS, "sign", symmetry.FIRST_STEPS["identity"])  # which rotations do not change
    with pytest.raises(ClaimFailed, match="does not see a rotation"):
        symmetry.only_if_signs()
    monkeypatch.setitem(symmetry.FIRST_STEPS, "identity", torch.sign)
    with pytest.raises(ClaimFailed, match="sees a rotation"):
        symmetry.only_if_rotations()
