# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from mmdensecl.datasets.folder import search_folder
from mmdensecl.datasets.transforms.loading import decode_rgb
from mmdensecl.datasets.unlabeled import UnreadableImageError
from mmdensecl.registry import HOOKS
from mmdensecl.evaluation.probes import knn_accuracy

Labelled = List[Tuple[str, int]]  # path and class number
SPLITS = ('train', 'val')


@HOOKS.register_module()
class KNNHook(Hook):
    """Say during training how well neighbours share a label.

    Every ``interval`` epochs, and once before the first, the mean of the
    query backbone's last map is taken for labelled pictures, and those of one
    part are named by a vote of their nearest neighbours in the other, see
    :func:`mmdensecl.evaluation.probes.knn_accuracy`. The accuracy in percent
    goes to the log and to the visualizer's backends as ``knn_top1``, and with
    it ``knn_chance``, what naming the most common class would reach.

    Labels are folders: ``data_root/{train,val}/CLASS/...``, or
    ``data_root/CLASS/...``, where a fixed random share is held out.

    Training goes on as if nothing had been: weights, statistics of batch
    norms, modes and random numbers stay as they are. Rank 0 does the work, as
    its statistics are those that a checkpoint gets, in float32 and without
    compilation; the others wait at their next exchange, which is why
    ``max_images`` bounds it.

    Args:
        data_root (str): Folder of the labelled pictures.
        interval (int): Epochs from one time to the next. Defaults to 1.
        k (int): Neighbours that vote. Defaults to 20.
        size (int): Side in pixels of the centre crop, out of a picture whose
            shorter side is 8 / 7 of it. Defaults to 224.
        max_images (int): Pictures of each part at most, drawn at random.
            Defaults to 2000.
        val_share (float): Share that is held out where there are no folders
            ``train`` and ``val``. Defaults to 0.2.
        batch_size (int): Pictures at a time. Defaults to 64.
        num_workers (int): Processes that read pictures. Defaults to 2.
        seed (int): Of what is drawn. Defaults to 0.

    Raises:
        ValueError: An argument is out of its range, or there are too few
            classes or pictures.
        FileNotFoundError: There is no such folder.
    """

    priority = 'LOW'

    def __init__(self,
                 data_root: str,
                 interval: int = 1,
                 k: int = 20,
                 size: int = 224,
                 max_images: int = 2000,
                 val_share: float = 0.2,
                 batch_size: int = 64,
                 num_workers: int = 2,
                 seed: int = 0) -> None:
        for name, value in dict(
                interval=interval,
                k=k,
                size=size,
                max_images=max_images,
                batch_size=batch_size).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        if not 0 < val_share < 1:
            raise ValueError('val_share must be between 0 and 1, got '
                             f'{val_share:g}')
        self.data_root = data_root
        self.interval = interval
        self.k = k
        self.size = size
        self.max_images = max_images
        self.val_share = val_share
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed

    def before_train(self, runner) -> None:
        """Find the pictures, and measure what training starts from."""
        if not is_main_process():
            return
        self.train, self.val = split_labelled(self.data_root, self.val_share,
                                              self.max_images, self.seed)
        if len(self.train) < self.k:
            raise ValueError(
                f'KNNHook: k={self.k} neighbours need as many pictures, but '
                f'"{self.data_root}" has {len(self.train)} to vote. Choose a '
                'smaller k')
        if runner.iter == 0:
            self._measure(runner)

    def after_train_epoch(self, runner) -> None:
        """Measure, where it is time to."""
        if is_main_process() and self.every_n_epochs(runner, self.interval):
            self._measure(runner)

    def _measure(self, runner) -> None:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        bank, labels = self._features(runner, model, self.train)
        queries, truth = self._features(runner, model, self.val)
        if len(bank) < self.k or not len(queries):
            runner.logger.warning(
                f'KNNHook: too few pictures of "{self.data_root}" can be '
                'read, no kNN this time')
            return
        accuracy = knn_accuracy(
            bank, labels, queries, truth, ks=(self.k, ), topk=(1, ))
        common = labels.bincount().argmax()
        values = dict(
            knn_top1=accuracy[self.k][0],
            knn_chance=100 * (truth == common).float().mean().item())
        runner.logger.info(
            f'kNN after {runner.iter} steps: '
            f'knn_top1: {values["knn_top1"]:.1f}  '
            f'knn_chance: {values["knn_chance"]:.1f}  ({len(queries)} '
            f'pictures named by {len(bank)}, k={self.k})')
        runner.visualizer.add_scalars(values, step=runner.iter)

    @torch.no_grad()
    def _features(self, runner, model: nn.Module,
                  pictures: Labelled) -> Tuple[Tensor, Tensor]:
        loader = DataLoader(
            CentreCrops(pictures, self.size),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            # TerminationHook shields those workers from signals thereby.
            worker_init_fn=runner.train_dataloader.worker_init_fn,
            # Else a number would be drawn from torch's global generator.
            generator=torch.Generator())
        device = next(model.backbone.parameters()).device
        mean = getattr(model.data_preprocessor, 'mean', torch.zeros(()))
        std = getattr(model.data_preprocessor, 'std', torch.ones(()))
        features, labels = [], []
        with eval_mode(model.backbone):
            for images, numbers, readable in loader:
                if not readable.any():
                    continue
                images = images[readable].to(device, torch.float32)
                # Not by __call__: other shapes would compile it anew.
                maps = model.backbone.forward(
                    (images - mean.to(device)) / std.to(device))
                maps = maps[-1] if isinstance(maps, (tuple, list)) else maps
                features.append(maps.mean((2, 3)).float().cpu())
                labels.append(numbers[readable])
        broken = len(pictures) - sum(map(len, labels))
        if broken:
            runner.logger.warning(
                f'KNNHook: {broken} of {len(pictures)} pictures of '
                f'"{self.data_root}" cannot be read and are left out')
        if not features:
            return torch.empty(0, 1), torch.empty(0, dtype=torch.long)
        return torch.cat(features), torch.cat(labels)


