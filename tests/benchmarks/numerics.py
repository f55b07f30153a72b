"""What statistics and fits cost, next to the teacher's forward pass and to one eigendecomposition.

python -m tests.benchmarks.numerics [--repeats 5]
"""

import argparse
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import ViTConfig, ViTModel

from statsvc.hadamard import hadamard
from statsvc.moments import Moments, MomentsStream
from statsvc.normalizations import fit
from tests.benchmarks.timing import alternate, judge

IMAGES, TOKENS = 8, 197
STREAMED = 16 * 4096  # tokens, so that closing the stream weighs as little as in a real dataset shard


def measure_statistics(repeats: int) -> None:
    """Moments at D=768 as a part of a float32 ViT-B/16 pass over the same number of tokens."""
    model: Any = ViTModel(ViTConfig(), add_pooling_layer=False)
    model.eval()
    pixels_B3SS = torch.randn(IMAGES, 3, 224, 224)
    x_ND = torch.randn(STREAMED, 768)

    def forward() -> None:
        with torch.inference_mode():
            model(pixels_B3SS)

    def statistics() -> None:
        stream: MomentsStream[torch.Tensor] = MomentsStream(768)
        stream.add(x_ND)
        stream.moments()

    seconds = alternate({"forward": forward, "statistics": statistics}, repeats)
    per_token = seconds["forward"] / (IMAGES * TOKENS)
    share = seconds["statistics"] / STREAMED / per_token
    microseconds = seconds["statistics"] / STREAMED * 1e6
    print(f"\nstatistics at D=768, {torch.get_num_threads()} threads: {microseconds:.2f} us a token")
    print(f"  float32 ViT-B/16: {per_token * 1e6:.0f} us a token")
    judge("statistics / forward pass", share, 0.01, at_most=True)


def measure_fit(repeats: int) -> None:
    """PHI-S at D=1536 from moments to a finished transform, next to one float64 eigh of the same matrix."""
    rng = np.random.default_rng(0)
    dim = 1536
    mixing_DD = rng.standard_normal((dim, dim)) * np.logspace(0, -2, dim)
    covariance_DD = mixing_DD @ mixing_DD.T / dim
    moments = Moments(20_000, rng.standard_normal(dim), covariance_DD * 19_999)

    def eigh() -> None:
        with threadpool_limits(1):
            np.linalg.eigh(covariance_DD)

    cases = {"eigh, one thread": eigh, "fit phi-s": lambda: fit(moments, "phi-s"), "hadamard": lambda: hadamard(dim)}
    seconds = alternate(cases, repeats)
    print(f"\nfit at D={dim}: " + ", ".join(f"{name} {each:.2f} s" for name, each in seconds.items()))
    judge("fit / eigh", seconds["fit phi-s"] / seconds["eigh, one thread"], 3.0, at_most=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    repeats = arguments.parse_args().repeats
    measure_statistics(repeats)
    measure_fit(repeats)


if __name__ == "__main__":
    main()
