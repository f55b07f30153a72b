"""Orders q + 1 for a prime power q = 3 mod 4 (type I) and 2 (q + 1) for a prime power q = 1 mod 4 (type II).

Both types share one line of FAMILIES because the paper prefers neither: 1152 = S(32) x P2(36) stands there
although S(16) x P1(72) exists. An order that has both types, such as 20, is built by type I.

Source: Paley (1933), "On orthogonal matrices"; arXiv:2410.01680, A.1.1.
"""

import numpy as np

from statsvc.numerics.hadamard.family import Signs
from statsvc.numerics.hadamard.galois import Field, prime_power

BLOCK = 256  # rows of differences held at once as int64: 17 MB at q = 8191


def type_one(n: int) -> bool:
    """Whether n = q + 1 for a prime power q = 3 mod 4."""
    return n % 4 == 0 and prime_power(n - 1) is not None


def type_two(n: int) -> bool:
    """Whether n = 2 (q + 1) for a prime power q = 1 mod 4."""
    return n % 8 == 4 and prime_power(n // 2 - 1) is not None


def covers(n: int) -> bool:
    """Whether n is an order of either type."""
    return type_one(n) or type_two(n)


def name(n: int) -> str:
    """P1(n) or P2(n)."""
    return f"P1({n})" if type_one(n) else f"P2({n})"


def build(n: int) -> Signs:
    """H_NN [n, n] int8 from the bordered Jacobsthal matrix C, [q + 1, q + 1] with a zero diagonal.

    Type I: C + C^T = 0, and H = I + C. Type II: C = C^T, and every entry of C becomes a 2 x 2 block.
    """
    if type_one(n):
        H_NN = bordered_jacobsthal(n - 1, border=-1)
        np.fill_diagonal(H_NN, 1)
        return H_NN
    return build_type_two(n)


def build_type_two(n: int) -> Signs:
    """The type II matrix H_NN [n, n] int8, which is symmetric, whether or not order n has type I too."""
    C = bordered_jacobsthal(n // 2 - 1, border=1)
    off_diagonal = np.array([[1, 1], [1, -1]], np.int8)
    diagonal = np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(C, off_diagonal) + np.kron(np.eye(len(C), dtype=np.int8), diagonal)


def bordered_jacobsthal(q: int, border: int) -> Signs:
    """C [q + 1, q + 1] int8: a zero, a row of ones, a column of `border`, and chi(a - b) for a, b in GF(q).

    C C^T = q I when `border` is chi(-1), which is -1 for q = 3 mod 4 and 1 for q = 1 mod 4.
    """
    field = Field.of_order(q)
    chi_Q = field.quadratic_character()
    elements_Q = np.arange(q, dtype=np.int64)
    C = np.zeros((q + 1, q + 1), np.int8)
    C[0, 1:] = 1
    C[1:, 0] = border
    for top in range(0, q, BLOCK):
        rows = elements_Q[top : top + BLOCK, None]
        C[1 + top : 1 + top + len(rows), 1:] = chi_Q[field.subtract(rows, elements_Q)]
    return C
