# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The photographs inside the scikit-image and scikit-learn wheels.

What the demo learns from and what it is scored on are two regions of each
photograph that share no pixel.
"""
import shutil
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

PUBLIC_DOMAIN = 'public domain'
CC0 = 'CC0 1.0'
TRAIN, VAL = 'train', 'val'
TRAIN_PERCENT = 65  # of the longer side
STAMP = 'LICENSES.txt'


class Photograph(NamedTuple):
    """Where a photograph comes from.

    Args:
        load (Callable): Gives its pixels.
        licence (str): Licence and author, as its docstring or README names
            them.
        scale (float): Share of its size that is kept. Defaults to 1.
        border (int): Pixels cut off on each side. Defaults to 0.
    """
    load: Callable[[], np.ndarray]
    licence: str
    scale: float = 1
    border: int = 0


def _sample(name: str) -> Callable[[], np.ndarray]:
    return lambda: load_sample_image(name)


PHOTOGRAPHS: Dict[str, Photograph] = dict(
    astronaut=Photograph(skimage.data.astronaut, f'{PUBLIC_DOMAIN}, NASA'),
    brick=Photograph(skimage.data.brick, f'{CC0}, CC0Textures', 0.75),
    camera=Photograph(skimage.data.camera, f'{CC0}, Lav Varshney'),
    cat=Photograph(skimage.data.cat, f'{CC0}, Stefan van der Walt'),
    china=Photograph(
        _sample('china.jpg'), 'CC BY 2.0, danielbuechele on Flickr'),
    clock=Photograph(skimage.data.clock,
                     f'{PUBLIC_DOMAIN}, Stefan van der Walt'),
    coffee=Photograph(skimage.data.coffee, f'{CC0}, Rachel Michetti'),
    coins=Photograph(skimage.data.coins, 'no known restrictions'),
    flower=Photograph(_sample('flower.jpg'), 'CC BY 2.0, vultilion on Flickr'),
    grass=Photograph(skimage.data.grass, f'{CC0}, DeTexturePro', 0.75),
    gravel=Photograph(skimage.data.gravel, f'{CC0}, CC0Textures', 0.75),
    hubble=Photograph(skimage.data.hubble_deep_field, f'{PUBLIC_DOMAIN}, NASA',
                      0.7),
    ihc=Photograph(skimage.data.immunohistochemistry, 'no known restrictions',
                   0.75),
    # The square inside the round picture.
    retina=Photograph(skimage.data.retina, f'{CC0}, Hagstrom et al.', 0.5,
                      211),
    rocket=Photograph(skimage.data.rocket, f'{PUBLIC_DOMAIN}, SpaceX'))


def region_box(width: int, height: int,
               split: str) -> Tuple[int, int, int, int]:
    """The part of a picture that belongs to a split, cut across its length.

    Args:
        width (int): Of the picture.
        height (int): Of the picture.
        split (str): ``'train'`` or ``'val'``.

    Returns:
        Tuple[int, int, int, int]: left, top, right, bottom, as PIL counts.
    """
    cut = max(width, height) * TRAIN_PERCENT // 100
    if width >= height:
        train, val = (0, 0, cut, height), (cut, 0, width, height)
    else:
        train, val = (0, 0, width, cut), (0, cut, width, height)
    return {TRAIN: train, VAL: val}[split]


def load_region(name: str, split: str) -> Image.Image:
    """The region of a photograph for a split, at the size that is kept.

    Args:
        name (str): One of ``PHOTOGRAPHS``.
        split (str): ``'train'`` or ``'val'``.
    """
    photograph = PHOTOGRAPHS[name]
    image = Image.fromarray(np.asarray(photograph.load())).convert('RGB')
    border = photograph.border
    image = image.crop(
        (border, border, image.width - border, image.height - border))
    # Cut before resizing: interpolation would mix the regions.
    image = image.crop(region_box(*image.size, split))
    return image.resize(
        [round(side * photograph.scale) for side in image.size],
        Image.Resampling.LANCZOS)


Write = Callable[[Path], List[str]]


def fill(out_dir: Path, stamp: str, write: Write) -> bool:
    """Write a folder as a whole, or leave it where it is there already.

    It is written beside its place and moved there when it is complete, so
    that an interrupted run leaves nothing half done. A folder that another
    version or other options wrote is replaced.

    Args:
        out_dir (Path): The folder.
        stamp (str): Tells this version and its options from all others; its
            first word says which tool wrote the folder.
        write (Callable): Fills the folder that it is given and returns lines
            on the photographs in it.

    Returns:
        bool: Whether anything was written.

    Raises:
        FileExistsError: The folder holds what is not of this tool.
    """
    out_dir = out_dir.resolve()
    kind = stamp.split()[0]
    done = out_dir / STAMP
    found = done.read_text(encoding='utf-8') if done.is_file() else ''
    if found.startswith(f'{stamp}\n'):
        return False
    taken = out_dir.exists() and (not out_dir.is_dir()
                                  or any(out_dir.iterdir()))
    if taken and not found.startswith(kind):
        raise FileExistsError(
            f'"{out_dir}" is not a folder of {kind.lower()} of this demo; '
            'remove it or name another folder')
    part = out_dir.with_name(f'{out_dir.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    lines = write(part)
    (part / STAMP).write_text(
        '\n'.join([stamp, *lines]) + '\n', encoding='utf-8')
    shutil.rmtree(out_dir, ignore_errors=True)
    part.rename(out_dir)
    return True
