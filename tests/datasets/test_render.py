# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What is rendered is what PIL and torchvision, the authors' tools, make."""

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from mmdensecl.datasets import TwoViews
from mmdensecl.datasets.transforms import View, render_view
from mmdensecl.datasets.transforms.render import blur_kernel

SIDE = 64
PLAIN = View((0, 0, SIDE, SIDE), None, False, None, False)
ADJUST = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)
NOTHING = (1.0, 1.0, 1.0, 0.0)
# Sigmas at which PIL's box ends on a whole pixel are left out: there it comes
# out half a level too dark. The kernel of 2.5 has radius 2.
SIGMAS = (0.1, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8, 2.0, 2.5)


def authors_view(image, view, size):
    """The same view by PIL and torchvision, as the authors do it."""
    left, top, width, height = view.box
    image = F.resized_crop(image, top, left, height, width, [size, size])
    if view.jitter is not None:
        order, *factors = view.jitter
        for i in order:
            image = ADJUST[i](image, factors[i])
    if view.gray:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if view.sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(radius=view.sigma))
    if view.flip:
        image = F.hflip(image)
    return F.pil_to_tensor(image)


def difference(image, view, size=SIDE):
    """In grey levels, ours less the authors'."""
    return render_view(image, view, size).double() - authors_view(
        image, view, size
    )


def make_picture(seed):
    """Colours, structure and noise of another kind for each seed."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (*rng.integers(3, 12, 2), 3), dtype=np.uint8)
    smooth = Image.fromarray(cells).resize((SIDE, SIDE), Image.BICUBIC)
    noise = rng.normal(0, rng.uniform(0, 30), (SIDE, SIDE, 3))
    pixels = np.asarray(smooth) * rng.uniform(0.4, 1.6) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope='module', params=range(5))
def picture(request):
    return make_picture(request.param)


class TestAgainstPIL:
    @pytest.mark.parametrize(
        'box',
        [
            (0, 0, 320, 240),
            (100, 40, 50, 80),
            (3, 5, 317, 20),
            (300, 220, 20, 20),
            (17, 11, 64, 64),
            (0, 0, 1, 240),
            (319, 239, 1, 1),
        ],
    )
    def test_crop_and_resize(self, photo, box):
        """Smaller, larger, one way each; at most a rounding apart."""
        apart = difference(photo, PLAIN._replace(box=box))
        assert apart.abs().max() <= 1 and apart.abs().mean() < 0.3
        assert apart.mean().abs() < 0.1

    @pytest.mark.parametrize('which', range(3))
    @pytest.mark.parametrize('factor', [0.6, 0.77, 0.9, 1.0, 1.13, 1.3, 1.4])
    def test_brightness_contrast_saturation(self, picture, which, factor):
        factors = list(NOTHING)
        factors[which] = factor
        apart = difference(picture, PLAIN._replace(jitter=([which], *factors)))
        # A level apart where a product is a whole number, or nearly.
        assert apart.abs().max() <= 1 and apart.abs().mean() < 0.1

    @pytest.mark.parametrize('factor', [-0.1, -0.06, 0.0, 0.03, 0.07, 0.1])
    def test_hue(self, picture, factor):
        """Another 8-bit wheel, as far from the exact turn as PIL's is."""
        view = PLAIN._replace(jitter=([3], 1.0, 1.0, 1.0, factor))
        apart = difference(picture, view)
        assert apart.abs().mean() < 1.2 and apart.mean().abs() < 0.5
        assert apart.abs().max() <= 16
        hsv = rgb_to_hsv(np.asarray(picture) / 255)
        hsv[..., 0] = (hsv[..., 0] + int(factor * 255) / 255) % 1
        exact = torch.from_numpy(hsv_to_rgb(hsv) * 255).permute(2, 0, 1)
        ours, theirs = (
            (render(picture, view, SIDE) - exact).abs().mean()
            for render in (render_view, authors_view)
        )
        assert ours < 1.5 * theirs

    def test_hue_of_grey_is_grey(self):
        image = Image.new('RGB', (SIDE, SIDE), (77, 77, 77))
        view = PLAIN._replace(jitter=([3], 1.0, 1.0, 1.0, 0.1))
        assert (render_view(image, view, SIDE) == 77).all()

    def test_gray(self, picture):
        view = PLAIN._replace(gray=True)
        out = render_view(picture, view, SIDE)
        assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2])
        apart = difference(picture, view)
        assert apart.abs().max() <= 1 and apart.abs().mean() < 0.05

    @pytest.mark.parametrize('sigma', SIGMAS)
    def test_blur(self, picture, sigma):
        """The same kernel; PIL rounds after each of its six passes."""
        apart = difference(picture, PLAIN._replace(sigma=sigma))
        assert apart.abs().mean() < 1 and apart.mean().abs() < 0.2
        # PIL repeats the edge of each pass, OpenCV of the picture.
        inner = apart[:, 9:-9, 9:-9]
        assert inner.abs().max() <= 3

    @pytest.mark.parametrize('gray', [False, True])
    @pytest.mark.parametrize('flip', [False, True])
    def test_gray_then_blur_then_flip(self, picture, gray, flip):
        apart = difference(
            picture, PLAIN._replace(gray=gray, sigma=1.7, flip=flip)
        )
        assert apart.abs().mean() < 1

    def test_drawn_views(self, photo):
        """All of it, as it is drawn: no bias, less than a level apart."""
        apart = []
        for seed in range(25):
            out = TwoViews(size=SIDE).transform(dict(img=photo, seed=seed))
            for view, image in zip(
                out['views'], out['view_imgs'], strict=True
            ):
                apart.append(image.double() - authors_view(photo, view, SIDE))
        means = torch.stack([x.abs().mean() for x in apart])
        assert means.mean() < 1 and means.max() < 2
        assert torch.stack(apart).mean().abs() < 0.1


