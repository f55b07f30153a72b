"""Hadamard matrices against definitions, naive number theory and exact int64 products.

Shape suffixes: N = order of the matrix, Q = elements of a field.
"""

import hashlib
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.errors import NoHadamardMatrix
from statsvc.numerics.hadamard import FAMILIES, constructible, construction, hadamard, kronecker, paley, sylvester
from statsvc.numerics.hadamard.check import BLOCK, check
from statsvc.numerics.hadamard.family import Signs
from statsvc.numerics.hadamard.galois import Field, prime_power

# Later `statsvc.numerics.hadamard` is the function, so the package is taken from where imports keep it.
PACKAGE: ModuleType = sys.modules["statsvc.numerics.hadamard"]

WIDTHS = [192, 256, 320, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1664, 1792, 2048]
LARGE_WIDTHS = [2560, 3072, 3200, 3584, 4096, 5120, 6144, 8192]
LIMIT = 4096


def is_hadamard(H_NN: Signs, n: int) -> bool:
    """The definition, with int64 throughout and no BLAS."""
    H64_NN = H_NN.astype(np.int64)
    gram_NN = np.einsum("ik,jk->ij", H64_NN, H64_NN)
    return set(np.unique(H_NN)) <= {-1, 1} and np.array_equal(gram_NN, n * np.eye(n, dtype=np.int64))


def odd_prime_powers(limit: int) -> set[int]:
    primes = [p for p in range(3, limit) if all(p % d for d in range(2, int(p**0.5) + 1))]
    return {p**m for p in primes for m in range(1, 13) if p**m < limit}


# The matrices


@pytest.mark.parametrize("n", [n for n in range(1, 301) if constructible(n)])
def test_every_small_order_is_a_hadamard_matrix(n: int) -> None:
    assert is_hadamard(hadamard(n), n)


@pytest.mark.parametrize("n", WIDTHS)
def test_every_common_width_is_a_hadamard_matrix(n: int) -> None:
    H_NN = hadamard(n)
    assert H_NN.dtype == np.int8
    assert H_NN.shape == (n, n)
    # float64 holds integers to 2^53: exact by another route than the float32 blocks of the check.
    wide_NN = H_NN.astype(np.float64)
    assert np.array_equal(np.abs(wide_NN), np.ones((n, n)))
    assert np.array_equal(wide_NN @ wide_NN.T, n * np.eye(n))


@pytest.mark.parametrize("n", LARGE_WIDTHS)
def test_every_large_width_has_orthogonal_rows_wherever_one_looks(n: int) -> None:
    H_NN = hadamard(n)
    assert H_NN.dtype == np.int8
    assert H_NN.shape == (n, n)
    rows = np.random.default_rng(n).choice(n, 24, replace=False)
    picked = H_NN[rows].astype(np.int64)
    assert set(np.unique(picked)) == {-1, 1}
    assert np.array_equal(np.einsum("ik,jk->ij", picked, picked), n * np.eye(len(rows), dtype=np.int64))


@pytest.mark.parametrize("n", [28, 244, 344, 1332, 52, 100, 164, 340, 1252])
def test_paley_matrices_of_prime_powers_are_hadamard_matrices(n: int) -> None:
    """q = 3^3, 3^5, 7^3, 11^3 for type I; 5^2, 7^2, 3^4, 13^2, 5^4 for type II."""
    assert is_hadamard(paley.build(n), n)


def test_both_types_of_paley_are_built() -> None:
    assert [paley.name(n) for n in (12, 36, 20, 28, 52)] == ["P1(12)", "P2(36)", "P1(20)", "P1(28)", "P2(52)"]


