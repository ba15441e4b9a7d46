# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Say how well a demo's features match views that training never saw.

Two views are cut of each scene for scoring. Each cell of one is matched with
the most similar cell of the other, by the features of the backbone. A table
counts the right matches; a picture shows the mutual ones of the first scenes,
before and after training.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmdensecl.datasets.transforms import PackViews, TwoViews
from mmdensecl.evaluation.dense_probes import list_pairs
from mmdensecl.evaluation.matching import (
    Pairs,
    compare,
    match_accuracy,
    mean_accuracy,
)
from mmdensecl.models.modules import Features, backbone_features
from mmdensecl.transfer.feature_extractor import FrozenBackbone, load_backbone
from mmdensecl.visualization import Panel, match_sheet, strongest_matches
from mmdensecl.visualization.views import pairs_of

# Larger than in training, for a finer grid: the network is convolutional. With
# smaller crops, many views of a scene would hardly overlap.
SIZE, CROP_SCALE = 192, (0.5, 1.0)
DRAWS = 2  # pairs of views of each scene
SEEDS = 3  # draws of random weights
SHOWN = 3  # pairs in the picture


def draw_pairs(root: Path) -> Pairs:
    """Two views of each scene for scoring, a few times."""
    draw, pack = TwoViews(size=SIZE, crop_scale=CROP_SCALE), PackViews()
    views: list[dict] = []
    for image, _ in list_pairs(root, 'val') * DRAWS:
        scene = dict(img=Image.open(image).convert('RGB'), img_path=image)
        seed = len(views)
        views.append(pack(draw(dict(scene, sample_idx=seed, seed=seed))))
    return pairs_of(views, SIZE)


def encode(network: FrozenBackbone, pairs: Pairs) -> tuple[Features, Features]:
    """The features of both views."""
    query, key = (
        backbone_features(torch.stack(network.extract_dense([*views])))
        for views in (pairs.query, pairs.key)
    )
    return query, key


def draw(
    features: Mapping[str, tuple[Features, Features]],
    pairs: Pairs,
    path: Path,
) -> None:
    """Draw a row for each network and a column for each pair."""
    rows = []
    for name, (query, key) in features.items():
        top = query.backbone_feats.size(2)  # all of them
        rows.append(
            [
                Panel(
                    name,
                    pairs.query[i],
                    pairs.key[i],
                    strongest_matches(query, key, i, pairs.views, top),
                )
                for i in range(SHOWN)
            ]
        )
    title = 'All mutual nearest neighbours in two views of scenes that '
    figure = match_sheet(rows, f'{title}training never saw')
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', type=Path, help='of the demo')
    parser.add_argument('scenes', type=Path, help='in the layout of VOC2012')
    parser.add_argument('out', type=Path, help='the picture, a PNG')
    args = parser.parse_args()
    logging.disable(logging.INFO)  # mmengine's lists of initialised tensors

    pairs = draw_pairs(args.scenes)
    network = load_backbone(args.checkpoint)
    trained = encode(network, pairs)
    random = [
        encode(network.untrained(pairs.query, seed), pairs)
        for seed in range(SEEDS)
    ]
    draw(dict(untrained=random[0], trained=trained), pairs, args.out)

    after, *before = (
        match_accuracy(query, key, pairs.views)
        for query, key in (trained, *random)
    )
    found = compare(after, mean_accuracy(before))
    table = Table(title=f'Matches in {found.pairs} pairs of unseen views')
    table.add_column('the match of a cell is taken by')
    table.add_column('right', justify='right')
    for name, share in (*found.baselines.items(), ('DenseCL', found.right)):
        table.add_row(name, f'{100 * share:.1f}%')
    console = Console()
    console.print(table)
    console.print(f'picture  {args.out}', soft_wrap=True)


if __name__ == '__main__':
    main()
