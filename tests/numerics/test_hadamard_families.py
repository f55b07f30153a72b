"""The families beyond Sylvester and Paley: their published sequences, their matrices, and which orders they add.

Shape suffixes: N = order of the matrix, T = length of T-rows, V = length of the rows of circulants.
"""

import hashlib
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from statsvc.numerics.hadamard import (
    FAMILIES,
    baumert_hall,
    constructible,
    construction,
    goethals_seidel,
    hadamard,
    kronecker,
    paley,
    sylvester,
    williamson,
)
from statsvc.numerics.hadamard.agaian import Agaian, agaian_product
from statsvc.numerics.hadamard.arrays import circulant
from statsvc.numerics.hadamard.arrays import goethals_seidel as goethals_seidel_array
from statsvc.numerics.hadamard.cyclotomic import conference_circulants, squares_and_others
from statsvc.numerics.hadamard.family import Family, Signs
from statsvc.numerics.hadamard.galois import prime_power
from statsvc.numerics.hadamard.goethals_seidel import ORBIT_SIGNS, first_rows
from statsvc.numerics.hadamard.miyamoto import Miyamoto
from statsvc.numerics.hadamard.quadruples import CIRCULANTS, has_quadruple, miyamoto, quadruple, turyn
from statsvc.numerics.hadamard.t_rows import LENGTHS, PERIODIC, t_rows

LIMIT = 4096
LATER: tuple[Family, ...] = FAMILIES[2:]
MIYAMOTO, AGAIAN = FAMILIES[5:]
SMALL = Agaian((sylvester, paley))  # one that has small orders, which the real one leaves to others


def is_hadamard(H_NN: Signs, n: int, rows: slice = slice(None)) -> bool:
    """Any two rows agree in exactly half the places: bits of Python integers, no product and no numpy sum.

    With a slice, only its rows are held against all others.
    """
    if H_NN.shape != (n, n) or not set(np.unique(H_NN).tolist()) <= {-1, 1}:
        return False
    bits = [int.from_bytes(np.packbits(row == 1).tobytes()) for row in H_NN]
    return all(2 * (bits[i] ^ bits[j]).bit_count() == n for i in range(n)[rows] for j in range(n) if i != j)


def autocorrelations(rows_4V: Signs, periodic: bool) -> list[int]:
    """The sums over four rows of row[i] * row[i + s] for s = 1, 2, ..."""
    rows, length = rows_4V.tolist(), rows_4V.shape[1]
    return [
        sum(row[i] * row[(i + s) % length] for row in rows for i in range(length if periodic else length - s))
        for s in range(1, length)
    ]


# The matrices


