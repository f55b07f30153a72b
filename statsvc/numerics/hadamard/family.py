"""What a family of Hadamard matrices has to offer. A family is a module (or any object) with three functions.

Shape suffixes in this package: N = order of the matrix, Q = elements of the field GF(q).
"""

from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Signs: TypeAlias = NDArray[np.int8]


class Family(Protocol):
    """A construction that gives a Hadamard matrix for some orders, by itself and not as a product."""

    def covers(self, n: int) -> bool:
        """Whether the family has the order n. Any integer may be asked; nothing is built to answer."""

    def name(self, n: int) -> str:
        """How order n is built, e.g. "P1(384)". Artifacts record it: one name, one matrix, for ever."""

    def build(self, n: int) -> Signs:
        """A fresh H_NN [n, n] int8 with entries +-1 and H_NN @ H_NN.T = n I, for an n that `covers` accepts."""
