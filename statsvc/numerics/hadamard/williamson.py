"""Orders 4 w: four Williamson-type matrices of order w in Williamson's array. New orders: 92, 172, ...

Sources: Williamson (1944), "Hadamard's determinant theorem and the sum of four squares"; those of `quadruples`.
"""

import numpy as np

from statsvc.numerics.hadamard.arrays import cooper_wallis
from statsvc.numerics.hadamard.family import Signs
from statsvc.numerics.hadamard.quadruples import has_quadruple, quadruple


def covers(n: int) -> bool:
    """Whether n = 4 w for the order w of a quadruple."""
    return n % 4 == 0 and has_quadruple(n // 4)


def name(n: int) -> str:
    """W(n)."""
    return f"W({n})"


def build(n: int) -> Signs:
    """H_NN [n, n] int8: [[A, -B, -C, -D], [B, A, -D, C], [C, D, A, -B], [D, -C, B, A]]."""
    # The array of T-rows of length 1: 1, 0, 0, 0.
    return cooper_wallis(np.eye(4, 1, dtype=np.int8), quadruple(n // 4))
