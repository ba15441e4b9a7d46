# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms as T

from mmdensecl.datasets import PackViews, TwoViews

# Seeds are fixed, so a threshold this low fails only when the code changes.
P_VALUE = 1e-3
DRAWS = 4000


@pytest.fixture(scope='module')
def drawn():
    """Many views of one picture, whose size is far from the crop's limits."""
    torch.manual_seed(0)
    transform = TwoViews()
    image = Image.new('RGB', (2000, 2000))
    return [transform.draw(image) for _ in range(DRAWS)]


def is_uniform(values, low, high):
    return stats.kstest(values, 'uniform', (low, high - low)).pvalue > P_VALUE


def has_rate(flags, probability):
    flags = list(flags)
    return stats.binomtest(sum(flags), len(flags),
                           probability).pvalue > P_VALUE


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
            [(v.jitter is not None, v.gray, v.sigma is not None, v.flip)
             for v in drawn], float)
        off_diagonal = np.corrcoef(flags.T)[~np.eye(4, dtype=bool)]
        assert np.abs(off_diagonal).max() < 4 / DRAWS**0.5

    @pytest.mark.parametrize('which, low, high', [(1, 0.6, 1.4), (2, 0.6, 1.4),
                                                  (3, 0.6, 1.4),
                                                  (4, -0.1, 0.1)])
    def test_jitter_factors(self, drawn, which, low, high):
        assert is_uniform([v.jitter[which] for v in drawn if v.jitter], low,
                          high)

    def test_jitter_order(self, drawn):
        orders = [tuple(v.jitter[0]) for v in drawn if v.jitter]
        counts = [orders.count(order) for order in set(orders)]
        assert len(counts) == 24
        assert stats.chisquare(counts).pvalue > P_VALUE

    def test_blur(self, drawn):
        assert is_uniform([v.sigma for v in drawn if v.sigma], 0.1, 2.0)

    def test_pictures_match_torchvision(self, photo):
        """The views' statistics are those of the same torchvision chain."""
        torch.manual_seed(0)
        transform = TwoViews(size=32)
        theirs = T.Compose([
            T.RandomResizedCrop(32, scale=(0.2, 1.)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomHorizontalFlip(),
            T.PILToTensor(),
        ])
        transform.blur_prob = 0.  # torchvision blurs differently
        a = torch.stack([
            view for _ in range(400)
            for view in transform.transform(dict(img=photo))['view_imgs']
        ]).float()
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
            dict(img=photo, seed=5, img_path='a.png', sample_idx=3))
        packed = PackViews().transform(results)
        assert [v.shape for v in packed['inputs']] == [(3, 32, 32)] * 2
        sample = packed['data_samples']
        assert sample.img_path == 'a.png' and sample.sample_idx == 3
        left, top, width, height = results['views'][1].box
        assert sample.views[1] == (left, top, width, height,
                                   results['views'][1].flip)

    def test_negative_strength_is_refused(self):
        with pytest.raises(ValueError):
            TwoViews(jitter=(-0.4, 0.4, 0.4, 0.1))
