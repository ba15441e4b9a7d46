# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""MoCo-v2's two views of an image."""

import math
from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmpretrain.structures import DataSample
from torchvision.transforms import ColorJitter

from mmdensecl.registry import TRANSFORMS

from .render import View, render_view

# Draws of a crop that may miss the image, torchvision's number.
CROP_ATTEMPTS = 10


def draw_crop(
    width: int,
    height: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    rng: Random,
) -> tuple[int, int, int, int]:
    """Draw the box of a crop, distributed as torchvision's.

    Area uniform, logarithm of the ratio uniform, position uniform; redrawn
    where it does not fit, and after ten misses the largest box in the centre
    whose ratio is within the range: `RandomResizedCrop.get_params`, which
    takes ten times as long.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        scale: Range of the crop's share of the area.
        ratio: Range of the crop's width over height.
        rng: Source of the random numbers.

    Returns:
        Left, top, width and height.
    """
    lowest, highest = ratio
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, w, h
    w = max(1, min(width, round(height * highest)))
    h = max(1, min(height, round(width / lowest)))
    return (width - w) // 2, (height - h) // 2, w, h


@TRANSFORMS.register_module(name=['SampleTwoCropParams', 'DrawViews'])
class SampleTwoCropParams(BaseTransform):
    """Draw MoCo-v2's augmentation of two views of a decoded image.

    Crop and resize, colour jitter, grey, blur, flip, in this order, as the
    authors do. The defaults are the published numbers. Nothing is rendered
    yet: end the pipeline with :class:`PackImage` to leave that to the
    model's device, or take :class:`TwoViews` instead.

    Required keys: `img` (PIL, RGB); `seed`, optional, fixes everything
    that is drawn. Added: `views`, two :class:`View`.

    Args:
        crop_scale: Range of the crop's share of the image's area.
        crop_ratio: Range of the crop's width over height, before resizing.
        jitter: Strength of brightness, contrast, saturation and hue.
        jitter_prob: Share of views that are jittered.
        gray_prob: Share of views without colour.
        blur_sigma: Range of the blur's standard deviation in pixels.
        blur_prob: Share of views that are blurred.
        flip_prob: Share of views that are mirrored.
    """

    def __init__(
        self,
        crop_scale: Sequence[float] = (0.2, 1.0),
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
        gray_prob: float = 0.2,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        blur_prob: float = 0.5,
        flip_prob: float = 0.5,
    ) -> None:
        self.crop_scale = tuple(crop_scale)
        self.crop_ratio = tuple(crop_ratio)
        checked = ColorJitter(*jitter)  # and the ranges spelled out
        self.jitter = (
            checked.brightness,
            checked.contrast,
            checked.saturation,
            checked.hue,
        )
        self.blur_sigma = tuple(blur_sigma)
        self.probs = jitter_prob, gray_prob, blur_prob, flip_prob

    def draw(self, width: int, height: int, rng: Random) -> View:
        """Draw one view of an image of that size."""
        box = draw_crop(width, height, self.crop_scale, self.crop_ratio, rng)
        jitter = (
            rng.sample(range(4), 4),
            *(x and rng.uniform(*x) for x in self.jitter),
        )
        sigma = rng.uniform(*self.blur_sigma)
        jittered, gray, blurred, flip = (rng.random() < x for x in self.probs)
        return View(
            box=box,
            jitter=jitter if jittered else None,
            gray=gray,
            sigma=sigma if blurred else None,
            flip=flip,
        )

    def transform(self, results: dict) -> dict:
        seed = results.get('seed')
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        # A generator of its own: torch's takes longer to seed and to draw.
        rng = Random(seed)
        width, height = results['img'].size
        results['views'] = [self.draw(width, height, rng) for _ in range(2)]
        return results


@TRANSFORMS.register_module()
class TwoViews(SampleTwoCropParams):
    """Draw two random views and render them in the worker.

    Required keys: as :class:`SampleTwoCropParams`. Added: `views`;
    `view_imgs`, two uint8 tensors (3, size, size). Removed: `img`.

    Args:
        size: Side of a view, which is square, in pixels.
        **kwargs: Arguments of :class:`SampleTwoCropParams`.
    """

    def __init__(self, size: int = 224, **kwargs) -> None:
        super().__init__(**kwargs)
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                'Views are square: size must be a positive int, their side '
                f'in pixels, got {size!r}'
            )
        self.size = size

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        image = results.pop('img')
        results['view_imgs'] = [
            render_view(image, view, self.size) for view in results['views']
        ]
        return results


def _sample(results: dict, **more) -> DataSample:
    """What is known of an image beside its pixels."""
    sample = DataSample()
    fields = dict(
        img_path=results['img_path'],
        sample_idx=results['sample_idx'],
        views=[view.coordinates for view in results['views']],
        **more,
    )
    for name, value in fields.items():
        # set_metainfo would make deep copies.
        sample.set_field(value, name, field_type='metainfo')
    return sample


@TRANSFORMS.register_module()
class PackViews(BaseTransform):
    """Pack two rendered views the way mmpretrain's algorithms take them.

    Required keys: `view_imgs`, `views`, `img_path`, `sample_idx`.

    Returns of :meth:`transform`: `inputs`, the two tensors, and
    `data_samples`, a `DataSample` with `img_path`, `sample_idx` and
    `views` (two rows of left, top, width, height, flip).
    """

    def transform(self, results: dict) -> dict:
        return dict(inputs=results['view_imgs'], data_samples=_sample(results))


@TRANSFORMS.register_module(name=['PackImage', 'PackPicture'])
class PackImage(BaseTransform):
    """Pack an image and what was drawn for :class:`mmdensecl.DeviceViews`.

    Images differ in size, so the dataloader's `collate_fn` must be
    `pseudo_collate`. Only the rectangle around both crops is sent, at full
    resolution: up to 36 MB of a photograph of 12 megapixels. Shrink such files
    first, or render in the workers by :class:`TwoViews`.

    Required keys: `img` (PIL, RGB), `views`, `img_path`,
    `sample_idx`.

    Returns of :meth:`transform`: `inputs`, the rectangle, uint8 (3, H, W),
    and `data_samples`, a `DataSample` as :class:`PackViews` makes it, with
    `aug_params` besides: two :class:`View`, boxes within the rectangle.
    """

    def transform(self, results: dict) -> dict:
        views = results['views']
        boxes = np.array([view.box for view in views])
        left, top = boxes[:, :2].min(axis=0).tolist()
        right, bottom = (boxes[:, :2] + boxes[:, 2:]).max(axis=0).tolist()
        # The copy lets go of the rest: all of a tensor's storage is sent.
        image = np.asarray(results['img'])[top:bottom, left:right].copy()
        drawn = [
            view._replace(box=(x - left, y - top, width, height))
            for view in views
            for x, y, width, height in [view.box]
        ]
        return dict(
            inputs=torch.from_numpy(image).permute(2, 0, 1),
            data_samples=_sample(results, aug_params=drawn),
        )
