# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What is rendered is what PIL and torchvision, the authors' tools, make."""

import numpy as np
import pytest
import torch
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
FACTORS = (1.4, 0.6, 0.6, 0.1)
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


@pytest.fixture(scope='module', params=range(3))
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

    @pytest.mark.parametrize(
        'changes, most',
        [
            *(
                (dict(jitter=([i], *factors)), 1)
                for i in range(3)
                for factors in (
                    NOTHING[:i] + (factor,) + NOTHING[i + 1 :]
                    for factor in (0.6, 0.77, 1.4)
                )
            ),
            # Another 8-bit wheel, as far from the exact turn as PIL's is.
            (dict(jitter=([3], 1.0, 1.0, 1.0, -0.1)), 16),
            (dict(jitter=([3], 1.0, 1.0, 1.0, 0.06)), 16),
            (dict(gray=True), 1),
        ],
    )
    def test_colours(self, picture, changes, most):
        apart = difference(picture, PLAIN._replace(**changes))
        assert apart.abs().max() <= most
        assert apart.abs().mean() < (0.1 if most == 1 else 1.2)
        assert apart.mean().abs() < 0.5

    @pytest.mark.parametrize('sigma', SIGMAS)
    def test_blur(self, picture, sigma):
        """The same kernel; PIL rounds after each of its six passes."""
        apart = difference(picture, PLAIN._replace(sigma=sigma))
        assert apart.abs().mean() < 1 and apart.mean().abs() < 0.2
        # PIL repeats the edge of each pass, OpenCV of the picture.
        inner = apart[:, 9:-9, 9:-9]
        assert inner.abs().max() <= 3
        kernel = blur_kernel(sigma)
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert kernel.sum() == pytest.approx(1)
        assert (kernel * offsets**2).sum() == pytest.approx(sigma**2)

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
        """The image itself is never written to."""
        before = np.array(photo)
        view = View((0, 0, 320, 240), (range(4), *FACTORS), True, 1.0, True)
        render_view(photo, view, 240)
        assert (np.asarray(photo) == before).all()
        off = PLAIN._replace(jitter=(range(4), *[None] * 4))
        assert torch.equal(
            render_view(photo, off, SIDE), render_view(photo, PLAIN, SIDE)
        )
        crop = photo.crop((0, 0, SIDE, SIDE))
        out = render_view(photo, PLAIN, SIDE)
        assert out.dtype == torch.uint8 and out.shape == (3, SIDE, SIDE)
        assert out.is_contiguous()  # or else stacking a batch takes longer
        assert (out.permute(1, 2, 0).numpy() == np.asarray(crop)).all()

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
