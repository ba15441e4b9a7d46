# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from random import Random

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from scipy import stats
from torchvision import transforms as T

from mmdensecl.datasets import (
    PackImage,
    PackViews,
    SampleTwoCropParams,
    TwoViews,
)
from mmdensecl.models import DeviceViews

# Seeds are fixed, so a threshold this low fails only when the code changes.
P_VALUE = 1e-3
DRAWS = 4000


@pytest.fixture(scope='module')
def drawn():
    """Many views of one picture, whose size is far from the crop's limits."""
    rng, transform = Random(0), SampleTwoCropParams()
    return [transform.draw(2000, 2000, rng) for _ in range(DRAWS)]


def is_uniform(values, low, high):
    return stats.kstest(values, 'uniform', (low, high - low)).pvalue > P_VALUE


def has_rate(flags, probability):
    flags = list(flags)
    return (
        stats.binomtest(sum(flags), len(flags), probability).pvalue > P_VALUE
    )


class TestDistributions:
    """The published augmentation: reference numbers of MoCo-v2."""

    def test_crop_area(self, drawn):
        areas = np.array([v.box[2] * v.box[3] for v in drawn]) / 2000**2
        assert areas.min() > 0.199 and areas.max() <= 1
        # Wide or tall crops near the full area do not fit and are redrawn.
        assert is_uniform(areas[areas < 0.7], 0.2, 0.7)

    def test_crop_ratio(self, drawn):
        small = [v for v in drawn if v.box[2] * v.box[3] < 0.7 * 2000**2]
        ratios = np.log([v.box[2] / v.box[3] for v in small])
        assert is_uniform(ratios, np.log(3 / 4), np.log(4 / 3))

    def test_crop_position(self, drawn):
        small = [v for v in drawn if max(v.box[2:]) < 1900]
        assert is_uniform([v.box[0] / (2000 - v.box[2]) for v in small], 0, 1)
        assert is_uniform([v.box[1] / (2000 - v.box[3]) for v in small], 0, 1)

    def test_rates(self, drawn):
        assert has_rate((v.jitter is not None for v in drawn), 0.8)
        assert has_rate((v.gray for v in drawn), 0.2)
        assert has_rate((v.sigma is not None for v in drawn), 0.5)
        assert has_rate((v.flip for v in drawn), 0.5)

    def test_rates_are_independent(self, drawn):
        flags = np.array(
            [
                (v.jitter is not None, v.gray, v.sigma is not None, v.flip)
                for v in drawn
            ],
            float,
        )
        off_diagonal = np.corrcoef(flags.T)[~np.eye(4, dtype=bool)]
        assert np.abs(off_diagonal).max() < 4 / DRAWS**0.5

    @pytest.mark.parametrize(
        'which, low, high',
        [(1, 0.6, 1.4), (2, 0.6, 1.4), (3, 0.6, 1.4), (4, -0.1, 0.1)],
    )
    def test_jitter_factors(self, drawn, which, low, high):
        assert is_uniform(
            [v.jitter[which] for v in drawn if v.jitter], low, high
        )

    def test_jitter_order(self, drawn):
        orders = [tuple(v.jitter[0]) for v in drawn if v.jitter]
        counts = [orders.count(order) for order in set(orders)]
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > P_VALUE

    def test_blur(self, drawn):
        assert is_uniform([v.sigma for v in drawn if v.sigma], 0.1, 2.0)

    @pytest.mark.parametrize(
        'size',
        [
            (500, 375),
            (100, 60),
            (60, 100),
            (7, 5),
            (200, 20),
            (20, 200),
            (1, 1),
        ],
    )
    def test_crops_match_torchvision(self, size):
        """Also where few draws fit, or none."""
        rng, transform = Random(1), SampleTwoCropParams()
        shape = torch.zeros(1, *size[::-1])
        ours = [transform.draw(*size, rng).box for _ in range(1000)]
        theirs = []
        for _ in range(1000):
            top, left, height, width = T.RandomResizedCrop.get_params(
                shape, [0.2, 1.0], [3 / 4, 4 / 3]
            )
            theirs.append((left, top, width, height))
        for a, b in zip(
            zip(*ours, strict=True), zip(*theirs, strict=True), strict=True
        ):
            assert stats.ks_2samp(a, b).pvalue > P_VALUE
        # The fallback is one box, always the same.
        if max(size) >= 10 * min(size):
            assert set(ours) == set(theirs) and len(set(ours)) == 1

    @pytest.mark.parametrize('where', ['worker', 'device'])
    def test_pictures_match_torchvision(self, photo, where):
        """The views' statistics are those of the same torchvision chain."""
        torch.manual_seed(0)
        theirs = T.Compose(
            [
                T.RandomResizedCrop(32, scale=(0.2, 1.0)),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomHorizontalFlip(),
                T.PILToTensor(),
            ]
        )
        no_blur = dict(blur_prob=0.0)  # torchvision blurs differently
        if where == 'worker':
            transform = TwoViews(size=32, **no_blur)
            a = torch.stack(
                [
                    view
                    for _ in range(400)
                    for view in transform(dict(img=photo))['view_imgs']
                ]
            ).float()
        else:
            draw, pack = SampleTwoCropParams(**no_blur), PackImage()
            batch = [
                pack(draw(dict(img=photo, img_path='', sample_idx=0)))
                for _ in range(400)
            ]
            a = torch.cat(DeviceViews(32)(pseudo_collate(batch))['inputs'])
        b = torch.stack([theirs(photo) for _ in range(800)]).float()
        for statistic in (
            lambda x: x.mean((1, 2, 3)),
            lambda x: x.std((1, 2, 3)),
            lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
            lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)),
        ):
            assert stats.ks_2samp(statistic(a), statistic(b)).pvalue > P_VALUE


