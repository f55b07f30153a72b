"""A student of normalized targets as one of features: the inverse of each head's transform, folded into it.

Suffixes: B = images, S = side in pixels, N = tokens, T = tokens of an output, D = channels of the teacher, k = channels
of a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from statsvc.errors import TransformError
from statsvc.numerics.transform import Transform
from statsvc.student.distill.vit import Student
from statsvc.student.modules.fold import fold_inverse
from statsvc.student.modules.normalize import Denormalize

Transforms = Mapping[str, Mapping[str, Transform]]
# Rounding errors of sums of a few thousand terms are some ten times the unit roundoff of their size.
SLACK = 64 * torch.finfo(torch.float32).eps


def fold(student: Student, transforms: Transforms) -> Student:
    """A new student that gives each teacher's features. Source: arXiv:2410.01680, A.6."""
    folded, outputs = deepcopy(student), {}
    for teacher, by_output in student.shape.outputs.items():
        outputs[teacher] = dict(by_output)
        for output, transform in transforms.get(teacher, {}).items():
            head = folded.heads[f"{teacher}/{output}"]
            assert isinstance(head, nn.Sequential)
            assert isinstance(head[-1], nn.Linear)
            head[-1] = fold_inverse(head[-1], transform)
            outputs[teacher][output] = (by_output[output][0], len(transform.mean))
    folded.shape = replace(student.shape, outputs=outputs)
    return folded


@torch.no_grad()
def check_fold(student: Student, folded: Student, transforms: Transforms, image_B3SS: torch.Tensor) -> None:
    """Raises TransformError unless `folded` gives what Denormalize makes of the student's targets, but for rounding."""
    targets, features = student(image_B3SS), folded(image_B3SS)
    for teacher, by_output in transforms.items():
        for output, transform in by_output.items():
            y_BTk, x_BTD = targets[teacher][output], features[teacher][output]
            denormalize = Denormalize(transform).to(y_BTk.device)
            error_D = (denormalize(y_BTk) - x_BTD).abs().amax((0, 1))
            # Of what is added up in each channel, whatever cancels out of it.
            size_D = denormalize.inverse.abs() @ y_BTk.abs().amax((0, 1)) + denormalize.mean.abs()
            if not (error_D <= SLACK * size_D).all():  # written this way so that NaN fails too
                raise TransformError(
                    f"{teacher} {output}: the folded student is off by {float(error_D.max()):.3g} from the student and "
                    "Denormalize, more than rounding; it was not written: please report this"
                )