def test_sylvester_entries_are_the_parity_of_shared_bits() -> None:
    expected_NN = [[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    assert np.array_equal(sylvester.build(64), expected_NN)


def test_the_parts_of_a_product_stand_in_the_order_of_its_name() -> None:
    assert construction(24) == "S(2) x P1(12)"
    twelve_NN = hadamard(12)
    assert np.array_equal(hadamard(24), np.block([[twelve_NN, twelve_NN], [twelve_NN, -twelve_NN]]))


@pytest.mark.parametrize(
    ("n", "digest"),
    [
        (28, "3ec6c53133760a03"),
        (36, "1a7aed2f42a8c71d"),
        (768, "77d9069301d2a854"),
        (1152, "2fced5e4ba0d21f3"),
        (3200, "996bb1319c6b5e16"),
    ],
)
def test_the_matrices_do_not_drift(n: int, digest: str) -> None:
    """Targets that were fitted with a matrix are mixed with no others, so a change here changes numbers.

    28 = 3^3 + 1 and 3200 = 32 * 2 (7^2 + 1) depend on the choice of the irreducible polynomial.
    """
    assert hashlib.sha256(hadamard(n).tobytes()).hexdigest()[:16] == digest


def test_two_calls_give_equal_matrices_that_share_no_memory() -> None:
    first_NN, second_NN = hadamard(60), hadamard(60)
    assert np.array_equal(first_NN, second_NN)
    first_NN[:] = 0
    assert is_hadamard(second_NN, 60)
    assert is_hadamard(hadamard(60), 60)


# The choice of a construction


@pytest.mark.parametrize(
    ("n", "name"),
    [
        (768, "S(2) x P1(384)"),
        (1024, "S(1024)"),
        (1152, "S(32) x P2(36)"),
        (1280, "S(64) x P1(20)"),
        (1408, "S(32) x P1(44)"),
    ],
)
def test_the_paper_s_orders_are_built_as_in_the_paper(n: int, name: str) -> None:
    """arXiv:2410.01680, A.1.1."""
    assert construction(n) == name


def test_only_768_needs_to_be_pinned() -> None:
    assert kronecker.PINNED == {768: 2}


@pytest.mark.parametrize(
    ("n", "name"), [(1, "S(1)"), (2, "S(2)"), (36, "P2(36)"), (384, "S(32) x P1(12)"), (3984, "P1(12) x P1(332)")]
)
def test_few_cores_come_before_a_large_power_of_two(n: int, name: str) -> None:
    assert construction(n) == name


def family_orders() -> tuple[set[int], set[int]]:
    """The orders of Sylvester and of Paley up to LIMIT, from naive primes."""
    odd = odd_prime_powers(LIMIT)
    paley_orders = {q + 1 for q in odd if q % 4 == 3} | {2 * (q + 1) for q in odd if q % 4 == 1}
    return {2**k for k in range(13)}, {n for n in paley_orders if n <= LIMIT}


def test_each_family_covers_its_own_orders_and_no_others() -> None:
    asked = range(-16, LIMIT + 1)
    assert ({n for n in asked if sylvester.covers(n)}, {n for n in asked if paley.covers(n)}) == family_orders()


def test_the_orders_are_exactly_the_products_of_sylvester_and_paley_orders() -> None:
    """Oracle: products of products until nothing new appears."""
    powers, base = family_orders()
    orders = base = powers | base
    while grown := {a * b for a in orders for b in base if a * b <= LIMIT} - orders:
        orders |= grown
    assert {n for n in range(-8, LIMIT + 1) if kronecker.factorize(n, FAMILIES[:2])} == orders
    assert sum(n % 4 == 0 for n in orders) == 692  # of 1024


def test_a_family_added_at_the_end_brings_new_orders_and_changes_no_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class EveryMultipleOfFour:
        def covers(self, n: int) -> bool:
            return n > 0 and n % 4 == 0

        def name(self, n: int) -> str:
            return f"E({n})"

        def build(self, n: int) -> Signs:
            raise NotImplementedError(n)

    before = {n: construction(n) for n in range(1, 1345) if constructible(n)}
    monkeypatch.setattr(PACKAGE, "FAMILIES", (*FAMILIES, EveryMultipleOfFour()))
    after = {n: construction(n) for n in range(1, 1345) if constructible(n)}
    assert before.items() < after.items()
    assert after[668] == "E(668)"
    assert after[1336] == "S(2) x E(668)"


# Refusals


@pytest.mark.parametrize(
    ("n", "below", "above"),
    [(716, "712", "720"), (668, "664", "672"), (770, "768", "772"), (3, "2", "4"), (0, "none", "1"), (-7, "none", "1")],
)
def test_a_refused_order_names_the_nearest_orders(n: int, below: str, above: str) -> None:
    assert not constructible(n)
    for refuse in (hadamard, construction):
        with pytest.raises(NoHadamardMatrix, match=f"order {n}: .* nearest orders: {below} below, {above} above$"):
            refuse(n)


def test_a_refusal_tells_a_missing_construction_from_an_impossible_order() -> None:
    with pytest.raises(NoHadamardMatrix, match="no construction is known here"):
        hadamard(668)
    with pytest.raises(NoHadamardMatrix, match="is 1, 2 or a positive multiple of 4"):
        hadamard(90)


def test_asking_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(n: int) -> Signs:
        raise AssertionError(f"order {n} was built")

    for family in FAMILIES:
        monkeypatch.setattr(family if isinstance(family, ModuleType) else type(family), "build", fail)
    assert constructible(768)
    assert construction(768) == "S(2) x P1(384)"
    assert construction(4120) == "A(20,412)"
    with pytest.raises(NoHadamardMatrix):
        hadamard(668)


def test_an_order_read_from_numpy_is_an_order_and_a_float_is_not() -> None:
    assert construction(np.int64(768)) == "S(2) x P1(384)"  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        hadamard(768.0)  # type: ignore[arg-type]


# The self-check


@pytest.mark.parametrize("entry", [-1, 0, 2, 127])
def test_the_check_rejects_one_wrong_entry(entry: int) -> None:
    H_NN = hadamard(20)
    H_NN[7, 3] = entry if H_NN[7, 3] != entry else -entry
    with pytest.raises(ArithmeticError, match="order 20"):
        check(H_NN, 20)


def test_the_check_rejects_orthogonal_rows_of_the_right_length_with_other_entries() -> None:
    with pytest.raises(ArithmeticError, match=r"entries other than \+-1"):
        check(2 * np.eye(4, dtype=np.int8), 4)


N_BLOCKS = 2 * BLOCK


@pytest.mark.parametrize(("row", "copy"), [(0, 1), (0, N_BLOCKS - 1), (BLOCK - 1, BLOCK), (N_BLOCKS - 2, N_BLOCKS - 1)])
def test_the_check_finds_a_repeated_row_in_every_block(row: int, copy: int) -> None:
    H_NN = hadamard(N_BLOCKS)
    H_NN[copy] = H_NN[row]
    with pytest.raises(ArithmeticError, match=f"rows {row} and {copy} not orthogonal"):
        check(H_NN, N_BLOCKS)


def test_the_check_rejects_a_matrix_of_another_order() -> None:
    with pytest.raises(ArithmeticError, match="shape"):
        check(hadamard(8), 4)


def test_a_broken_family_is_caught_before_its_matrix_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(n: int) -> Signs:
        H_NN = kept(n)
        H_NN[-1, -1] *= -1
        return H_NN

    kept = paley.build
    assert is_hadamard(hadamard(24), 24)
    monkeypatch.setattr(paley, "build", broken)
    with pytest.raises(ArithmeticError, match="not orthogonal"):
        hadamard(24)


# The fields

FIELDS = {q: Field.of_order(q) for q in (3, 7, 9, 25, 27, 81, 125, 169, 243, 343, 625, 2187, 4099, 6561)}


@st.composite
def field_and_elements(draw: st.DrawFn) -> tuple[Field, NDArray[np.int64]]:
    q = draw(st.sampled_from(sorted(FIELDS)))
    return FIELDS[q], np.array(draw(st.tuples(*[st.integers(0, q - 1)] * 3)), np.int64)


def power(field: Field, a: NDArray[np.int64], exponent: int) -> NDArray[np.int64]:
    result = np.ones_like(a)
    for bit in bin(exponent)[2:]:
        result = field.multiply(result, result)
        if bit == "1":
            result = field.multiply(result, a)
    return result


@given(field_and_elements())
@settings(deadline=None)
def test_galois_arithmetic_obeys_the_field_axioms(drawn: tuple[Field, NDArray[np.int64]]) -> None:
    field, (a, b, c) = drawn
    zero, one, q = np.zeros_like(a), np.ones_like(a), field.order
    times, minus = field.multiply, field.subtract

    def plus(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.int64]:
        return minus(x, minus(zero, y))

    assert 0 <= times(a, b) < q
    assert 0 <= minus(a, b) < q
    assert minus(a, a) == 0
    assert minus(a, zero) == a
    assert times(a, one) == a
    assert plus(a, b) == plus(b, a)
    assert plus(plus(a, b), c) == plus(a, plus(b, c))
    assert times(a, b) == times(b, a)
    assert times(times(a, b), c) == times(a, times(b, c))
    assert times(a, plus(b, c)) == plus(times(a, b), times(a, c))
    assert power(field, plus(a, b), field.p) == plus(power(field, a, field.p), power(field, b, field.p))
    assert times(a, power(field, a, q - 2)) == (a != 0)  # the inverse


@pytest.mark.parametrize("q", sorted(FIELDS))
def test_the_quadratic_character_is_euler_s_criterion(q: int) -> None:
    """a^((q - 1) / 2) is 1 for squares, -1 otherwise: no table of squares involved."""
    field = FIELDS[q]
    elements_Q = np.arange(q, dtype=np.int64)
    euler_Q = power(field, elements_Q, (q - 1) // 2)
    minus_one = field.subtract(np.zeros_like(elements_Q), np.ones_like(elements_Q))
    expected_Q = np.where(euler_Q == minus_one, -1, euler_Q)
    assert np.array_equal(field.quadratic_character(), expected_Q)


def test_prime_fields_are_the_integers_mod_p() -> None:
    a, b = np.divmod(np.arange(31 * 31), 31)
    assert np.array_equal(FIELDS[3].multiply(a % 3, b % 3), a % 3 * (b % 3) % 3)
    field = Field.of_order(31)
    assert np.array_equal(field.multiply(a, b), a * b % 31)
    assert np.array_equal(field.subtract(a, b), (a - b) % 31)


def test_prime_powers_are_told_from_other_numbers() -> None:
    odd = {q for q in range(-3, 3000) if q % 2 and prime_power(q)}
    assert odd == odd_prime_powers(3000)
    assert [prime_power(q) for q in (2, 8, 9, 12, 6561, 8191)] == [(2, 1), (2, 3), (3, 2), None, (3, 8), (8191, 1)]


def test_there_is_no_field_of_fifteen_elements() -> None:
    with pytest.raises(ValueError, match="not 15"):
        Field.of_order(15)


# The package


def test_the_public_name_is_the_function() -> None:
    program = (
        "import statsvc\n"
        "from statsvc.numerics.hadamard import construction, paley\n"
        "from statsvc.numerics.hadamard.galois import Field\n"
        "assert statsvc.hadamard(12).shape == (12, 12)\n"
        "assert construction(12) == paley.name(12)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
