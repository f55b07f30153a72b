"""Two ways to fill an array with blocks: the Goethals-Seidel array, and four T-rows with four Williamson-type blocks.

Shape suffixes: V = length of the rows, W = order of the blocks.
Source: Goethals and Seidel (1970), "A skew Hadamard matrix of order 36"; Cooper and Wallis (1972), "A construction for
Hadamard arrays".
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from statsvc.numerics.hadamard.family import Signs


def circulant(row_V: NDArray[np.int8]) -> NDArray[np.int8]:
    """[V, V] whose rows are row_V, each shifted one place further to the right."""
    steps = np.arange(len(row_V))
    rows: NDArray[np.int8] = row_V[(steps - steps[:, None]) % len(row_V)]
    return rows


def goethals_seidel(rows_4V: NDArray[np.int8]) -> NDArray[np.int8]:
    """[4 V, 4 V] from the first rows of four circulants A, B, C, D with entries 0 and +-1.

    Its rows are orthogonal when A A^T + B B^T + C C^T + D D^T is a multiple of I: circulants commute, and with the
    back identity R every product such as A (B R)^T is symmetric, so that all other terms cancel in pairs.
    """
    A, B, C, D = (circulant(row) for row in rows_4V)
    # Reversing the columns multiplies by R from the right.
    BR, CR, DR = (block[:, ::-1] for block in (B, C, D))
    BtR, CtR, DtR = (block.T[:, ::-1] for block in (B, C, D))
    return np.block([[A, BR, CR, DR], [-BR, A, DtR, -CtR], [-CR, -DtR, A, BtR], [-DR, CtR, -BtR, A]])


def cooper_wallis(t_rows_4T: NDArray[np.int8], blocks_4WW: Sequence[Signs]) -> Signs:
    """H_NN [4 T W, 4 T W] int8 from four T-rows and four Williamson-type matrices.

    The T-rows are the first rows of circulants with entries 0 and +-1 of which exactly one is not 0 at each place,
    and with T1 T1^T + ... + T4 T4^T = T I. They make a Baumert-Hall array of order 4 T: an array in four symbols,
    each T times in each row, with orthogonal rows for any values that commute. The symbols then give way to blocks.
    """
    T1, T2, T3, T4 = t_rows_4T
    units = ((T1, T2, T3, T4), (T2, -T1, T4, -T3), (T3, -T4, -T1, T2), (T4, T3, -T2, -T1))
    order = 4 * t_rows_4T.shape[1] * len(blocks_4WW[0])
    H_NN = np.zeros((order, order), np.int8)
    for unit_4T, block_WW in zip(units, blocks_4WW, strict=True):
        H_NN += np.kron(goethals_seidel(np.stack(unit_4T)), block_WW)
    return H_NN
