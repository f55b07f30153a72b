"""The array libraries that the core runs on alike: numpy, torch, and torch on CUDA where there is a device.

Torch is imported where a test asks for it, so that the tests of numpy neither wait for it nor need it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray


def tensor(array: NDArray[Any]) -> Any:
    """The same array in torch; skips the test where there is none."""
    return pytest.importorskip("torch").from_numpy(array)


def cuda(array: NDArray[Any]) -> Any:
    return tensor(array).cuda()


def host(array: Any) -> NDArray[Any]:
    """The array of any library as numpy's."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)


each_library = pytest.mark.parametrize(
    "library",
    [
        pytest.param(np.asarray, id="numpy"),
        pytest.param(tensor, id="torch"),
        pytest.param(cuda, id="cuda", marks=pytest.mark.gpu),
    ],
)
