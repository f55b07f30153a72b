"""A plan, photographs and a model for the containers; and what that model says, without anything of ours.

Suffixes: T = tokens, D = channels, k = channels of a target.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.numpy import load
from transformers import AutoModel, Dinov2Config, Dinov2Model
from transformers.utils import logging

from workers.demo import write_shard

SHARDS, IMAGES = 10, 16
SIZE, MEAN, STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODEL = "models/dino"


def write(folder: Path, demo_plan: Path) -> Path:
    """The folder for /data, and the plan: the demo's teachers and one from a checkpoint, which takes longer."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, image_size=SIZE, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "data" / MODEL)
    for shard in range(SHARDS):
        write_shard(folder / "data" / tar_name(shard), range(shard * IMAGES, (shard + 1) * IMAGES))
    plan: dict[str, Any] = yaml.safe_load(demo_plan.read_text())
    plan["data"] = {"shards": "*.tar"}
    plan["teachers"]["dino"] = {
        "source": "transformers", "model": MODEL, "size": SIZE, "interpolation": "bicubic", "mean": list(MEAN),
        "std": list(STD),
    }  # fmt: skip
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    for entry in (folder, *folder.rglob("*")):  # the containers may run as somebody else
        entry.chmod(0o755 if entry.is_dir() else 0o644)
    return path


def tar_name(shard: int) -> str:
    return f"photos-{shard:06d}.tar"


def fresh_target(folder: Path, shard: int, position: int, artifact: bytes) -> tuple[np.ndarray, np.ndarray]:
    """One photograph through the checkpoint and a transform: the target [T, k], and by how much arithmetic may differ.

    Another batch size and another processor change a float32 forward pass of six layers by some 2**-17 of its numbers;
    four times that, carried through the matrix as if all of it added up.
    """
    with tarfile.open(folder / "data" / tar_name(shard)) as tar:
        jpeg = tar.extractfile([member for member in tar if member.name.endswith(".jpg")][position])
        assert jpeg is not None
        photograph = Image.open(io.BytesIO(jpeg.read()))
    side = min(photograph.size)
    x, y = (photograph.width - side) // 2, (photograph.height - side) // 2
    view = photograph.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = (np.asarray(view) / 255 - MEAN) / STD
    auto_model: Any = AutoModel
    model = auto_model.from_pretrained(folder / "data" / MODEL).eval()
    with torch.no_grad():
        out = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
    feature_TD = out.last_hidden_state[0, 1:].double().numpy()
    transform = load(artifact)
    target_Tk = (feature_TD - transform["mean"]) @ transform["matrix"].T
    noise_Tk = 2.0**-15 * np.abs(feature_TD) @ np.abs(transform["matrix"]).T
    return target_Tk, noise_Tk
