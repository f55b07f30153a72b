"""The inverse of a transform, folded into the student's last layer: no cost when it is deployed.

Suffixes: r = replicas, D = channels of the teacher, k = channels of a target, i = everything a layer sums over.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Literal, TypeVar

import torch
from torch import nn

from statsvc.errors import PlanError, TransformError
from statsvc.numerics.transform import Transform

Layer = TypeVar("Layer", bound=nn.Linear | nn.Conv2d)
Order = Literal["replica-major", "channel-major"]


def fold_inverse(module: Layer, transform: Transform, replicas: int = 1, order: Order = "replica-major") -> Layer:
    """A new layer that gives features [D] where `module` gives targets [k]: W = inverse W', b = inverse b' + mean.

    module    nn.Linear, or nn.Conv2d in one group, 1x1 or any other kernel, as only its outputs are mapped; it has
              replicas * k outputs and stays as it is. The new one has replicas * D, and always a bias
    replicas  targets per token, for heads that upsample
    order     of the outputs. replica-major: k channels of the first replica, then those of the next, as before
              unflatten(-1, (replicas, k)). channel-major: all replicas of the first channel, then those of the next,
              as before nn.PixelShuffle

    Folded in float64 and rounded once to the layer's dtype: in float32 it agrees with layer and Denormalize within
    rounding. Fold before casting to lower precision. Device, requires_grad and training mode stay.

    Source: arXiv:2410.01680, eq. 42-43. Raises TransformError for layers that cannot take it or have other widths,
    PlanError for other replicas or order.
    """
    if order not in ("replica-major", "channel-major") or replicas < 1:
        raise PlanError(f"replicas is 1 or more, order replica-major or channel-major; got {replicas} and {order!r}")
    if not isinstance(transform, Transform):
        raise TransformError(
            f"fold_inverse takes a Transform, such as targets.transform; got {type(transform).__name__}"
        )
    # Not isinstance: a subclass may compute something else from its weight, or its weight from something else.
    if type(module) not in (nn.Linear, nn.Conv2d) or "weight" not in dict(module.named_parameters(recurse=False)):
        raise TransformError(
            f"an inverse folds into nn.Linear and nn.Conv2d with a weight of their own; got {type(module).__name__}: "
            "remove parametrizations and merge adapters first, or put Denormalize behind it"
        )
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise TransformError(
            f"{type(module).__name__} has hooks or a forward of its own, which may change its outputs: remove them "
            "first, or put Denormalize behind it"
        )
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise TransformError(
            f"an inverse mixes all channels, so the layer must have one group; got {module.groups}: put Denormalize "
            "behind it"
        )
    dim, k = transform.inverse.shape
    if len(module.weight) != replicas * k:
        raise TransformError(
            f"this {transform.method} transform has {k} channels, {replicas * k} with {replicas} replicas; the layer "
            f"has {len(module.weight)} outputs: fold the transform of this head's targets, with its replicas"
        )

    # On the CPU: not every device has float64.
    weight_rki = _by_replica(module.weight.detach().cpu().double().flatten(1), replicas, order)
    mean_D1, inverse_Dk = torch.tensor(transform.mean)[:, None], torch.tensor(transform.inverse)
    bias_rD1 = mean_D1.expand(replicas, dim, 1)
    if module.bias is not None:
        bias_rD1 = inverse_Dk @ _by_replica(module.bias.detach().cpu().double()[:, None], replicas, order) + mean_D1
    weight = _in_order(inverse_Dk @ weight_rki, order).reshape(-1, *module.weight.shape[1:])
    bias = _in_order(bias_rD1, order)[:, 0]

    folded = deepcopy(module)
    trained = module.weight if module.bias is None else module.bias
    folded.weight = nn.Parameter(weight.to(module.weight), module.weight.requires_grad)
    folded.bias = nn.Parameter(bias.to(module.weight), trained.requires_grad)
    if isinstance(folded, nn.Linear):
        folded.out_features = len(weight)
    else:
        folded.out_channels = len(weight)
    return folded


def _by_replica(outputs: torch.Tensor, replicas: int, order: Order) -> torch.Tensor:
    """[r, k, i] from the outputs of a layer, [r * k, i] in either order."""
    k = len(outputs) // replicas
    if order == "replica-major":
        return outputs.reshape(replicas, k, -1)
    return outputs.reshape(k, replicas, -1).transpose(0, 1)


def _in_order(array_rDi: torch.Tensor, order: Order) -> torch.Tensor:
    """[r * D, i], the inverse of `_by_replica`."""
    return (array_rDi if order == "replica-major" else array_rDi.transpose(0, 1)).flatten(0, 1)
