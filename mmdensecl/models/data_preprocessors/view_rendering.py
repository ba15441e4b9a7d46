# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Rendering of drawn views on any device, a whole batch at a time.

The operations, their order and their rounding to whole levels, down in blends
and to the nearest elsewhere, are PIL's and so those of
:func:`mmdensecl.datasets.transforms.render_view`; only hue is finer here, PIL
knows 256. Pixels are float32 in 0-255. What to do with which view is worked
out on the CPU and sent once, so that the CPU never waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed import to_device

CONTRAST, SATURATION, HUE = 1, 2, 3  # places in a view's jitter; 0 is light
ROUNDS = 5  # four of the jitter, then grey
UNCHANGED = (1.0, 0.0, 0.0)


def crop_and_resize(source: Tensor, box: tuple[int, ...], size: int) -> Tensor:
    """Cut out a box and resize it, antialiased as PIL does.

    From (3, H, W) to (1, 3, size, size), float32, not rounded; the box is
    left, top, width and height.
    """
    left, top, width, height = box
    crop = source[None, :, top : top + height, left : left + width].float()
    return F.interpolate(crop, (size, size), mode='bilinear', antialias=True)


def luma(images: Tensor) -> Tensor:
    """Grey of (N, 3, H, W) as (N, 1, H, W), by ITU-R BT.601 like PIL."""
    red, green, blue = images.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round()


def blend(
    images: Tensor, factor: Tensor, mean: Tensor, gray: Tensor
) -> Tensor:
    """Brightness, contrast or saturation, another one for each image.

    All three are ``base + factor * (image - base)``, where the base is black,
    the mean grey where `mean` is 1, or the image in grey where `gray` is 1.
    Images (N, 3, H, W), 0-255; all else (N, 1, 1, 1), a factor of 1 leaves an
    image as it is.
    """
    base = luma(images)
    base = gray * base + mean * base.mean((2, 3), keepdim=True).round()
    return torch.lerp(base, images, factor).clamp_(0, 255).floor_()


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of (N, 3, H, W) by (N, 1, 1, 1) turns.

    Value and saturation in HSV stay:
    ``value - chroma * clamp(min(k, 4 - k), 0, 1)`` with ``k = (n + hue) mod
    6``, hue in sixths of a turn, and n = 5, 3, 1 for red, green and blue:
    https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    some = chroma.clamp(min=1e-6)  # grey has no hue, any will do
    hue = torch.where(
        value == red,
        (green - blue) / some,
        torch.where(
            value == green, 2 + (blue - red) / some, 4 + (red - green) / some
        ),
    )
    n = torch.arange(5, 0, -2, device=images.device).view(3, 1, 1)
    k = (hue + 6 * shift + n) % 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).round_()


def blur_kernels(sigma: Tensor, reach: int) -> Tensor:
    """Kernels of what PIL calls Gaussian blur: a box, three times over.

    The box has a fraction of a pixel at either end, which makes the variance
    right for any sigma (Gwosdek et al., SSVM 2011). From sigmas (N, ) in
    pixels (N, 6 * reach + 1), each of sum 1; a box reaches at least 1 more
    than the whole pixels of the largest sigma to either side.
    """
    variance = sigma[:, None] ** 2 / 3  # of one box
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()  # to either side
    end = (2 * whole + 1) * (variance - whole * (whole + 1) / 3) / 2
    end = end / ((whole + 1) ** 2 - variance)
    taps = torch.arange(-reach, reach + 1, device=sigma.device).abs()
    box = (1 + whole - taps).clamp(0, 1) + end * (taps == whole + 1)
    box = (box / box.sum(1, keepdim=True))[:, None]
    kernels = box.transpose(0, 1)
    for _ in range(2):
        kernels = F.conv1d(kernels, box, padding=2 * reach, groups=len(sigma))
    return kernels[0]


def blur(images: Tensor, kernels: Tensor) -> Tensor:
    """Blur (N, C, H, W) by odd kernels (N, K) both ways, edges repeated."""
    channels = images.shape[0] * images.shape[1]
    kernels = kernels.repeat_interleave(images.shape[1], 0)[:, None, None]
    # One image of all channels, so that each has its own kernel.
    x = images.reshape(1, channels, *images.shape[2:])
    x = F.pad(x, [kernels.shape[-1] // 2] * 4, mode='replicate')
    x = F.conv2d(x, kernels, groups=channels)
    x = F.conv2d(x, kernels.transpose(2, 3), groups=channels)
    return x.view_as(images).round_()


class Plan(NamedTuple):
    """What is done to which of M views, on their device."""

    blends: Tensor  # arguments of `blend`, (rounds, 3, M, 1, 1, 1)
    hues: list[tuple[Tensor, Tensor]]  # of each round: views, turns
    blurred: Tensor  # which views are, (B, )
    sigma: Tensor  # of their blur, (B, )
    reach: int  # of the boxes of the blur, 0 where nothing is blurred


def make_plan(views: Sequence, device: torch.device) -> Plan:
    """Sort what was drawn by operation."""
    blends = [[UNCHANGED] * len(views) for _ in range(ROUNDS)]
    hues: list[dict[int, float]] = [{} for _ in range(ROUNDS)]
    blurs = {i: v.sigma for i, v in enumerate(views) if v.sigma is not None}
    for i, view in enumerate(views):
        order, *strengths = view.jitter or ((),)
        for turn, kind in enumerate(order):
            factor = strengths[kind]
            if kind == HUE and factor is not None:
                hues[turn][i] = factor
            elif factor is not None:
                base = kind == CONTRAST, kind == SATURATION
                blends[turn][i] = (factor, *base)
        if view.gray:
            blends[-1][i] = (0.0, 0.0, 1.0)  # saturation of nothing

    def send(values: list, dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), device)

    parts = [*hues, blurs]
    counts = [len(part) for part in parts]
    rows = send([i for part in parts for i in part], torch.long)
    amounts = send([x for part in parts for x in part.values()], torch.float32)
    *hue_rows, blurred = rows.split(counts)
    *turns, sigma = amounts.split(counts)
    shifts = [x.view(-1, 1, 1, 1) for x in turns]
    factors = send(blends, torch.float32).transpose(1, 2)
    return Plan(
        factors[..., None, None, None],
        list(zip(hue_rows, shifts, strict=True)),
        blurred,
        sigma,
        int(max(blurs.values())) + 1 if blurs else 0,
    )


def render_views(
    sources: Sequence[Tensor], views: Sequence, size: int
) -> Tensor:
    """Carry out drawn views, one of each source, (M, 3, size, size) in 0-255.

    Args:
        sources: M sources on one device, uint8, RGB, (3, H, W), each of a
            size of its own.
        views: M :class:`mmdensecl.datasets.transforms.View`.
        size: Side of the results in pixels.
    """
    plan = make_plan(views, sources[0].device)
    crops = []
    for source, view in zip(sources, views, strict=True):
        crop = crop_and_resize(source, view.box, size)
        # All that follows treats left and right alike.
        crops.append(crop.flip(3) if view.flip else crop)
    images = torch.cat(crops).contiguous().round_()
    for arguments, (rows, shift) in zip(plan.blends, plan.hues, strict=True):
        images = blend(images, *arguments)
        if len(rows):
            images[rows] = shift_hue(images[rows], shift)
    if plan.reach:
        kernels = blur_kernels(plan.sigma, plan.reach)
        images[plan.blurred] = blur(images[plan.blurred], kernels)
    return images
