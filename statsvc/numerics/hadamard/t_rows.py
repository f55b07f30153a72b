"""T-rows: four rows with entries 0 and +-1, exactly one not 0 at each place, whose autocorrelations sum to zero.

As first rows of circulants they satisfy T1 T1^T + ... + T4 T4^T = T I for their length T. All but length 67 are
T-sequences, made from base sequences A, B, C, D: entries +-1, lengths m + p, m + p, m, m, nonperiodic
autocorrelations that sum to zero; then T = 2 m + p. Every entry of the tables is checked by the tests.

Sources: Turyn (1974), "Hadamard matrices, Baumert-Hall units, four-symbol sequences, pulse compression, and surface
wave encodings"; Kharaghani and Tayfeh-Rezaie (2005), "A Hadamard matrix of order 428"; those at the tables.

Shape suffix: T = length of the T-rows.
"""

import numpy as np

from statsvc.numerics.hadamard.family import Signs

# m: A and B of length m + 1, C and D of length m. The first quadruples that an exhaustive search meets; there are
# thousands, counted in Djokovic (2010), "Classification of base sequences BS(n + 1, n)".
SHORT = {
    1: ("++", "+-", "+", "+"),
    3: ("+++-", "+--+", "+++", "+-+"),
    4: ("++-+-", "+---+", "++++", "+--+"),
    6: ("++-+-++", "++---+-", "+++++-", "++--+-"),
    9: ("+++--+-++-", "++--+---++", "++++++-+-", "++-+-+++-"),
}

# m: Turyn-type sequences X, Y, Z, W of lengths m, m, m, m - 1. A hexadecimal digit for each place holds a bit for each
# of them, X first, 1 for -1; the last holds three. Best, Djokovic, Kharaghani and Ramp (2013), "Turyn-type sequences:
# classification, enumeration, and construction"; 36: Kharaghani and Tayfeh-Rezaie (2005).
TURYN_TYPE = {
    2: "01",
    4: "0161",
    6: "006d61",
    8: "06e5c4d1",
    10: "0001f4a961",
    12: "0004f90bc961",
    14: "00036ac71c7651",
    16: "0000778e52de5561",
    18: "00006758b30d1e9a51",
    20: "000038e2739c7a0b6951",
    22: "00000f702c71a9ad565961",
    24: "00000b7c2cb2bc4b6cd9a961",
    26: "000000ff0f846f1ca5a5aa9551",
    28: "0000067cde3e50639ab46135aa51",
    30: "000000f70b106f9d427a25e9a96951",
    32: "00000138f64f1c1e77844f26d95a5961",
    36: "060989975b685d8fc80750b21c0212eceb26",
}

# A Golay pair: two sequences whose own autocorrelations cancel. Golay (1961), "Complementary series".
GOLAY_10 = ("++-+-+--++", "++-+++++--")

# Length: a letter for each place names the row that is not 0 there, a capital for 1 and a small letter for -1.
# Sawade (1985), "A Hadamard matrix of order 268".
PERIODIC = {67: "ABddacCbaDCbaaaBBaCCcDBCacacaDAadDdDcCAbBBaCbbbDcaDdbBdbCccdCdDDBBA"}

# An array takes the first length that fits, so the order of the tables is part of the construction's identity.
LENGTHS = (
    1,
    *(2 * m + 1 for m in SHORT),
    *(3 * m - 1 for m in TURYN_TYPE),
    101,
    *PERIODIC,
)


def t_rows(length: int) -> Signs:
    """[4, T] int8 for a length of LENGTHS."""
    if length == 1:
        return np.eye(4, 1, dtype=np.int8)
    if length in PERIODIC:
        places = PERIODIC[length]
        return np.array([[(c == row) - (c == row.lower()) for c in places] for row in "ABCD"], np.int8)
    A, B, C, D = base_sequences(length)
    rows_4T = np.zeros((4, length), np.int8)
    rows_4T[:2, : len(A)] = (A + B) // 2, (A - B) // 2
    rows_4T[2:, len(A) :] = (C + D) // 2, (C - D) // 2
    return rows_4T


def base_sequences(length: int) -> tuple[Signs, Signs, Signs, Signs]:
    """A, B, C and D with entries +-1 for a T of LENGTHS other than 1 and 67."""
    if length == 101:
        one = np.ones(1, np.int8)
        A, B = golay_product(signs(GOLAY_10[0]), signs(GOLAY_10[1]))
        return A, B, one, one
    if length % 2 == 1 and (length - 1) // 2 in SHORT:
        A, B, C, D = (signs(sequence) for sequence in SHORT[(length - 1) // 2])
        return A, B, C, D
    *places, last = (int(digit, 16) for digit in TURYN_TYPE[(length + 1) // 3])
    X, Y, Z, W = (signs(["+-"[place >> bit & 1] for place in places]) for bit in (3, 2, 1, 0))
    X, Y, Z = (np.append(head, signs("+-"[last >> bit & 1])) for head, bit in ((X, 2), (Y, 1), (Z, 0)))
    return np.append(Z, W), np.append(Z, -W), X, Y


def golay_product(A: Signs, B: Signs) -> tuple[Signs, Signs]:
    """The Golay pair of length g^2 from one of length g. Turyn (1974)."""
    half_sum, half_difference = (A + B) // 2, (A - B) // 2
    return (
        np.kron(A, half_sum) + np.kron(B[::-1], half_difference),
        np.kron(B, half_sum) - np.kron(A[::-1], half_difference),
    )


def signs(text: str | list[str]) -> Signs:
    """[length] int8, 1 for "+" and -1 for "-"."""
    return np.array([1 if sign == "+" else -1 for sign in text], np.int8)
