"""Orders 4 t w: Williamson-type matrices of order w in the Baumert-Hall array of order 4 t that T-rows make.

A longer table of T-rows or of quadruples could change which t and w an old order is split into. New entries therefore
belong into a family of their own at the end of FAMILIES.

Sources: Baumert and Hall (1965), "A new construction for Hadamard matrices"; Cooper and Wallis (1972), "A construction
for Hadamard arrays"; Turyn (1974), "Hadamard matrices, Baumert-Hall units, four-symbol sequences, pulse compression,
and surface wave encodings".
"""

from statsvc.numerics.hadamard.arrays import cooper_wallis
from statsvc.numerics.hadamard.family import Signs
from statsvc.numerics.hadamard.quadruples import has_quadruple, quadruple
from statsvc.numerics.hadamard.t_rows import LENGTHS, t_rows


def split(n: int) -> tuple[int, int] | None:
    """The first t > 1 of LENGTHS with n = 4 t w for the order w > 1 of a quadruple, and this w."""
    for t in LENGTHS[1:]:
        w, rest = divmod(n, 4 * t)
        if rest == 0 and w > 1 and has_quadruple(w):
            return t, w
    return None


def covers(n: int) -> bool:
    """Whether n = 4 t w for T-rows and a quadruple, both longer than 1."""
    return split(n) is not None


def name(n: int) -> str:
    """BH(4t,w): the array's order and the blocks' order."""
    t, w = parts(n)
    return f"BH({4 * t},{w})"


def build(n: int) -> Signs:
    """H_NN [n, n] int8, an array [4 t, 4 t] of blocks [w, w]."""
    t, w = parts(n)
    return cooper_wallis(t_rows(t), quadruple(w))


def parts(n: int) -> tuple[int, int]:
    """t and w of an order that `covers` accepts."""
    found = split(n)
    if found is None:
        raise ValueError(f"{n} is not 4 t w for T-rows of length t and Williamson-type matrices of order w")
    return found
