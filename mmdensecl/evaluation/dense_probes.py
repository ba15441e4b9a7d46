# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Linear and kNN probes of frozen dense features.

The protocols are in docs/evaluation.md. Nothing here needs mmseg.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import Cityscapes

from .probes import knn_votes, nearest

IGNORED = 255  # in masks: borders, and what is too hard to tell
VOC_LISTS = 'ImageSets/Segmentation'
CITYSCAPES_IMAGES = 'leftImg8bit'
END, MASK_END = '_leftImg8bit', '_gtFine_labelTrainIds.png'
# In the order of the train ids.
CITYSCAPES_CLASSES = [
    x.name
    for x in sorted(Cityscapes.classes, key=lambda x: x.train_id)
    if 0 <= x.train_id < 255
]


class SegmentationPair(NamedTuple):
    """Files of an image and of its mask."""

    image: Path
    mask: Path


class LabelledCells(NamedTuple):
    """The features and labels of an image."""

    cells: Tensor  # (C, h, w)
    mask: Tensor  # class of each pixel, uint8, (H, W)
    labels: Tensor  # class of each cell, from label_cells, (h * w, )


def list_pairs(
    root: str | Path, split: str, max_images: int | None = None, seed: int = 0
) -> list[SegmentationPair]:
    """The images of a split, in VOC or Cityscapes layout.

    Args:
        root: Like ``VOCdevkit/VOC2012``, with ``JPEGImages``,
            ``SegmentationClass`` and ``ImageSets/Segmentation``; or like
            ``cityscapes``, with ``leftImg8bit`` and ``gtFine``.
        split: 'train' or 'val', or the name of another list or folder.
        max_images: Draw at most this many at random; None takes all.
        seed: Seed of that draw.

    Returns:
        In the order of the list, or of the paths.

    Raises:
        FileNotFoundError: The layout is neither, or a file is missing.
        ValueError: The split is empty.
    """
    root = Path(root)
    source = root / VOC_LISTS / f'{split}.txt'
    cityscapes = root / CITYSCAPES_IMAGES / split
    if source.is_file():
        pairs = [
            SegmentationPair(
                root / f'JPEGImages/{name}.jpg',
                root / f'SegmentationClass/{name}.png',
            )
            for name in source.read_text(encoding='utf-8').split()
        ]
    elif cityscapes.is_dir():
        source, masks = cityscapes, root / 'gtFine' / split
        pairs = [
            SegmentationPair(
                x,
                masks / x.parent.name / f'{x.stem[: -len(END)]}{MASK_END}',
            )
            for x in sorted(source.glob(f'*/*{END}.*'))
        ]
    else:
        raise FileNotFoundError(
            f'There is no list "{source}" as in VOCdevkit/VOC2012 '
            '(JPEGImages/*.jpg, SegmentationClass/*.png), and no '
            f'"{cityscapes}" as in cityscapes (*/*{END}.*, '
            f'gtFine/{split}/*/*{MASK_END})'
        )
    if not pairs:
        raise ValueError(f'"{source}" lists no images')
    if max_images is not None and max_images < len(pairs):
        order = np.random.default_rng(seed).permutation(len(pairs))
        pairs = [pairs[i] for i in sorted(order[:max_images])]
    for file in (file for pair in pairs for file in pair):
        if not file.is_file():
            raise FileNotFoundError(
                f'"{source}" lists an image without the file "{file}"'
            )
    return pairs


def read_class_names(root: str | Path, num_classes: int) -> list[str]:
    """Names of the classes; "class 3" for one that the dataset does not name.

    ``class_names.txt`` has one a line, with or without the background, which
    is class 0; Cityscapes has its own.
    """
    file = Path(root) / 'class_names.txt'
    if file.is_file():
        names = file.read_text(encoding='utf-8').splitlines()
        if len(names) == num_classes - 1:
            names = ['background', *names]
    else:
        is_cityscapes = (Path(root) / CITYSCAPES_IMAGES).is_dir()
        names = CITYSCAPES_CLASSES if is_cityscapes else []
    names = names[:num_classes]
    return names + [f'class {i}' for i in range(len(names), num_classes)]


def read_mask(path: str | Path) -> Tensor:
    """The class of each pixel, uint8, (H, W), of a palette or grey PNG.

    Raises:
        ValueError: The image holds no indices.
    """
    with Image.open(path) as image:
        if image.mode not in ('P', 'L'):
            raise ValueError(
                f'The mask "{path}" is of the mode {image.mode}; '
                'expected a PNG of class numbers (mode P or L)'
            )
        return torch.from_numpy(np.array(image))


def label_cells(
    mask: Tensor, shape: tuple[int, int], num_classes: int
) -> Tensor:
    """The class of each cell of a grid (h, w): that of most of its pixels.

    Returns:
        long, (h * w, ); ``IGNORED`` where half of a cell or more is.
    """
    classes = torch.where(mask == IGNORED, num_classes, mask.long())
    # one_hot would take 8 bytes for each of these.
    found = classes == torch.arange(num_classes + 1)[:, None, None]
    shares = F.adaptive_avg_pool2d(found.float(), shape)
    label = shares[:num_classes].argmax(dim=0)
    return label.where(shares[num_classes] < 0.5, IGNORED).flatten()


def count_classes(masks: Sequence[Tensor]) -> int:
    """One more than the highest class in any mask."""
    # IGNORED is the highest of uint8, so it wraps to 0.
    return max((int((mask + 1).max()) for mask in masks), default=1) or 1


