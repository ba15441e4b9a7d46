# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Small things for tests, here and in projects that build on this one."""

from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image


def write_pictures(
    folder: str | Path, count: int, size: int = 48, seed: int = 0
) -> None:
    """Write PNGs of random smooth blobs, ``0000.png`` and so on.

    Args:
        folder (str | Path): Made where it is missing.
        count (int): How many.
        size (int): Side in pixels. Defaults to 48.
        seed (int): Fixes the pictures. Defaults to 0.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(
            rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        )
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(
            folder / f'{i:04d}.png'
        )


def shrink(cfg: Config, data_root: str | Path, size: int = 64) -> Config:
    """Make a shipped pre-training config small enough for a test.

    Its model stays as it is, but for a short queue and few categories;
    pictures become small and few, and no worker processes start.

    Args:
        cfg (Config): Changed in place.
        data_root (str | Path): Folder of pictures.
        size (int): Side of a view in pixels. Defaults to 64.

    Returns:
        Config: The same.
    """
    loader = cfg.train_dataloader
    loader.update(
        batch_size=2, num_workers=0, persistent_workers=False, pin_memory=False
    )
    loader.dataset.data_root = str(data_root)
    for transform in loader.dataset.pipeline:
        if transform['type'] == 'mmdensecl.TwoViews':
            transform['size'] = size
    if cfg.model.data_preprocessor.get('type') == 'mmdensecl.DeviceViews':
        cfg.model.data_preprocessor.size = size
    if cfg.model.get('compile_encoders'):  # Inductor takes minutes on a CPU
        cfg.model.compile_encoders = dict(backend='aot_eager')
    if cfg.model.queue_len != 'auto':
        cfg.model.queue_len = 8
    if 'category' in cfg.model:  # two pictures of at least four cells
        cfg.model.num_samples = 3
        if 'num_clusters' in cfg.model.category:
            cfg.model.category.num_clusters = 4
    return cfg
