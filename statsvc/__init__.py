"""statsvc: teacher features run once, normalized with PHI-S, cached as Zarr. See README.md."""

from statsvc.hadamard import hadamard
from statsvc.moments import Moments
from statsvc.normalizations import fit
from statsvc.rotation import rotation
from statsvc.store import open_store as open  # noqa: A004 - the public name is statsvc.open
from statsvc.transform import Transform

__all__ = ["Moments", "Transform", "fit", "hadamard", "open", "rotation"]
