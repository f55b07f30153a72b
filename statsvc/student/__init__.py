"""The training side: cached, normalized targets in a student's training loop. Needs statsvc[student], with torch."""

from statsvc.student.data.dataset import TargetDataset
from statsvc.student.distill.vit import load_student
from statsvc.student.modules import losses
from statsvc.student.modules.decode import decode
from statsvc.student.modules.fold import fold_inverse
from statsvc.student.modules.normalize import Denormalize, Normalize
from statsvc.student.modules.resample import resample

__all__ = ["Denormalize", "Normalize", "TargetDataset", "decode", "fold_inverse", "load_student", "losses", "resample"]
