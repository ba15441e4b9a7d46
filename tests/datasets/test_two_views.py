# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from random import Random

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms as T

from mmdensecl.datasets import (
    PackViews,
    SampleTwoCropParams,
    TwoViews,
)

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

    def test_crop(self, drawn):
        areas = np.array([v.box[2] * v.box[3] for v in drawn]) / 2000**2
        assert areas.min() > 0.199 and areas.max() <= 1
        # Wide or tall crops near the full area do not fit and are redrawn.
        assert is_uniform(areas[areas < 0.7], 0.2, 0.7)
        small = [v.box for v in drawn if v.box[2] * v.box[3] < 0.7 * 2000**2]
        ratios = np.log([box[2] / box[3] for box in small])
        assert is_uniform(ratios, np.log(3 / 4), np.log(4 / 3))
        small = [v.box for v in drawn if max(v.box[2:]) < 1900]
        for left in (0, 1):
            free = [box[left] / (2000 - box[left + 2]) for box in small]
            assert is_uniform(free, 0, 1)

    def test_strengths(self, drawn):
        jitters = [v.jitter for v in drawn if v.jitter]
        ranges = [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]
        for i, limits in enumerate(ranges, 1):
            assert is_uniform([x[i] for x in jitters], *limits)
        assert is_uniform([v.sigma for v in drawn if v.sigma], 0.1, 2.0)

    @pytest.mark.parametrize('size', [(500, 375), (60, 100), (7, 5), (1, 1)])
    def test_crops_match_torchvision(self, size):
        """Also where few draws fit, or none."""
        rng, transform = Random(1), SampleTwoCropParams()
        shape = torch.zeros(1, *size[::-1])
        ours = [transform.draw(*size, rng).box for _ in range(1000)]
        theirs = [
            T.RandomResizedCrop.get_params(shape, [0.2, 1.0], [3 / 4, 4 / 3])
            for _ in range(1000)
        ]
        for mine, other in enumerate((1, 0, 3, 2)):  # left, top, width, height
            a, b = [x[mine] for x in ours], [x[other] for x in theirs]
            assert stats.ks_2samp(a, b).pvalue > P_VALUE

    def test_fallback(self):
        """The largest in the middle, where no draw fits."""
        rng, transform = Random(1), SampleTwoCropParams()
        boxes = {transform.draw(200, 20, rng).box for _ in range(9)}
        top, left, height, width = T.RandomResizedCrop.get_params(
            torch.zeros(1, 20, 200), [0.2, 1.0], [3 / 4, 4 / 3]
        )
        assert boxes == {(left, top, width, height)}

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

    def test_jitter_order(self, drawn):
        orders = [tuple(v.jitter[0]) for v in drawn if v.jitter]
        counts = [orders.count(order) for order in set(orders)]
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > P_VALUE


class TestTwoViews:
    def test_the_seed_fixes_everything(self, photo):
        transform = TwoViews(size=32)

        def run(seed):
            own = {} if seed is None else dict(seed=seed)
            return transform.transform(dict(img=photo, **own))

        torch.manual_seed(1)
        first = run(5)
        torch.manual_seed(2)
        second, other = run(5), run(6)
        assert first['views'] == second['views']
        assert torch.equal(first['view_imgs'][0], second['view_imgs'][0])
        assert first['views'] != other['views']
        assert first['views'][0] != first['views'][1]
        # Torch's own generator, which mmengine seeds, is only asked for one.
        torch.manual_seed(2)
        expected = torch.rand(3)
        torch.manual_seed(2)
        run(5)
        assert torch.equal(torch.rand(3), expected)
        drawn = []
        for _ in range(2):
            torch.manual_seed(3)
            drawn.append([run(None)['views'] for _ in range(2)])
        assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]

    @pytest.mark.parametrize('size', [(64, 96), 32.0, 0])
    def test_views_are_square(self, size):
        with pytest.raises(ValueError, match='Views are square.*got'):
            TwoViews(size=size)

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

    def test_strength_of_zero(self, photo):
        transform = SampleTwoCropParams(
            jitter=(0.0, 0.4, 0.0, 0.1), jitter_prob=1.0
        )
        for view in transform(dict(img=photo, seed=1))['views']:
            _, brightness, contrast, saturation, hue = view.jitter
            assert brightness is None and saturation is None
            assert contrast is not None and hue is not None
