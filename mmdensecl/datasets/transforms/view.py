# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What is drawn for a view."""

from typing import NamedTuple


class View(NamedTuple):
    """Everything random about one view of an image.

    Attributes:
        box: Left, top, width and height of the crop in pixels.
        jitter: Order of the four operations, then factors of brightness,
            contrast, saturation and hue; None for none.
        gray: Whether colour is removed.
        sigma: Radius of the Gaussian blur in pixels of the view; None for
            none.
        flip: Whether it is mirrored.
    """

    box: tuple[int, int, int, int]
    jitter: tuple | None
    gray: bool
    sigma: float | None
    flip: bool

    @property
    def coordinates(self) -> tuple[float, ...]:
        """Left, top, width, height and flip, as the models expect them."""
        return (*map(float, self.box), float(self.flip))
