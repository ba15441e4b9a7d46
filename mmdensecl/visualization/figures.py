# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Figures for mmengine's visualizer."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def to_array(figure: Figure) -> np.ndarray:
    """A figure as RGB pixels, uint8, (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
