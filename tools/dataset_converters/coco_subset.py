# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw a share of the pictures of a COCO annotation file.

For semi-supervised fine-tuning, such as on 10% of train2017. The same seed
draws the same pictures everywhere, and a smaller share is part of a larger
one.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw(ids: Sequence[int], percent: float, seed: int) -> list[int]:
    """Draw a share of ids, without replacement.

    Args:
        ids (Sequence[int]): In any order.
        percent (float): Above 0, at most 100.
        seed (int): Fixes the draw.

    Returns:
        List[int]: In the order of the draw, at least one.
    """
    # Its stream never changes, unlike that of numpy's newer generators.
    order = np.random.RandomState(seed).permutation(sorted(ids))
    return order[: max(1, round(len(ids) * percent / 100))].tolist()


def main() -> None:
    """Write the subset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'annotations', type=Path, help='such as instances_train2017.json'
    )
    parser.add_argument(
        '--percent', type=float, default=10, help='of the pictures'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--out',
        type=Path,
        help='by default beside the annotations, such as '
        'instances_train2017_10pct_seed0.json',
    )
    args = parser.parse_args()
    source = args.annotations
    if not 0 < args.percent <= 100:
        parser.error(
            f'--percent is above 0 and at most 100, got {args.percent:g}'
        )
    if not source.is_file():
        parser.error(f'there is no file "{source}"')
    out = args.out or source.with_name(
        f'{source.stem}_{args.percent:g}pct_seed{args.seed}.json'
    )
    if out.exists():
        parser.error(f'"{out}" exists already; remove it first')

    content = json.loads(source.read_text(encoding='utf-8'))
    if not {'images', 'annotations', 'categories'} <= set(content):
        parser.error(
            f'"{source}" has no images, annotations and categories, '
            'as a COCO file of instances does'
        )
    total = len(content['images'])
    ids = draw([x['id'] for x in content['images']], args.percent, args.seed)
    chosen = set(ids)
    content['images'] = [x for x in content['images'] if x['id'] in chosen]
    content['annotations'] = [
        x for x in content['annotations'] if x['image_id'] in chosen
    ]
    # Under another name until it is whole.
    unfinished = out.with_name(f'{out.name}.unfinished')
    unfinished.write_text(json.dumps(content), encoding='utf-8')
    unfinished.replace(out)
    digest = hashlib.sha256(json.dumps(sorted(chosen)).encode()).hexdigest()
    print(
        f'{out}: {len(chosen)} of {total} pictures, '
        f'{len(content["annotations"])} annotations; '
        f'sha256 of the ids {digest[:12]}'
    )


if __name__ == '__main__':
    main()