class CentreCrops(Dataset):
    """The centres of labelled pictures.

    Args:
        pictures (Labelled): Paths and class numbers.
        size (int): Side of a crop in pixels.
    """

    def __init__(self, pictures: Labelled, size: int) -> None:
        self.pictures, self.size = pictures, size

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, idx: int) -> Tuple[Tensor, int, bool]:
        """uint8 RGB, the class number, and whether it could be read."""
        path, label = self.pictures[idx]
        try:
            image = decode_rgb(Path(path).read_bytes())
        except (UnreadableImageError, OSError):
            blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
            return blank, label, False
        image = F.resize(image, [-(-self.size * 8 // 7)])
        image = F.center_crop(image, [self.size, self.size])
        return F.pil_to_tensor(image), label, True


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while, then each part in the mode that it had.

    Args:
        module (nn.Module): Whose ``train`` may do more than set modes, and is
            not called.
    """
    modes = {part: part.training for part in module.modules()}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def split_labelled(root: str,
                   val_share: float = 0.2,
                   max_images: int = 2000,
                   seed: int = 0) -> Tuple[Labelled, Labelled]:
    """Labelled pictures in two parts.

    Args:
        root (str): ``root/{train,val}/CLASS/...`` or ``root/CLASS/...``.
        val_share (float): Share of each class that is held out in the second
            case. Defaults to 0.2.
        max_images (int): Of each part at most. Defaults to 2000.
        seed (int): Of what is drawn. Defaults to 0.

    Returns:
        Tuple[Labelled, Labelled]: Those that vote, and those that are named.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are fewer than two classes, a class is only in
            ``val``, or a part is empty.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f'The labelled folder "{root}" does not exist (working '
            f'directory: "{os.getcwd()}")')
    named = all(os.path.isdir(os.path.join(root, x)) for x in SPLITS)
    by_class: Dict[Tuple[str, str], List[str]] = {}
    for name in search_folder(root):
        *folders, _ = name.split('/')
        split = folders.pop(0) if named and folders else ''
        if folders and (split in SPLITS or not named):
            path = os.path.join(root, name)
            by_class.setdefault((split, folders[0]), []).append(path)
    classes = sorted({name for split, name in by_class if split != 'val'})
    unknown = sorted({name for _, name in by_class} - {*classes})
    if len(classes) < 2 or unknown:
        what = (f'classes that are only in val: {unknown[:5]}'
                if unknown else f'{len(classes)} classes')
        raise ValueError(
            f'"{root}" has {what}. Expected folders CLASS/ of pictures, at '
            'least two, or train/CLASS/ and val/CLASS/')
    random = torch.Generator().manual_seed(seed)
    train: Labelled = []
    val: Labelled = []
    for (split, name), paths in sorted(by_class.items()):
        labelled = [(path, classes.index(name)) for path in paths]
        held_out = len(labelled) * (split == 'val')
        if not split:
            labelled = _drawn(labelled, len(labelled), random)
            held_out = max(1, round(val_share * len(labelled)))
        val += labelled[:held_out]
        train += labelled[held_out:]
    if not train or not val:
        raise ValueError(f'"{root}" has {len(train)} pictures to vote and '
                         f'{len(val)} to be named; neither may be 0')
    return (_drawn(train, max_images, random), _drawn(val, max_images, random))


def _drawn(items: Sequence, count: int, random: torch.Generator) -> list:
    order = torch.randperm(len(items), generator=random)[:count]
    return [items[i] for i in order.tolist()]
