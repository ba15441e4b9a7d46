# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import io
import warnings

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image

from mmdensecl.registry import TRANSFORMS
from ..unlabeled import UnreadableImageError


def _to_8_bits(values: np.ndarray) -> Image.Image:
    """A grey of up to 32 bits, its brightest pixel white.

    Cameras and scanners put 10, 12 or 14 bits into 16, and do not say so;
    without stretching their pictures would be black.
    """
    scale = 255 / max(255, int(values.max()))
    return Image.fromarray((values.clip(0) * scale).astype(np.uint8))


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
                if image.mode.startswith('I'):
                    image = _to_8_bits(np.asarray(image))
                elif image.mode == 'F':
                    raise UnreadableImageError(
                        'pictures of floats have no agreed range; save them '
                        'with 8 or 16 bits')
                image.load()
                # convert would copy what is RGB already.
                return image if image.mode == 'RGB' else image.convert('RGB')
    except UnreadableImageError:
        raise
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
