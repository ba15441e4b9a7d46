# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Figures as arrays, for mmengine's visualizer, and inside of pages."""

import base64
import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def to_array(figure: Figure) -> np.ndarray:
    """A figure as RGB pixels, uint8, (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def data_uri(image: Image.Image | np.ndarray, kind: str) -> str:
    """The address that holds an image, or an array of 0 to 1, in a page."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray((image * 255).round().astype(np.uint8))
    file = io.BytesIO()
    image.save(file, kind, quality=80)
    code = base64.b64encode(file.getvalue()).decode()
    return f'data:image/{kind.lower()};base64,{code}'
