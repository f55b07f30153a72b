"""The tests mirror the folders of the product; `support` is what they share, `contracts` what all implementations of
a protocol must do.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
