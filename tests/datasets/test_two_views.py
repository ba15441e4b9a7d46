# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms as T

from mmdensecl.datasets import PackViews, TwoViews
from mmdensecl.datasets.transforms import View, render_view

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


@pytest.fixture(scope='module')
def photo():
    """A picture with structure at every scale."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    fine = rng.integers(-20, 20, (240, 320, 3))
    smooth = np.asarray(coarse.resize((320, 240), Image.BICUBIC), dtype=int)
    return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))


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


class TestRender:
    PLAIN = View((0, 0, 64, 64), None, False, None, False)

    def test_nothing_to_do(self, photo):
        crop = photo.crop((0, 0, 64, 64))
        out = render_view(photo, self.PLAIN, 64)
        assert out.dtype == torch.uint8 and out.shape == (3, 64, 64)
        assert (out.permute(1, 2, 0).numpy() == np.asarray(crop)).all()

    def test_crop_is_where_it_says(self):
        y, x = np.mgrid[:200, :250].astype(np.uint8)
        image = Image.fromarray(np.stack([x, y, 0 * x], 2))
        out = render_view(image, self.PLAIN._replace(box=(100, 40, 50, 80)),
                          10).float()
        centres = torch.arange(10) + 0.5
        expected_x = 100 + centres * 5 - 0.5
        expected_y = 40 + centres * 8 - 0.5
        inner = slice(1, -1)  # the filter is cut off at the crop's edge
        assert (out[0, 5] - expected_x)[inner].abs().max() <= 1
        assert (out[1, :, 5] - expected_y)[inner].abs().max() <= 1

    def test_flip(self, photo):
        plain = render_view(photo, self.PLAIN, 64)
        flipped = render_view(photo, self.PLAIN._replace(flip=True), 64)
        assert torch.equal(flipped, plain.flip(2))
        assert not torch.equal(flipped, plain)

    def test_gray(self, photo):
        out = render_view(photo, self.PLAIN._replace(gray=True), 64)
        assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2])

    def test_blur_widens_a_point(self):
        array = np.zeros((65, 65, 3), np.uint8)
        array[32, 32] = 255
        view = self.PLAIN._replace(box=(0, 0, 65, 65), sigma=2.0)
        out = render_view(Image.fromarray(array), view, 65)[0].double()
        offsets = torch.arange(65) - 32
        spread = (out.sum(0) * offsets**2).sum() / out.sum()
        assert spread.sqrt() == pytest.approx(2.0, rel=0.15)

    @pytest.mark.parametrize('which', range(4))
    def test_jitter_operations(self, photo, which):
        factors = [1., 1., 1., 0.]
        factors[which] = (1.4, 0.6, 0.6, 0.1)[which]
        apply = (T.functional.adjust_brightness, T.functional.adjust_contrast,
                 T.functional.adjust_saturation, T.functional.adjust_hue)
        expected = apply[which](photo.crop((0, 0, 64, 64)), factors[which])
        view = self.PLAIN._replace(jitter=([which], *factors))
        out = render_view(photo, view, 64)
        assert (out.permute(1, 2, 0).numpy() == np.asarray(expected)).all()

    def test_jitter_order_matters(self, photo):
        factors = (1.4, 0.6, 0.6, 0.1)
        one = self.PLAIN._replace(jitter=([0, 1, 2, 3], *factors))
        other = self.PLAIN._replace(jitter=([3, 2, 1, 0], *factors))
        assert not torch.equal(
            render_view(photo, one, 64), render_view(photo, other, 64))

    def test_tiny_pictures(self):
        transform = TwoViews(size=8)
        for size in ((1, 1), (1, 50), (50, 1)):
            out = transform.transform(dict(img=Image.new('RGB', size)))
            assert all(v.shape == (3, 8, 8) for v in out['view_imgs'])


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
