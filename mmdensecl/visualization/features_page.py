# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Dense features of a folder as one HTML page that needs nothing else."""
import base64
import io
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from .dense_maps import Neighbours, segment_colors

THUMBNAIL = 360  # of the longer side, in pixels


def clean(text: object) -> str:
    """One line of printable characters, safe to look at."""
    return ''.join(x if x.isprintable() else ' ' for x in str(text)).strip()


def _data_uri(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind, quality=80)
    code = base64.b64encode(file.getvalue()).decode()
    return f'data:image/{kind.lower()};base64,{code}'


def _cells_uri(values: np.ndarray) -> str:
    """A pixel for each cell; the page enlarges them."""
    return _data_uri(
        Image.fromarray((values * 255).round().astype(np.uint8)), 'PNG')


def features_page(pictures: Sequence[Image.Image],
                  names: Sequence[str],
                  colors: Sequence[np.ndarray],
                  labels: Sequence[np.ndarray],
                  neighbours: Optional[Neighbours],
                  chosen: Tuple[int, int] = (0, 0),
                  about: str = '') -> str:
    """The page.

    Args:
        pictures (Sequence[Image.Image]): The first is the one to click on.
        names (Sequence[str]): Of the pictures; any text.
        colors (Sequence[np.ndarray]): From ``pca_colors``.
        labels (Sequence[np.ndarray]): From ``segments``.
        neighbours (Neighbours, optional): Of the first picture's cells; None
            where there is no other picture.
        chosen (tuple[int, int]): Row and column of the cell that is shown
            first. Defaults to (0, 0).
        about (str): A line on where the features are from. Defaults to ''.

    Returns:
        str: HTML.
    """
    names = [clean(name) for name in names]  # such as no UTF-8
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent))
    count = 1 + max(int(x.max()) for x in labels)
    palette = segment_colors(count)
    entries: List[Dict[str, Any]] = []
    for picture, name, color, label in zip(pictures, names, colors, labels):
        small = picture.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        entries.append(
            dict(
                name=name,
                photo=_data_uri(small, 'JPEG'),
                pca=_cells_uri(color),
                segments=_cells_uri(palette(label)[..., :3]),
                width=small.width,
                height=small.height,
                shape=[int(x) for x in label.shape]))
    data = dict(
        shapes=[x['shape'] for x in entries],
        names=names,
        chosen=list(chosen),
        picture=[] if neighbours is None else neighbours.picture.tolist(),
        cell=[] if neighbours is None else neighbours.cell.tolist(),
        similarity=[] if neighbours is None else
        neighbours.similarity.round(3).astype(float).round(3).tolist())
    return environment.get_template('features.html.j2').render(
        entries=entries, data=data, count=count, about=about)