class TestRender:
    def test_nothing_to_do(self, photo):
        crop = photo.crop((0, 0, SIDE, SIDE))
        out = render_view(photo, PLAIN, SIDE)
        assert out.dtype == torch.uint8 and out.shape == (3, SIDE, SIDE)
        assert out.is_contiguous()  # or else stacking a batch takes longer
        assert (out.permute(1, 2, 0).numpy() == np.asarray(crop)).all()

    def test_crop_is_where_it_says(self):
        y, x = np.mgrid[:200, :250].astype(np.uint8)
        image = Image.fromarray(np.stack([x, y, 0 * x], 2))
        out = render_view(
            image, PLAIN._replace(box=(100, 40, 50, 80)), 10
        ).float()
        centres = torch.arange(10) + 0.5
        expected_x = 100 + centres * 5 - 0.5
        expected_y = 40 + centres * 8 - 0.5
        inner = slice(1, -1)  # the filter is cut off at the crop's edge
        assert (out[0, 5] - expected_x)[inner].abs().max() <= 1
        assert (out[1, :, 5] - expected_y)[inner].abs().max() <= 1

    def test_flip(self, photo):
        plain = render_view(photo, PLAIN, SIDE)
        flipped = render_view(photo, PLAIN._replace(flip=True), SIDE)
        assert torch.equal(flipped, plain.flip(2))
        assert not torch.equal(flipped, plain)

    @pytest.mark.parametrize('sigma', SIGMAS)
    def test_blur_kernel_is_as_wide_as_it_says(self, sigma):
        kernel = blur_kernel(sigma)
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert kernel.sum() == pytest.approx(1)
        assert kernel == pytest.approx(kernel[::-1])
        assert (kernel * offsets**2).sum() == pytest.approx(sigma**2)

    def test_blur_widens_a_point(self):
        array = np.zeros((65, 65, 3), np.uint8)
        array[32, 32] = 255
        view = PLAIN._replace(box=(0, 0, 65, 65), sigma=2.0)
        out = render_view(Image.fromarray(array), view, 65)[0].double()
        offsets = torch.arange(65) - 32
        spread = (out.sum(0) * offsets**2).sum() / out.sum()
        assert spread.sqrt() == pytest.approx(2.0, rel=0.15)

    def test_jitter_order_matters(self, photo):
        factors = (1.4, 0.6, 0.6, 0.1)
        one = PLAIN._replace(jitter=([0, 1, 2, 3], *factors))
        other = PLAIN._replace(jitter=([3, 2, 1, 0], *factors))
        assert not torch.equal(
            render_view(photo, one, SIDE), render_view(photo, other, SIDE)
        )

    def test_an_operation_without_factor_is_left_out(self, photo):
        view = PLAIN._replace(jitter=([0, 1, 2, 3], None, None, None, None))
        assert torch.equal(
            render_view(photo, view, SIDE), render_view(photo, PLAIN, SIDE)
        )

    def test_the_picture_is_left_alone(self, photo):
        before = np.array(photo)
        view = View(
            (0, 0, 320, 240),
            ([3, 2, 1, 0], 1.4, 0.6, 0.6, 0.1),
            True,
            1.0,
            True,
        )
        render_view(photo, view, 240)
        assert (np.asarray(photo) == before).all()

    @pytest.mark.parametrize(
        'width, height', [(1, 1), (1, 50), (50, 1), (2, 3)]
    )
    @pytest.mark.parametrize('size', [1, 2, 8])
    @pytest.mark.parametrize('gray', [False, True])
    def test_tiny_pictures(self, width, height, size, gray):
        image = Image.new('RGB', (width, height), (200, 90, 40))
        view = View(
            (0, 0, width, height),
            (range(4), 1.2, 0.8, 1.1, 0.05),
            gray,
            2.0,
            True,
        )
        apart = difference(image, view, size)
        assert apart.shape == (3, size, size) and apart.abs().max() <= 3
