"""Orders a b / 2 from two Hadamard matrices of orders a and b, both multiples of 4: half of a Kronecker product.

Source: Agaian (1985), "Hadamard matrices and their applications".
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from statsvc.numerics.hadamard import kronecker
from statsvc.numerics.hadamard.family import Family, Signs


@dataclass(frozen=True, slots=True)
class Agaian:
    """The family over others.

    earlier  the families that stand before this one and give both factors
    """

    earlier: tuple[Family, ...]

    def covers(self, n: int) -> bool:
        """Whether n = a b / 2 for known orders a and b."""
        return orders(n, self.earlier) is not None

    def name(self, n: int) -> str:
        """A(a,b)."""
        a, b = self.parts(n)
        return f"A({a},{b})"

    def build(self, n: int) -> Signs:
        """H_NN [n, n] int8 from the left and right half of one matrix and the upper and lower half of the other."""
        a, b = self.parts(n)
        first, second = (kronecker.matrix(order, self.earlier) for order in (a, b))
        left, right = first[:, : a // 2], first[:, a // 2 :]
        return agaian_product(left, right, second[: b // 2], second[b // 2 :])

    def parts(self, n: int) -> tuple[int, int]:
        """a and b of an order that `covers` accepts."""
        found = orders(n, self.earlier)
        if found is None:
            raise ValueError(f"{n} is not half the product of two known orders")
        return found


@cache
def orders(n: int, families: tuple[Family, ...]) -> tuple[int, int] | None:
    """The smallest a and its b with n = a b / 2 that the families make, both multiples of 4."""
    if n < 8 or n % 8:
        return None
    quarters = [d for d in kronecker.divisors(n // 8) if d * d <= n // 8]
    pairs = ((4 * d, n // (2 * d)) for d in quarters)
    return next((pair for pair in pairs if all(kronecker.factorize(order, families) for order in pair)), None)


def agaian_product(left: Signs, right: Signs, upper: Signs, lower: Signs) -> Signs:
    """(left + right) / 2 (x) upper + (left - right) / 2 (x) lower, for [a, a/2] twice and [b/2, b] twice.

    The halves of the sum and of the difference are 0 at complementary places, so all entries are +-1; the cross terms
    vanish because the rows of `upper` are orthogonal to those of `lower`.
    """
    return np.kron((left + right) // 2, upper) + np.kron((left - right) // 2, lower)
