# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Pairs of views as a config's pipeline draws them."""
from copy import deepcopy
from typing import List, Optional

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import Tensor

from mmdensecl.engine.config import dicts
from mmdensecl.models.data_preprocessors import render_views
from mmdensecl.evaluation.matching import Pairs

DRAWING = ('mmdensecl.TwoViews', 'mmdensecl.DrawViews')


def view_images(data: dict, size: int) -> List[Tensor]:
    """The two views of a sample, rendered here where a run's device would.

    Args:
        data (dict): What a pipeline gave, of ``mmdensecl.PackViews`` or
            ``mmdensecl.PackPicture``.
        size (int): Side in pixels of views that are not rendered yet.

    Returns:
        list[Tensor]: uint8, (3, H, W) each.
    """
    if 'drawn_views' not in data['data_samples']:
        return data['inputs']
    views = data['data_samples'].drawn_views
    return list(render_views([data['inputs']] * 2, views, size).byte())


class ViewDrawer:
    """Draws pairs of views of a picture as a run with a config would.

    Args:
        cfg (Config): Of a pre-training.
        size (int, optional): Side of a view in pixels. Defaults to None: the
            config's.

    Raises:
        ValueError: The config draws no views.
    """

    def __init__(self, cfg: Config, size: Optional[int] = None) -> None:
        pipelines = (node['pipeline']
                     for node, _ in dicts(cfg.get('train_dataloader')) if any(
                         x.get('type') in DRAWING
                         for x in node.get('pipeline', ())))
        pipeline = deepcopy(next(pipelines, None))
        if pipeline is None:
            raise ValueError(
                f'The pipeline of {cfg.filename} draws no views: it must have '
                f'{" or ".join(DRAWING)}, as the configs of pre-training have')
        self.size = size
        for transform in pipeline:
            if transform['type'] == DRAWING[0]:
                self.size = size or transform.get('size', 224)
                transform['size'] = self.size
        if self.size is None:
            self.size = cfg.model.data_preprocessor.get('size', 224)
        self.pipeline = Compose(pipeline)

    def draw(self, data: bytes, count: int, seed: int = 0) -> Pairs:
        """Pairs of views of one picture.

        Args:
            data (bytes): The encoded picture.
            count (int): How many pairs.
            seed (int): Of the first; the others follow. Defaults to 0.

        Returns:
            Pairs: The same ones for the same seed.
        """
        samples = [
            self.pipeline(
                dict(
                    img_bytes=data,
                    img_path='',
                    sample_idx=0,
                    seed=seed * 10**6 + i)) for i in range(count)
        ]
        query, key = zip(*(view_images(x, self.size) for x in samples))
        views = torch.tensor([x['data_samples'].views for x in samples],
                             dtype=torch.float32)
        return Pairs(torch.stack(query), torch.stack(key), views)
