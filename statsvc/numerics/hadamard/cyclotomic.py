"""The quadratic character of a field, laid out as circulants. Miyamoto's and Turyn's constructions start from them.

Shape suffixes: M = (q - 1) / 2 squares other than 0, W = (q + 1) / 2,
P = powers of an element.
"""

import numpy as np
from numpy.typing import NDArray

from statsvc.numerics.hadamard.family import Signs
from statsvc.numerics.hadamard.galois import Field


def squares_and_others(q: int) -> tuple[Signs, Signs]:
    """First rows c1_M and c2_M of circulants with C1 C1^T + C2 C2^T = q I - 2 J, for a prime power q = 1 mod 4.

    With the powers of a primitive element g in the order g^0, g^2, ..., then g^1, g^3, ..., the character of all
    differences of elements other than 0 is [[C1, C2], [C2^T, -C1]]. C1 is symmetric and has the zeros, C2 R with
    the columns reversed is symmetric. Rows of C1 sum to -1 and rows of C2 to 0.
    """
    field = Field.of_order(q)
    powers = primitive_powers(field)
    differences = field.quadratic_character()[field.subtract(np.ones_like(powers), powers)]
    return differences[0::2], differences[1::2]


def primitive_powers(field: Field) -> NDArray[np.int64]:
    """[q - 1] the powers g^0, g^1, ... of the first primitive element g of the field."""
    for g in range(2, field.order):
        powers = np.ones(1, np.int64)
        step = np.full(1, g)  # g^len(powers)
        while len(powers) < field.order - 1:
            powers = np.append(powers, field.multiply(powers, step))
            step = field.multiply(step, step)
        powers = powers[: field.order - 1]
        if (powers == 1).sum() == 1:
            return powers
    raise ValueError(f"GF({field.order}) has no primitive element beyond 0 and 1")


def conference_circulants(q: int) -> tuple[Signs, Signs]:
    """First rows a_W and b_W of symmetric circulants with A^2 + B^2 = q I, for a prime power q = 1 mod 4.

    a_W[0] is the only zero. [[A, B], [B, -A]] is Paley's symmetric conference matrix in another order: that of
    the powers of an element x + s of GF(q^2), where s^2 is no square in GF(q).
    Source: Turyn (1972), "An infinite class of Williamson matrices".
    """
    W = (q + 1) // 2
    field = Field.of_order(q)
    chi_Q = field.quadratic_character()
    imaginary_PQ = imaginary_parts(field, np.flatnonzero(chi_Q == -1)[:1], 5 * W)
    # A power is in GF(q) when its exponent is a multiple of q + 1, and for the right x at no other exponent.
    x = np.flatnonzero(imaginary_PQ[1 : 2 * W].all(axis=0))[0]
    chi_P = chi_Q[imaginary_PQ[:, x]]
    fours_W = 4 * np.arange(W)
    return chi_P[fours_W], chi_P[fours_W + W]


def imaginary_parts(field: Field, nonsquare: NDArray[np.int64], powers: int) -> NDArray[np.int64]:
    """[powers, q] the coefficients of s in (x + s)^0, (x + s)^1, ... for every x in GF(q); s^2 is the nonsquare."""
    x_Q = np.arange(field.order, dtype=np.int64)
    real_Q, imaginary_Q = np.ones_like(x_Q), np.zeros_like(x_Q)
    imaginary_PQ = np.empty((powers, field.order), np.int64)
    for power in range(powers):
        imaginary_PQ[power] = imaginary_Q
        real_Q, imaginary_Q = (
            field.add(field.multiply(real_Q, x_Q), field.multiply(imaginary_Q, nonsquare)),
            field.add(real_Q, field.multiply(imaginary_Q, x_Q)),
        )
    return imaginary_PQ
