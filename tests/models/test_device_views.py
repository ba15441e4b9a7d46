# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Views rendered on the device against PIL, torchvision and SciPy."""

import itertools
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from PIL import Image

from mmdensecl.datasets import (
    PackImage,
    PackViews,
    SampleTwoCropParams,
    TwoViews,
)
from mmdensecl.datasets.transforms import View, render_view
from mmdensecl.models import DeviceViews
from mmdensecl.models.data_preprocessors import render_views
from mmdensecl.registry import TRANSFORMS

CONFIGS = Path(__file__).parents[2] / 'configs'
SIZE = 48
PLAIN = View((0, 0, SIZE, SIZE), None, False, None, False)
FACTORS = (1.4, 0.6, 0.7, 0.1)


def make_picture(width=SIZE, height=SIZE, seed=0):
    """Coloured structure at every scale, and flat, black and white parts."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    array = np.array(coarse.resize((width, height), Image.BICUBIC), dtype=int)
    array += rng.integers(-30, 31, array.shape)
    array[: height // 6] = rng.choice([0, 128, 255])
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read(image, i, seed):
    """A decoded image, as the transforms get it."""
    path = f'{i}.png'
    return dict(img=image, seed=seed + i, img_path=path, sample_idx=i)


def pack(images, seed=0, **kwargs):
    """A batch as a dataloader gives it."""
    draw, end = SampleTwoCropParams(**kwargs), PackImage()
    return pseudo_collate(
        [end(draw(read(x, i, seed))) for i, x in enumerate(images)]
    )


class TestRenderViews:
    def compare(self, pictures, views):
        """With the worker's rendering: mean error, mean absolute error."""
        out = render_views(list(map(to_tensor, pictures)), views, SIZE)
        expected = torch.stack(
            [
                render_view(picture, view, SIZE)
                for picture, view in zip(pictures, views, strict=True)
            ]
        )
        error = out - expected
        return error.mean((1, 2, 3)), error.abs().mean((1, 2, 3))

    def test_orders_of_jitter(self):
        """All 24 in one batch, each carried out as drawn."""
        picture = make_picture()
        orders = list(itertools.permutations(range(4)))
        views = [PLAIN._replace(jitter=(x, *FACTORS)) for x in orders]
        # An operation that is switched off is drawn as None.
        views[0] = PLAIN._replace(jitter=(orders[0], 1.4, None, 0.7, None))
        _, error = self.compare([picture] * 24, views)
        assert error.max() < 1
        # And most orders differ by more than that.
        out = render_views([to_tensor(picture)] * 24, views, SIZE)
        distance = torch.cdist(out.flatten(1), out.flatten(1), p=1)
        assert (distance / out[0].numel() > 2).float().mean() > 0.5

    def test_like_the_worker(self):
        """Forty views, as drawn, against the 8-bit chain."""
        rng, draw = Random(0), SampleTwoCropParams()
        sizes = [(160, 120), (90, 200), (60, 60), (300, 260)]
        pictures = [make_picture(*size, seed=1) for size in sizes] * 10
        views = [draw.draw(*picture.size, rng) for picture in pictures]
        bias, error = self.compare(pictures, views)
        assert error.mean() < 0.75 and error.max() < 2
        assert bias.mean().abs() < 0.2 and bias.abs().max() < 1

    def test_a_batch_is_its_pictures_one_by_one(self):
        sizes = [(90, 70), (1, 1), (30, 200), (1, 50), (300, 200), (50, 1)]
        pictures = [make_picture(*size, seed=1) for size in sizes] * 3
        rng, draw = Random(1), SampleTwoCropParams()
        views = [draw.draw(*picture.size, rng) for picture in pictures]
        tensors = list(map(to_tensor, pictures))
        out = render_views(tensors, views, 20)
        assert out.shape == (18, 3, 20, 20) and out.dtype == torch.float32
        for tensor, view, result in zip(tensors, views, out, strict=True):
            alone = render_views([tensor], [view], 20)[0]
            assert (alone - result).abs().mean() < 0.01
        assert out.min() >= 0 and out.max() <= 255

    def test_the_cpu_does_not_wait(self):
        """Nothing reads a value back: there are none on the meta device."""
        views = [
            View((0, 0, 30, 20), ((3, 1, 0, 2), *FACTORS), True, 1.5, True),
            PLAIN._replace(box=(1, 2, 10, 10)),
        ]
        pictures = [torch.zeros(3, 20, 30, dtype=torch.uint8, device='meta')]
        assert render_views(pictures * 2, views, 16).shape == (2, 3, 16, 16)


class TestDeviceViews:
    SIZES = [(60, 40), (1, 1), (33, 80), (64, 64)]

    @pytest.fixture
    def pictures(self):
        return [
            make_picture(*size, seed=i) for i, size in enumerate(self.SIZES)
        ]

    def test_where_it_is_rendered_makes_no_difference(self, pictures):
        """The same seed: the same views, coordinates and pixels."""
        batch = pack(pictures, seed=7)
        assert all(x.dtype == torch.uint8 for x in batch['inputs'])
        outputs = DeviceViews(size=32)(batch, training=True)
        two_views, end = TwoViews(size=32), PackViews()
        for i, picture in enumerate(pictures):
            worker = end(two_views(read(picture, i, 7)))
            sample = outputs['data_samples'][i]
            expected = worker['data_samples']
            assert sample.views == expected.views
            assert sample.img_path == expected.img_path
            assert sample.sample_idx == expected.sample_idx == i
            for view, theirs in zip(
                outputs['inputs'], worker['inputs'], strict=True
            ):
                assert (view[i] - theirs).abs().mean() < 2

    @pytest.mark.parametrize('name', ['densecl', 'mocov2'])
    def test_config(self, name):
        """It draws the views of the worker's config, and normalises alike."""
        worker, device = (
            Config.fromfile(
                CONFIGS / f'{name}_r50_8xb32-coslr-200e{suffix}.py'
            )
            for suffix in ('', '_fast')
        )
        assert device.model.data_preprocessor == dict(
            worker.model.data_preprocessor,
            type='mmdensecl.DeviceViews',
            size=224,
        )
        (decode, views, _), (again, sample, pack) = (
            x.train_dataloader.dataset.pipeline for x in (worker, device)
        )
        assert again.type == decode.type and views.pop('size') == 224
        drawers = dict(views, type=sample.type), sample
        drawers = [vars(TRANSFORMS.build(x)) for x in drawers]
        assert drawers[0] == drawers[1]
        assert pack.type == 'mmdensecl.PackImage'