@pytest.mark.parametrize(
    ("family", "n"),
    [(family, n) for family in (*LATER, SMALL) for n in range(4, 437, 4) if family.covers(n)],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_every_small_order_of_a_family_is_a_hadamard_matrix(family: Family, n: int) -> None:
    """Also the orders that an earlier family builds in practice."""
    H_NN = family.build(n)
    assert H_NN.dtype == np.int8
    assert is_hadamard(H_NN, n)


@pytest.mark.parametrize(
    "n",
    [
        *(1004, 1076, 1340),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (2524, 2916, 3028, 3180, 3756, 3772, 3844, 4084, 4120)),
    ],
)
def test_rows_of_large_orders_are_orthogonal_to_all_others(n: int) -> None:
    assert is_hadamard(hadamard(n), n, slice(0, n, n // 16))


@pytest.mark.slow
@pytest.mark.parametrize("family", [*LATER, SMALL])
def test_every_order_that_a_family_adds_up_to_1300_is_a_hadamard_matrix(family: Family) -> None:
    for n in range(440, 1301, 4):
        if family.covers(n) and kronecker.factorize(n, FAMILIES[:2]) is None:
            assert is_hadamard(family.build(n), n)


def test_the_oracle_can_fail() -> None:
    H_NN = hadamard(92)
    assert is_hadamard(H_NN, 92)
    H_NN[3, 7] *= -1
    assert not is_hadamard(H_NN, 92)
    H_NN[3, 7] = 0
    assert not is_hadamard(H_NN, 92)


@pytest.mark.parametrize(
    ("n", "digest"),
    [
        (92, "2216fb48a98d5b2b"),
        (156, "308d32a1706fe406"),
        (412, "9ddf93c0b5760327"),
        (428, "2fd2a91ef9d88c6b"),
        (436, "c1c868f5d9d8cab1"),
        (876, "39e81da2742575f6"),
        (1340, "95258a9d35179a51"),
        (2916, "d719b8d8bd7a728b"),
        (4120, "50d918cea3bc179c"),
    ],
)
def test_the_matrices_do_not_drift(n: int, digest: str) -> None:
    """One name, one matrix, for ever: see the test of this name in `test_hadamard`."""
    assert hashlib.sha256(hadamard(n).tobytes()).hexdigest()[:16] == digest


def test_a_matrix_of_half_the_kronecker_product_s_order_comes_from_the_halves_of_both() -> None:
    first, second = paley.build(12), paley.build(20)
    H_NN = agaian_product(first[:, :6], first[:, 6:], second[:10], second[10:])
    assert is_hadamard(H_NN, 120)
    assert SMALL.name(120) == "A(4,60)"


# Which orders there are


def reached(families: int, limit: int = LIMIT) -> set[int]:
    """The multiples of 4 that the first families make."""
    return {n for n in range(4, limit + 1, 4) if kronecker.factorize(n, FAMILIES[:families])}


def test_960_of_the_1024_multiples_of_four_up_to_4096_are_constructible() -> None:
    assert sum(constructible(n) for n in range(4, LIMIT + 1, 4)) == 960
    assert [len(reached(families)) for families in range(1, 8)] == [11, 692, 727, 769, 915, 960, 960]


def test_the_open_orders_are_known_by_name() -> None:
    """Quarters of the orders up to 4096 that no family here makes."""
    quarters = (
        "167 179 223 283 311 334 347 358 359 419 443 463 479 487 491 515 519 523 537 566 571 573 599 622 643 647 655 "
        "659 669 694 699 716 718 719 721 739 751 763 787 789 823 838 839 859 863 865 879 883 886 907 917 919 926 933 "
        "947 955 958 959 971 974 982 985 991 1019"
    )
    assert [n // 4 for n in range(4, LIMIT + 1, 4) if not constructible(n)] == [int(q) for q in quarters.split()]


def test_agaian_s_product_adds_nine_orders_between_4096_and_8192() -> None:
    added = reached(7, 8192) - reached(6, 8192)
    assert sorted(added) == [4120, 4152, 5240, 5768, 6104, 6920, 7032, 7336, 7672]


def test_orders_that_fewer_families_make_keep_their_construction() -> None:
    """Artifacts that were written before a family was added stay valid."""
    for n in (1, 2, *range(4, LIMIT + 1, 4)):
        factors = kronecker.factorize(n, FAMILIES)
        for families in range(1, len(FAMILIES)):
            earlier = kronecker.factorize(n, FAMILIES[:families])
            assert earlier is None or earlier == factors


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (44, "P1(44)"),
        (116, "GS(116)"),
        (768, "S(2) x P1(384)"),
        (3984, "P1(12) x P1(332)"),
        (4092, "P1(4092)"),
        (92, "W(92)"),
        (172, "W(172)"),
        (184, "S(2) x W(92)"),
        (268, "GS(268)"),
        (428, "GS(428)"),
        (156, "BH(12,13)"),
        (1340, "BH(268,5)"),
        (436, "M(436)"),
        (3236, "M(3236)"),
        (4120, "A(20,412)"),
    ],
)
def test_the_construction_names_family_and_orders(n: int, name: str) -> None:
    assert construction(n) == name


@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize("n", [-92, -8, -4, 0, 1, 2, 3, 6, 90, 668])
def test_no_family_covers_an_order_that_cannot_be(family: Family, n: int) -> None:
    assert not family.covers(n)


@pytest.mark.parametrize("n", [12, 668])
def test_a_split_order_that_is_not_covered_is_refused_by_number(n: int) -> None:
    for family in (baumert_hall, AGAIAN):
        with pytest.raises(ValueError, match=f"^{n} is not"):
            family.build(n)
    with pytest.raises(ValueError, match="do not make order 668"):
        kronecker.matrix(668, FAMILIES)


def test_miyamoto_s_smaller_order_may_be_miyamoto_s_itself() -> None:
    """293 - 1 = 4 * 73, which without the families between is Miyamoto's too."""
    alone = Miyamoto((sylvester, paley))
    assert alone.covers(292)
    assert alone.covers(4 * 293)
    assert kronecker.factorize(292, (sylvester, paley)) is None
    assert is_hadamard(alone.build(4 * 293), 4 * 293)


# The published sequences


@pytest.mark.parametrize("length", LENGTHS)
def test_exactly_one_t_row_has_an_entry_at_each_place_and_their_autocorrelations_cancel(length: int) -> None:
    rows_4T = t_rows(length)
    assert rows_4T.shape == (4, length)
    assert np.abs(rows_4T).sum(axis=0).tolist() == [1] * length
    assert not any(autocorrelations(rows_4T, periodic=length in PERIODIC))


def test_the_order_of_the_lengths_is_frozen() -> None:
    """A Baumert-Hall array takes the first length that fits: another order would change matrices."""
    known = [1, 3, 7, 9, 13, 19, 5, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77, 83, 89, 95, 107, 101, 67]
    assert list(LENGTHS) == known


@pytest.mark.parametrize("v", ORBIT_SIGNS)
def test_rows_from_orbits_keep_their_multiplier_and_their_autocorrelations_cancel(v: int) -> None:
    multiplier, rows = ORBIT_SIGNS[v]
    rows_4V = first_rows(v)
    assert rows_4V.shape == (4, v)
    assert set(np.unique(rows_4V).tolist()) == {-1, 1}
    assert np.array_equal(rows_4V[:, np.arange(v) * multiplier % v], rows_4V)
    assert {len(row) for row in rows} == {len({min(orbit(x, multiplier, v)) for x in range(v)})}
    assert not any(autocorrelations(rows_4V, periodic=True))


def orbit(x: int, multiplier: int, v: int) -> set[int]:
    return {x * pow(multiplier, k, v) % v for k in range(v)}


@pytest.mark.parametrize("w", [w for w in range(1, 130) if has_quadruple(w)])
def test_williamson_type_matrices_are_symmetric_and_commute_and_their_squares_sum_to_4_w(w: int) -> None:
    blocks = [block.astype(np.int64) for block in quadruple(w)]
    assert len(blocks) == 4
    for block in blocks:
        assert block.shape == (w, w)
        assert set(np.unique(block).tolist()) <= {-1, 1}
        assert np.array_equal(block, block.T)
    for first, second in combinations(blocks, 2):
        assert np.array_equal(first @ second, second @ first)
    squares = sum((block @ block for block in blocks), np.zeros((w, w), np.int64))
    assert np.array_equal(squares, 4 * w * np.eye(w, dtype=np.int64))


def test_the_three_sources_of_quadruples_give_these_orders() -> None:
    odd = range(1, 130, 2)
    powers = {p**m for p in range(3, 258) if all(p % d for d in range(2, p)) for m in range(1, 6)}
    assert [w for w in odd if turyn(w)] == [1] + [w for w in odd if 2 * w - 1 in powers and w > 1]
    assert list(CIRCULANTS) == [11, 23, 43]
    assert [w for w in odd if miyamoto(w) and not turyn(w)] == [17, 73, 81, 113]


@pytest.mark.parametrize("q", [q for q in range(5, 300, 4) if prime_power(q)])
def test_symmetric_circulants_from_the_quadratic_character_have_squares_that_sum_to_q(q: int) -> None:
    A, B = (circulant(row).astype(np.int64) for row in conference_circulants(q))
    W = (q + 1) // 2
    assert np.array_equal(A, A.T)
    assert np.array_equal(B, B.T)
    assert np.array_equal(A @ A + B @ B, q * np.eye(W, dtype=np.int64))
    assert np.array_equal(np.argwhere(A == 0), np.repeat(np.arange(W), 2).reshape(W, 2))
    C1, C2 = (circulant(row).astype(np.int64) for row in squares_and_others(q))
    assert np.array_equal(C1, C1.T)
    assert np.array_equal(C2[:, ::-1], C2[:, ::-1].T)
    assert np.array_equal(C1 @ C1.T + C2 @ C2.T, q * np.eye(W - 1, dtype=np.int64) - 2)
    assert (C1.sum(axis=1) == -1).all()
    assert not C2.sum(axis=1).any()


# The arrays


def test_a_circulant_shifts_its_first_row_to_the_right() -> None:
    row = np.array([1, 2, 3], np.int8)
    assert circulant(row).tolist() == [[1, 2, 3], [3, 1, 2], [2, 3, 1]]


def test_a_goethals_seidel_array_needs_no_symmetric_circulants() -> None:
    """Orthogonal rows, up to the sum of the four products, for any rows at all."""
    rows_4V = np.random.default_rng(0).choice([-1, 1], (4, 7)).astype(np.int8)
    array = goethals_seidel_array(rows_4V).astype(np.int64)
    blocks: list[NDArray[np.int64]] = [circulant(row).astype(np.int64) for row in rows_4V]
    total = sum((block @ block.T for block in blocks), np.zeros((7, 7), np.int64))
    assert not np.array_equal(total, 28 * np.eye(7))  # the rows were not chosen to be complementary
    assert np.array_equal(array @ array.T, np.kron(np.eye(4, dtype=np.int64), total))


def test_williamson_s_array_is_the_one_of_a_single_t_row() -> None:
    A, B, C, D = quadruple(9)
    expected_NN = np.block([[A, -B, -C, -D], [B, A, -D, C], [C, D, A, -B], [D, -C, B, A]])
    assert np.array_equal(williamson.build(36), expected_NN)


def test_t_rows_with_blocks_of_one_entry_are_the_goethals_seidel_array_of_their_sums() -> None:
    T1, T2, T3, T4 = t_rows(7)
    rows_4V = np.stack([T1 + T2 + T3 + T4, T2 - T1 + T3 - T4, T3 - T1 + T4 - T2, T4 - T1 + T2 - T3])
    assert np.array_equal(goethals_seidel.build(28), goethals_seidel_array(rows_4V))
