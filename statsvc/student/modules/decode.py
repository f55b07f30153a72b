"""Codes back to targets on the device that trains.

Suffixes: B = rows, T = tokens, k = channels of a target, h = bytes of a token's int4 codes, two codes each.
"""

from __future__ import annotations

import torch

from statsvc.errors import PlanError


def decode(codes: torch.Tensor, scales: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """float32 [B, T, k] targets from codes, int8 [B, T, k] or packed int4, uint8 [B, T, ceil(k / 2)], and scales.

    scales is float32 [B, T]. k says how many channels int4 codes have; without it both codes of the last byte count.
    Bit for bit what `Targets.read` gives, under autocast too. Nothing looks at the numbers, so a GPU does not wait:
    the readers have checked them. Raises PlanError for arrays that do not belong together.
    """
    if codes.dtype not in (torch.int8, torch.uint8):
        raise PlanError(f"codes are int8, or uint8 for int4; got {codes.dtype}: float targets need no decoding")
    if scales.shape != codes.shape[:-1] or scales.dtype != torch.float32:
        raise PlanError(
            f"scales are float32, one per token, {tuple(codes.shape[:-1])} for these codes; got {scales.dtype} "
            f"{tuple(scales.shape)}: pass both as the batch holds them"
        )
    packed = codes.dtype == torch.uint8
    k = codes.shape[-1] * (2 if packed else 1) if k is None else k
    if codes.shape[-1] != (-(-k // 2) if packed else k):
        raise PlanError(f"{codes.dtype} codes {tuple(codes.shape)} do not hold {k} channels: pass the k of the target")
    return (_unpacked(codes, k) if packed else codes).float() * scales[..., None]


def _unpacked(codes_BTh: torch.Tensor, k: int) -> torch.Tensor:
    """int8 [B, T, k]: channel 2j is the low nibble of byte j, channel 2j + 1 the high one."""
    nibbles_BTk = torch.stack([codes_BTh & 15, codes_BTh >> 4], dim=-1).flatten(-2)[..., :k]
    # Two's complement of 4 bits: flipping the sign bit and taking 8 away carries it to 8.
    return (nibbles_BTk ^ 8).to(torch.int8) - 8
