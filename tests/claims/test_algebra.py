"""Letters that do not commute, against matrices."""

import pytest
import sympy
import torch

from deltaw.claims.algebra import assuming_orthogonal, coefficients, equal, evaluate, gradient, matrix, transpose

X, Y, Z, D = (matrix(name) for name in "XYZD")
c = sympy.Symbol("c")
VALUES = dict(zip((X, Y, Z, D), torch.randn(4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))) | {c: 0.3}


def value(expression):
    return evaluate(expression, VALUES, VALUES[X])


@pytest.mark.parametrize("expression", [X * Y, X**2 * Y + c * Y * X, (X + c * Y) * (Z - X) + 2, c * transpose(X) * Y])
def test_transposing_is_transposing(expression):
    torch.testing.assert_close(value(transpose(expression)), value(expression).mT)
    assert equal(transpose(transpose(expression)), expression)


@pytest.mark.parametrize("function", [X, X * Y, Y * X * Z, X * Y * X, c * X**3 + Y * X - Z])
def test_gradients_are_autograds(function):
    x = VALUES[X].clone().requires_grad_(True)
    loss = (VALUES[D] * evaluate(function, VALUES | {X: x}, x)).sum()
    (expected,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(value(gradient(function, X, D)), expected)


def test_a_transposed_letter_is_refused():
    with pytest.raises(ValueError, match="transposed"):
        gradient(transpose(X) * Y, X, D)


def test_products_do_not_commute():
    assert not equal(X * Y, Y * X)


def test_an_orthogonal_letter_cancels():
    xt = transpose(X)
    assert equal(assuming_orthogonal(Y * xt * X * Z + X * xt, X), Y * Z + 1)
    assert equal(assuming_orthogonal(X * xt * X * xt, X), sympy.Integer(1))
    assert equal(assuming_orthogonal(X * Y * xt, X), X * Y * xt)


def test_coefficients_put_together_are_the_expression():
    expression = (X + c * Y) * (Z - c**2 * X) * Y + 2 * c
    parts = coefficients(expression, c)
    assert list(parts) == [0, 1, 2, 3]
    assert equal(sum(c**power * part for power, part in parts.items()), expression)
    assert not any(part.has(c) for part in parts.values())