def draw_cells(
    items: Sequence[LabelledCells], seed: int, max_cells: int = 5000
) -> tuple[Tensor, Tensor]:
    """Labelled cells to fit a probe to.

    As many images as there are, drawn with replacement, so that the spread
    over seeds includes that of the choice of images; then cells of them.

    Returns:
        Features (N, C) and classes (N, ).

    Raises:
        ValueError: No cell has a class.
    """
    rng = np.random.default_rng(seed)
    drawn = [items[i] for i in rng.integers(len(items), size=len(items))]
    cells = torch.cat([item.cells.flatten(1).T for item in drawn])
    labels = torch.cat([item.labels for item in drawn])
    known = torch.nonzero(labels != IGNORED).flatten()
    if not len(known):
        raise ValueError(
            'There is nothing to learn from: no cell of the '
            f'{len(drawn)} training images drawn has a class. '
            f'Expected masks that are not all {IGNORED}'
        )
    kept = known[rng.permutation(len(known))[:max_cells]]
    return cells[kept], labels[kept]


Scorer = Callable[[Tensor], Tensor]  # cells (N, C) to scores (N, classes)


def fit_knn(
    cells: Tensor,
    labels: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Scorer:
    """The vote of the ``k`` nearest cells, see :func:`.probes.knn_votes`."""

    def score(queries: Tensor) -> Tensor:
        similarity, index = nearest(cells, queries, min(k, len(cells)))
        votes = knn_votes(similarity, labels[index], num_classes, temperature)
        return votes / votes.sum(dim=1, keepdim=True)

    return score


def fit_linear(
    cells: Tensor,
    labels: Tensor,
    num_classes: int,
    weight_decay: float = 1e-2,
    max_iters: int = 50,
) -> Scorer:
    """Multinomial logistic regression on standardised features, by L-BFGS.

    Half of ``weight_decay`` times the squared weights is added to the mean
    cross-entropy.
    """
    mean = cells.mean(dim=0)
    std = cells.std(dim=0, correction=0).clamp(min=1e-6)
    x = (cells - mean) / std
    weight = torch.zeros(x.size(1), num_classes, requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iters, line_search_fn='strong_wolfe'
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(x @ weight + bias, labels)
            + weight_decay / 2 * weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return lambda queries: ((queries - mean) / std @ weight + bias).softmax(1)


PROBES: dict[str, Callable[..., Scorer]] = dict(linear=fit_linear, kNN=fit_knn)


def predict_mask(scorer: Scorer, item: LabelledCells) -> Tensor:
    """The class of each pixel of an image.

    The scores of the cells are resized bilinearly to the mask, and each pixel
    gets the class with the highest.
    """
    scores = scorer(item.cells.flatten(1).T)
    # Channels last, which is several times faster from here on.
    scores = scores.view(1, *item.cells.shape[1:], -1).permute(0, 3, 1, 2)
    return F.interpolate(scores, item.mask.shape, mode='bilinear').argmax(
        dim=1
    )[0]


def mean_iou(
    scorer: Scorer, items: Sequence[LabelledCells], num_classes: int
) -> float:
    """Mean IoU in percent over the labelled pixels of all images together.

    Raises:
        ValueError: The masks show no class; those that they do not show do
            not count.
    """
    counts = torch.zeros((num_classes + 1) * num_classes, dtype=torch.long)
    for item in items:
        # Ignored pixels go to an extra row: selecting costs ten times more.
        truth = item.mask.long().where(item.mask != IGNORED, num_classes)
        pairs = truth * num_classes + predict_mask(scorer, item)
        counts += pairs.flatten().bincount(minlength=len(counts))
    confusion = counts.view(num_classes + 1, num_classes)[:num_classes]
    both = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - both
    shown = confusion.sum(1) > 0
    if not shown.any():
        raise ValueError(
            'There is nothing to score: no pixel of the '
            f'{len(items)} validation masks has a class. '
            f'Expected masks that are not all {IGNORED}'
        )
    return 100 * (both[shown] / union[shown]).mean().item()


def dense_probes(
    train: Sequence[LabelledCells],
    val: Sequence[LabelledCells],
    num_classes: int,
    seed: int,
) -> dict[str, float]:
    """Mean IoU of each probe, for one draw of training cells."""
    cells, labels = draw_cells(train, seed)
    return {
        name: mean_iou(fit(cells, labels, num_classes), val, num_classes)
        for name, fit in PROBES.items()
    }


class SegmentationImages:
    """Images and masks of a dataset, decoded once for many backbones.

    Args:
        root: See :func:`list_pairs`.
        read_image: From a path to an image as the backbone takes it.
        max_images: Images of each split at most.
    """

    def __init__(
        self,
        root: str | Path,
        read_image: Callable[[Path], Tensor],
        max_images: int,
    ) -> None:
        self.images: dict[str, list[Tensor]] = {}
        self.masks: dict[str, list[Tensor]] = {}
        for split in ('train', 'val'):
            pairs = list_pairs(root, split, max_images)
            self.images[split] = [read_image(pair.image) for pair in pairs]
            self.masks[split] = [read_mask(pair.mask) for pair in pairs]
        self.num_classes = count_classes(
            [mask for masks in self.masks.values() for mask in masks]
        )
        self.classes = read_class_names(root, self.num_classes)

    def extract(
        self, backbone: Callable[[list[Tensor]], list[Tensor]]
    ) -> dict[str, list[LabelledCells]]:
        """Features and labels of each split.

        ``backbone`` makes maps (C, h, w) of images, such as ``extract_dense``
        of :class:`mmdensecl.FrozenBackbone`.
        """
        found: dict[str, list[LabelledCells]] = {}
        for split, images in self.images.items():
            found[split] = []
            maps = backbone(images)
            for x, mask in zip(maps, self.masks[split], strict=True):
                shape = x.size(1), x.size(2)
                labels = label_cells(mask, shape, self.num_classes)
                item = LabelledCells(x.float().cpu(), mask, labels)
                found[split].append(item)
        return found
