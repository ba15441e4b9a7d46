# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import io
import warnings

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image

from mmdensecl.registry import TRANSFORMS
from ..unlabeled import UnreadableImageError


def decode_rgb(data: bytes) -> Image.Image:
    """Decode a picture of any mode to 8-bit RGB.

    Args:
        data (bytes): The encoded file.

    Returns:
        Image.Image: In mode RGB; the EXIF orientation is not applied, as in
        the authors' code.

    Raises:
        UnreadableImageError: It is no picture, is truncated, or is so large
            that decoding it could exhaust the memory.
    """
    try:
        with warnings.catch_warnings():
            # Oddities of metadata are none of a pre-training run's business.
            warnings.simplefilter('ignore')
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith('I'):  # 16-bit greys
                    high_byte = np.asarray(image) >> 8
                    image = Image.fromarray(
                        high_byte.clip(0, 255).astype(np.uint8))
                return image.convert('RGB')
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(str(error)) from error
    except Exception as error:
        # Broken files make PIL's decoders raise nearly anything.
        raise UnreadableImageError(
            f'{type(error).__name__}: {error}') from error


@TRANSFORMS.register_module()
class DecodeRGB(BaseTransform):
    """Decode a picture, once for all its views.

    Required keys: ``img_bytes``. Added: ``img`` (PIL, RGB).
    """

    def transform(self, results: dict) -> dict:
        results['img'] = decode_rgb(results.pop('img_bytes'))
        return results
