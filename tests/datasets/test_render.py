# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from mmdensecl.datasets import TwoViews
from mmdensecl.datasets.transforms import View, render_view


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
