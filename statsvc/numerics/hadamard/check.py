"""The exact check that every matrix passes before it is handed out."""

import numpy as np

from statsvc.numerics.hadamard.family import Signs

BLOCK = 1024  # rows of the Gram matrix held at once: 34 MB at n = 8192


def check(H_NN: Signs, n: int) -> None:
    """Raise unless H_NN is [n, n], its entries are +-1 and H_NN @ H_NN.T = n I, in exact integers.

    A failure is a mistake in a family, not in a call: an ArithmeticError that no caller is meant to handle.
    """
    if H_NN.shape != (n, n):
        raise ArithmeticError(f"order {n} was built with shape {H_NN.shape}")
    if not ((H_NN == 1) | (H_NN == -1)).all():
        raise ArithmeticError(f"order {n} was built with entries other than +-1")
    # The float32 product is exact: its terms are +-1, so every partial sum, in whatever order BLAS takes them, is an
    # integer of at most n, and float32 holds every integer up to 2^24. An int64 product would bypass BLAS.
    H32_NN = H_NN.astype(np.float32)
    for top in range(0, n, BLOCK):
        # The Gram matrix is symmetric: its upper triangle is enough and costs half.
        gram = H32_NN[top : top + BLOCK] @ H32_NN[top:].T
        gram[np.diag_indices(len(gram))] -= n
        if gram.any():
            row, column = np.argwhere(gram)[0] + top
            raise ArithmeticError(f"order {n} was built with rows {row} and {column} not orthogonal")
