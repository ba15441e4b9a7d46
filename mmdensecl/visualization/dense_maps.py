# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Colours, segments and neighbours of dense features, common to pictures.

A map is an array (h, w, C) of unit vectors, float16 to spare memory.
"""
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

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
REDUCED = 32  # components that k-means looks at

Map = np.ndarray


class Seen(NamedTuple):
    """A picture and what a backbone makes of it, without the outer cells.

    Attributes:
        picture (np.ndarray): uint8, (H, W, 3).
        map (np.ndarray): Its cells, (h, w, C).
        box (np.ndarray): Left, top, right and bottom of what is left, as
            shares of the whole picture.
    """
    picture: np.ndarray
    map: Map
    box: np.ndarray


@torch.no_grad()
def see(backbone: Callable[[Tensor], Tensor],
        picture: Tensor,
        margin: int = 0) -> Seen:
    """Look at one picture.

    Args:
        backbone (Callable): From (1, 3, H, W) to a map (1, C, h, w).
        picture (Tensor): RGB, uint8, (3, H, W).
        margin (int): Rings of outer cells to cut off, with the picture below
            them. Defaults to 0.

    Raises:
        ValueError: The margin leaves no cell.
    """
    dense = backbone(picture[None])
    rows, columns = dense.shape[2:]
    if min(rows, columns) <= 2 * margin:
        raise ValueError(
            f'the picture has {rows} x {columns} cells, of which a margin of '
            f'{margin} leaves none; raise the size or lower the margin')
    inner = dense[:, :, margin:rows - margin, margin:columns - margin]
    x, y = margin / columns, margin / rows
    box = np.array([x, y, 1 - x, 1 - y])
    height, width = picture.shape[1:]
    left, top, right, bottom = (box *
                                ([width, height] * 2)).round().astype(int)
    return Seen(picture[:, top:bottom, left:right].permute(1, 2, 0).numpy(),
                l2_normalize(inner)[0].permute(1, 2, 0).half().cpu().numpy(),
                box)


def _sample(maps: Sequence[Map], seed: int) -> np.ndarray:
    """Cells of all maps, as many of each as its size asks for."""
    total = sum(x.shape[0] * x.shape[1] for x in maps)
    rng = np.random.default_rng(seed)
    taken = []
    for x in maps:
        cells = x.reshape(-1, x.shape[2])
        count = min(len(cells), max(1, SAMPLE * len(cells) // total))
        taken.append(cells[rng.permutation(len(cells))[:count]])
    return np.concatenate(taken).astype(np.float32)


def _reduce(maps: Sequence[Map], components: int,
            seed: int) -> Tuple[np.ndarray, List[np.ndarray]]:
    """The first components of a sample and of all maps, one PCA for all."""
    sample = _sample(maps, seed)
    pca = PCA(min(components, *sample.shape), random_state=seed).fit(sample)
    return pca.transform(sample), [
        pca.transform(x.reshape(-1, x.shape[2]).astype(np.float32)).reshape(
            *x.shape[:2], -1) for x in maps
    ]


def pca_colors(maps: Sequence[Map], seed: int = 0) -> List[np.ndarray]:
    """The first three components as red, green and blue.

    One PCA and one scale for all pictures, so that a colour means the same in
    each: from the 1st to the 99th percentile of a component.

    Args:
        maps (Sequence[np.ndarray]): Of the pictures.
        seed (int): Of the sample. Defaults to 0.

    Returns:
        list[np.ndarray]: (h, w, 3), 0 to 1.
    """
    sample, reduced = _reduce(maps, 3, seed)
    low, high = np.percentile(sample, (1, 99), axis=0)
    spread = np.maximum(high - low, 1e-6)
    colors = [((x - low) / spread).clip(0, 1) for x in reduced]
    # Fewer than three components where there are fewer cells.
    return [np.pad(x, [(0, 0), (0, 0), (0, 3 - x.shape[2])]) for x in colors]


def segments(maps: Sequence[Map],
             count: int = 6,
             seed: int = 0) -> List[np.ndarray]:
    """k-means of the cells of all pictures together.

    Args:
        maps (Sequence[np.ndarray]): Of the pictures.
        count (int): How many segments at most. Defaults to 6.
        seed (int): Of the sample and the centres. Defaults to 0.

    Returns:
        list[np.ndarray]: (h, w), integers, 0 for the largest segment.
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
    """The most similar patches in other pictures, the best first.

    Attributes:
        picture (np.ndarray): Which picture, (P, K), for the P cells of the
            query picture row by row.
        cell (np.ndarray): Which of its cells, (P, K).
        similarity (np.ndarray): Cosine similarities, (P, K).
    """
    picture: np.ndarray
    cell: np.ndarray
    similarity: np.ndarray


