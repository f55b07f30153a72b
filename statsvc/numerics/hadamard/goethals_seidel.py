"""Orders 4 v: four circulants of order v in the Goethals-Seidel array, among them 428 and 412.

The circulants come from T-rows, as T1 + T2 + T3 + T4 and three more sums, or from supplementary difference sets of a
prime order that are unions of orbits under a multiplier.

Sources: Goethals and Seidel (1970), "A skew Hadamard matrix of order 36"; those at the table and in `t_rows`.
"""

import numpy as np

from statsvc.numerics.hadamard.arrays import cooper_wallis, goethals_seidel
from statsvc.numerics.hadamard.family import Signs
from statsvc.numerics.hadamard.t_rows import LENGTHS, t_rows

# v: (h, signs of the four first rows). All places x, h x, h^2 x, ... modulo v have one sign. The signs stand in the
# order of the orbits' smallest members, so the first is that of place 0.
# 127, 163: Djokovic (1992), "Construction of some new Hadamard matrices".
# 103, 151: Djokovic (1994), "Five new orders for Hadamard matrices of skew type".
# 239: Djokovic (1994), "Two Hadamard matrices of order 956 of Goethals-Seidel type".
# 191: Djokovic (2008), "Hadamard matrices of order 764 exist".
# 251, 631: Djokovic, Golubitsky and Kotsireas (2014), "Some new orders of Hadamard and skew-Hadamard matrices".
ORBIT_SIGNS = {
    103: (
        46,
        [
            "+++---+--+----+++-+-+-+-++-+-++--++",
            "++-+++----++------+--+-++-+-+++++-+",
            "+---+++-+--+-+----+-+++-+--+---+-++",
            "+----+++++---+----++++-+-+------+-+",
        ],
    ),
    127: (2, ["+-+++------+++-+-++", "+-++-+----++-+-++--", "+-+-+-++-+-+-+-+---", "+++--+-++----+++---"]),
    151: (
        8,
        [
            "+-++--+++--+++-+-+-+-+--+-+--+-",
            "++-+-+++++-++-++-+-----+++---++",
            "+--------+++++++--++-+---++-+-+",
            "+++-++-+----+++-++---++-+-+----",
        ],
    ),
    163: (38, ["+--+--+--++-+++-++-", "+-++++++--++-----++", "+-++-+-+++++----+--", "+++++--++----++----"]),
    191: (
        39,
        [
            "++++++--+++-++++-+++-----++-----+--++-+",
            "+++-++-+--++++---+++-+-+++++--+--+-----",
            "+-+-+-++++-+-++-+-++--+--++++--++-----+",
            "+++-+--++-+---+-+--++++-++--++---+---+-",
        ],
    ),
    239: (
        10,
        [
            "+----+++-+-++-+-+++++----+--+++-++-",
            "+-+++++-++---+++--+-++-----+-+---++",
            "++--+--+++++-----+-+--++--++++++---",
            "+--+--++++-+---++--+-++---+--+--+-+",
        ],
    ),
    251: (
        20,
        [
            "++-+----+------+++-+-++++-+++-++-+-+-+-----+++++-+-",
            "++-+++-++++-+++------++-++--++---+-+---++-+-++--++-",
            "+--+-+-++---++-+--+-++++++-+--+++---+++--++-++-++--",
            "++--+-+--+++++--++--+-+--+++++-++-++-+-----++-+-++-",
        ],
    ),
    631: (
        8,
        [
            "+----+--++----+--++--+-++-+-++--++++-+++-++",
            "+--------+-++-++++---+--+-+--+-+++++--+++-+",
            "+----+-----------++++-++-++++---++-+-++++++",
            "+------+++---+----+--++++---++++-++-++-+-++",
        ],
    ),
}


def covers(n: int) -> bool:
    """Whether n = 4 v for an order of the table or a length of T-rows."""
    return n % 4 == 0 and (n // 4 in ORBIT_SIGNS or n // 4 in LENGTHS)


def name(n: int) -> str:
    """GS(n)."""
    return f"GS({n})"


def build(n: int) -> Signs:
    """H_NN [n, n] int8: [[A, B R, C R, D R], ...] with circulants A, B, C, D and the back identity R."""
    v = n // 4
    if v in ORBIT_SIGNS:
        return goethals_seidel(first_rows(v))
    return cooper_wallis(t_rows(v), [np.ones((1, 1), np.int8)] * 4)


def first_rows(v: int) -> Signs:
    """[4, v] int8, the first rows of the four circulants of order v."""
    multiplier, rows = ORBIT_SIGNS[v]
    rows_4V = np.zeros((4, v), np.int8)
    orbit = 0
    for place in range(v):
        if not rows_4V[0, place]:
            image = place
            while not rows_4V[0, image]:
                rows_4V[:, image] = [1 if row[orbit] == "+" else -1 for row in rows]
                image = image * multiplier % v
            orbit += 1
    return rows_4V
