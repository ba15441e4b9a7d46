# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional as F

from .view import View


def _jitter(image: Image.Image, jitter: tuple) -> Image.Image:
    order, *factors = jitter
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation,
              F.adjust_hue)
    for i in order:
        if factors[i] is not None:
            image = adjust[i](image, factors[i])
    return image


def render_view(image: Image.Image, view: View, size: int) -> Tensor:
    """Carry out a drawn view.

    Args:
        image (Image.Image): The picture, RGB.
        view (View): What to do.
        size (int): Side of the result in pixels.

    Returns:
        Tensor: uint8, (3, size, size).
    """
    left, top, width, height = view.box
    image = F.resized_crop(image, top, left, height, width, [size, size])
    if view.jitter is not None:
        image = _jitter(image, view.jitter)
    if view.gray:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if view.sigma is not None:
        image = image.filter(ImageFilter.GaussianBlur(radius=view.sigma))
    if view.flip:
        image = F.hflip(image)
    return F.pil_to_tensor(image)
