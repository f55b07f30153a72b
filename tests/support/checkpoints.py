"""Checkpoint folders that transformers writes, small and random, and the ways in which tests change them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from tests.support.teachers import Keys

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
DINO = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
SAM = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "mlp_dim": 64, "window_size": 2, "global_attn_indexes": [1],
}  # fmt: skip
# What such a folder does not say about preprocessing.
GIVEN: Keys = {"size": 32, "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


def shake(model: torch.nn.Module) -> None:
    """Make every weight random, also those that begin as zeros or ones."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))


def save_checkpoint(folder: Path, architecture: str, configuration: Keys, seed: int = 0) -> Any:
    """The model that was saved in the folder."""
    torch.manual_seed(seed)
    auto_model: Any = transformers.AutoModel
    model = auto_model.from_config(transformers.AutoConfig.for_model(architecture, **configuration)).eval()
    shake(model)
    model.save_pretrained(folder)
    return model


def flip(file: Path, place: int) -> None:
    """Change one bit of that byte; twice is not at all."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_weights(file: Path, *missing: str, **changed: torch.Tensor) -> None:
    """Take tensors out of a file of weights, and put others in the place of some (dots in names are __ here)."""
    tensors = safetensors.torch.load_file(file)
    for name in missing:
        del tensors[name]
    tensors.update({name.replace("__", "."): tensor for name, tensor in changed.items()})
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


REVISION = "0123" * 10


def hub_snapshot(hub: Path, repository: str) -> Path:
    """An empty folder where huggingface_hub looks for a repository that it has downloaded."""
    cached = hub / f"models--{repository.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(REVISION)
    snapshot = cached / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
