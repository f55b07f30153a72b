"""Four teachers for the small experiment: real architectures with the statistics of trained ones, without a download.

Weights are drawn at random from a seed, four layers deep, at about a quarter of the real widths. Then weight and bias
of the last LayerNorm are set so that, on other photographs than the experiment's, every channel has the mean and
standard deviation that `tests.support.features.channel_scales` gives it: the extremes of the paper's Table 7, with
sigma_g and
phi of its Table 8. Which channel gets which is drawn. Correlations between channels are what the network makes of
photographs.

Suffixes: N = feature vectors, B = images, T = tokens, D = channels, S = side of the image in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from tests.support.features import channel_scales
from workers.demo import photograph

LAYERS = 4
# Of the weights: with larger ones features have more directions and are harder to foretell. Chosen by how near
# effective rank and what students leave unexplained come to the paper's.
GAINS = {"dfn-clip": 2.5, "siglip": 2.5, "dinov2": 2.0, "sam": 1.0}
CALIBRATION, FIRST_SEED = 96, 1_000_000  # photographs that the experiment does not see
HALF = [0.5, 0.5, 0.5]
# Image and patch, both in pixels: all have 8 x 8 patches.
SIZES = {"dfn-clip": (112, 14), "siglip": (128, 16), "dinov2": (112, 14), "sam": (128, 16)}
NORMS = {"dfn-clip": "post_layernorm", "siglip": "post_layernorm", "dinov2": "layernorm", "sam": "neck.layer_norm2"}


class ClipTokens(torch.nn.Module):
    """A CLIP's patches after its last norm, which transformers applies to the CLS token alone."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.model: Any = transformers.CLIPVisionModel.from_pretrained(weights)

    def forward(self, pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"patches": features("dfn-clip", self.model, pixels_B3SS)}


def write_teachers(folder: Path) -> dict[str, dict[str, Any]]:
    """Write the checkpoints; the section `teachers` of a plan that uses them."""
    section: dict[str, dict[str, Any]] = {}
    for seed, (name, (size, _)) in enumerate(SIZES.items()):
        model = calibrated(name, seed)
        model.save_pretrained(folder / name)
        keys = {"size": size, "interpolation": "bicubic", "mean": HALF, "std": HALF}
        if name == "dfn-clip":
            own = f"{__name__}:{ClipTokens.__name__}"
            section[name] = {"source": "python", "model": own, "options": {"weights": str(folder / name)}, **keys}
        else:
            taps = {"patches": "last_hidden_state", "summary": None}
            section[name] = {"source": "transformers", "model": str(folder / name), "taps": taps, **keys}
    return section


def calibrated(name: str, seed: int) -> Any:
    """A model with random weights and the features' statistics of a trained one."""
    model = architecture(name)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for of, weight in sorted(model.named_parameters()):
            values = rng.standard_normal(tuple(weight.shape), np.float32)
            if "norm" in of and of.endswith("weight"):
                values = np.exp(0.5 * values)
            else:
                values *= 0.1 if weight.ndim == 1 else GAINS[name] * weight[0].numel() ** -0.5
            weight.copy_(torch.from_numpy(values))
    norm = next(module for path, module in model.named_modules() if path.endswith(NORMS[name]))
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    with torch.inference_mode():
        x_ND = features(name, model, photographs(SIZES[name][0])).flatten(0, 1).double()
    mean_D, std_D = (torch.from_numpy(rng.permutation(each)) for each in channel_scales(name, x_ND.shape[1]))
    weight_D = std_D / x_ND.std(0)
    with torch.no_grad():
        norm.weight.copy_(weight_D)
        norm.bias.copy_(mean_D - weight_D * x_ND.mean(0))
    return model


def architecture(name: str) -> Any:
    size, patch = SIZES[name]
    common: dict[str, Any] = {"image_size": size, "patch_size": patch, "num_hidden_layers": LAYERS}
    match name:
        case "dfn-clip":
            config: Any = transformers.CLIPVisionConfig(
                hidden_size=320, intermediate_size=1280, num_attention_heads=5, **common
            )
            model: Any = transformers.CLIPVisionModel(config)
        case "siglip":
            config = transformers.SiglipVisionConfig(
                hidden_size=288, intermediate_size=1152, num_attention_heads=4, **common
            )
            model = transformers.SiglipVisionModel(config)
        case "dinov2":
            model = transformers.Dinov2Model(
                transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, **common)
            )
        case _:
            config = transformers.SamVisionConfig(
                hidden_size=192, mlp_dim=768, num_attention_heads=3, output_channels=320, window_size=4,
                global_attn_indexes=[1, 3], **common,
            )  # fmt: skip
            model = transformers.SamVisionModel(config)
    return model.eval()


def features(name: str, model: Any, pixels_B3SS: torch.Tensor) -> torch.Tensor:
    """[B, T, D]: patches after the last norm."""
    last: torch.Tensor = model(pixels_B3SS).last_hidden_state
    match name:
        case "sam":
            return last.flatten(2).mT
        case "dfn-clip":
            norm = next(module for path, module in model.named_modules() if path.endswith(NORMS[name]))
            normed: torch.Tensor = norm(last[:, 1:])
            return normed
        case "dinov2":
            return last[:, 1:]
    return last


def photographs(size: int) -> torch.Tensor:
    """float32 [B, 3, S, S]: the centres of photographs, as the teachers want them."""
    images = []
    for seed in range(FIRST_SEED, FIRST_SEED + CALIBRATION):
        image = photograph(seed)
        side = min(image.size)
        x, y = (image.width - side) // 2, (image.height - side) // 2
        view = image.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
        images.append(np.asarray(view, np.float32))
    return (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - HALF[0]) / HALF[0]


def effective_rank(x_ND: NDArray[np.floating]) -> float:
    """exp of the entropy of the singular values of centred features (RankMe, arXiv:2210.02885)."""
    value_D = np.linalg.svd(x_ND - x_ND.mean(0), compute_uv=False)
    part_D = value_D / value_D.sum()
    return float(np.exp(-(part_D * np.log(part_D + 1e-12)).sum()))
