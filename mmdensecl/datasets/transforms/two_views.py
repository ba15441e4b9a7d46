# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from contextlib import nullcontext
from typing import Sequence

import torch
from mmcv.transforms import BaseTransform
from mmpretrain.structures import DataSample
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop

from mmdensecl.registry import TRANSFORMS
from .render import render_view
from .view import View


@TRANSFORMS.register_module()
class TwoViews(BaseTransform):
    """Two random views of one decoded picture: MoCo-v2's augmentation.

    Crop and resize, colour jitter, grey, blur, flip, in this order and on PIL
    pictures, as the authors do. The defaults are the published numbers. What
    was drawn is kept, so that the model knows where the views lie.

    Required keys: ``img`` (PIL, RGB); ``seed``, optional, fixes everything
    that is drawn. Added: ``views``, two :class:`View`; ``view_imgs``, two
    uint8 tensors (3, size, size). Removed: ``img``.

    Args:
        size (int): Side of a view in pixels. Defaults to 224.
        crop_scale (Sequence[float]): Range of the crop's share of the
            picture's area. Defaults to (0.2, 1.0).
        crop_ratio (Sequence[float]): Range of the crop's width over height,
            before resizing. Defaults to (3 / 4, 4 / 3).
        jitter (Sequence[float]): Strength of brightness, contrast,
            saturation and hue. Defaults to (0.4, 0.4, 0.4, 0.1).
        jitter_prob (float): Defaults to 0.8.
        gray_prob (float): Defaults to 0.2.
        blur_sigma (Sequence[float]): Range of the blur's standard deviation
            in pixels. Defaults to (0.1, 2.0).
        blur_prob (float): Defaults to 0.5.
        flip_prob (float): Defaults to 0.5.
    """

    def __init__(self,
                 size: int = 224,
                 crop_scale: Sequence[float] = (0.2, 1.0),
                 crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
                 jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
                 jitter_prob: float = 0.8,
                 gray_prob: float = 0.2,
                 blur_sigma: Sequence[float] = (0.1, 2.0),
                 blur_prob: float = 0.5,
                 flip_prob: float = 0.5) -> None:
        self.size = size
        self.crop_scale = list(crop_scale)
        self.crop_ratio = list(crop_ratio)
        self.jitter = ColorJitter(*jitter)  # checks and spells out the ranges
        self.jitter_prob = jitter_prob
        self.gray_prob = gray_prob
        self.blur_sigma = tuple(blur_sigma)
        self.blur_prob = blur_prob
        self.flip_prob = flip_prob

    def draw(self, image: Image.Image) -> View:
        """Draw one view from torch's global generator."""
        top, left, height, width = RandomResizedCrop.get_params(
            image, self.crop_scale, self.crop_ratio)
        jitter = ColorJitter.get_params(self.jitter.brightness,
                                        self.jitter.contrast,
                                        self.jitter.saturation,
                                        self.jitter.hue)
        jitter = (jitter[0].tolist(), *jitter[1:])
        low, high = self.blur_sigma
        sigma = low + (high - low) * float(torch.rand(()))
        use_jitter, gray, blur, flip = (torch.rand(4) < torch.tensor(
            [self.jitter_prob, self.gray_prob, self.blur_prob,
             self.flip_prob])).tolist()
        return View((left, top, width, height), jitter if use_jitter else None,
                    gray, sigma if blur else None, flip)

    def transform(self, results: dict) -> dict:
        image, seed = results.pop('img'), results.get('seed')
        with nullcontext() if seed is None else torch.random.fork_rng([]):
            if seed is not None:
                # Not torch.manual_seed, which also seeds the GPUs.
                torch.default_generator.manual_seed(seed)
            views = [self.draw(image), self.draw(image)]
        results['views'] = views
        results['view_imgs'] = [
            render_view(image, view, self.size) for view in views
        ]
        return results


@TRANSFORMS.register_module()
class PackViews(BaseTransform):
    """Pack two views the way mmpretrain's algorithms take them.

    Required keys: ``view_imgs``, ``views``, ``img_path``, ``sample_idx``.

    Returns of :meth:`transform`: ``inputs``, the two tensors, and
    ``data_samples``, a ``DataSample`` with ``img_path``, ``sample_idx`` and
    ``views`` (two rows of left, top, width, height, flip).
    """

    def transform(self, results: dict) -> dict:
        sample = DataSample()
        sample.set_metainfo(
            dict(
                img_path=results['img_path'],
                sample_idx=results['sample_idx'],
                views=[view.coordinates for view in results['views']]))
        return dict(inputs=results['view_imgs'], data_samples=sample)
