"""How many images are enough: the error that the stop rule expects, beside the error that there really is.

Tokens of one image resemble each other, so each image shares a part of its noise. The true covariance is known here,
and with it the true variances of the targets, which ought to be 1.

Suffixes: N = feature vectors, D = channels.
"""

from __future__ import annotations

import numpy as np

import statsvc
from tests.benchmarks.fits import variances
from tests.benchmarks.rows import Goal, Row, Table
from workers.driver.pilot import confidence

DIM, TOKENS, SHARED = 256, 49, 0.4  # SHARED: correlation of two tokens of one image
TRIALS = 12
IMAGES = (3000,)  # about where the rule stops: at an error of 1%


def tables() -> list[Table]:
    # Variances over two decades, mixed over all channels.
    root_DD = np.random.default_rng(0).standard_normal((DIM, DIM)) * np.geomspace(1, 0.1, DIM)
    root_DD = root_DD.astype(np.float32)
    true_DD = root_DD @ root_DD.T
    rows = []
    for images in IMAGES:
        errors, ratios = [], []
        for trial in range(TRIALS):
            rng = np.random.default_rng((images, trial))
            halves = []
            for _ in range(2):
                image_ND = np.repeat(rng.standard_normal((images // 2, DIM), np.float32), TOKENS, axis=0)
                own_ND = rng.standard_normal((images // 2 * TOKENS, DIM), np.float32)
                x_ND = (SHARED**0.5 * image_ND + (1 - SHARED) ** 0.5 * own_ND) @ root_DD.T
                halves.append(statsvc.Moments.of(x_ND))
            expected = confidence((halves[0], halves[1]), "phi-s")
            assert expected
            fitted = statsvc.fit(halves[0].merge(halves[1]), "phi-s")
            true = float(np.sqrt(np.mean((variances(fitted.matrix, true_DD) - 1) ** 2)))
            errors.append(true)
            ratios.append(true / expected.rms)
        independent = (1 + (TOKENS - 1) * SHARED**2) / (images * TOKENS)
        what = f"{images} images of {TOKENS} tokens: rms error"
        law = float(np.sqrt(2 * independent))
        rows += [
            Row(what, float(np.median(errors)), "", law, "sqrt(2 deff / N)", "less"),
            Row(
                f"{images} images: least of true / expected in {TRIALS} trials", min(ratios), goal=Goal(0.78, of="ours")
            ),
            Row(f"{images} images: largest of true / expected", max(ratios), goal=Goal(1.14, at_most=True, of="ours")),
        ]
    return [Table(f"The stop rule: error of the output variances, D={DIM}, correlation {SHARED} in an image", (*rows,))]
