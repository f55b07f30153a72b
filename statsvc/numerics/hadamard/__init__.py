"""Hadamard matrices: entries +-1, rows orthogonal. PHI-S rotates with them, so that all channels get one variance.

    hadamard(1280)        the matrix
    construction(1280)    "S(64) x P1(20)", how it is built: other choices give other, equally valid targets
    constructible(1280)   True; NoHadamardMatrix names the nearest orders where it is False

FAMILIES is the table of constructions. With Kronecker products it reaches 960 of the 1,024 multiples of 4 up to 4096:

    family             orders                          name         brings   files
    Sylvester          2^k                             S(64)            11   sylvester
    Paley              q + 1, 2 (q + 1)                P1(20)          681   paley, galois
    Williamson         4 w                             W(92)            35   williamson, quadruples, cyclotomic
    Goethals-Seidel    4 v                             GS(428)          42   goethals_seidel, t_rows
    Baumert-Hall       4 t w                           BH(12,73)       146   baumert_hall, arrays
    Miyamoto           4 q, from order q - 1           M(436)           45   miyamoto
    Agaian             a b / 2, from orders a and b    A(20,412)         0   agaian (nine from 4120 to 8192)

A new family is one new file with the three functions of `family.Family` and one line at the end of FAMILIES.
`kronecker` multiplies the families and says which of several ways is taken; `check` proves every result.

Source: Sylvester (1867); Paley (1933); arXiv:2410.01680, A.1.1; every file names its own.
"""

from itertools import count

from statsvc.errors import NoHadamardMatrix
from statsvc.numerics.hadamard import baumert_hall, goethals_seidel, kronecker, paley, sylvester, williamson
from statsvc.numerics.hadamard.agaian import Agaian
from statsvc.numerics.hadamard.check import check
from statsvc.numerics.hadamard.family import Family, Signs
from statsvc.numerics.hadamard.miyamoto import Miyamoto

__all__ = ["FAMILIES", "constructible", "construction", "hadamard"]

DIRECT: tuple[Family, ...] = (
    sylvester,  # stands first: `kronecker` splits off powers of two before it looks for anything else
    paley,
    williamson,
    goethals_seidel,
    baumert_hall,
)
WITH_MIYAMOTO: tuple[Family, ...] = (*DIRECT, Miyamoto(DIRECT))
FAMILIES: tuple[Family, ...] = (*WITH_MIYAMOTO, Agaian(WITH_MIYAMOTO))


def hadamard(n: int) -> Signs:
    """A fresh H_NN [n, n] int8, entries +-1, H_NN @ H_NN.T = n I exactly; the same matrix for the same n.

    Divide by sqrt(n) for a rotation. Takes n^2 bytes for the result and four times that for its check.
    Raises NoHadamardMatrix, naming the nearest orders, when no construction is known.
    """
    H_NN = kronecker.build(factors_of(n))
    check(H_NN, n)
    return H_NN


def construction(n: int) -> str:
    """How hadamard(n) is built, e.g. "S(2) x P1(384)". Raises NoHadamardMatrix like hadamard(n)."""
    return " x ".join(family.name(order) for family, order in factors_of(n))


def constructible(n: int) -> bool:
    """Whether hadamard(n) exists; nothing is built to find out."""
    return kronecker.factorize(n, FAMILIES) is not None


def factors_of(n: int) -> tuple[kronecker.Factor, ...]:
    """The factors of order n, or NoHadamardMatrix."""
    factors = kronecker.factorize(n, FAMILIES)
    if factors is None:
        below = next((m for m in range(n - 1, 0, -1) if constructible(m)), "none")
        above = next(m for m in count(max(n + 1, 1)) if constructible(m))  # ends: powers of two
        # Zero-padding to the next order is common elsewhere, but the cropped matrix is not orthogonal.
        reason = (
            "no construction is known here"
            if n > 0 and n % 4 == 0
            else "the order of a Hadamard matrix is 1, 2 or a positive multiple of 4"
        )
        raise NoHadamardMatrix(
            f"no Hadamard matrix of order {n}: {reason}; nearest orders: {below} below, {above} above"
        )
    return factors