class TestTwoViews:
    def test_the_seed_fixes_everything(self, photo):
        transform = TwoViews(size=32)

        def run(seed):
            return transform.transform(dict(img=photo, seed=seed))

        torch.manual_seed(1)
        first = run(5)
        torch.manual_seed(2)
        second, other = run(5), run(6)
        assert first['views'] == second['views']
        assert torch.equal(first['view_imgs'][0], second['view_imgs'][0])
        assert first['views'] != other['views']
        assert first['views'][0] != first['views'][1]

    def test_the_seed_leaves_the_global_generator_alone(self, photo):
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        TwoViews(size=32).transform(dict(img=photo, seed=5))
        assert torch.equal(torch.rand(3), expected)

    def test_pack(self, photo):
        results = TwoViews(size=32).transform(
            dict(img=photo, seed=5, img_path='a.png', sample_idx=3)
        )
        packed = PackViews().transform(results)
        assert [v.shape for v in packed['inputs']] == [(3, 32, 32)] * 2
        sample = packed['data_samples']
        assert sample.img_path == 'a.png' and sample.sample_idx == 3
        left, top, width, height = results['views'][1].box
        assert sample.views[1] == (
            left,
            top,
            width,
            height,
            results['views'][1].flip,
        )

    def test_without_a_seed(self, photo):
        """It comes from torch's generator, which mmengine seeds."""
        transform = SampleTwoCropParams()
        torch.manual_seed(3)
        first = [transform(dict(img=photo))['views'] for _ in range(2)]
        torch.manual_seed(3)
        assert transform(dict(img=photo))['views'] == first[0] != first[1]

    def test_strength_of_zero(self, photo):
        transform = SampleTwoCropParams(
            jitter=(0.0, 0.4, 0.0, 0.1), jitter_prob=1.0
        )
        for view in transform(dict(img=photo, seed=1))['views']:
            _, brightness, contrast, saturation, hue = view.jitter
            assert brightness is None and saturation is None
            assert contrast is not None and hue is not None

    def test_negative_strength_is_refused(self):
        with pytest.raises(ValueError):
            TwoViews(jitter=(-0.4, 0.4, 0.4, 0.1))
