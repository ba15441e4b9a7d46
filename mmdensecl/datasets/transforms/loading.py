# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Decode images, also broken and hostile ones."""

import io
import warnings

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image, UnidentifiedImageError

from mmdensecl.registry import TRANSFORMS

from ..unlabeled import UnreadableImageError

# Those of the extensions that are listed, whatever a file is called. PIL's
# other decoders are not for untrusted files: that of EPS runs ghostscript.
FORMATS = ('JPEG', 'PNG', 'BMP', 'PPM', 'TIFF', 'WEBP')
# Encoders write about ten. Each goes over the whole image and may be
# declared in a dozen bytes, so a small file could take hours.
MAX_JPEG_SCANS = 500


def _to_8_bits(values: np.ndarray) -> Image.Image:
    """A grey of up to 32 bits, its brightest pixel white.

    Cameras and scanners put 10, 12 or 14 bits into 16, and do not say so;
    without stretching their images would be black.
    """
    scale = 255 / max(255, int(values.max()))
    eight = np.empty(values.shape, np.uint8)
    # Without a float64 of each pixel in between.
    np.multiply(values.clip(0), scale, out=eight, casting='unsafe')
    return Image.fromarray(eight)


def _check_cost(
    image: Image.Image, data: bytes, max_pixels: int | None
) -> None:
    """Refuse what takes too much memory or time, before it is decoded."""
    pixels = image.width * image.height
    if pixels == 0:
        raise UnreadableImageError('it has no pixels')
    if max_pixels is not None and pixels > max_pixels:
        raise UnreadableImageError(
            f'{image.width} x {image.height} pixels are more than '
            f'max_pixels={max_pixels}; cut or shrink it'
        )
    scans = data.count(b'\xff\xda') if image.format in ('JPEG', 'MPO') else 0
    if scans > MAX_JPEG_SCANS:
        raise UnreadableImageError(
            f'a JPEG of about {scans} scans, more than {MAX_JPEG_SCANS}, is '
            'made to take long'
        )


def decode_rgb(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image of any mode to 8-bit RGB.

    Of several frames it is the first. Transparency is dropped, and the
    colours behind it are kept.

    Args:
        data: The encoded file.
        max_pixels: The most that are decoded. Defaults to PIL's limit, 179
            million.

    Returns:
        In mode RGB; the EXIF orientation is not applied, as in the authors'
        code.

    Raises:
        UnreadableImageError: It is no image of :data:`FORMATS`, is truncated,
            or would take too much memory or time.
    """
    try:
        with warnings.catch_warnings():
            # Oddities of metadata are none of a pre-training run's business.
            warnings.simplefilter('ignore')
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_cost(image, data, max_pixels)
                if image.mode.startswith('I'):
                    image = _to_8_bits(np.asarray(image))
                elif image.mode == 'F':
                    raise UnreadableImageError(
                        'images of floats have no agreed range; save them '
                        'with 8 or 16 bits'
                    )
                image.load()
                # convert would copy what is RGB already.
                return image if image.mode == 'RGB' else image.convert('RGB')
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(
            f'it is none of {", ".join(FORMATS)}'
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(str(error)) from error
    except Exception as error:
        # Broken files make PIL's decoders raise nearly anything.
        raise UnreadableImageError(
            f'{type(error).__name__}: {error}'
        ) from error


@TRANSFORMS.register_module()
class DecodeRGB(BaseTransform):
    """Decode an image, once for all its views.

    Required keys: `img_bytes`. Added: `img` (PIL, RGB).

    Args:
        max_pixels: Images of more pixels are unreadable. A pixel takes up to
            16 bytes of a worker's memory. Defaults to PIL's limit, 179
            million.
    """

    def __init__(self, max_pixels: int | None = None) -> None:
        self.max_pixels = max_pixels

    def transform(self, results: dict) -> dict:
        results['img'] = decode_rgb(results.pop('img_bytes'), self.max_pixels)
        return results
