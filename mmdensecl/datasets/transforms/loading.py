# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Decode images, also broken and hostile ones."""

import io
import logging
import warnings

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from PIL import Image, UnidentifiedImageError, features

from mmdensecl.registry import TRANSFORMS

from ..unlabeled import UnreadableImageError

# Those of the extensions that are listed, whatever a file is called. PIL's
# other decoders are not for untrusted files: that of EPS runs ghostscript.
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'PPM', 'TIFF', 'WEBP') + (
    ('AVIF',) if features.check('avif') else ()
)
TIFF_HEADS = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')
# Tags of a TIFF, and what the latter says of colours.
SAMPLES_PER_PIXEL, PHOTOMETRIC, RGB = 277, 262, 2
# Encoders write about ten. Each goes over the whole image and may be
# declared in a dozen bytes, so a small file could take hours.
MAX_JPEG_SCANS = 500
# Entry of an image's `info`: it had more than 8 bits.
WAS_DEEP = 'mmdensecl_was_deep'


def _to_8_bits(values: np.ndarray) -> Image.Image:
    """The upper 8 of the bits that are in use, of 16 or 32.

    Cameras and scanners put 10, 12 or 14 bits into 16, and do not say so;
    without this their images would be black. The brightest and darkest
    pixels of a thousand, such as a sensor's broken ones, are not asked.
    Negative numbers, as of a tomograph, are shifted to begin at 0.
    """
    # A step that is no multiple of 3 meets all colours.
    sample = np.sort(values.reshape(-1)[:: 1 + 3 * (values.size // 300_000)])
    skipped = min(len(sample) - 1, 1 + len(sample) // 1000)
    low = min(0, int(sample[skipped]))
    bits = max(8, (int(sample[-1 - skipped]) - low).bit_length())
    high = min(low + 2**bits - 1, np.iinfo(values.dtype).max)
    eight = (values.clip(low, high) - low) >> (bits - 8)
    image = Image.fromarray(eight.astype(np.uint8))
    image.info[WAS_DEEP] = True
    return image


def _is_deep_color(image: Image.Image) -> bool:
    """Whether PIL would take the upper 8 of 16 bits, in use or not."""
    tiles: list = getattr(image, 'tile', [])
    args = tiles[0][3] if tiles else ''
    raw, *rest = (args,) if isinstance(args, str) else args or ('',)
    return ';16' in str(raw) or (image.format == 'PPM' and rest == [65535])


def _decode_deep_color(data: bytes, mode: str) -> Image.Image:
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if (
        mode not in ('LA', 'RGB', 'RGBA', 'RGBX')
        or found is None
        or found.dtype != np.uint16
        or found.ndim != 3
    ):
        raise UnreadableImageError(
            f'colours of 16 bits in the mode {mode} cannot be read; save it '
            'as RGB'
        )
    return _to_8_bits(found[..., 2::-1])  # OpenCV's order is BGR(A)


def _check_bands(image: Image.Image) -> None:
    """Refuse a TIFF of which PIL would show one band of many as grey."""
    tags = getattr(image, 'tag_v2', {})
    bands, kind = tags.get(SAMPLES_PER_PIXEL, 1), tags.get(PHOTOMETRIC)
    if bands > len(image.getbands()) and kind != RGB:
        raise UnreadableImageError(
            f'it has {bands} bands that are not declared as RGB; write the '
            'three to be used as RGB'
        )


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


def decode_rgb(
    data: bytes, max_pixels: int | None = None, min_side: int | None = None
) -> Image.Image:
    """Decode an image of any mode to 8-bit RGB.

    Of several frames it is the first. Transparency is dropped, and the
    colours behind it are kept. Of 10 to 32 bits the upper 8 that are in use
    are taken.

    Args:
        data: The encoded file.
        max_pixels: The most that are decoded. Defaults to PIL's limit, 179
            million.
        min_side: See :class:`DecodeRGB`. Defaults to None, the whole size.

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
                _check_bands(image)
                if min_side is not None:
                    image.draft(None, (min_side, min_side))
                if image.mode.startswith('I'):
                    image = _to_8_bits(np.asarray(image))
                elif _is_deep_color(image):
                    image = _decode_deep_color(data, image.mode)
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
        what = f'it is none of {", ".join(FORMATS)}'
        if data.startswith(TIFF_HEADS):
            what = (
                'it is a TIFF of a kind that PIL cannot read, such as bands '
                'that are not declared as RGB; write three bands as RGB'
            )
        raise UnreadableImageError(what) from error
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
        min_side: JPEGs are decoded at a half, a quarter or an eighth of their
            size where neither side gets shorter than this many pixels, which
            is several times faster for large photographs. Crops are drawn in
            the smaller image. Defaults to None, always the whole size.
    """

    def __init__(
        self, max_pixels: int | None = None, min_side: int | None = None
    ) -> None:
        self.max_pixels = max_pixels
        self.min_side = min_side
        # In memory that workers share, to warn once.
        self.warned = torch.zeros(1, dtype=torch.bool).share_memory_()

    def transform(self, results: dict) -> dict:
        image = decode_rgb(
            results.pop('img_bytes'), self.max_pixels, self.min_side
        )
        results['img'] = image
        if image.info.get(WAS_DEEP) is True and not self.warned:
            self.warned[0] = True
            print_log(
                f'{results.get("img_path", "An image")!r} has more than 8 '
                'bits a channel. Of such images the upper 8 of the bits that '
                'they use are taken; if another scale is right for them, '
                'save them with 8 bits',
                logger='current',
                level=logging.WARNING,
            )
        return results
