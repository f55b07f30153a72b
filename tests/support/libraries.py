"""The array libraries that the core runs on alike: numpy, torch, and torch on CUDA where there is a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray


def cuda(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array).cuda()


def host(array: Any) -> NDArray[Any]:
    """The array of any library as numpy's."""
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
each_library = pytest.mark.parametrize(
    "library",
    [
        pytest.param(np.asarray, id="numpy"),
        pytest.param(torch.from_numpy, id="torch"),
        pytest.param(cuda, id="cuda", marks=needs_gpu),
    ],
)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Small arrays gain nothing from more, and lose hundreds of times where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
