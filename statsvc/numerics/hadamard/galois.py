"""Finite fields GF(p^m), as much of them as the constructions need.

An element is an integer 0 <= a < p^m whose digits in base p are the coefficients of a polynomial over GF(p),
constant term first. Products are reduced by an irreducible polynomial that is found by search. Everything is
integer arithmetic: squares in float32 are wrong from q = 4099 on, because (q - 1)^2 no longer fits 24 bits.
"""

from dataclasses import dataclass
from itertools import count, product

import numpy as np
from numpy.typing import NDArray

from statsvc.numerics.hadamard.family import Signs

Elements = NDArray[np.int64]


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p^m and p prime, or None when q is no prime power."""
    if q < 2:
        return None
    p = next(d for d in count(2) if d * d > q or q % d == 0)
    if q % p:
        return q, 1  # no divisor up to the square root
    m = 0
    while q % p == 0:
        q, m = q // p, m + 1
    return (p, m) if q == 1 else None


def divides(divisor: tuple[int, ...], polynomial: tuple[int, ...], p: int) -> bool:
    """Whether one monic polynomial over GF(p) divides another; coefficients constant term first."""
    rest = list(polynomial)
    degree = len(divisor) - 1
    for shift in reversed(range(len(polynomial) - degree)):
        lead = rest[shift + degree]
        for i, c in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - lead * c) % p
    return not any(rest)


def irreducible(p: int, m: int) -> tuple[int, ...]:
    """The first monic irreducible polynomial of degree m over GF(p): m + 1 coefficients, constant term first."""

    def monic(degree: int) -> list[tuple[int, ...]]:
        return [(*reversed(low), 1) for low in product(range(p), repeat=degree)]

    divisors = [d for degree in range(1, m // 2 + 1) for d in monic(degree)]
    return next(f for f in monic(m) if not any(divides(d, f, p) for d in divisors))


@dataclass(frozen=True, slots=True)
class Field:
    """The field with p^m elements.

    p        the prime characteristic
    m        the degree over GF(p)
    modulus  m + 1 coefficients of a monic irreducible polynomial, constant term first
    """

    p: int
    m: int
    modulus: tuple[int, ...]

    @classmethod
    def of_order(cls, q: int) -> "Field":
        """GF(q). The modulus is a function of q alone, so the numbering of the elements is too."""
        found = prime_power(q)
        if found is None:
            raise ValueError(f"a finite field has a prime power of elements, not {q}")
        p, m = found
        return cls(p, m, irreducible(p, m))

    @property
    def order(self) -> int:
        """The number of elements, q = p^m."""
        return int(self.p**self.m)

    def subtract(self, a: Elements, b: Elements) -> Elements:
        """a - b elementwise; the shapes broadcast."""
        difference = (a - b) % self.p
        for i in range(1, self.m):
            # a // p^i is not digit i of a, but equals it modulo p.
            place = self.p**i
            difference = difference + (a // place - b // place) % self.p * place
        return difference

    def add(self, a: Elements, b: Elements) -> Elements:
        """a + b elementwise; the shapes broadcast."""
        return self.subtract(a, self.subtract(np.zeros_like(b), b))

    def multiply(self, a: Elements, b: Elements) -> Elements:
        """a * b elementwise; the shapes broadcast."""
        p, m = self.p, self.m
        terms = [np.zeros_like(a * b) for _ in range(2 * m - 1)]  # coefficients of the product, x^0 first
        for i in range(m):
            for j in range(m):
                terms[i + j] = (terms[i + j] + (a // p**i % p) * (b // p**j % p)) % p
        for degree in reversed(range(m, 2 * m - 1)):
            for i in range(m):  # x^m = -(lower terms of the modulus)
                low = degree - m + i
                terms[low] = (terms[low] - terms[degree] * self.modulus[i]) % p
        reduced = terms[0]
        for i in range(1, m):
            reduced = reduced + terms[i] * p**i
        return reduced

    def quadratic_character(self) -> Signs:
        """chi_Q [q] int8: 0 at zero, 1 at the other squares, -1 elsewhere; q odd."""
        elements_Q = np.arange(self.order, dtype=np.int64)
        chi_Q = np.full(self.order, -1, np.int8)
        chi_Q[self.multiply(elements_Q, elements_Q)] = 1
        chi_Q[0] = 0
        return chi_Q
