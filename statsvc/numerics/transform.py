"""An invertible affine map of feature vectors, and the file that carries it.

Suffixes: N = feature vectors, D = channels of the teacher, k = channels of the target (k = D without a rank).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from safetensors.numpy import load

from statsvc.digests import canonical_json, little_endian, sha256
from statsvc.errors import DamagedObject, TransformError

TENSORS = ("mean", "matrix", "inverse")
VERSION = version("statsvc")


@dataclass(frozen=True, eq=False)
class Transform:
    """y = (x - mean) @ matrix.T and back: x = y @ inverse.T + mean.

    mean [D], matrix [k, D], inverse [D, k], all float64; matrix @ inverse is the identity, checked here.
    alpha is the one scalar gain of the isotropic methods (1 / sigma_g, 1 / phi), checked too, and None for the others.
    hadamard names the construction of the Hadamard matrix in it, if there is one: another construction
    gives other, equally valid targets. output, fingerprint and moments_digest say what it was fitted on.

    Source: arXiv:2410.01680, eq. 45-50. Raises TransformError for parts that do not belong together.
    """

    method: str
    mean: np.ndarray
    matrix: np.ndarray
    inverse: np.ndarray
    count: int
    alpha: float | None = None
    rotation: str = "none"
    hadamard: str = "none"
    output: str = ""
    fingerprint: str = ""
    moments_digest: str = ""
    statsvc_version: str = VERSION

    @np.errstate(over="ignore", invalid="ignore")  # what comes of NaN and infinity fails the checks
    def __post_init__(self) -> None:
        if any(getattr(self, name).dtype != np.float64 for name in TENSORS):
            raise TransformError(f"{self.method}: mean, matrix and inverse are float64, so that digests agree")
        k, dim = self.matrix.shape
        if self.mean.shape != (dim,) or self.inverse.shape != (dim, k):
            raise TransformError(
                f"{self.method}: mean [D], matrix [k, D] and inverse [D, k] must agree; got {self.mean.shape}, "
                f"{self.matrix.shape}, {self.inverse.shape}"
            )
        # Random probes find any disagreement and cost D^2 where the full product costs D^3.
        probe_k8 = np.random.default_rng(0).standard_normal((k, 8))
        error = np.abs(self.matrix @ (self.inverse @ probe_k8) - probe_k8).max()
        if not error < 1e-8 or not np.isfinite(self.mean).all():  # written this way so that NaN fails too
            raise TransformError(f"{self.method}: matrix and inverse disagree, max |M M^-1 v - v| = {error:.3g}")
        if self.alpha is not None:
            error = np.abs(self.matrix - self.alpha**2 * self.inverse.T).max()
            if not error <= 1e-12 * self.alpha:
                raise TransformError(f"{self.method}: {self.alpha} is not the gain of the matrix, off by {error:.3g}")

    @property
    def rank(self) -> int:
        """k, the channels of a target."""
        return len(self.matrix)

    @cached_property
    def digest(self) -> str:
        """64 hex digits over everything that changes a target: the identity of this transform."""
        identity = {
            "method": self.method,
            "output": self.output,
            "fingerprint": self.fingerprint,
            "moments_digest": self.moments_digest,
            "count": self.count,
            "rank": self.rank,
        }
        return sha256(canonical_json(identity), self.mean, self.matrix, self.inverse)

    def apply(self, x: Any) -> Any:
        """Features [..., D] to targets [..., k], in the library, precision and device of `x`."""
        mean_D, matrix_kD = self.arrays_like(x)[:2]
        _check_width(x, len(self.mean))
        return (x - mean_D) @ matrix_kD.T

    def invert(self, y: Any) -> Any:
        """Targets [..., k] to features [..., D], in the library, precision and device of `y`."""
        mean_D, _, inverse_Dk = self.arrays_like(y)
        _check_width(y, self.rank)
        return y @ inverse_Dk.T + mean_D

    def arrays_like(self, x: Any) -> tuple[Any, Any, Any]:
        """mean, matrix and inverse in the library, precision and device of `x`; loops convert once and keep them."""
        xp = array_namespace(x)
        if not xp.isdtype(x.dtype, "real floating"):
            raise TransformError(f"a transform takes floating point features; got {x.dtype}: decode them first")
        mean_D, matrix_kD, inverse_Dk = (
            xp.asarray(array, dtype=x.dtype, device=device(x)) for array in (self.mean, self.matrix, self.inverse)
        )
        return mean_D, matrix_kD, inverse_Dk

    def to_bytes(self, dtype: str = "float64") -> bytes:
        """The artifact: a safetensors file with float64 tensors and everything else as metadata strings.

        With float32 it is for those who apply it in that precision: from_bytes takes the artifact itself only.

        Written here because the safetensors library orders metadata at random, and equal transforms must give
        equal files. Layout: u64 length of a JSON header, the header, the tensors.
        """
        header: dict[str, Any] = {"__metadata__": self.metadata()}
        tensors: list[bytes] = []
        offset = 0
        for name in TENSORS:
            array = getattr(self, name).astype(dtype, copy=False)
            tensors.append(little_endian(array).tobytes())
            header[name] = {
                "dtype": {"float64": "F64", "float32": "F32"}[dtype],
                "shape": array.shape,
                "data_offsets": [offset, offset + array.nbytes],
            }
            offset += array.nbytes
        text = canonical_json(header)
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + b"".join(tensors)

    @classmethod
    def from_bytes(cls, artifact: bytes, digest: str) -> Transform:
        """Read an artifact; raises DamagedObject unless it is the transform of that digest."""
        try:
            (length,) = struct.unpack_from("<Q", artifact)
            metadata = json.loads(artifact[8 : 8 + length])["__metadata__"]
            tensors = load(artifact)
            transform = cls(
                method=metadata["method"],
                mean=tensors["mean"],
                matrix=tensors["matrix"],
                inverse=tensors["inverse"],
                count=int(metadata["count"]),
                alpha=float(metadata["alpha"]) if metadata["alpha"] else None,
                rotation=metadata["rotation"],
                hadamard=metadata["hadamard"],
                output=metadata["output"],
                fingerprint=metadata["fingerprint"],
                moments_digest=metadata["moments_digest"],
                statsvc_version=metadata["statsvc_version"],
            )
            if wrong := [key for key, value in transform.metadata().items() if metadata[key] != value]:
                raise ValueError(f"its {wrong[0]} is {metadata[wrong[0]]!r}")
        except Exception as error:  # whatever the bytes are, it is not our file
            raise DamagedObject(f"transform {digest}: not a transform artifact ({error}); restore the file") from error
        if transform.digest != digest:
            raise DamagedObject(
                f"transform {digest}: its contents have digest {transform.digest}; targets must not be mixed with it: "
                "restore the file"
            )
        return transform

    def metadata(self) -> dict[str, str]:
        """What the artifact says beside its tensors."""
        return {
            "method": self.method,
            "output": self.output,
            "digest": self.digest,
            "count": str(self.count),
            "alpha": "" if self.alpha is None else repr(float(self.alpha)),
            "rank": str(self.rank),
            "rotation": self.rotation,
            "hadamard": self.hadamard,
            "fingerprint": self.fingerprint,
            "moments_digest": self.moments_digest,
            "statsvc_version": self.statsvc_version,
        }


def _check_width(x: Any, width: int) -> None:
    # A last axis of 1 would be broadcast, not refused.
    if x.shape[-1:] != (width,):
        raise TransformError(f"this transform takes [..., {width}]; got shape {tuple(x.shape)}")
