# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Pairs of views as a config's pipeline draws them."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from torch import Tensor

from mmdensecl.engine.config import dicts
from mmdensecl.evaluation.matching import Pairs
from mmdensecl.models.data_preprocessors import render_views

DRAWING = (
    'mmdensecl.TwoViews',
    'mmdensecl.SampleTwoCropParams',
    'mmdensecl.DrawViews',
)


def view_images(data: dict, size: int) -> list[Tensor]:
    """The two views of a sample, rendered here where a run's device would.

    Args:
        data: What a pipeline gave.
        size: Side in pixels of views that are not rendered yet.

    Returns:
        uint8, (3, H, W) each.
    """
    if 'aug_params' not in data['data_samples']:
        return data['inputs']
    views = data['data_samples'].aug_params
    return list(render_views([data['inputs']] * 2, views, size).byte())


def pairs_of(samples: Sequence[dict], size: int) -> Pairs:
    """Both views of all samples.

    Args:
        samples: What a pipeline gave for each.
        size: See :func:`view_images`.
    """
    query, key = zip(*(view_images(x, size) for x in samples), strict=True)
    views = torch.tensor(
        [x['data_samples'].views for x in samples], dtype=torch.float32
    )
    return Pairs(torch.stack(query), torch.stack(key), views)


class ViewDrawer:
    """Draws pairs of views of an image as a run with a config would.

    Args:
        cfg: Of a pre-training.
        size: Side of a view in pixels; None for the config's.

    Raises:
        ValueError: The config draws no views.
    """

    def __init__(self, cfg: Config, size: int | None = None) -> None:
        pipelines = (
            node['pipeline']
            for node, _ in dicts(cfg.get('train_dataloader'))
            if any(x.get('type') in DRAWING for x in node.get('pipeline', ()))
        )
        pipeline = deepcopy(next(pipelines, None))
        if pipeline is None:
            raise ValueError(
                f'The pipeline of {cfg.filename} draws no views: it must have '
                f'{" or ".join(DRAWING)}, as the configs of pre-training have'
            )
        self.size = size or cfg.model.data_preprocessor.get('size', 224)
        for transform in pipeline:
            if transform['type'] == DRAWING[0]:
                self.size = size or transform.get('size', 224)
                transform['size'] = self.size
        self.pipeline = Compose(pipeline)

    def draw(self, data: bytes, count: int, seed: int = 0) -> Pairs:
        """Pairs of views of one image, the same ones for the same seed.

        Args:
            data: The encoded image.
            count: How many pairs.
            seed: Seed of the first; the others follow.
        """
        source = dict(img_bytes=data, img_path='', sample_idx=0)
        samples = [
            self.pipeline(dict(source, seed=seed * 10**6 + i))
            for i in range(count)
        ]
        return pairs_of(samples, self.size)
