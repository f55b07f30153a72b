"""Transforms against their formulas, the artifact against safetensors' own reader, and the digest computed by hand.

Suffixes: N = feature vectors, D = channels of the teacher, k = channels of the target.
"""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.errors import DamagedObject, TransformError
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import METHODS, fit
from statsvc.numerics.transform import Transform
from tests.support.features import TEACHERS, Floats, teacher_features
from tests.support.libraries import each_library, host

Library = Callable[[NDArray[Any]], Any]


def fitted(method: str = "phi-s", dim: int = 12) -> Transform:
    moments = Moments.of(teacher_features("dinov2", 200, dim))
    return fit(moments, method, output="patches", fingerprint="0123456789abcdef" * 4)


def made(mean_D: Floats, matrix_kD: Floats, inverse_Dk: Floats, alpha: float | None = None) -> Transform:
    return Transform("made", mean_D, matrix_kD, inverse_Dk, count=9, alpha=alpha)


def narrow() -> Transform:
    """12 channels to 5, as a method with a rank would: rows of the matrix are orthonormal."""
    rows_kD = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 5)))[0].T
    return made(np.arange(12.0), rows_kD * 2, np.ascontiguousarray(rows_kD.T) / 2, alpha=2.0)


# There and back


@each_library
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("dtype", "contract", "expected"), [(np.float64, 1e-6, 1e-12), (np.float32, 5e-5, 3e-5)])
def test_features_of_real_scales_come_back_within_a_fraction_of_each_channels_deviation(
    dtype: type[np.floating], contract: float, expected: float, teacher: str, method: str, library: Library
) -> None:
    """The worst of 1500 values of the worst of 384 channels. Measured: 1e-13 in float64, 2e-5 (SigLIP) in float32."""
    x_ND = teacher_features(teacher, 1500, 384).astype(dtype)
    transform = fit(Moments.of(x_ND), method, eigenvalue_floor=1e-4)
    back_ND = host(transform.invert(transform.apply(library(x_ND))))
    assert back_ND.dtype == dtype
    error_D = np.abs(back_ND - x_ND.astype(np.float64)).max(axis=0) / x_ND.std(axis=0, dtype=np.float64)
    assert error_D.max() <= expected <= contract


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.floats(1e-3, 1e3), st.sampled_from([(3,), (2, 3), (0,), ()]))
def test_inverting_undoes_applying(seed: int, dim: int, spread: float, leading: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    axes_DD = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    gain_D = np.geomspace(1, spread, dim)
    transform = made(10 * rng.standard_normal(dim), gain_D[:, None] * axes_DD, axes_DD.T / gain_D)
    x_ND = transform.mean + rng.standard_normal((*leading, dim))
    back_ND = transform.invert(transform.apply(x_ND))
    assert back_ND.shape == x_ND.shape
    # A product of 8 terms errs by 8 ulps, twice; the inverse magnifies it by at most the spread of the gains.
    condition = max(spread, 1 / spread)
    assert np.all(np.abs(back_ND - x_ND) <= 64 * np.finfo(np.float64).eps * condition * (10 + np.abs(x_ND)))


@each_library
def test_applying_and_inverting_are_the_two_formulas(library: Library) -> None:
    for transform in (fitted(), narrow()):
        x_ND = teacher_features("dinov2", 6, 12).astype(np.float64)
        k = transform.rank
        y_Nk = host(transform.apply(library(x_ND)))
        back_ND = host(transform.invert(library(y_Nk)))
        assert y_Nk.shape == (6, k)
        for n in range(6):
            for j in range(k):
                y = sum(transform.matrix[j, c] * (x_ND[n, c] - transform.mean[c]) for c in range(12))
                assert y_Nk[n, j] == pytest.approx(y, abs=1e-13)
            for c in range(12):
                x = sum(transform.inverse[c, j] * y_Nk[n, j] for j in range(k)) + transform.mean[c]
                assert back_ND[n, c] == pytest.approx(x, abs=1e-12)


@each_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 3, 4)])
def test_any_leading_axes_are_kept_with_library_precision_and_device(
    leading: tuple[int, ...], dtype: type[np.floating], library: Library
) -> None:
    x = library(np.ones((*leading, 12), dtype))
    y = narrow().apply(x)
    back = narrow().invert(y)
    assert type(y) is type(back) is type(x)
    assert y.dtype == back.dtype == x.dtype
    assert (y.shape, back.shape) == ((*leading, 5), (*leading, 12))
    assert y.device == back.device == x.device


