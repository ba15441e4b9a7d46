# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The photographs inside the scikit-image, scikit-learn and matplotlib wheels.

What the demo learns from and what it is scored on are two regions of each
photograph that share no pixel.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
from matplotlib.cbook import get_sample_data
from PIL import Image
from sklearn.datasets import load_sample_image

PUBLIC, CC0, FREE = 'public domain', 'CC0 1.0', 'no known restrictions'
SPLITS = TRAIN, VAL = 'train', 'val'
STAMP = 'LICENSES.txt'


class Photograph(NamedTuple):
    """Where a photograph comes from.

    Args:
        load: Returns its pixels.
        licence: Licence and author, as its docstring or README names them.
        train: Percent of the longer side that is for training.
        scale: Share of its size that is kept.
        border: Pixels cut off on each side.
    """

    load: Callable[[], np.ndarray]
    licence: str
    train: int = 65
    scale: float = 1
    border: int = 0


def _hopper() -> np.ndarray:
    path = get_sample_data('grace_hopper.jpg', asfileobj=False)
    return np.asarray(Image.open(path))


def _motorcycle() -> np.ndarray:
    return skimage.data.stereo_motorcycle()[0]


PHOTOGRAPHS = dict(
    astronaut=Photograph(skimage.data.astronaut, f'{PUBLIC}, NASA'),
    brick=Photograph(skimage.data.brick, f'{CC0}, CC0Textures'),
    camera=Photograph(skimage.data.camera, f'{CC0}, Lav Varshney'),
    cat=Photograph(skimage.data.cat, f'{CC0}, Stefan van der Walt'),
    china=Photograph(
        lambda: load_sample_image('china.jpg'),
        'CC BY 2.0, danielbuechele on Flickr',
    ),
    coffee=Photograph(skimage.data.coffee, f'{CC0}, Rachel Michetti'),
    coins=Photograph(skimage.data.coins, f'{FREE}, Brooklyn Museum'),
    # The dahlia is cut through its middle.
    flower=Photograph(
        lambda: load_sample_image('flower.jpg'),
        'CC BY 2.0, vultilion on Flickr',
        48,
    ),
    grass=Photograph(skimage.data.grass, f'{CC0}, DeTexturePro'),
    gravel=Photograph(skimage.data.gravel, f'{CC0}, CC0Textures'),
    hopper=Photograph(_hopper, f'{PUBLIC}, US Navy'),
    hubble=Photograph(
        skimage.data.hubble_deep_field, f'{PUBLIC}, NASA', scale=0.7
    ),
    ihc=Photograph(skimage.data.immunohistochemistry, f'{FREE}, CMMI'),
    moon=Photograph(skimage.data.moon, 'as scikit-image, author not named'),
    motorcycle=Photograph(
        _motorcycle, 'Middlebury Stereo 2014, Scharstein et al.'
    ),
    page=Photograph(skimage.data.page, 'as scikit-image, author not named'),
    # The square inside the round image.
    retina=Photograph(
        skimage.data.retina, f'{CC0}, Hagstrom et al.', scale=0.5, border=211
    ),
    rocket=Photograph(skimage.data.rocket, f'{PUBLIC}, SpaceX'),
    text=Photograph(skimage.data.text, f'{PUBLIC}, Wikipedia'),
)


def load_region(name: str, split: str) -> Image.Image:
    """Return the region of a photograph for a split, cut across its length.

    Args:
        name: One of ``PHOTOGRAPHS``.
        split: ``'train'`` or ``'val'``.
    """
    photograph = PHOTOGRAPHS[name]
    pixels = np.asarray(photograph.load())
    border = photograph.border
    pixels = pixels[
        border : len(pixels) - border, border : pixels.shape[1] - border
    ]
    axis = int(pixels.shape[1] > pixels.shape[0])
    cut = pixels.shape[axis] * photograph.train // 100
    region = np.split(pixels, [cut], axis)[SPLITS.index(split)]
    # Cut before resizing: interpolation would mix the regions.
    image = Image.fromarray(region).convert('RGB')
    return image.resize(
        [round(x * photograph.scale) for x in image.size],
        Image.Resampling.LANCZOS,
    )


def fill(
    out_dir: Path, stamp: str, write: Callable[[Path], list[str]]
) -> bool:
    """Write a folder as a whole, or leave it where it is there already.

    It is written beside its place and moved there when it is complete, so
    that an interrupted run leaves nothing half done. A folder that another
    version or other options wrote is replaced.

    Args:
        out_dir: The folder.
        stamp: Tells this version and its options from all others; its first
            word says which tool wrote the folder.
        write: Fills the folder that it is given and returns lines on the
            photographs in it.

    Returns:
        Whether anything was written.

    Raises:
        FileExistsError: The folder holds what is not of this tool.
    """
    out_dir = out_dir.resolve()
    kind = stamp.split()[0]
    done = out_dir / STAMP
    found = done.read_text(encoding='utf-8') if done.is_file() else ''
    if found.startswith(f'{stamp}\n'):
        return False
    taken = out_dir.exists() and (
        not out_dir.is_dir() or any(out_dir.iterdir())
    )
    if taken and not found.startswith(kind):
        raise FileExistsError(
            f'"{out_dir}" is not a folder of {kind.lower()} of this demo; '
            'remove it or name another folder'
        )
    part = out_dir.with_name(f'{out_dir.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    lines = write(part)
    (part / STAMP).write_text(
        '\n'.join([stamp, *lines]) + '\n', encoding='utf-8'
    )
    shutil.rmtree(out_dir, ignore_errors=True)
    part.rename(out_dir)
    return True
