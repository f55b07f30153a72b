"""Orders 1, 2, 4, 8, ...: the Kronecker powers of [[1, 1], [1, -1]].

Source: Sylvester (1867), "Thoughts on inverse orthogonal matrices"; arXiv:2410.01680, A.1.1.
"""

import numpy as np

from statsvc.numerics.hadamard.family import Signs


def covers(n: int) -> bool:
    """Whether n is a power of two, 1 included."""
    return n >= 1 and n & (n - 1) == 0


def name(n: int) -> str:
    """S(n)."""
    return f"S({n})"


def build(n: int) -> Signs:
    """H_NN [n, n] int8, symmetric, by doubling: H(2m) = [[H, H], [H, -H]]."""
    H_NN = np.ones((n, n), np.int8)
    m = 1
    while m < n:
        H_NN[:m, m : 2 * m] = H_NN[:m, :m]
        H_NN[m : 2 * m, :m] = H_NN[:m, :m]
        H_NN[m : 2 * m, m : 2 * m] = -H_NN[:m, :m]
        m *= 2
    return H_NN
