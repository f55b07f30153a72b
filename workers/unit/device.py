"""Getting results off the device without making it wait.

Suffix: B = images.
"""

from typing import Any

import numpy as np
import torch


class HostCopy:
    """Tensors on their way to host memory; on CUDA behind the work already queued, into pinned memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._event: Any = None
        self._host = tensors
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._host = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in tensors.items()
            }
            cuda: Any = torch.cuda  # its Event is not typed
            self._event = cuda.Event()
            self._event.record()

    def wait(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return {name: tensor.numpy() for name, tensor in self._host.items()}


def finite_images(*arrays: torch.Tensor) -> torch.Tensor:
    """bool [B]: images of which every number in every array is finite."""
    finite_B = torch.ones(len(arrays[0]), dtype=torch.bool, device=arrays[0].device)
    for array in arrays:
        finite_B &= torch.isfinite(array).flatten(1).all(dim=1)
    return finite_B
