# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw predictions of a few validation images."""

import inspect
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine.dist import get_world_size, master_only
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.structures import BaseDataElement
from PIL import Image

from mmdensecl.registry import HOOKS


def spread_evenly(count: int, total: int) -> Sequence[int]:
    """Positions from the first to the last of a sequence.

    Args:
        count: How many at most.
        total: Length of the sequence.

    Returns:
        Rising, without repeats.
    """
    positions = np.linspace(0, total - 1, min(count, total), dtype=int)
    return np.unique(positions).tolist()


@HOOKS.register_module()
class SamplePredictionsHook(Hook):
    """Draw a few validation images, the same ones in every run.

    After each validation or test `<work_dir>/predictions/` holds
    `<index>_gt.png` and `<index>_pred.png` of images that are spread
    evenly over the dataset, drawn by the host's own visualizer. Of several
    processes rank 0 draws, out of its share.

    Args:
        num: How many images.
        height: Of the files, in pixels.
        score_thr: Score below which a detection is not drawn.

    Raises:
        TypeError: The config's visualizer draws no predictions.
    """

    def __init__(
        self, num: int = 4, height: int = 320, score_thr: float = 0.3
    ) -> None:
        self.num = num
        self.height = height
        self.score_thr = score_thr
        self.seen = 0
        self.chosen: Sequence[int] = ()

    def before_run(self, runner) -> None:
        """Refuse a visualizer that cannot draw, before hours of training."""
        if 'out_file' not in self._parameters(runner):
            raise TypeError(
                'SamplePredictionsHook draws with the visualizer of mmdet or '
                'mmseg, but the config has '
                f'"{type(runner.visualizer).__name__}": set '
                "visualizer=dict(type='DetLocalVisualizer') or "
                "'SegLocalVisualizer', or drop the hook"
            )

    def _before_epoch(self, runner, mode: str = 'train') -> None:
        """Choose the images of a validation or a test."""
        if mode != 'train':
            loader = getattr(runner, f'{mode}_dataloader')
            # The sampler deals the images out like cards, rank 0 first.
            share = -(-len(loader.dataset) // get_world_size())
            self.chosen = spread_evenly(self.num, share)
            self.seen = 0

    @master_only
    def _after_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = 'train',
    ) -> None:
        """Draw the chosen ones of a batch."""
        for sample in outputs if mode != 'train' else ():
            if self.seen in self.chosen:
                self._draw(runner, self.seen * get_world_size(), sample)
            self.seen += 1

    def _draw(self, runner, index: int, sample: BaseDataElement) -> None:
        image = mmcv.imfrombytes(get(sample.img_path), channel_order='rgb')
        folder = Path(runner.work_dir, 'predictions')
        options: dict[str, Any] = {}
        if 'pred_score_thr' in self._parameters(runner):
            options['pred_score_thr'] = self.score_thr
        for kind in ('gt', 'pred'):
            path = folder / f'{index:05d}_{kind}.png'
            names = sample.keys()  # a sample itself is not iterable
            if not any(name.startswith(f'{kind}_') for name in names):
                continue  # a test set may have no labels
            runner.visualizer.add_datasample(
                path.stem,
                image,
                sample.cpu(),
                draw_gt=kind == 'gt',
                draw_pred=kind == 'pred',
                out_file=str(path),
                **options,
            )
            with Image.open(path) as drawn:
                width = max(1, round(drawn.width * self.height / drawn.height))
                drawn.resize((width, self.height)).save(path)

    @staticmethod
    def _parameters(runner) -> Container[str]:
        return inspect.signature(runner.visualizer.add_datasample).parameters
