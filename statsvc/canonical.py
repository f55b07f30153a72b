"""One spelling for every value that is hashed or committed: equal values give equal bytes."""

import hashlib
import json
from typing import Any

import numpy as np


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; floats in their shortest exact form, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(*parts: bytes | np.ndarray) -> str:
    """64 hex digits over the parts in order; arrays count as little-endian bytes in C order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(little_endian(part).data if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


def little_endian(array: np.ndarray) -> np.ndarray:
    """The array as contiguous little-endian memory; no copy where it is that already."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
