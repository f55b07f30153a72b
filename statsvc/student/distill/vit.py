"""The reference student: a plain ViT with one small head for each teacher and output.

Suffixes: B = images, S = side in pixels, P = patches, N = tokens (class tokens, then patches), d = width of the
student, h = heads of the attention, T = tokens of an output, k = channels of an output.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from statsvc.digests import canonical_json
from statsvc.errors import StoreError

Found = dict[str, dict[str, torch.Tensor]]
METADATA = "statsvc-student"  # one entry: the safetensors library writes several in any order
STD = 0.02  # of the first weights, as in most ViTs


@dataclass(frozen=True)
class Shape:
    """Everything that decides the shapes of a student's weights, and what its pixels must be.

    outputs  teacher -> output -> (tokens, channels); a summary has a class token for each of its tokens
    mean, std  of the pixels in [0, 1], as the student was trained with them
    """

    size: int
    patch: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float
    outputs: dict[str, dict[str, tuple[int, int]]]
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def grid(self) -> tuple[int, int]:
        return self.size // self.patch, self.size // self.patch


class Block(nn.Module):
    """Attention, then an MLP, each behind its norm and beside an identity."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads, hidden = heads, int(dim * mlp_ratio)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x_BNd: torch.Tensor) -> torch.Tensor:
        q_BhNd, k_BhNd, v_BhNd = (
            self.qkv(self.norm_attention(x_BNd)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed_BNd = functional.scaled_dot_product_attention(q_BhNd, k_BhNd, v_BhNd).transpose(1, 2).flatten(2)
        x_BNd = x_BNd + self.projection(mixed_BNd)
        seen_BNd: torch.Tensor = x_BNd + self.mlp(self.norm_mlp(x_BNd))
        return seen_BNd


class Student(nn.Module):
    """Pixels float32 [B, 3, S, S], normalized, to {teacher: {output: [B, T, k]}}; patches on the student's own grid.

    The heads end in nn.Linear, into which `fold` folds the inverse of a transform.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, patches, dim = shape, shape.grid[0] * shape.grid[1], shape.dim
        self.embed = nn.Conv2d(3, dim, shape.patch, shape.patch)
        self.places = nn.Parameter(torch.empty(1, patches, dim))
        self.classes = nn.Parameter(torch.empty(1, sum(self._class_tokens()), dim))
        self.blocks = nn.ModuleList(Block(dim, shape.heads, shape.mlp_ratio) for _ in range(shape.depth))
        # With a slash in it, no name is one of ModuleDict's own attributes.
        self.heads = nn.ModuleDict(
            {
                f"{teacher}/{output}": nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, channels))
                for teacher, outputs in shape.outputs.items()
                for output, (_, channels) in outputs.items()
            }
        )
        for parameter in (self.places, self.classes):
            nn.init.trunc_normal_(parameter, std=STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=STD)
                nn.init.zeros_(module.bias)

    def forward(self, image_B3SS: torch.Tensor) -> Found:
        patches_BPd = self.embed(image_B3SS).flatten(2).mT + self.places
        classes_BNd = self.classes.expand(len(image_B3SS), -1, -1)
        x_BNd = torch.cat([classes_BNd, patches_BPd], 1)
        for block in self.blocks:
            x_BNd = block(x_BNd)
        *summaries, patches_BPd = torch.split(x_BNd, [*self._class_tokens(), patches_BPd.shape[1]], 1)
        own, found = iter(summaries), {}
        for teacher, outputs in self.shape.outputs.items():
            found[teacher] = {
                output: self.heads[f"{teacher}/{output}"](patches_BPd if output == "patches" else next(own))
                for output in outputs
            }
        return found

    def _class_tokens(self) -> list[int]:
        """How many each summary has, in the order of the outputs."""
        return [
            tokens
            for outputs in self.shape.outputs.values()
            for output, (tokens, _) in outputs.items()
            if output != "patches"
        ]


def student_bytes(student: Student, about: dict[str, Any]) -> bytes:
    """A safetensors file with the weights; its metadata hold the shape, and what else there is to say."""
    told = canonical_json({"shape": asdict(student.shape), "about": about}).decode()
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    data: bytes = save(weights, {METADATA: told})
    return data


def load_student(path: str | Path) -> Student:
    """The student of a file that `statsvc distill` wrote, in evaluation mode on the CPU.

    `student.shape` says what its pixels must be. Raises StoreError for any other file.
    """
    try:
        with safe_open(path, "pt") as file:
            shape = json.loads(file.metadata()[METADATA])["shape"]
            outputs = {
                teacher: {output: tuple(each) for output, each in outputs.items()}
                for teacher, outputs in shape.pop("outputs").items()
            }
            shape |= {name: tuple(shape[name]) for name in ("mean", "std")}
            student = Student(Shape(outputs=outputs, **shape))
            student.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(
            f"{path}: not a student of `statsvc distill` ({error}); name its student.safetensors"
        ) from error
    return student.eval()
