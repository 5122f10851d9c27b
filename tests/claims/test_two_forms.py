"""The optimizers are torch's where torch has them, the mixers what they are called, the runs comparable."""

from functools import partial

import pytest
import torch

from deltaw.claims import two_forms
from deltaw.claims.two_forms import MIXERS, RULES, Mixer, Rule

IDENTITY = torch.eye(two_forms.RANK, dtype=torch.float64)


def test_the_mixers_are_what_they_are_called():
    found = {name: (two_forms.is_orthogonal(m.start()), two_forms.is_signed_permutation(m.start())) for name, m in MIXERS.items()}
    assert found == {"signed permutation": (True, True), "orthogonal": (True, False), "2 × orthogonal": (False, False),
                     "random": (False, False), "orthogonal, trained": (True, False)}  # fmt: skip
    assert not torch.equal(two_forms.signed_permutation(), IDENTITY)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_identity_changes_nothing(rule):
    assert max(two_forms.apart(rule, Mixer(lambda: IDENTITY), 5)) < 1e-12


@pytest.mark.parametrize("name", ["SGD, norm clip", "SGD, value clip"])
def test_clipping_acts(name):
    rule = RULES[name]
    unclipped = Rule(rule.make, rule.symmetries)
    mixer = MIXERS["orthogonal"]
    clipped, free = (two_forms.both_forms(one, mixer, 50)[0].products[-1] for one in (rule, unclipped))
    assert (clipped - free).norm() > 0.05 * free.norm()


def test_newton_schulz_orthogonalizes():
    for shape in ((9, 4), (4, 9)):
        g = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        sigma = torch.linalg.svdvals(two_forms.orthogonalized(g))
        assert sigma.min() > 0.6 and sigma.max() < 1.3
    assert not two_forms.orthogonalized(torch.zeros(3, 2)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_is_torchs():
    theirs = partial(torch.optim.Muon, lr=0.02, weight_decay=0.0)
    ours = partial(two_forms.Muon, lr=0.02, dtype=torch.bfloat16)
    mixer = MIXERS["orthogonal"]
    one, other = (two_forms.both_forms(Rule(make, two_forms.is_orthogonal), mixer, 2)[0].products[-1] for make in (ours, theirs))
    assert (one - other).norm() < 0.03 * other.norm()  # bfloat16, rounded at other places


def test_sign_descent_moves_by_the_rate():
    x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    x.grad = torch.tensor([0.1, -5.0, 0.0])
    two_forms.Sign([x], lr=0.5).step()
    assert x.tolist() == [0.5, -1.5, 3.0]
