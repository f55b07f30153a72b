"""The documented import path of the reader of a trained student."""

from statsvc.student.distill.vit import load_student

__all__ = ["load_student"]
