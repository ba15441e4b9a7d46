# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from mmdensecl.visualization.dense_maps import (
    extract_map,
    nearest_patches,
    pca_colors,
    segments,
)
from mmdensecl.visualization.features_page import features_page

KINDS = np.eye(8)[:4]  # four kinds of cells


def map_of(kinds):
    return KINDS[np.array(kinds)].astype(np.float16)


ONE = map_of([[0, 0, 1], [0, 2, 1]])
TWO = map_of([[3, 1], [1, 0], [2, 2]])


def test_a_colour_means_the_same_in_all_images():
    colors = pca_colors([ONE, TWO])
    assert [x.shape for x in colors] == [(2, 3, 3), (3, 2, 3)]
    cells = np.concatenate([x.reshape(-1, 3) for x in colors])
    kinds = np.concatenate([x.reshape(-1, 8).argmax(1) for x in (ONE, TWO)])
    seen = {}
    for kind, color in zip(kinds, cells, strict=False):
        np.testing.assert_allclose(color, seen.setdefault(kind, color))
    colors = np.stack([seen[kind] for kind in range(4)])
    apart = np.abs(colors[:, None] - colors[None]).max(axis=2)
    assert (apart + np.eye(4) > 0.2).all()
    assert colors.min() >= 0 and colors.max() <= 1


def test_segments_are_those_of_all_images():
    labels = segments([ONE, TWO], 4)
    cells = np.concatenate([x.flatten() for x in labels])
    kinds = np.concatenate([x.reshape(-1, 8).argmax(1) for x in (ONE, TWO)])
    assert len(set(zip(kinds, cells, strict=False))) == len(set(cells)) == 4
    sizes = np.bincount(cells)
    assert (np.diff(sizes) <= 0).all()
    # No more than there are different cells.
    assert segments([ONE], 10)[0].max() == 2


def test_nearest_patches_are_in_other_images():
    third = map_of([[3, 3], [3, 1]])
    found = nearest_patches([ONE, TWO, third], 0, top=8)
    assert found.image.shape == (6, 2)
    assert 0 not in found.image
    # Kind 2, which only the second image has, in its cells 4 and 5.
    assert found.image[4, 0] == 1 and found.cell[4, 0] in (4, 5)
    assert found.similarity[4].tolist() == [1, 0]
    # Kind 1 is in both.
    assert found.similarity[2].tolist() == [1, 1]
    best = dict(zip(found.image[2], found.cell[2], strict=False))
    assert best[1] in (1, 2) and best[2] == 3
    with pytest.raises(ValueError, match='only one'):
        nearest_patches([ONE])


def test_margin_cuts_cells_and_image_alike():
    image = torch.arange(3 * 40 * 60).view(3, 40, 60).to(torch.uint8)

    def backbone(images):
        return torch.nn.functional.avg_pool2d(images.float(), 10) + 1

    seen = extract_map(backbone, image, 1)
    assert seen.map.shape == (2, 4, 3)
    expected = image[:, 10:30, 10:50].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(seen.image, expected)
    np.testing.assert_allclose((seen.map.astype(float) ** 2).sum(2), 1, 1e-2)
    with pytest.raises(ValueError, match='4 x 6 cells'):
        extract_map(backbone, image, 2)


HOSTILE = '</script><script>alert(1)</script>"\'<img src=x onerror=a>.png'


def page(count=2, **changes):
    maps = [ONE, TWO][:count]
    images = [Image.new('RGB', (30, 20)), Image.new('RGB', (20, 30))][:count]
    arguments = dict(
        images=images,
        names=[HOSTILE] * count,
        colors=pca_colors(maps),
        labels=segments(maps, 4),
        neighbours=nearest_patches(maps) if count > 1 else None,
        chosen=(1, 2),
        about=HOSTILE,
    )
    return features_page(**{**arguments, **changes})


def test_names_cannot_leave_their_place():
    odd = ['\udce4\x1b[2J\u202egnp.exe', 'javascript:alert(1)']
    html = page(names=odd)  # no UTF-8, or it turns the line around
    html.encode()
    assert '\x1b' not in html and '\u202e' not in html
    assert not re.search('(href|src)="javascript', html)
    html = page()
    assert '<script>alert' not in html and '<img src=x' not in html
    # Whole nonetheless: what the script shows, and as text.
    data = re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1)
    data = json.loads(data)
    assert data['names'] == [HOSTILE] * 2
    assert data['chosen'] == [1, 2] and data['shapes'] == [[2, 3], [3, 2]]
    assert len(data['image']) == 6 and data['image'][4] == [1]
    assert html.count('&lt;/script&gt;') == 8  # two in each name and about


def test_page_needs_nothing_else():
    html = page()
    text = re.sub(r'"data:image/[^"]*"', '', html)
    assert not re.search(r'https?:|//\w|url\(|@import', text, re.I)
    sources = re.findall(r'src="([^"]*)"', html)
    assert sources and all(x.startswith('data:image/') for x in sources)
    assert "default-src 'none'" in html
