"""The training side: cached, normalized targets in a student's training loop. Needs statsvc[student], with torch."""

from statsvc.student import losses
from statsvc.student.dataset import TargetDataset
from statsvc.student.decode import decode
from statsvc.student.fold import fold_inverse
from statsvc.student.normalize import Denormalize, Normalize
from statsvc.student.resample import resample

__all__ = ["Denormalize", "Normalize", "TargetDataset", "decode", "fold_inverse", "losses", "resample"]
