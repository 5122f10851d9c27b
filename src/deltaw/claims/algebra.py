"""Matrices as letters that do not commute: enough algebra to derive a gradient step by hand, and no more.

A matrix is a non-commuting sympy symbol, its transpose another one; a learning rate is an ordinary symbol.
Expressions are polynomials in them, expanded before they are compared, and never compared as text.
"""

from collections.abc import Mapping

import sympy
from sympy import Add, Expr, Integer, Mul, Pow, Symbol
from torch import Tensor


def matrix(name: str) -> Symbol:
    """A letter for a matrix."""
    return Symbol(name, commutative=False)


def transpose(expression: Expr) -> Expr:
    """(X Y)ᵀ = Yᵀ Xᵀ, term by term; numbers are their own transposes."""
    expression = sympy.expand(expression)
    if isinstance(expression, Add):
        return Add(*map(transpose, expression.args))
    numbers, letters = factors(expression)
    return Mul(*numbers, *(_flip(letter) for letter in reversed(letters)))


def gradient(function: Expr, letter: Symbol, upstream: Expr) -> Expr:
    """∂L/∂X of a matrix-valued polynomial F(X), given Δ = ∂L/∂F.

    dL = tr(Δᵀ dF), and each place of X in a term P X Q contributes
    tr(Δᵀ P dX Q), hence Pᵀ Δ Qᵀ to the gradient.
    """
    total = Integer(0)
    for term in Add.make_args(sympy.expand(function)):
        numbers, letters = factors(term)
        for place, found in enumerate(letters):
            if found == letter:
                before, after = Mul(*letters[:place]), Mul(*letters[place + 1 :])
                total += Mul(*numbers) * transpose(before) * upstream * transpose(after)
            elif found == _flip(letter):
                raise ValueError(f"{letter} stands transposed in {function}, too")
    return sympy.expand(total)


def assuming_orthogonal(expression: Expr, letter: Symbol) -> Expr:
    """The expression with XᵀX = XXᵀ = 1."""
    pairs = ((letter, _flip(letter)), (_flip(letter), letter))
    total = Integer(0)
    for term in Add.make_args(sympy.expand(expression)):
        numbers, letters = factors(term)
        kept: list[Expr] = []
        for found in letters:
            if kept and (kept[-1], found) in pairs:
                kept.pop()
            else:
                kept.append(found)
        total += Mul(*numbers, *kept)
    return total


def equal(one: Expr, other: Expr) -> bool:
    """Are they the same polynomial?"""
    return sympy.expand(one - other) == 0


def coefficients(expression: Expr, number: Symbol) -> dict[int, Expr]:
    """The expression as a polynomial in a number: power → coefficient, a polynomial in the letters."""
    found: dict[int, Expr] = {}
    for term in Add.make_args(sympy.expand(expression)):
        power = int(sympy.degree(Mul(*factors(term)[0]), number)) if term.has(number) else 0
        found[power] = found.get(power, Integer(0)) + sympy.expand(term / number**power)
    return dict(sorted(found.items()))


def evaluate(expression: Expr, values: Mapping[Symbol, Tensor | float], like: Tensor) -> Tensor | float:
    """The expression on numbers; a term without a matrix stands for that multiple of the identity of `like`'s size."""
    total = 0.0
    for term in Add.make_args(sympy.expand(expression)):
        numbers, letters = factors(term)
        scale = float(Mul(*numbers).subs({s: v for s, v in values.items() if s.is_commutative}))
        product: Tensor | None = None
        for letter in letters:
            value = values[letter] if letter in values else values[_flip(letter)].mT
            product = value if product is None else product @ value
        total = total + (scale * like.new_ones(like.shape[0]).diag() if product is None else scale * product)
    return total


def factors(term: Expr) -> tuple[list[Expr], list[Expr]]:
    """The commuting factors of one term, and its letters one by one, in order."""
    numbers, letters = [], []
    for factor in Mul.make_args(term):
        if factor.is_commutative:
            numbers.append(factor)
        elif isinstance(factor, Pow):
            letters += [factor.base] * int(factor.exp)
        else:
            letters.append(factor)
    return numbers, letters


def _flip(letter: Symbol) -> Symbol:
    name = letter.name
    return matrix(name[:-1] if name.endswith("ᵀ") else name + "ᵀ")
