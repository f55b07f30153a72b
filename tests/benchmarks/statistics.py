"""How exact streamed variances are beside two passes in float64, and what they cost beside the teacher's forward pass.

Shape suffixes: N = feature vectors, D = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import IncrementalPCA
from transformers import ViTConfig, ViTModel

from statsvc.numerics.moments import MomentsStream
from tests.benchmarks.rows import Goal, Row, Table
from tests.benchmarks.timing import alternate
from tests.support.features import TEACHERS, teacher_features

IMAGES, TOKENS = 8, 197
DIM = 768
STREAMED = 16 * 4096  # tokens, so that closing the stream weighs as little as in a real dataset shard
BATCH = 2048
REPEATS = 5
EXACT = Goal(1e-6, at_most=True, of="ours")

Floats = NDArray[np.floating]


def tables() -> list[Table]:
    return [accuracy(), cost()]


def ours(x_ND: NDArray[np.float32]) -> Floats:
    stream: MomentsStream[torch.Tensor] = MomentsStream(x_ND.shape[1])
    for batch_ND in torch.split(torch.from_numpy(x_ND), BATCH):
        stream.add(batch_ND)
    return stream.moments().covariance().diagonal().numpy()


def sklearn_pca(x_ND: NDArray[np.float32]) -> Floats:
    pca = IncrementalPCA(batch_size=BATCH)
    for start in range(0, len(x_ND), BATCH):
        pca.partial_fit(x_ND[start : start + BATCH])
    return np.diagonal(pca.get_covariance())


def plain_sums(x_ND: NDArray[np.float32]) -> Floats:
    """Sums of x and of x x^T in float32, as much training code keeps them."""
    x = torch.from_numpy(x_ND)
    sum_D, square_DD = torch.zeros(x.shape[1]), torch.zeros(x.shape[1], x.shape[1])
    for batch_ND in torch.split(x, BATCH):
        sum_D += batch_ND.sum(0)
        square_DD += batch_ND.T @ batch_ND
    covariance_DD = square_DD / len(x) - torch.outer(sum_D / len(x), sum_D / len(x))
    return covariance_DD.diagonal().numpy().astype(np.float64)


def hard_data() -> dict[str, NDArray[np.float32]]:
    rng, count, dim = np.random.default_rng(0), 8 * BATCH, 192
    found = {f"the scales of {name}": teacher_features(name, count, dim) for name in TEACHERS}
    noise_ND = rng.standard_normal((count, dim))
    for ratio in (1e4, 1e5):
        found[f"mean/std of {ratio:.0e}".replace("e+0", "e")] = (noise_ND + ratio).astype(np.float32)
    classes_N1 = np.repeat(rng.standard_normal((16, dim)) * 10, count // 16, axis=0)
    found["sorted by class, 10 apart"] = (noise_ND + classes_N1).astype(np.float32)
    return found


def accuracy() -> Table:
    errors: dict[str, dict[str, float]] = {}
    methods: dict[str, Callable[[NDArray[np.float32]], Floats]] = {
        "ours": ours,
        "scikit-learn IncrementalPCA": sklearn_pca,
        "float32 sums": plain_sums,
    }
    for data, x_ND in hard_data().items():
        true_D = x_ND.astype(np.float64).var(axis=0, ddof=1)
        errors[data] = {name: float(np.abs(method(x_ND) / true_D - 1).max()) for name, method in methods.items()}
    teachers = [errors.pop(data) for data in list(errors) if data.startswith("the scales")]
    worst = {name: max(each[name] for each in teachers) for name in methods}
    rows = [
        Row(data, found["ours"], "", found[name], name, "less", EXACT)
        for data, found in {"scales of four real teachers, worst": worst, **errors}.items()
        for name in methods
        if name != "ours"
    ]
    return Table("Relative error of a channel's variance against two passes in float64, worst channel", tuple(rows))


def cost() -> Table:
    """Moments at D=768 beside a float32 ViT-B/16 pass over as many tokens, and beside the bare product."""
    model: Any = ViTModel(ViTConfig(), add_pooling_layer=False)
    model.eval()
    pixels_B3SS = torch.randn(IMAGES, 3, 224, 224)
    x_ND = torch.randn(STREAMED, DIM)
    few_ND = x_ND[: 3 * BATCH].numpy()
    blocks_ND = torch.split(x_ND, 4096)

    def forward(dtype: torch.dtype) -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            model(pixels_B3SS)

    def statistics() -> None:
        stream: MomentsStream[torch.Tensor] = MomentsStream(DIM)
        stream.add(x_ND)
        stream.moments()

    def product() -> None:
        for block_ND in blocks_ND:
            block_ND.T @ block_ND

    seconds = alternate(
        {
            "float32": lambda: forward(torch.float32),
            "bfloat16": lambda: forward(torch.bfloat16),
            "statistics": statistics,
            "product": product,
        },
        REPEATS,
    )
    # By itself and less often: it takes as long as all the others together.
    seconds |= alternate({"beside sklearn": statistics, "sklearn": lambda: sklearn_pca(few_ND)}, 2)
    counts = {"float32": IMAGES * TOKENS, "bfloat16": IMAGES * TOKENS, "sklearn": len(few_ND)}
    us = {name: each / counts.get(name, STREAMED) * 1e6 for name, each in seconds.items()}
    return Table(
        f"What statistics cost a token at D={DIM}, {torch.get_num_threads()} threads",
        (
            Row("statistics", us["statistics"], "us", us["float32"], "ViT-B/16, float32", "less", Goal(100)),
            Row("statistics", us["statistics"], "us", us["bfloat16"], "ViT-B/16, bfloat16", "less"),
            Row("statistics", us["statistics"], "us", us["product"], "the full product x^T x alone", "less"),
            Row(
                "statistics", us["beside sklearn"], "us", us["sklearn"], "scikit-learn IncrementalPCA", "less", Goal(1)
            ),
        ),
    )
