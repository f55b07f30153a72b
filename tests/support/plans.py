"""Plans small enough to run in a test: real architectures, a few channels, a few layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

TINY_DINO: dict[str, Any] = {
    "source": "random-vit",
    "model": "dinov2",
    "size": 56,
    "options": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "seed": 1,
        "scale": 50.0,
    },
}
TINY_SIGLIP: dict[str, Any] = {
    "source": "random-vit",
    "model": "siglip_vision_model",
    "size": 64,
    "options": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "seed": 2,
        "scale": 0.5,
    },
}


def tiny_dino(**options: Any) -> dict[str, Any]:
    """The tiny teacher with other fields in its config."""
    return {**TINY_DINO, "options": {**TINY_DINO["options"], **options}}


def plan_document(folder: Path, **changes: Any) -> dict[str, Any]:
    """A plan over folder/photos/*.tar into folder/store, with some keys changed."""
    return {
        "store": str(folder / "store"),
        "data": {"shards": str(folder / "photos" / "*.tar")},
        "teachers": {"dino": TINY_DINO, "siglip": TINY_SIGLIP},
        "statistics": {"images": "all"},
        "engine": {"batch_size": 4, "decoders": 1},
        **changes,
    }


def write_plan(folder: Path, document: dict[str, Any]) -> Path:
    """The plan as a file."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    return path
