"""The device that teachers run on: its settings, and getting results off it without making it wait.

Suffixes: B = images, D = channels.
"""

from typing import Any

import numpy as np
import torch

from statsvc.numerics.moments import Moments


def configure_torch(threads: int) -> None:
    """Settings under which a teacher gives the numbers that its plan asks for."""
    torch.set_num_threads(threads)
    # Where the plan says float32 it means it: by default CUDA convolutions drop 13 bits of each factor.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


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


def on_host(moments: Moments[Any]) -> Moments[np.ndarray]:
    """The moments as numpy arrays; waits for the device."""
    mean_D, scatter_DD = (np.asarray(torch.as_tensor(array).cpu()) for array in (moments.mean, moments.scatter))
    return Moments(moments.count, mean_D, scatter_DD)


def finite_images(*arrays: torch.Tensor) -> torch.Tensor:
    """bool [B]: images of which every number in every array is finite."""
    finite_B = torch.ones(len(arrays[0]), dtype=torch.bool, device=arrays[0].device)
    for array in arrays:
        finite_B &= torch.isfinite(array).flatten(1).all(dim=1)
    return finite_B
