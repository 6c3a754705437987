"""Random crops and colour jitter for training images, on the device and in one go for a batch.

The strengths that NVIDIA fine-tunes GR00T-N1.5 with are the defaults: a crop of 95 % of each side, brightness 0.3,
contrast 0.4, saturation 0.5, hue 0.08; all views of a sample get the same crop and the same colours. Differences:
the four colour changes come in a fixed order, and hue turns in the YIQ plane, which is linear, rather than in HSV.

What is random comes as numbers from outside, so that a step's augmentation does not depend on how the batch is split.

Shape legend: B batch, V views, H x W pixels of the frames, S pixels of the network's input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from algorithms.common.args import Augmentation

NUM_DRAWS = 6
LUMA = (0.299, 0.587, 0.114)
# RGB to YIQ (NTSC).
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def augment(images: Tensor, draws: Tensor, augmentation: Augmentation, crop_scale: float, image_size: int) -> Tensor:
    """Crops, jitters and resizes images, and truncates them to 8 bits.

    With an `Augmentation` of zeros without random crop, the result is that of the policy's own preprocessing.

    Args:
        images: uint8 [B, V, H, W, 3].
        draws: float32 [B, 6], uniform in [0, 1).
        augmentation: strengths.
        crop_scale: fraction of each side that the crop keeps.
        image_size: S.

    Returns:
        uint8 [B, V, 3, S, S].
    """
    draws = draws.to(images.device)
    height, width = images.shape[2:4]
    crop_h, crop_w = int(height * crop_scale), int(width * crop_scale)
    if augmentation.random_crop:
        top = (draws[:, 0] * (height - crop_h + 1)).long()
        left = (draws[:, 1] * (width - crop_w + 1)).long()
    else:
        top = torch.full_like(draws[:, 0], round((height - crop_h) / 2.0), dtype=torch.long)
        left = torch.full_like(draws[:, 1], round((width - crop_w) / 2.0), dtype=torch.long)
    rows = top[:, None] + torch.arange(crop_h, device=images.device)  # [B, h]
    columns = left[:, None] + torch.arange(crop_w, device=images.device)  # [B, w]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices on both sides of a slice come first: [B, h, w, V, 3].
    cropped = images[sample, :, rows[:, :, None], columns[:, None, :]]
    values = cropped.permute(0, 3, 4, 1, 2).to(torch.float32) / 255.0  # [B, V, 3, h, w]
    if (crop_h, crop_w) != (image_size, image_size):
        values = F.interpolate(
            values.flatten(0, 1), size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=True
        ).unflatten(0, images.shape[:2])
    return (jitter(values, draws[:, 2:], augmentation) * 255.0).to(torch.uint8)


def jitter(values: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """Changes colours.

    Args:
        values: float32 [B, V, 3, S, S] in [0, 1].
        draws: float32 [B, 4], uniform in [0, 1): brightness, contrast, saturation, hue.
        augmentation: strengths.

    Returns:
        float32 [B, V, 3, S, S] in [0, 1].
    """
    signed = (2 * draws - 1)[:, :, None, None, None, None]  # [B, 4, 1, 1, 1, 1]
    if augmentation.brightness:
        values = (values * (1 + augmentation.brightness * signed[:, 0])).clamp(0, 1)
    luma = torch.tensor(LUMA, device=values.device)[:, None, None]  # [3, 1, 1]
    if augmentation.contrast:
        mean = (values * luma).sum(dim=2, keepdim=True).mean(dim=(-2, -1), keepdim=True)
        values = (mean + (values - mean) * (1 + augmentation.contrast * signed[:, 1])).clamp(0, 1)
    if augmentation.saturation:
        grey = (values * luma).sum(dim=2, keepdim=True)
        values = (grey + (values - grey) * (1 + augmentation.saturation * signed[:, 2])).clamp(0, 1)
    if augmentation.hue:
        angle = 2 * math.pi * augmentation.hue * signed[:, 3].flatten()  # [B]
        values = torch.einsum("bij,bvjhw->bvihw", hue_rotation(angle), values).clamp(0, 1)
    return values


def hue_rotation(angle: Tensor) -> Tensor:
    """Returns matrices [B, 3, 3] that turn RGB colours by `angle` [B] rad in the YIQ plane, brightness unchanged."""
    to_yiq = torch.tensor(YIQ)
    to_rgb = torch.linalg.inv(to_yiq).to(angle.device)  # inverted on the CPU: a GPU's solver would wait for the host
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=-1).unflatten(-1, (3, 3))
    return to_rgb @ turn @ to_yiq.to(angle.device)
