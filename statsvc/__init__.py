"""statsvc: teacher features run once, normalized with PHI-S, cached as Zarr. See README.md."""

from statsvc.numerics.hadamard import hadamard
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import fit
from statsvc.numerics.rotation import rotation
from statsvc.numerics.transform import Transform
from statsvc.store.reader import open_store as open  # noqa: A004 - the public name is statsvc.open

__all__ = ["Moments", "Transform", "fit", "hadamard", "open", "rotation"]
