# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A kNN classifier on the features of a backbone in training."""

import os
from collections.abc import Sequence

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import find_classes, make_dataset
from torchvision.transforms.v2 import functional as F

from mmdensecl.datasets.folder import is_image
from mmdensecl.models.modules import check_at_least
from mmdensecl.registry import HOOKS
from mmdensecl.transfer.feature_extractor import FrozenBackbone, as_rgb

from .probes import knn_accuracy

Labelled = list[tuple[str, int]]  # path and class number
HELD_OUT = 0.2  # share of each class without folders `train` and `val`
BATCH = 64


@HOOKS.register_module()
class KNNHook(Hook):
    """Evaluate the backbone with a kNN classifier every `interval` epochs.

    And once before the first. The features are means of the query backbone's
    last map; images of one part are classified by their nearest neighbours in
    the other, see :func:`.probes.knn_accuracy`. The accuracy in percent goes
    to the log and the visualizer's backends as ``knn_top1``, and with it
    ``knn_chance``, that of always naming the most common class.

    Labels are folders: ``data_root/{train,val}/CLASS/...``, or
    ``data_root/CLASS/...``, of which a fixed random share is held out.

    Training is not affected: a copy of the backbone is evaluated, and random
    numbers stay as they are. Rank 0 does the work, as its statistics are
    those that a checkpoint gets, in float32 and without compilation; the
    others wait at their next exchange, which is why ``max_images`` bounds it.

    Args:
        data_root: Folder of the labelled images.
        interval: Epochs from one evaluation to the next.
        k: Neighbours that vote.
        size: Side in pixels of the centre crop, out of an image whose shorter
            side is 8 / 7 of it.
        max_images: Images of each part at most, drawn at random.
        num_workers: Processes that read images.

    Raises:
        ValueError: An argument is out of its range, or there are too few
            classes or images.
        FileNotFoundError: There is no such folder.
    """

    priority = 'LOW'

    def __init__(
        self,
        data_root: str,
        interval: int = 1,
        k: int = 20,
        size: int = 224,
        max_images: int = 2000,
        num_workers: int = 2,
    ) -> None:
        self.data_root = data_root
        self.interval = interval
        self.k = k
        self.size = size
        self.max_images = max_images
        self.num_workers = num_workers
        check_at_least(
            1, interval=interval, k=k, size=size, max_images=max_images
        )

    def before_train(self, runner) -> None:
        """Find the images, and evaluate what training starts from."""
        if not is_main_process():
            return
        self.train, self.val = split_labelled(self.data_root, self.max_images)
        if len(self.train) < self.k:
            raise ValueError(
                f'KNNHook: k={self.k} neighbours need as many images, but '
                f'"{self.data_root}" has {len(self.train)} to vote. Choose a '
                'smaller k'
            )
        if runner.iter == 0:
            self._evaluate(runner)

    def after_train_epoch(self, runner) -> None:
        """Evaluate, every ``interval`` epochs."""
        if is_main_process() and self.every_n_epochs(runner, self.interval):
            self._evaluate(runner)

    def _evaluate(self, runner) -> None:
        backbone = FrozenBackbone.copy_of(runner.model)
        bank, labels = self._extract(runner, backbone, self.train)
        queries, truth = self._extract(runner, backbone, self.val)
        if len(bank) < self.k or not len(queries):
            runner.logger.warning(
                f'KNNHook: too few images of "{self.data_root}" can be read, '
                'no kNN this time'
            )
            return
        accuracy = knn_accuracy(bank, labels, queries, truth, (self.k,))
        common = labels.bincount().argmax()
        values = dict(
            knn_top1=accuracy[self.k][0],
            knn_chance=100 * (truth == common).float().mean().item(),
        )
        runner.logger.info(
            f'kNN after {runner.iter} steps: '
            f'knn_top1: {values["knn_top1"]:.1f}  '
            f'knn_chance: {values["knn_chance"]:.1f}  ({len(queries)} images '
            f'classified by {len(bank)}, k={self.k})'
        )
        runner.visualizer.add_scalars(values, step=runner.iter)

    @torch.no_grad()
    def _extract(
        self, runner, backbone: FrozenBackbone, items: Labelled
    ) -> tuple[Tensor, Tensor]:
        """Features and labels of the images that can be read."""
        loader = DataLoader(
            CentreCrops(items, self.size),
            batch_size=BATCH,
            num_workers=self.num_workers,
            # TerminationHook shields those workers from signals thereby.
            worker_init_fn=runner.train_dataloader.worker_init_fn,
            # Else a number would be drawn from torch's global generator.
            generator=torch.Generator(),
        )
        features, labels = [torch.empty(0, 1)], [torch.empty(0).long()]
        for images, numbers, readable in loader:
            if readable.any():
                maps = backbone(images[readable])
                features.append(maps.mean((2, 3)).float().cpu())
                labels.append(numbers[readable])
        broken = len(items) - sum(map(len, labels))
        if broken:
            runner.logger.warning(
                f'KNNHook: {broken} of {len(items)} images of '
                f'"{self.data_root}" cannot be read and are left out'
            )
        return torch.cat(features[1:] or features), torch.cat(labels)


class CentreCrops(Dataset):
    """The centres of labelled images, of ``size`` pixels."""

    def __init__(self, items: Labelled, size: int) -> None:
        self.items, self.size = items, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, idx: int) -> tuple[Tensor, int, bool]:
        """uint8 RGB, the class number, and whether it could be read."""
        path, label = self.items[idx]
        try:
            image = as_rgb(path, -(-self.size * 8 // 7))
        except (ValueError, OSError):
            blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return blank, label, False
        return F.center_crop(image, [self.size, self.size]), label, True


def split_labelled(
    root: str, max_images: int = 2000
) -> tuple[Labelled, Labelled]:
    """Labelled images in two parts.

    Args:
        root: ``root/{train,val}/CLASS/...`` or ``root/CLASS/...``.
        max_images: Of each part at most.

    Returns:
        Those that vote, and those that are classified.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are fewer than two classes, a class is only in
            ``val``, or a part is empty.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f'The labelled folder "{root}" does not exist (working '
            f'directory: "{os.getcwd()}")'
        )
    folders = [os.path.join(root, split) for split in ('train', 'val')]
    if not all(map(os.path.isdir, folders)):
        folders = [root]
    classes, numbers = find_classes(folders[0])
    unknown = sorted({*find_classes(folders[-1])[0]} - {*classes})
    if len(classes) < 2 or unknown:
        what = f'{len(classes)} classes'
        if unknown:
            what = f'classes that are only in val: {unknown[:5]}'
        raise ValueError(
            f'"{root}" has {what}. Expected folders CLASS/ of images, at '
            'least two, or train/CLASS/ and val/CLASS/'
        )
    train, *rest = (
        make_dataset(x, numbers, None, is_image, allow_empty=True)
        for x in folders
    )
    random = torch.Generator().manual_seed(0)
    val: Labelled = rest[0] if rest else []
    if not rest:
        items, train = train, []
        for number in range(len(classes)):
            mine = _draw([x for x in items if x[1] == number], None, random)
            held_out = max(1, round(HELD_OUT * len(mine)))
            val += mine[:held_out]
            train += mine[held_out:]
    if not train or not val:
        raise ValueError(
            f'"{root}" has {len(train)} images to vote and {len(val)} to be '
            'classified; neither may be 0'
        )
    return _draw(train, max_images, random), _draw(val, max_images, random)


def _draw(items: Sequence, count: int | None, random: torch.Generator) -> list:
    order = torch.randperm(len(items), generator=random)[:count]
    return [items[i] for i in order.tolist()]
