"""Williamson-type matrices: symmetric A, B, C, D with entries +-1 that commute, and A^2 + B^2 + C^2 + D^2 = 4 w I.

They fill the arrays of `arrays.cooper_wallis`. Three sources, asked in this order:

1. w = (q + 1) / 2 for a prime power q = 1 mod 4. Turyn (1972), "An infinite class of Williamson matrices".
2. Circulants found by search. Williamson (1944), "Hadamard's determinant theorem and the sum of four squares": 43.
   Baumert, Golomb and Hall (1962), "Discovery of an Hadamard matrix of order 92": 23. Tables with these and 11: Hall
   (1983), "Combinatorial theory"; Holzmann, Kharaghani and Tayfeh-Rezaie (2008), "Williamson matrices up to order 59".
3. A prime power w = 1 mod 4 with a symmetric Hadamard matrix of order (w - 1) / 2. Miyamoto (1991), "A construction of
   Hadamard matrices"; Seberry and Yamada (1992), "Hadamard matrices, sequences, and block designs".

Shape suffix: W = w.
"""

from typing import TypeAlias

import numpy as np

from statsvc.numerics.hadamard import paley, sylvester
from statsvc.numerics.hadamard.arrays import circulant
from statsvc.numerics.hadamard.cyclotomic import conference_circulants, squares_and_others
from statsvc.numerics.hadamard.family import Signs
from statsvc.numerics.hadamard.galois import prime_power

Quadruple: TypeAlias = tuple[Signs, Signs, Signs, Signs]

# First rows up to the middle; the other half mirrors them. Only orders that no formula here gives.
CIRCULANTS = {
    11: ("++----", "++-+-+", "++-++-", "+-++--"),
    23: ("++---+---+-+", "+-++-++--+++", "+++---++-+-+", "+++-+++-+---"),
    43: ("++---++++-+--+--++----", "+++-+-++--+-+-++++-+--", "++-++++++----+-+--++-+", "+---++--++++-+-+++-++-"),
}


def has_quadruple(w: int) -> bool:
    """Whether there are four Williamson-type matrices of order w here. Nothing is built to answer."""
    return turyn(w) or w in CIRCULANTS or miyamoto(w)


def quadruple(w: int) -> Quadruple:
    """A_WW, B_WW, C_WW, D_WW, each [w, w] int8, for a w that `has_quadruple` accepts."""
    if turyn(w):
        return from_conference_matrix(w)
    if w in CIRCULANTS:
        A, B, C, D = (circulant(mirrored(half, w)) for half in CIRCULANTS[w])
        return A, B, C, D
    return from_symmetric_hadamard(w)


def turyn(w: int) -> bool:
    """Whether 2 w - 1 is a prime power and 1 mod 4, or w = 1."""
    return w == 1 or (w > 0 and w % 2 == 1 and prime_power(2 * w - 1) is not None)


def from_conference_matrix(w: int) -> Quadruple:
    """I + A, -I + A, B and B for the blocks A and B of a symmetric conference matrix of order 2 w."""
    if w == 1:
        one = np.ones((1, 1), np.int8)
        return one, one, one, one
    A, B = (circulant(row) for row in conference_circulants(2 * w - 1))
    unit = np.eye(w, dtype=np.int8)
    return unit + A, A - unit, B, B


def mirrored(half: str, w: int) -> Signs:
    """The first row [w] of a symmetric circulant from its places 0 .. (w - 1) / 2."""
    signs = np.array([1 if sign == "+" else -1 for sign in half], np.int8)
    return signs[np.minimum(np.arange(w), w - np.arange(w))]


def miyamoto(w: int) -> bool:
    """Whether w is a prime power, 1 mod 4, and a symmetric Hadamard matrix of order (w - 1) / 2 is at hand."""
    return w % 4 == 1 and prime_power(w) is not None and symmetric_factors((w - 1) // 2) is not None


def symmetric_factors(m: int) -> tuple[int, int] | None:
    """(s, m / s) for the smallest power of two s such that m / s is 1 or a Paley II order."""
    s = 1
    while m % s == 0:
        if m == s or paley.type_two(m // s):
            return s, m // s
        s *= 2
    return None


def from_symmetric_hadamard(w: int) -> Quadruple:
    """Each matrix is a corner, a border and an inner block of order w - 1, made of 2 x 2 blocks.

    With J all ones, L = [[1, -1], [-1, 1]], J L = 0, the circulants C1 and C2 of `squares_and_others` and a symmetric
    Hadamard matrix K of order (w - 1) / 2, the inner blocks are C1 (x) J + I (x) L, C2 R (x) J, and twice K (x) L.
    """
    M = (w - 1) // 2
    s, core = symmetric_factors(M) or (M, 1)
    K = np.kron(sylvester.build(s), paley.build_type_two(core) if core > 1 else np.ones((1, 1), np.int8))
    c1_M, c2_M = squares_and_others(w)
    J = np.ones((2, 2), np.int8)
    L = np.array([[1, -1], [-1, 1]], np.int8)
    first = np.kron(circulant(c1_M), J) + np.kron(np.eye(M, dtype=np.int8), L)
    second = np.kron(circulant(c2_M)[:, ::-1], J)
    both = bordered(1, np.kron(K, L))
    # Rows of the first inner block sum to -2 and all others to 0: one corner of the other sign balances the border.
    return bordered(-1, first), bordered(1, second), both, both


def bordered(corner: int, inner: Signs) -> Signs:
    """The inner matrix with ones above and to the left of it, and the corner."""
    matrix = np.ones((len(inner) + 1, len(inner) + 1), np.int8)
    matrix[0, 0] = corner
    matrix[1:, 1:] = inner
    return matrix