def nearest_patches(maps: Sequence[Map],
                    query: int = 0,
                    top: int = 8) -> Neighbours:
    """For each cell of one picture the best cell of each of the nearest.

    Args:
        maps (Sequence[np.ndarray]): Of at least two pictures.
        query (int): Which of them asks. Defaults to 0.
        top (int): How many pictures at most. Defaults to 8.

    Returns:
        Neighbours: Without the query picture itself.

    Raises:
        ValueError: There is no other picture.
    """
    others = [i for i in range(len(maps)) if i != query]
    if not others:
        raise ValueError('Nearest patches are looked for in other pictures, '
                         'and there is only one; give a folder')

    def flat(x: Map) -> Tensor:
        return torch.from_numpy(x.reshape(-1, x.shape[2])).float()

    cells = flat(maps[query])
    best = [(cells @ flat(maps[i]).t()).max(dim=1) for i in others]
    similarity = torch.stack([x.values for x in best], dim=1)
    found = torch.stack([x.indices for x in best], dim=1)
    similarity, order = similarity.topk(min(top, len(others)), dim=1)
    return Neighbours(
        np.array(others)[order.numpy()],
        found.gather(1, order).numpy(), similarity.numpy())


def segment_colors(count: int) -> ListedColormap:
    """As many colours as segments."""
    name = 'tab10' if count <= 10 else 'tab20'
    return ListedColormap(plt.get_cmap(name).colors[:count])


def draw_maps(pictures: Sequence[np.ndarray],
              names: Sequence[str],
              colors: Sequence[np.ndarray],
              labels: Optional[Sequence[np.ndarray]] = None) -> Figure:
    """A column for each picture: itself, its colours, its segments.

    Args:
        pictures (Sequence[np.ndarray]): uint8, (H, W, 3).
        names (Sequence[str]): Of the pictures.
        colors (Sequence[np.ndarray]): From :func:`pca_colors`.
        labels (Sequence[np.ndarray], optional): From :func:`segments`.
            Defaults to None.

    Returns:
        Figure: Of constrained layout.
    """
    rows = 2 if labels is None else 3
    figure = Figure(
        figsize=(0.4 + 2.6 * len(pictures), 0.5 + 2.3 * rows),
        layout='constrained')
    axes = figure.subplots(rows, len(pictures), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
    count = 1 + max(x.max() for x in labels) if labels is not None else 0
    for column, picture in enumerate(pictures):
        height, width = picture.shape[:2]
        extent = (0, width, height, 0)
        axes[0, column].imshow(picture, extent=extent)
        # No mathematics between two dollars of a file's name.
        axes[0, column].set_title(
            names[column], fontsize=10, parse_math=False, wrap=True)
        grey = picture.mean(axis=2)
        layers = [dict(X=colors[column])]
        if labels is not None:
            layers.append(
                dict(
                    X=labels[column],
                    cmap=segment_colors(count),
                    vmin=-0.5,
                    vmax=count - 0.5))
        for ax, layer in zip(axes[1:, column], layers):
            ax.imshow(grey, cmap='gray', extent=extent)
            ax.imshow(
                **layer, extent=extent, alpha=0.75, interpolation='nearest')
    titles = ('picture', 'features, PCA as RGB', f'{count} k-means segments')
    for ax, title in zip(axes[:, 0], titles):
        ax.set_ylabel(title, fontsize=10)
    figure.suptitle('Dense features: the same colour means similar features '
                    'in all pictures')
    return figure
