"""Canonical bytes against the json module, struct and hashlib."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.digests import canonical_json, little_endian, sha256

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('aäß𝄞\n"\\ '),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abä", max_size=3), inner, max_size=4),
    max_leaves=12,
)


def reordered(value: Any) -> Any:
    """The same value with every mapping written down in the opposite order."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


@given(values)
def test_json_is_exact_and_the_same_in_any_order(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(reordered(value)) == text
    assert canonical_json(json.loads(text)) == text


def test_json_has_sorted_keys_no_spaces_and_utf8() -> None:
    value = {"b": [1, 2.5, None, True], "ä": "ü", "a": {"z": 1e-300, "y": 0.1}}
    assert canonical_json(value) == '{"a":{"y":0.1,"z":1e-300},"b":[1,2.5,null,true],"ä":"ü"}'.encode()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_unknown_to_json_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"loss": [number]})


def test_values_that_are_no_json_are_refused() -> None:
    for value in (np.float32(1), np.zeros(3), {1, 2}, b"bytes"):
        with pytest.raises(TypeError):
            canonical_json({"value": value})


def test_digest_is_that_of_all_parts_joined() -> None:
    number_23 = np.arange(6, dtype=np.float64).reshape(2, 3) / 7
    expected = hashlib.sha256(b"head" + struct.pack("<6d", *number_23.ravel().tolist()) + b"tail").hexdigest()
    assert sha256(b"head", number_23, b"tail") == expected
    assert sha256() == hashlib.sha256(b"").hexdigest()
    assert sha256(np.asarray(258, np.int64)) == hashlib.sha256(b"\x02\x01" + bytes(6)).hexdigest()
    assert sha256(np.zeros((0, 3))) == sha256(b"")


NUMBERS_23 = np.arange(6, dtype=np.float64).reshape(2, 3) / 7


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.asfortranarray(NUMBERS_23), id="columns first"),
        pytest.param(NUMBERS_23.astype(">f8"), id="big-endian"),
        pytest.param(np.repeat(NUMBERS_23, 2, axis=1)[:, ::2], id="strided"),
        pytest.param(NUMBERS_23[::-1].copy()[::-1], id="backwards"),
    ],
)
def test_digest_does_not_depend_on_the_memory_layout(array: NDArray[np.float64]) -> None:
    assert sha256(array) == sha256(NUMBERS_23)
    assert little_endian(array).tobytes() == NUMBERS_23.astype("<f8").tobytes()


def test_digest_depends_on_every_bit() -> None:
    changed_23 = NUMBERS_23.copy()
    changed_23[1, 1] = np.nextafter(changed_23[1, 1], 1)
    negative_zero = NUMBERS_23.copy()
    negative_zero[0, 0] = -0.0
    different: list[NDArray[np.floating]] = [
        NUMBERS_23,
        NUMBERS_23.T,
        changed_23,
        negative_zero,
        NUMBERS_23.astype(np.float32),
    ]
    assert len({sha256(array) for array in different}) == len(different)


def test_little_endian_memory_is_not_copied() -> None:
    assert np.shares_memory(little_endian(NUMBERS_23), NUMBERS_23)
    assert not np.shares_memory(little_endian(NUMBERS_23.T), NUMBERS_23)
