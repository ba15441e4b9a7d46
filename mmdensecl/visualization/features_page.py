# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Dense features of a folder as one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from .dense_maps import Neighbours, segment_colors
from .figures import data_uri

THUMBNAIL = 360  # pixels of the longer side


def clean(text: object) -> str:
    """One line of printable characters."""
    return ''.join(x if x.isprintable() else ' ' for x in str(text)).strip()


def features_page(
    images: Sequence[Image.Image],
    names: Sequence[str],
    colors: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    neighbours: Neighbours | None,
    chosen: tuple[int, int] = (0, 0),
    about: str = '',
) -> str:
    """The page, as HTML.

    Args:
        images: The first is the one to click on.
        names: Of the images; any text.
        colors: From ``pca_colors``.
        labels: From ``segments``.
        neighbours: Of the first image's cells; None where it is the only one.
        chosen: Row and column of the cell that is shown first.
        about: A line on where the features are from.
    """
    names = [clean(name) for name in names]  # such as no UTF-8
    count = 1 + max(int(x.max()) for x in labels)
    palette = segment_colors(count)
    entries = []
    for image, name, color, label in zip(
        images, names, colors, labels, strict=True
    ):
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        entries.append(
            dict(
                name=name,
                photo=data_uri(small, 'JPEG'),
                pca=data_uri(color, 'PNG'),
                segments=data_uri(palette(label)[..., :3], 'PNG'),
                width=small.width,
                height=small.height,
            )
        )
    data: dict = dict(
        shapes=[x.shape for x in labels], names=names, chosen=chosen, image=[]
    )
    if neighbours is not None:
        data.update(
            image=neighbours.image.tolist(),
            cell=neighbours.cell.tolist(),
            similarity=neighbours.similarity.astype(float).round(3).tolist(),
        )
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    return environment.get_template('features.html.j2').render(
        entries=entries, data=data, count=count, about=about
    )
