"""A transform as a file for others: safetensors, npz or ONNX.

Suffix: none; arrays are those of a Transform.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from statsvc.errors import PlanError
from statsvc.numerics.transform import TENSORS, VERSION, Transform

OPSET, IR_VERSION = 13, 7  # of 2020: nothing newer is needed, and every runtime in use reads them


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """numpy's archive, the same bytes for the same arrays; loads without pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def to_npz(transform: Transform, dtype: str) -> bytes:
    """mean, matrix, inverse and all that is known of them."""
    texts = {name: np.array(value) for name, value in transform.metadata().items()}
    return npz({name: getattr(transform, name).astype(dtype) for name in TENSORS} | texts)


def to_onnx(transform: Transform, inverse: bool = False) -> bytes:
    """A model from float32 features [images, tokens, D] to targets [images, tokens, k], or the way back.

    The shapes are declared, because a runtime would broadcast a last axis of 1 and not refuse it. Raises PlanError
    where the onnx package is not installed.
    """
    onnx = _onnx()
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = (transform.inverse if inverse else transform.matrix).T.astype(np.float32)
    given, gives = ("targets", "features") if inverse else ("features", "targets")
    steps = (
        [
            helper.make_node("MatMul", [given, "weight"], ["turned"]),
            helper.make_node("Add", ["turned", "mean"], [gives]),
        ]
        if inverse
        else [
            helper.make_node("Sub", [given, "mean"], ["centred"]),
            helper.make_node("MatMul", ["centred", "weight"], [gives]),
        ]
    )
    graph = helper.make_graph(
        steps,
        f"{transform.method}{'-inverse' if inverse else ''}",
        [helper.make_tensor_value_info(given, float32, ["images", "tokens", weight.shape[0]])],
        [helper.make_tensor_value_info(gives, float32, ["images", "tokens", weight.shape[1]])],
        initializer=[
            onnx.numpy_helper.from_array(transform.mean.astype(np.float32), "mean"),
            onnx.numpy_helper.from_array(np.ascontiguousarray(weight), "weight"),
        ],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="statsvc",
        producer_version=VERSION,
    )
    helper.set_model_props(model, transform.metadata() | {"direction": f"{given} to {gives}"})
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _onnx() -> Any:
    try:
        return importlib.import_module("onnx")
    except ModuleNotFoundError as error:
        raise PlanError("--format onnx needs the onnx package: pip install 'statsvc[export]'") from error


# From a transform, a dtype, and whether the way back is meant.
ENCODE: dict[str, Callable[[Transform, str, bool], bytes]] = {
    "safetensors": lambda transform, dtype, _: transform.to_bytes(dtype),
    "npz": lambda transform, dtype, _: to_npz(transform, dtype),
    "onnx": lambda transform, _, inverse: to_onnx(transform, inverse),
}
