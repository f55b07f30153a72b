"""Which Kronecker product of family orders makes an order: one deterministic rule, decided without building.

The product of two Hadamard matrices is one again, so an order n is constructible when n = s c1 c2 ... with a
power of two s (Sylvester, the first family) and any number of orders c of the later families, the cores.
Of all such products the rule takes

1. the one that needs the shortest beginning of the table of families, so that a family added at the end brings
   new orders and never changes an order that could be built before;
2. then the fewest cores;
3. then the largest s: small cores are the cheapest to build, and a large s is what fast transforms like;
4. then the smallest first core, and for equal orders the family that stands first.

This gives the products of arXiv:2410.01680, A.1.1 for 1024, 1152, 1280 and 1408; 768 is pinned below.
"""

from collections.abc import Sequence
from functools import reduce
from math import isqrt
from operator import index
from typing import NamedTuple

import numpy as np

from statsvc.numerics.hadamard.family import Family, Signs

# Order: the s that step 3 takes first. The paper has 768 = S(2) x P1(384), with the smallest s there is, next to
# 1280 = S(64) x P1(20), with the largest; neither preference gives both.
PINNED = {768: 2}


class Factor(NamedTuple):
    """One factor of a Kronecker product."""

    family: Family
    order: int


def factorize(n: int, families: Sequence[Family]) -> tuple[Factor, ...] | None:
    """The factors of order n, left to right, or None when these families do not make n."""
    n = index(n)  # a width read from numpy becomes an int; 768.0 is a TypeError
    if n < 1:
        return None
    sylvester, *later = families
    powers = [s for s in divisors(n) if sylvester.covers(s)]
    powers.sort(key=lambda s: (s != PINNED.get(n), -s))
    for known in range(len(later) + 1):
        for cores in range(n.bit_length() // 2 + 1):  # a core is at least 4
            for s in powers:
                rest = split(n // s, cores, later[:known])
                if rest is not None:
                    return (Factor(sylvester, s), *rest) if s > 1 or not rest else rest
    return None


def split(n: int, cores: int, families: Sequence[Family]) -> tuple[Factor, ...] | None:
    """n as a product of exactly `cores` orders of these families, the smallest possible first, or None."""
    if cores == 0:
        return () if n == 1 else None
    for first in [n] if cores == 1 else divisors(n):
        family = next((family for family in families if family.covers(first)), None)
        if family is not None:
            rest = split(n // first, cores - 1, families)
            if rest is not None:
                return (Factor(family, first), *rest)
    return None


def divisors(n: int) -> list[int]:
    """Every divisor of n, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def matrix(n: int, families: Sequence[Family]) -> Signs:
    """H_NN [n, n] int8 for an order that these families make; ValueError for others."""
    factors = factorize(n, families)
    if factors is None:
        raise ValueError(f"these families do not make order {n}")
    return build(factors)


def build(factors: Sequence[Factor]) -> Signs:
    """H_NN [n, n] int8, the Kronecker product of the factors, left to right."""
    return reduce(np.kron, (factor.family.build(factor.order) for factor in factors))
