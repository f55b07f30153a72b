"""Lets torchvision's wheel for GPUs be imported beside a torch for CPUs, where its compiled operators cannot be loaded.

Goes into the second environment of the tests (see teachers_env.py) and nowhere else: timm and open_clip import
torchvision, but the models of the tests need none of its operators; declared without any code, they do not get in the
way. Every interpreter of that environment imports this file, so torch must not be imported before it is needed.
"""

from __future__ import annotations

import sys
from typing import Any

OPERATORS = ("nms", "qnms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
declared: list[Any] = []  # torch forgets a library that nobody holds


class BeforeTorchvision:
    """A finder that finds nothing, but is asked for torchvision before it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG002
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()


def declare() -> None:
    """The operators by name, unless the compiled ones can be loaded."""
    import importlib.machinery
    from pathlib import Path

    import torch

    untyped: Any = torch
    found = importlib.machinery.PathFinder.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        for compiled in Path(found.origin).parent.glob("_C.*so"):
            untyped.ops.load_library(str(compiled))
            return
    except OSError:
        pass
    library = untyped.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor x) -> Tensor")
        library.define(f"_{operator}_backward(Tensor x) -> Tensor")
    declared.append(library)


sys.meta_path.insert(0, BeforeTorchvision())