@each_library
def test_what_is_no_floating_point_feature_of_that_width_is_refused(library: Library) -> None:
    transform = narrow()
    for way, width in ((transform.apply, 12), (transform.invert, 5)):
        with pytest.raises(TransformError, match="int64: decode them first"):
            way(library(np.ones((3, width), np.int64)))
        # A width of 1 would be broadcast; 12 and 5 are the widths of the other way.
        for wrong in (1, 17 - width, width + 1):
            with pytest.raises(TransformError, match=rf"takes \[\.\.\., {width}\]; got shape \(3, {wrong}\)"):
                way(library(np.ones((3, wrong), np.float32)))
        with pytest.raises(TransformError, match=r"got shape \(\)"):
            way(library(np.array(1.0)))


# What cannot be a transform

EYE, ZERO = np.eye(4), np.zeros(4)


@pytest.mark.parametrize(
    ("mean", "matrix", "inverse", "reason"),
    [
        (ZERO, EYE[:3], EYE, "must agree"),
        (ZERO[:3], EYE, EYE, "must agree"),
        (ZERO[:, None], EYE, EYE, "must agree"),
        (ZERO, EYE, EYE + 1e-6, "disagree"),
        (ZERO, EYE, 2 * EYE, "disagree"),
        (ZERO, EYE[::-1].copy(), EYE, "disagree"),
        (ZERO, np.full((4, 4), np.nan), EYE, "disagree"),
        (ZERO, EYE, np.diag([1, 1, 1, np.nan]), "disagree"),
        (np.array([0, 0, np.nan, 0]), EYE, EYE, "disagree"),
        (np.array([0, 0, np.inf, 0]), EYE, EYE, "disagree"),
        (ZERO, np.diag([1, 1, 1, np.inf]), np.diag([1, 1, 1, 0.0]), "disagree"),
        (ZERO.astype(np.float32), EYE, EYE, "float64"),
        (ZERO, EYE.astype(np.float32), EYE, "float64"),
        (ZERO, EYE, EYE.astype(np.int64), "float64"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(mean: Any, matrix: Any, inverse: Any, reason: str) -> None:
    with pytest.raises(TransformError, match=f"made.*{reason}"):
        made(mean, matrix, inverse)


@pytest.mark.parametrize("alpha", [3.0, -2.0, 2.0 + 1e-10, 0.0, np.nan, np.inf])
def test_a_gain_that_is_not_the_matrixs_is_refused(alpha: float) -> None:
    assert made(ZERO, 2 * EYE, EYE / 2, alpha=2.0).alpha == 2.0
    with pytest.raises(TransformError, match="not the gain"):
        made(ZERO, 2 * EYE, EYE / 2, alpha=alpha)


# The digest


@pytest.mark.parametrize("transform", [*map(fitted, METHODS), narrow()], ids=[*METHODS, "with a rank"])
def test_the_digest_is_computed_as_the_design_says(transform: Transform) -> None:
    """sha256(canonical JSON of {method, output, fingerprint, moments_digest, count, rank} || mean || matrix || inverse
    as little-endian float64, C order)."""
    identity = (
        f'{{"count":{transform.count},"fingerprint":"{transform.fingerprint}","method":"{transform.method}",'
        f'"moments_digest":"{transform.moments_digest}","output":"{transform.output}","rank":{transform.rank}}}'
    )
    numbers = [
        *transform.mean.tolist(),
        *(value for row in transform.matrix.tolist() for value in row),
        *(value for row in transform.inverse.tolist() for value in row),
    ]
    expected = hashlib.sha256(identity.encode() + struct.pack(f"<{len(numbers)}d", *numbers)).hexdigest()
    assert transform.digest == expected


def nudged(array: Floats) -> Floats:
    """The last bit of one number."""
    changed = array.copy()
    changed.flat[-1] = np.nextafter(changed.flat[-1], np.inf)
    return changed


CHANGES: dict[str, Any] = {
    "method": "global",
    "output": "summary",
    "fingerprint": "other",
    "moments_digest": "other",
    "count": 201,
    "mean": nudged(fitted().mean),
    "matrix": nudged(fitted().matrix),
    "inverse": nudged(fitted().inverse),
}
NO_NUMBERS: dict[str, Any] = {"alpha": None, "rotation": "other", "hadamard": "other", "statsvc_version": "other"}


@pytest.mark.parametrize("field", CHANGES)
def test_the_digest_changes_with_everything_that_changes_a_target(field: str) -> None:
    transform = fitted()
    assert replace(transform, **{field: CHANGES[field]}).digest != transform.digest


@pytest.mark.parametrize("field", NO_NUMBERS)
def test_the_digest_does_not_change_with_what_changes_no_target(field: str) -> None:
    transform = fitted()
    changed: Any = replace(transform, **{field: NO_NUMBERS[field]})
    assert changed.digest == transform.digest


def test_every_field_is_known_to_change_the_digest_or_not() -> None:
    assert {field.name for field in fields(Transform)} == {*CHANGES, *NO_NUMBERS}


def test_the_digest_does_not_depend_on_how_arrays_lie_in_memory() -> None:
    transform = fitted()
    columns_first: Any = replace(transform, matrix=np.asfortranarray(transform.matrix))
    assert columns_first.digest == transform.digest
    assert columns_first.to_bytes() == transform.to_bytes()


# The artifact


@pytest.mark.parametrize("transform", [*map(fitted, METHODS), narrow()], ids=[*METHODS, "with a rank"])
def test_plain_safetensors_reads_the_artifact(transform: Transform, tmp_path: Path) -> None:
    path = tmp_path / "artifact.safetensors"
    path.write_bytes(transform.to_bytes())
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert metadata == {
        "method": transform.method,
        "output": transform.output,
        "digest": transform.digest,
        "count": str(transform.count),
        "alpha": "" if transform.alpha is None else repr(transform.alpha),
        "rank": str(transform.rank),
        "rotation": transform.rotation,
        "hadamard": transform.hadamard,
        "fingerprint": transform.fingerprint,
        "moments_digest": transform.moments_digest,
        "statsvc_version": version("statsvc"),
    }
    assert sorted(tensors) == ["inverse", "matrix", "mean"]
    for name, tensor in tensors.items():
        assert tensor.dtype == np.float64
        assert np.array_equal(tensor, getattr(transform, name))
    assert tensors["matrix"].shape == (transform.rank, 12)
    # Tensors begin at a multiple of 8 bytes, so that readers can map them.
    assert struct.unpack_from("<Q", path.read_bytes())[0] % 8 == 0


@pytest.mark.parametrize("transform", [*map(fitted, METHODS), narrow()], ids=[*METHODS, "with a rank"])
def test_what_was_written_is_read_back(transform: Transform) -> None:
    back = Transform.from_bytes(transform.to_bytes(), transform.digest)
    for field in fields(Transform):
        written, read = getattr(transform, field.name), getattr(back, field.name)
        assert np.array_equal(written, read) if isinstance(written, np.ndarray) else written == read, field.name
    assert back.to_bytes() == transform.to_bytes()


def test_an_artifact_of_another_version_is_read_and_keeps_its_bytes() -> None:
    older = replace(fitted(), statsvc_version="0.0.1")
    assert b'"statsvc_version":"0.0.1"' in older.to_bytes()
    assert Transform.from_bytes(older.to_bytes(), older.digest).to_bytes() == older.to_bytes()


def test_texts_beyond_ascii_survive() -> None:
    transform = replace(fitted(), output='"p\\ätches" 𝄞')
    assert Transform.from_bytes(transform.to_bytes(), transform.digest).output == transform.output
    assert safetensors.numpy.load(transform.to_bytes()).keys() == {"mean", "matrix", "inverse"}


BYTES = """
import hashlib, sys
import numpy as np
from statsvc.numerics.transform import Transform
matrix = np.array([[0.0, 2.0], [-2.0, 0.0]])
made = Transform("made", np.array([1.5, -0.1]), matrix, matrix.T / 4, 9, 2.0, output="patches", moments_digest="m")
sys.stdout.write(made.to_bytes().hex())
"""


def test_equal_transforms_are_equal_bytes_in_every_process() -> None:
    written = {
        subprocess.run(
            [sys.executable, "-c", BYTES], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    matrix = np.array([[0.0, 2.0], [-2.0, 0.0]])
    here = Transform(
        "made", np.array([1.5, -0.1]), matrix, matrix.T / 4, 9, 2.0, output="patches", moments_digest="m"
    ).to_bytes()
    assert written == {here.hex()}


# Damage


@pytest.mark.parametrize("digest", ["", "0" * 64, fitted("global").digest])
def test_an_artifact_under_another_digest_is_refused(digest: str) -> None:
    transform = fitted()
    with pytest.raises(DamagedObject, match=f"{digest}.*{transform.digest}.*restore"):
        Transform.from_bytes(transform.to_bytes(), digest)


def span(artifact: bytes, key: str) -> range:
    """Where the value of a metadata key stands."""
    before = f'"{key}":"'.encode()
    start = artifact.index(before) + len(before)
    return range(start, artifact.index(b'"', start))


@pytest.mark.parametrize("flip", [0x01, 0x02, 0x10, 0x20, 0x80])
def test_no_flipped_bit_goes_unnoticed(flip: int) -> None:
    """Every byte, but for those that no number depends on: padding, and words about where the transform comes from."""
    transform = fitted(dim=4)
    artifact = transform.to_bytes()
    words = {at for key in ("rotation", "hadamard", "statsvc_version") for at in span(artifact, key)}
    (length,) = struct.unpack_from("<Q", artifact)
    padding = set(range(len(artifact[: 8 + length].rstrip(b" ")), 8 + length))
    accepted = set()
    for at in range(len(artifact)):
        damaged = bytearray(artifact)
        damaged[at] ^= flip
        try:
            read = Transform.from_bytes(bytes(damaged), transform.digest)
        except DamagedObject:
            continue
        accepted.add(at)
        assert read.digest == transform.digest
        assert read.alpha == pytest.approx(transform.alpha, rel=1e-12)
    # The last digits of alpha are below the rounding of the matrix that it is checked against.
    assert accepted <= words | padding | set(span(artifact, "alpha")[-6:])


def test_no_cut_lengthened_or_blanked_artifact_is_read() -> None:
    transform = fitted()
    artifact = transform.to_bytes()
    damaged = [artifact[:length] for length in range(0, len(artifact), 7)]
    damaged += [artifact + b"\0", artifact + artifact, b"\0" + artifact, bytes(len(artifact)), b"\xff" * 100]
    page = 256
    damaged += [
        artifact[:start] + bytes(page) + artifact[start + page :]
        for start in range(0, len(artifact) - page, page)
        if any(artifact[start : start + page])
    ]
    for one in damaged:
        with pytest.raises(DamagedObject, match="restore the file"):
            Transform.from_bytes(one, transform.digest)


@pytest.mark.parametrize("key", ["count", "alpha", "rank", "digest", "method", "statsvc_version"])
def test_metadata_that_contradict_the_tensors_or_are_missing_are_refused(key: str) -> None:
    """Even in a well-formed file: a reader without statsvc would believe them."""
    transform = fitted()
    tensors = {name: getattr(transform, name) for name in ("mean", "matrix", "inverse")}
    (length,) = struct.unpack_from("<Q", transform.to_bytes())
    metadata = json.loads(transform.to_bytes()[8 : 8 + length])["__metadata__"]
    assert Transform.from_bytes(safetensors.numpy.save(tensors, metadata), transform.digest).count == 200
    missing = {name: value for name, value in metadata.items() if name != key}
    with pytest.raises(DamagedObject):
        Transform.from_bytes(safetensors.numpy.save(tensors, missing), transform.digest)
    if key != "statsvc_version":
        with pytest.raises(DamagedObject):
            Transform.from_bytes(safetensors.numpy.save(tensors, {**metadata, key: "13"}), transform.digest)


def test_tensors_of_another_type_are_refused() -> None:
    transform = fitted()
    (length,) = struct.unpack_from("<Q", transform.to_bytes())
    metadata = json.loads(transform.to_bytes()[8 : 8 + length])["__metadata__"]
    tensors = {name: getattr(transform, name).astype(np.float32) for name in ("mean", "matrix", "inverse")}
    with pytest.raises(DamagedObject, match="float64"):
        Transform.from_bytes(safetensors.numpy.save(tensors, metadata), transform.digest)
