# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What the authors do with PIL and torchvision, by the cheapest means.

Every operation is the same formula as theirs up to the rounding of a grey
level, taken from the library that was fastest at it on one core.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F


class View(NamedTuple):
    """Everything random about one view of an image.

    Attributes:
        box: Left, top, width and height of the crop in pixels.
        jitter: Order of the four operations, then factors of brightness,
            contrast, saturation and hue; None for none.
        gray: Whether colour is removed.
        sigma: Radius of the Gaussian blur in pixels of the view; None for
            none.
        flip: Whether it is mirrored.
    """

    box: tuple[int, int, int, int]
    jitter: tuple | None
    gray: bool
    sigma: float | None
    flip: bool

    @property
    def coordinates(self) -> tuple[float, ...]:
        """Left, top, width, height and flip, as the models expect them."""
        return (*map(float, self.box), float(self.flip))


def crop_and_resize(
    image: Image.Image, box: tuple[int, int, int, int], size: int
) -> np.ndarray:
    """PIL's antialiased bilinear filter, which OpenCV does not have."""
    crop = F.pil_to_tensor(image.crop(box))  # left, top, right, bottom
    return F.resize(crop, [size, size]).permute(1, 2, 0).numpy()


# PIL drops the fraction, OpenCV rounds. Not one half, which would also take
# one from a whole number that comes out a little too small.
DROP_FRACTION = -0.499


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black."""
    return cv2.addWeighted(image, factor, image, 0, DROP_FRACTION)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey, a whole number."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(
        image, factor, image, 0, (1 - factor) * mean + DROP_FRACTION
    )


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey image."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    gray = cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, factor, gray, 1 - factor, DROP_FRACTION)


def adjust_hue(image: np.ndarray, factor: float) -> np.ndarray:
    """Turn the wheel of 256 hues by `factor` of a whole turn."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _jitter(image: np.ndarray, jitter: tuple) -> np.ndarray:
    order, *factors = jitter
    adjust = (
        adjust_brightness,
        adjust_contrast,
        adjust_saturation,
        adjust_hue,
    )
    for i in order:
        if factors[i] is not None:
            image = adjust[i](image, factors[i])
    return image


def blur_kernel(sigma: float) -> np.ndarray:
    """The kernel that PIL calls Gaussian: a box, three times over.

    The box has a fraction of a pixel at either end, so that the variance is
    right for any sigma (Gwosdek et al., SSVM 2011); a sampled Gaussian is too
    narrow below one pixel.

    Args:
        sigma: Standard deviation in pixels.

    Returns:
        Of an odd length, sum 1.
    """
    variance = sigma**2 / 3  # of one box
    whole = int(((12 * variance + 1) ** 0.5 - 1) / 2)  # pixels to either side
    end = (2 * whole + 1) * (variance - whole * (whole + 1) / 3) / 2
    end /= (whole + 1) ** 2 - variance
    box = np.array([end, *[1] * (2 * whole + 1), end])
    box /= box.sum()
    return np.convolve(np.convolve(box, box), box)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """PIL's GaussianBlur with that radius, rounded once and not six times."""
    # OpenCV is twice as fast with a kernel of float32.
    kernel = blur_kernel(sigma).astype(np.float32)
    return cv2.sepFilter2D(
        image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE
    )


def to_tensor(image: np.ndarray) -> Tensor:
    """Colour planes one after the other; the one of a grey view thrice."""
    planes = [*cv2.split(image)]
    return torch.from_numpy(np.stack(planes * (3 // len(planes))))


def render_view(image: Image.Image, view: View, size: int) -> Tensor:
    """Carry out a drawn view.

    Args:
        image: The image, RGB.
        view: What to do.
        size: Side of the result in pixels.

    Returns:
        Uint8, (3, size, size).
    """
    left, top, width, height = view.box
    array = crop_and_resize(
        image, (left, top, left + width, top + height), size
    )
    if view.jitter is not None:
        array = _jitter(array, view.jitter)
    if view.gray:
        array = cv2.cvtColor(array, cv2.COLOR_RGB2GRAY)
    if view.sigma is not None:
        array = blur(array, view.sigma)
    if view.flip:
        array = cv2.flip(array, 1)
    return to_tensor(array)
