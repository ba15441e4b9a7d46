# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Probes of frozen dense features: kNN and linear.

The protocols are in docs/quality.md. Nothing here needs mmseg.
"""
from pathlib import Path
from typing import (Callable, Dict, List, NamedTuple, Optional, Sequence,
                    Tuple, Union)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .probes import nearest

IGNORED = 255  # of VOC's masks: borders and what is too hard to tell
LISTS = 'ImageSets/Segmentation'


class LabelledCells(NamedTuple):
    """A picture's map and its mask.

    Attributes:
        cells (Tensor): Features, (C, h, w).
        mask (Tensor): Class of each pixel, uint8, (H, W).
    """
    cells: Tensor
    mask: Tensor


class SegmentationPair(NamedTuple):
    """Files of a picture and of its mask."""
    image: Path
    mask: Path


def list_pairs(root: Union[str, Path],
               split: str,
               most: Optional[int] = None,
               seed: int = 0) -> List[SegmentationPair]:
    """The pictures of a split of data laid out like VOC.

    Args:
        root (str | Path): Has ``JPEGImages``, ``SegmentationClass`` and
            ``ImageSets/Segmentation``.
        split (str): Names the list, without ``.txt``.
        most (int, optional): Pictures at most, drawn at random. Defaults to
            None: all.
        seed (int): Of that. Defaults to 0.

    Returns:
        List[SegmentationPair]: In the order of the list.

    Raises:
        FileNotFoundError: The list, or a file that it names, is missing.
        ValueError: The list is empty.
    """
    root = Path(root)
    path = root / LISTS / f'{split}.txt'
    if not path.is_file():
        raise FileNotFoundError(
            f'There is no list "{path}". Expected a folder like '
            'VOCdevkit/VOC2012: JPEGImages/*.jpg, SegmentationClass/*.png '
            f'and {LISTS}/{{train,val}}.txt')
    names = path.read_text(encoding='utf-8').split()
    if not names:
        raise ValueError(f'The list "{path}" names no picture')
    if most is not None and most < len(names):
        kept = np.random.default_rng(seed).permutation(len(names))[:most]
        names = [names[i] for i in sorted(kept)]
    pairs = [
        SegmentationPair(root / f'JPEGImages/{name}.jpg',
                         root / f'SegmentationClass/{name}.png')
        for name in names
    ]
    for file in (file for pair in pairs for file in pair):
        if not file.is_file():
            raise FileNotFoundError(f'"{path}" names a picture without the '
                                    f'file "{file}"')
    return pairs


def read_mask(path: Union[str, Path]) -> Tensor:
    """Class of each pixel, as the indices of a palette PNG say it.

    Args:
        path (str | Path): The file.

    Returns:
        Tensor: uint8, (H, W).

    Raises:
        ValueError: It is no picture of indices.
    """
    with Image.open(path) as image:
        if image.mode not in ('P', 'L'):
            raise ValueError(f'The mask "{path}" is of the mode {image.mode}; '
                             'expected a PNG of class numbers (mode P or L)')
        return torch.from_numpy(np.array(image))


def extract(backbone: Callable[..., Tensor], pairs: Sequence[SegmentationPair],
            size: int) -> List[LabelledCells]:
    """Maps and masks of pictures.

    Args:
        backbone (Callable): ``extract_dense`` of
            :class:`mmdensecl.FrozenBackbone`.
        pairs (Sequence[SegmentationPair]): The pictures.
        size (int): Pixels of a picture's shorter side.
    """
    return [
        LabelledCells(
            backbone(pair.image, size).float().cpu(), read_mask(pair.mask))
        for pair in pairs
    ]


def label_cells(mask: Tensor, shape: Tuple[int, int],
                num_classes: int) -> Tensor:
    """Class of each cell: that of most of its pixels.

    Args:
        mask (Tensor): uint8, (H, W).
        shape (Tuple[int, int]): Height and width of the grid.
        num_classes (int): How many there are.

    Returns:
        Tensor: long, (h * w, ); ``IGNORED`` where half of a cell or more is.
    """
    classes = torch.where(mask == IGNORED, num_classes, mask.long())
    # one_hot would make 8 bytes of each of these.
    found = classes == torch.arange(num_classes + 1)[:, None, None]
    shares = F.adaptive_avg_pool2d(found.float(), shape)
    label = shares[:num_classes].argmax(dim=0)
    return label.where(shares[num_classes] < 0.5, IGNORED).flatten()


def count_classes(*parts: Sequence[LabelledCells]) -> int:
    """Of all masks: one more than the highest number in them."""
    highest = [
        int(item.mask[item.mask != IGNORED].max()) for part in parts
        for item in part if (item.mask != IGNORED).any()
    ]
    return 1 + max(highest, default=0)


def draw_cells(items: Sequence[LabelledCells],
               num_classes: int,
               seed: int,
               most: int = 5000) -> Tuple[Tensor, Tensor]:
    """Labelled cells to learn from.

    As many pictures as there are, drawn with replacement, so that seeds tell
    how much hangs on which pictures there are; then cells of them.

    Args:
        items (Sequence[LabelledCells]): Of the training set.
        num_classes (int): How many there are.
        seed (int): Of what is drawn.
        most (int): Cells at most. Defaults to 5000.

    Returns:
        Tuple[Tensor, Tensor]: Features (N, C) and class numbers (N, ).

    Raises:
        ValueError: No cell has a class.
    """
    rng = np.random.default_rng(seed)
    drawn = [items[i] for i in rng.integers(len(items), size=len(items))]
    cells = torch.cat([item.cells.flatten(1).T for item in drawn])
    labels = torch.cat([
        label_cells(item.mask, item.cells.shape[1:], num_classes)
        for item in drawn
    ])
    known = torch.nonzero(labels != IGNORED).flatten()
    if not len(known):
        raise ValueError('There is nothing to learn from: no cell of the '
                         f'{len(drawn)} training pictures drawn has a class. '
                         f'Expected masks that are not all {IGNORED}')
    kept = known[rng.permutation(len(known))[:most]]
    return cells[kept], labels[kept]


Scorer = Callable[[Tensor], Tensor]  # cells (N, C) to scores (N, classes)


def fit_knn(cells: Tensor,
            labels: Tensor,
            num_classes: int,
            k: int = 20,
            temperature: float = 0.07) -> Scorer:
    """The vote of :func:`mmdensecl.transfer.probes.knn_accuracy`, by cells.

    Args:
        cells (Tensor): (N, C).
        labels (Tensor): Class numbers, (N, ).
        num_classes (int): How many there are.
        k (int): Neighbours that vote. Defaults to 20.
        temperature (float): Of their weights. Defaults to 0.07.
    """

    def score(queries: Tensor) -> Tensor:
        similarity, index = nearest(cells, queries, min(k, len(cells)))
        votes = queries.new_zeros(len(queries), num_classes)
        weights = (similarity / temperature).exp()
        votes.scatter_add_(1, labels[index], weights)
        return votes / votes.sum(dim=1, keepdim=True)

    return score


def fit_linear(cells: Tensor,
               labels: Tensor,
               num_classes: int,
               weight_decay: float = 1e-2,
               max_iters: int = 50) -> Scorer:
    """Multinomial logistic regression on standardised features.

    Args:
        cells (Tensor): (N, C).
        labels (Tensor): Class numbers, (N, ).
        num_classes (int): How many there are.
        weight_decay (float): Half of it times the squared weights is added
            to the mean cross-entropy. Defaults to 0.01.
        max_iters (int): Of L-BFGS. Defaults to 50.
    """
    mean = cells.mean(dim=0)
    std = cells.std(dim=0, correction=0).clamp(min=1e-6)
    x = (cells - mean) / std
    weight = torch.zeros(x.size(1), num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias],
                                  max_iter=max_iters,
                                  line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(
            x @ weight + bias,
            labels) + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return lambda queries: ((queries - mean) / std @ weight + bias).softmax(1)


PROBES: Dict[str, Callable[..., Scorer]] = dict(linear=fit_linear, kNN=fit_knn)


def name_pixels(scorer: Scorer, item: LabelledCells,
                num_classes: int) -> Tensor:
    """Class of each pixel of a picture, by its cells.

    The scores of the cells are brought to the size of the mask, bilinearly,
    and each pixel is of the class with the highest.

    Args:
        scorer (Callable): From :func:`fit_linear` or :func:`fit_knn`.
        item (LabelledCells): The picture.
        num_classes (int): How many there are.

    Returns:
        Tensor: long, (H, W).
    """
    scores = scorer(item.cells.flatten(1).T)
    # Channels last, which is several times faster from here on.
    scores = scores.view(1, *item.cells.shape[1:], num_classes)
    scores = scores.permute(0, 3, 1, 2)
    return F.interpolate(
        scores, item.mask.shape, mode='bilinear').argmax(dim=1)[0]


def mean_iou(scorer: Scorer, items: Sequence[LabelledCells],
             num_classes: int) -> float:
    """mIoU over the pixels of all pictures together, ignored ones left out.

    Args:
        scorer (Callable): From :func:`fit_linear` or :func:`fit_knn`.
        items (Sequence[LabelledCells]): Of the validation set.
        num_classes (int): How many there are.

    Returns:
        float: In percent, the mean over the classes that the masks show.

    Raises:
        ValueError: They show none.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for item in items:
        named = name_pixels(scorer, item, num_classes)
        known = item.mask != IGNORED
        pairs = item.mask[known].long() * num_classes + named[known]
        confusion += pairs.bincount(
            minlength=num_classes**2).view_as(confusion)
    both = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - both
    shown = confusion.sum(1) > 0
    if not shown.any():
        raise ValueError('There is nothing to score: no pixel of the '
                         f'{len(items)} validation masks has a class. '
                         f'Expected masks that are not all {IGNORED}')
    return 100 * (both[shown] / union[shown]).mean().item()


def dense_probes(train: Sequence[LabelledCells], val: Sequence[LabelledCells],
                 num_classes: int, seed: int) -> Dict[str, float]:
    """mIoU of each probe, for one draw of training pictures.

    Args:
        train (Sequence[LabelledCells]): To learn from.
        val (Sequence[LabelledCells]): To measure on.
        num_classes (int): How many there are.
        seed (int): Of the draw.
    """
    cells, labels = draw_cells(train, num_classes, seed)
    return {
        name: mean_iou(fit(cells, labels, num_classes), val, num_classes)
        for name, fit in PROBES.items()
    }
