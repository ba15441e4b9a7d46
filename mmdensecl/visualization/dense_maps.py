# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Dense features as colours, segments and nearest neighbours.

A map is an array (h, w, C) of unit vectors, float16 to save memory.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from mmdensecl.models.modules import l2_normalize

SAMPLE = 20000  # cells that components and centres are fitted to
REDUCED = 32  # components for k-means


class ImageMap(NamedTuple):
    """An image and its map, without the outer cells.

    Attributes:
        image: uint8, (H, W, 3).
        map: Features, (h, w, C).
    """

    image: np.ndarray
    map: np.ndarray


@torch.no_grad()
def extract_map(
    backbone: Callable[[Tensor], Tensor], image: Tensor, margin: int = 0
) -> ImageMap:
    """Extract the map of an image.

    Args:
        backbone: From (1, 3, H, W) to a map (1, C, h, w).
        image: RGB, uint8, (3, H, W).
        margin: Rings of outer cells to cut off, and the image there.

    Raises:
        ValueError: The margin leaves no cell.
    """
    dense = backbone(image[None])
    rows, columns = dense.shape[2:]
    if min(rows, columns) <= 2 * margin:
        raise ValueError(
            f'the image has {rows} x {columns} cells, of which a margin of '
            f'{margin} leaves none; raise the size or lower the margin'
        )
    inner = dense[:, :, margin : rows - margin, margin : columns - margin]
    x, y = margin / columns, margin / rows
    box = np.array([x, y, 1 - x, 1 - y])
    sides = [*image.shape[:0:-1]] * 2
    left, top, right, bottom = (box * sides).round().astype(int)
    return ImageMap(
        image[:, top:bottom, left:right].permute(1, 2, 0).numpy(),
        l2_normalize(inner)[0].permute(1, 2, 0).half().cpu().numpy(),
    )


def _reduce(
    maps: Sequence[np.ndarray], components: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The first components of a sample and of all maps, one PCA for all."""
    total = sum(x.shape[0] * x.shape[1] for x in maps)
    rng = np.random.default_rng(seed)
    taken = []
    for x in maps:
        cells = x.reshape(-1, x.shape[2])
        count = min(len(cells), max(1, SAMPLE * len(cells) // total))
        taken.append(cells[rng.permutation(len(cells))[:count]])
    sample = np.concatenate(taken).astype(np.float32)
    pca = PCA(min(components, *sample.shape), random_state=seed).fit(sample)
    return pca.transform(sample), [
        pca.transform(x.reshape(-1, x.shape[2]).astype(np.float32)).reshape(
            *x.shape[:2], -1
        )
        for x in maps
    ]


def pca_colors(maps: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """The first three components as red, green and blue.

    One PCA and one scale for all images, so that a colour means the same in
    each: from the 1st to the 99th percentile of a component.

    Args:
        maps: Of the images.
        seed: Seed of the sample.

    Returns:
        (h, w, 3) each, 0 to 1.
    """
    sample, reduced = _reduce(maps, 3, seed)
    low, high = np.percentile(sample, (1, 99), axis=0)
    spread = np.maximum(high - low, 1e-6)
    colors = [((x - low) / spread).clip(0, 1) for x in reduced]
    # Fewer than three components where there are fewer cells.
    return [np.pad(x, [(0, 0), (0, 0), (0, 3 - x.shape[2])]) for x in colors]


def segments(
    maps: Sequence[np.ndarray], count: int = 6, seed: int = 0
) -> list[np.ndarray]:
    """k-means of the cells of all images together.

    Args:
        maps: Of the images.
        count: Number of segments at most.
        seed: Seed of the sample and the centres.

    Returns:
        (h, w) each, integers, 0 for the largest segment.
    """
    sample, reduced = _reduce(maps, REDUCED, seed)
    count = min(count, len(np.unique(sample, axis=0)))
    kmeans = KMeans(count, n_init=4, random_state=seed).fit(sample)
    sizes = np.bincount(kmeans.labels_, minlength=count)
    rank = (-sizes).argsort(kind='stable').argsort()
    return [
        rank[kmeans.predict(x.reshape(-1, x.shape[2]))].reshape(x.shape[:2])
        for x in reduced
    ]


class Neighbours(NamedTuple):
    """The most similar patches in other images, the best first.

    Attributes:
        image: Index of the image, (P, K), for the P cells of the query image
            row by row.
        cell: Index of the cell in it, (P, K).
        similarity: Cosine similarities, (P, K).
    """

    image: np.ndarray
    cell: np.ndarray
    similarity: np.ndarray


def nearest_patches(
    maps: Sequence[np.ndarray], query: int = 0, top: int = 8
) -> Neighbours:
    """For each cell of one image the best cell of each of the nearest.

    Args:
        maps: Of at least two images.
        query: Index of the query image.
        top: Number of images at most.

    Returns:
        Without the query image itself.

    Raises:
        ValueError: There is no other image.
    """
    others = [i for i in range(len(maps)) if i != query]
    if not others:
        raise ValueError(
            'Nearest patches are searched in other images, and there is only '
            'one; give a folder'
        )

    def flat(i: int) -> Tensor:
        return torch.from_numpy(maps[i]).flatten(0, 1).float()

    cells = flat(query)
    best = [(cells @ flat(i).t()).max(dim=1) for i in others]
    similarity = torch.stack([x.values for x in best], dim=1)
    found = torch.stack([x.indices for x in best], dim=1)
    similarity, order = similarity.topk(min(top, len(others)), dim=1)
    return Neighbours(
        np.array(others)[order.numpy()],
        found.gather(1, order).numpy(),
        similarity.numpy(),
    )


def segment_colors(count: int) -> ListedColormap:
    """As many colours as segments."""
    palette = plt.get_cmap('tab10' if count <= 10 else 'tab20')
    return ListedColormap([palette(i) for i in range(count)])


def draw_maps(
    images: Sequence[np.ndarray],
    names: Sequence[str],
    colors: Sequence[np.ndarray],
    labels: Sequence[np.ndarray] | None = None,
) -> Figure:
    """A column for each image: itself, its colours, its segments.

    Args:
        images: uint8, (H, W, 3).
        names: Of the images.
        colors: From :func:`pca_colors`.
        labels: From :func:`segments`.
    """
    count = 0 if labels is None else 1 + max(int(x.max()) for x in labels)
    titles = ('image', 'features, PCA as RGB', f'{count} k-means segments')
    rows = 2 if labels is None else 3
    figure = Figure(
        figsize=(0.4 + 2.6 * len(images), 0.5 + 2.3 * rows),
        layout='constrained',
    )
    axes = figure.subplots(rows, len(images), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, title in zip(axes[:, 0], titles, strict=False):
        ax.set_ylabel(title, fontsize=10)
    for i, image in enumerate(images):
        extent = (0, image.shape[1], image.shape[0], 0)
        axes[0, i].imshow(image, extent=extent)
        # No mathematics between two dollars of a file's name.
        axes[0, i].set_title(
            names[i], fontsize=10, parse_math=False, wrap=True
        )
        layers: list[dict] = [dict(X=colors[i])]
        if labels is not None:
            palette, high = segment_colors(count), count - 0.5
            layers += [dict(X=labels[i], cmap=palette, vmin=-0.5, vmax=high)]
        for ax, layer in zip(axes[1:, i], layers, strict=True):
            ax.imshow(image.mean(axis=2), cmap='gray', extent=extent)
            layer.update(extent=extent, alpha=0.75, interpolation='nearest')
            ax.imshow(**layer)
    figure.suptitle(
        'Dense features: the same colour means similar features in all images'
    )
    return figure
