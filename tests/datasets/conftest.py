# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope='module')
def photo():
    """A picture with structure at every scale."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    fine = rng.integers(-20, 20, (240, 320, 3))
    smooth = np.asarray(coarse.resize((320, 240), Image.BICUBIC), dtype=int)
    return Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8))
