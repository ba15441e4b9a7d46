# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw features and matches during the training."""

from pathlib import Path

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook

from mmdensecl.registry import HOOKS

from .sample_predictions_hook import spread_evenly

SEED = 0  # of the views, the same ones each time


@HOOKS.register_module()
class VisualizeFeaturesHook(Hook):
    """Draw what the backbone has learnt so far, every few epochs.

    Of a few training images, the same ones each time, the features as
    colours (`features`) and the strongest mutual matches of two views
    (`matches`) go through the run's visualizer, to files, TensorBoard or
    wherever its backends lead. One line of a config turns it on::

        default_hooks = dict(
            features=dict(type='mmdensecl.VisualizeFeaturesHook'))

    It looks through a copy of the backbone, at the end of an epoch, where
    :class:`ResumableEpochLoop` sets the random numbers anew, so the run stays
    the same bit by bit; what goes wrong is a warning. Of several processes
    rank 0 draws.

    Args:
        interval: Epochs from one drawing to the next.
        num_images: How many images, spread evenly over the dataset.
        size: Shorter side of an image as the backbone sees it, in pixels.
        top: Matches to draw at most.
        margin: Rings of outer cells without matches and colours, see
            :func:`mmdensecl.visualization.strongest_matches`.
    """

    priority = 'LOW'

    def __init__(
        self,
        interval: int = 10,
        num_images: int = 3,
        size: int = 320,
        top: int = 12,
        margin: int = 1,
    ) -> None:
        self.interval = interval
        self.num_images = num_images
        self.size = size
        self.top = top
        self.margin = margin

    def after_train_epoch(self, runner) -> None:
        """Draw, if it is time."""
        if self.every_n_epochs(runner, self.interval):
            self._draw(runner)

    @master_only
    def _draw(self, runner) -> None:
        try:
            with torch.no_grad():
                self._draw_images(runner)
        except Exception as error:  # no image is worth a run
            runner.logger.warning(
                'VisualizeFeaturesHook drew nothing at epoch '
                f'{runner.epoch + 1}: {type(error).__name__}: {error}'
            )

    def _draw_images(self, runner) -> None:
        # Imported here: most runs draw nothing, and scikit-learn is optional.
        from mmdensecl.datasets.transforms.loading import decode_rgb
        from mmdensecl.models.modules import backbone_features
        from mmdensecl.transfer.feature_extractor import FrozenBackbone, as_rgb
        from mmdensecl.visualization import (
            Panel,
            match_sheet,
            strongest_matches,
        )
        from mmdensecl.visualization.dense_maps import (
            draw_maps,
            extract_map,
            pca_colors,
        )
        from mmdensecl.visualization.figures import to_array
        from mmdensecl.visualization.views import ViewDrawer

        backbone = FrozenBackbone.copy_of(runner.model)
        dataset = runner.train_dataloader.dataset
        infos = [
            dataset.get_data_info(i)
            for i in spread_evenly(self.num_images, len(dataset))
        ]
        files = [dataset.read(x) for x in infos]
        names = [Path(x['img_path']).name for x in infos]
        seen = [
            extract_map(
                backbone, as_rgb(decode_rgb(x), self.size), self.margin
            )
            for x in files
        ]
        figure = draw_maps(
            [x.image for x in seen],
            names,
            pca_colors([x.map for x in seen], SEED),
        )
        step = runner.epoch + 1
        runner.visualizer.add_image('features', to_array(figure), step=step)

        drawer = ViewDrawer(runner.cfg, self.size)
        panels = []
        for name, file in zip(names, files, strict=True):
            pair = drawer.draw(file, 1, SEED)
            query, key = (
                backbone_features(backbone(x).cpu()) for x in pair[:2]
            )
            matches = strongest_matches(
                query, key, 0, pair.views, self.top, self.margin
            )
            panels.append(Panel(name, pair.query[0], pair.key[0], matches))
        title = f'Strongest mutual matches of two views, epoch {step}'
        figure = match_sheet([panels], title)
        runner.visualizer.add_image('matches', to_array(figure), step=step)
