"""A transform as torch modules: features to targets, and what the student says back to features.

    normalize = Normalize(teacher.transform("phi-s", output="patches"))
    y = normalize(features)                           # [..., D] or [B, D, H, W] -> [..., k] or [B, k, H, W]

Suffixes: D = channels of the teacher, k = channels of a target, i = channels in, o = channels out, 8 = bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from statsvc.errors import TransformError
from statsvc.numerics.transform import Transform
from statsvc.student.modules.float32 import Float32Module


class _Affine(Float32Module):
    """What both directions share: widths, float32, and the digest that their state dicts carry.

    digest  of the transform, 64 hex digits; the state dict holds it as transform_digest, uint8 [32]
    """

    mean: torch.Tensor
    transform_digest: torch.Tensor

    def __init__(self, transform: Transform, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.method, self.digest = transform.method, transform.digest
        self.channels_in, self.channels_out = channels_in, channels_out
        self.register_buffer("mean", torch.tensor(transform.mean, dtype=torch.float32))
        self.register_buffer("transform_digest", torch.tensor(list(bytes.fromhex(self.digest)), dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., o] from floating point [..., i]; [B, o, H, W] from [B, i, H, W], always, with 4 dimensions.

        In float32 under autocast and for every dtype. Only torch.set_float32_matmul_precision, when it was called,
        rounds the products (TF32, about 5e-4). Raises TransformError for another width, and for codes.
        """
        if not x.is_floating_point():
            raise TransformError(f"a transform takes floating point features; got {x.dtype}: decode them first")
        axis = 1 if x.ndim == 4 else -1
        if x.shape[axis:][:1] != (self.channels_in,):
            raise TransformError(
                f"{type(self).__name__} of this {self.method} transform takes [..., {self.channels_in}] or, with 4 "
                f"dimensions, [B, {self.channels_in}, H, W]; got {tuple(x.shape)}: give it those channels there, or "
                "use the transform of that output"
            )
        # Not a 1x1 convolution: cuDNN rounds those to TF32 unless told otherwise.
        with torch.autocast(x.device.type, enabled=False):
            return self._map(x.float().movedim(axis, -1)).movedim(-1, axis)

    def _map(self, x_i: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.method}, {self.channels_in} -> {self.channels_out}, digest={self.digest[:12]}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Raises TransformError for numbers of another transform, of an unknown one, or rounded ones."""
        held = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        if held:
            self._check(held)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, held: dict[str, torch.Tensor]) -> None:
        saved_8 = held.pop("transform_digest", None)
        if saved_8 is None:
            raise TransformError(
                f"a state dict of {type(self).__name__} carries the digest of its transform; this one has numbers "
                f"({', '.join(held)}) without it, and they may not be those of {self.digest}: leave them out and load "
                "with strict=False"
            )
        if (saved := bytes(saved_8.tolist()).hex()) != self.digest:
            raise TransformError(
                f"the state dict is of transform {saved} and this {type(self).__name__} of {self.digest}, and targets "
                f'of two fits must not be mixed: make the module from store.transform("{saved}")'
            )
        for name, array in held.items():
            if array.dtype != torch.float32:
                raise TransformError(
                    f"transforms are applied in float32; the state dict holds {name} rounded to {array.dtype}: leave "
                    "it out and load with strict=False, since the module has these numbers already"
                )


class Normalize(_Affine):
    """y = (x - mean) @ matrix.T: features of the teacher, D channels, to targets, k channels.

    mean float32 [D], matrix float32 [k, D]. Source: arXiv:2410.01680, eq. 5-26, by method.
    """

    matrix: torch.Tensor

    def __init__(self, transform: Transform) -> None:
        super().__init__(transform, len(transform.mean), transform.rank)
        self.register_buffer("matrix", torch.tensor(transform.matrix, dtype=torch.float32))

    def _map(self, x_D: torch.Tensor) -> torch.Tensor:
        # The mean first: it may be a hundred times the deviation, and products of large numbers lose the digits.
        return (x_D - self.mean) @ self.matrix.T


class Denormalize(_Affine):
    """x = y @ inverse.T + mean: targets, or what the student says of them, k channels, to features, D channels.

    mean float32 [D], inverse float32 [D, k]. Source: arXiv:2410.01680, eq. 45-50, by method.
    """

    # Not named matrix: the state dict of a Normalize must not fit.
    inverse: torch.Tensor

    def __init__(self, transform: Transform) -> None:
        super().__init__(transform, transform.rank, len(transform.mean))
        self.register_buffer("inverse", torch.tensor(transform.inverse, dtype=torch.float32))

    def _map(self, y_k: torch.Tensor) -> torch.Tensor:
        return y_k @ self.inverse.T + self.mean
