# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import NamedTuple, Optional, Tuple


class View(NamedTuple):
    """Everything random about one view of a picture.

    Attributes:
        box (tuple[int]): Left, top, width and height of the crop in pixels.
        jitter (tuple, optional): Order of the four operations, then factors
            of brightness, contrast, saturation and hue; None for none.
        gray (bool): Whether colour is removed.
        sigma (float, optional): Radius of the Gaussian blur in pixels of the
            view; None for none.
        flip (bool): Whether it is mirrored.
    """
    box: Tuple[int, int, int, int]
    jitter: Optional[tuple]
    gray: bool
    sigma: Optional[float]
    flip: bool

    @property
    def coordinates(self) -> Tuple[float, ...]:
        """Left, top, width, height and flip, as the models expect them."""
        return (*map(float, self.box), float(self.flip))
