"""Orders 4 q for a prime power q = 1 mod 4 such that a Hadamard matrix of order q - 1 is known.

Source: Miyamoto (1991), "A construction of Hadamard matrices".
"""

from dataclasses import dataclass

import numpy as np

from statsvc.numerics.hadamard import kronecker
from statsvc.numerics.hadamard.arrays import circulant
from statsvc.numerics.hadamard.cyclotomic import squares_and_others
from statsvc.numerics.hadamard.family import Family, Signs
from statsvc.numerics.hadamard.galois import prime_power

# The signs of the 4 x 4 blocks: a Hadamard matrix that is I plus a skew part.
BLOCK_SIGNS = np.array([[1, 1, 1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1], [-1, 1, -1, 1]], np.int8)


@dataclass(frozen=True, slots=True)
class Miyamoto:
    """The family over others.

    earlier  the families that stand before this one; they and this one itself give the matrix of order q - 1
    """

    earlier: tuple[Family, ...]

    def covers(self, n: int) -> bool:
        """Whether n = 4 q for a prime power q = 1 mod 4 and order q - 1 is known."""
        q = n // 4
        if n % 16 != 4 or prime_power(q) is None:
            return False
        return kronecker.factorize(q - 1, self.all) is not None

    def name(self, n: int) -> str:
        """M(n)."""
        return f"M({n})"

    def build(self, n: int) -> Signs:
        """H_NN [n, n] int8: 4 x 4 blocks, each with a corner, a border and an inner block of order q - 1.

        Inner blocks are U (x) J + V (x) L with J all ones, L = [[1, -1], [-1, 1]] and J L = 0. U holds the character
        of the field and has its zeros where V has the identity; elsewhere V holds the quarters of K, order q - 1.
        """
        q = n // 4
        K = kronecker.matrix(q - 1, self.all)
        M = (q - 1) // 2
        K1, K2, K3, K4 = K[:M, :M], K[:M, M:], K[M:, :M], -K[M:, M:]
        C1, C2 = (circulant(row) for row in squares_and_others(q))
        I, O = np.eye(M, dtype=np.int8), np.zeros((M, M), np.int8)  # noqa: E741
        U = [[-C1, C2, O, O], [C2.T, -C1, O, O], [O, O, -C1, C2], [O, O, C2.T, -C1]]
        V = [[I, O, K1, K2], [O, I, K3, K4], [K1.T, K3.T, I, O], [K2.T, K4.T, O, I]]
        H = np.empty((4, q, 4, q), np.int8)
        for i in range(4):
            for j in range(4):
                u, v = U[i][j], V[i][j]
                H[i, 0, j, 0] = BLOCK_SIGNS[i, j]
                # Rows of the diagonal inner blocks sum to 2 and all others to 0; this border balances them.
                H[i, 1:, j, 0] = H[i, 0, j, 1:] = -BLOCK_SIGNS[i, j] if i == j else BLOCK_SIGNS[i, j]
                H[i, 1::2, j, 1::2] = H[i, 2::2, j, 2::2] = BLOCK_SIGNS[i, j] * (u + v)
                H[i, 1::2, j, 2::2] = H[i, 2::2, j, 1::2] = BLOCK_SIGNS[i, j] * (u - v)
        return H.reshape(n, n)

    @property
    def all(self) -> tuple[Family, ...]:
        """The families that give the matrix of order q - 1. This ends: each step divides the order by more than 4."""
        return (*self.earlier, self)
