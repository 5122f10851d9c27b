"""A wrong sign anywhere in equations 2 – 10 makes the claim fail, by algebra and in numbers."""

import pytest
import sympy

from deltaw.claims import ClaimFailed
from deltaw.claims.moslora_appendix import EQUATIONS, check_numbers, check_symbolic, difference_not_zero


def mutations_of_all():
    for equation in EQUATIONS:
        sides = equation.sides()
        for pair, (_, printed) in enumerate(sides):
            for term in range(len(printed)):
                yield pytest.param(equation, pair, term, id=f"eq{equation.number}-{pair}-{term}")


MUTATIONS = list(mutations_of_all())


def with_wrong_sign(equation, pair, term):
    sides = [(derived, list(printed)) for derived, printed in equation.sides()]
    sides[pair][1][term] *= -1
    return sides


@pytest.mark.parametrize("equation, pair, term", MUTATIONS)
def test_a_wrong_sign_is_found_by_algebra(equation, pair, term):
    with pytest.raises(ClaimFailed, match=f"equation {equation.number}"):
        check_symbolic(equation, with_wrong_sign(equation, pair, term))


@pytest.mark.parametrize("equation, pair, term", MUTATIONS)
def test_a_wrong_sign_is_found_in_numbers(equation, pair, term):
    with pytest.raises(ClaimFailed, match=f"equation {equation.number}"):
        check_numbers(equation, with_wrong_sign(equation, pair, term))


def test_equation_10_needs_the_orthogonal_mixer():
    equation = EQUATIONS[-1]
    for derived, printed in equation.sides():
        assert sympy.expand(derived - sum(printed)) != 0


def test_the_difference_vanishes_at_b_zero():
    assert difference_not_zero()["at B = 0"] == "0"
