"""Five random rows of each teacher, from the stored codes and from a fresh forward pass. Imports nothing of statsvc.

    python tests/support/oracle.py STORE CHECKPOINTS TARS   prints teacher, output, row, signal to noise in decibels

CHECKPOINTS holds a transformers folder named after each teacher's architecture.
"""

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from PIL import Image, ImageOps
from safetensors import safe_open
from transformers import AutoModel

store, checkpoints, tars = map(Path, sys.argv[1:])
FOLDERS = {"dino": "dinov2", "siglip": "siglip"}
root: Any = zarr.open_group(store, mode="r")
photographs: list[tuple[int, bytes]] = []
for shard, tar in enumerate(sorted(tars.glob("*.tar"))):
    with tarfile.open(tar) as members:
        jpegs = [members.extractfile(member) for member in members if member.name.endswith(".jpg")]
        first = shard * root.attrs["rows_per_shard"]
        photographs += [(first + position, jpeg.read()) for position, jpeg in enumerate(jpegs) if jpeg]
rng = np.random.default_rng(7)
for teacher, folder in FOLDERS.items():
    about = root[f"teachers/{teacher}"].attrs
    size, filter_name = about["preprocessing"]["size"], about["preprocessing"]["interpolation"].upper()
    model = AutoModel.from_pretrained(checkpoints / folder).eval()
    ((_, cache_set),) = root[f"teachers/{teacher}/cache"].groups()
    for row, jpeg in (photographs[i] for i in rng.choice(len(photographs), 5, replace=False)):
        x, y, w, h, _ = (int(number) for number in root["samples/views"][row])
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg))).convert("RGB")
        view = upright.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling[filter_name])
        pixels = (np.asarray(view) / 255 - about["preprocessing"]["mean"]) / about["preprocessing"]["std"]
        with torch.no_grad():
            out = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
        tokens = about["outputs"]["patches"]["tokens"]
        for output, features in (("patches", out.last_hidden_state[0, -tokens:]), ("summary", out.pooler_output)):
            arrays = cache_set[output]
            stored = arrays["codes"] if "codes" in arrays else arrays["values"]
            target = stored[row].astype(np.float64)
            if "scales" in arrays:
                target *= arrays["scales"][row][:, None]
            with safe_open(
                store / ".statsvc/transforms" / f"{stored.attrs['transform']}.safetensors", "np"
            ) as artifact:
                mean, inverse = artifact.get_tensor("mean"), artifact.get_tensor("inverse")
            error = target @ inverse.T + mean - features.numpy()
            signal = ((features.numpy() - mean) ** 2).sum() / (error**2).sum()
            print(teacher, output, row, f"{10 * np.log10(signal):.1f}")
