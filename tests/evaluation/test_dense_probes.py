# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Probes of dense features whose worth is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmdensecl.evaluation.dense_probes import (
    IGNORED,
    PROBES,
    LabelledCells,
    SegmentationImages,
    count_classes,
    dense_probes,
    draw_cells,
    fit_linear,
    label_cells,
    list_pairs,
    mean_iou,
    read_class_names,
    read_mask,
)

CLASSES = 3


def make_items(count, seed, worth):
    """Masks of 8 x 8 blocks on 4 x 4 cells; features that tell them or not."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        blocks = torch.randint(CLASSES, (4, 4), generator=generator)
        mask = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1).byte()
        told = F.one_hot(blocks, CLASSES).permute(2, 0, 1).float()
        noise = torch.randn(CLASSES, 4, 4, generator=generator)
        items.append(
            LabelledCells(
                worth * told + (1 - worth) * noise + 1e-3 * noise,
                mask,
                blocks.flatten(),
            )
        )
    return items


def pixels_as_cells(cells, mask):
    """One cell a pixel, so that nothing is interpolated."""
    mask = torch.tensor(mask).byte()
    return LabelledCells(cells, mask, mask.flatten().long())


class TestCells:
    def test_most_pixels_decide(self):
        mask = torch.tensor(
            [
                [0, 1, 2, 2],
                [1, 1, 2, 0],
                [IGNORED, IGNORED] * 2,
                [1, IGNORED, 2, 2],
            ]
        ).byte()
        assert label_cells(mask, (2, 2), 3).tolist() == [
            1,
            2,
            IGNORED,
            IGNORED,
        ]
        mask[2, 2] = 2
        assert label_cells(mask, (2, 2), 3)[3] == 2
        uneven = torch.zeros(7, 11, dtype=torch.uint8)
        uneven[:, 6:] = 1
        assert label_cells(uneven, (2, 2), 2).tolist() == [0, 1, 0, 1]
        masks = [uneven, torch.full((4, 4), 7).byte()]
        assert count_classes(masks) == 8
        assert count_classes([torch.full((4, 4), IGNORED).byte()]) == 1

    def test_draws(self):
        items = make_items(10, 0, 1)
        items[0].labels[:] = IGNORED
        draws = [draw_cells(items, seed) for seed in (0, 0, 1)]
        assert torch.equal(draws[0][0], draws[1][0])
        assert not torch.equal(draws[0][0][:16], draws[2][0][:16])
        assert (draws[0][1] < CLASSES).all()
        cells, labels = draw_cells(items, 0, max_cells=7)
        assert cells.shape == (7, CLASSES) and labels.shape == (7,)
        # A cell keeps its own label.
        assert torch.equal(cells.argmax(1), labels)
        for item in items:
            item.mask[:], item.labels[:] = IGNORED, IGNORED
        with pytest.raises(ValueError, match='nothing to learn from'):
            draw_cells(items, 0)
        with pytest.raises(ValueError, match='nothing to score'):
            mean_iou(lambda x: x, items, CLASSES)


class TestMeanIoU:
    def test_by_hand(self):
        named = torch.tensor([[0, 1, 1], [1, 2, 2]])
        scores = F.one_hot(named, 3).permute(2, 0, 1).float()
        items = [pixels_as_cells(scores, [[0, 0, 1], [1, IGNORED, 1]])]
        # 0: 1 of 2, 1: 2 of 4; 2 is in no mask and has no IoU.
        assert mean_iou(lambda x: x, items, 3) == pytest.approx(50.0)

    def test_pixels_not_cells(self):
        """A mask is not shrunk: two cells, and a border between them."""
        cells = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        mask = torch.tensor([[0] * 4 + [1] * 4] * 3).byte()
        items = [LabelledCells(cells, mask, torch.tensor([0, 1]))]
        assert mean_iou(lambda x: x, items, 2) == 100.0
        mask[:, 4] = 0
        assert mean_iou(lambda x: x, items, 2) == pytest.approx(
            50 * (4 / 5 + 3 / 4)
        )


class TestProbes:
    def test_perfect_and_useless_features(self):
        results = {
            worth: dense_probes(
                make_items(12, 0, worth), make_items(6, 1, worth), CLASSES, 0
            )
            for worth in (1, 0)
        }
        assert results[1].keys() == PROBES.keys()
        # All but the pixels that interpolation blurs at the cells' borders.
        perfect = mean_iou(lambda x: x, make_items(6, 1, 1), CLASSES)
        for name in PROBES:
            assert results[1][name] == pytest.approx(perfect, abs=3)
            assert perfect > 80 and results[0][name] < 35

    def test_linear_is_the_optimum(self):
        cells, labels = draw_cells(make_items(12, 0, 0.5), 0)
        score = fit_linear(cells, labels, CLASSES, weight_decay=0.1)
        x = (cells - cells.mean(0)) / cells.std(0, correction=0)
        # Where the gradient vanishes: residuals against features is decay.
        design = torch.cat([x, torch.ones(len(x), 1)], 1)
        logits = score(cells).log()
        weight = torch.linalg.lstsq(
            design, logits - logits.mean(1, keepdim=True)
        ).solution[:-1]
        gradient = x.T @ (score(cells) - F.one_hot(labels, CLASSES)) / len(x)
        torch.testing.assert_close(
            gradient, -0.1 * weight, atol=2e-3, rtol=0.02
        )


class TestFiles:
    @pytest.fixture
    def root(self, tmp_path):
        for folder in (
            'JPEGImages',
            'SegmentationClass',
            'ImageSets/Segmentation',
        ):
            (tmp_path / folder).mkdir(parents=True)
        for i in range(6):
            Image.new('RGB', (8, 6)).save(tmp_path / f'JPEGImages/{i}.jpg')
            mask = Image.fromarray(np.full((6, 8), i, np.uint8), 'P')
            mask.putpalette([7 * x % 256 for x in range(768)])
            mask.save(tmp_path / f'SegmentationClass/{i}.png')
        (tmp_path / 'ImageSets/Segmentation/train.txt').write_text(
            '\n'.join('012345') + '\n'
        )
        return tmp_path

    def test_voc(self, root):
        pairs = list_pairs(root, 'train')
        assert [x.image.stem for x in pairs] == [*'012345']
        assert (read_mask(pairs[3].mask) == 3).all()
        with pytest.raises(ValueError, match='mode RGB'):
            read_mask(root / 'JPEGImages/0.jpg')
        (root / 'class_names.txt').write_text('skin\nhair\n')
        assert read_class_names(root, 2) == ['skin', 'hair']
        assert read_class_names(root, 3) == ['background', 'skin', 'hair']
        some = [list_pairs(root, 'train', 3, seed) for seed in (0, 0, 1)]
        assert some[0] == some[1] != some[2] and len(some[0]) == 3
        assert len(list_pairs(root, 'train', 99)) == 6
        (root / 'SegmentationClass/4.png').unlink()
        with pytest.raises(FileNotFoundError, match='4.png'):
            list_pairs(root, 'train')
        with pytest.raises(FileNotFoundError, match='no list.*val.txt'):
            list_pairs(root, 'val')

    def test_files_are_read_once_for_many_backbones(self, root):
        """And cells are labelled anew where the grid is another."""
        path = root / 'ImageSets/Segmentation'
        (path / 'val.txt').write_text('5\n')
        read = []

        def read_image(path):
            read.append(path.stem)
            return torch.zeros(3, 6, 8)

        data = SegmentationImages(root, read_image, 4)
        assert data.num_classes == 6 and len(read) == 5
        for grid in ((2, 2), (2, 2), (3, 4)):
            found = data.extract(
                lambda images, grid=grid: [torch.zeros(1, *grid)] * len(images)
            )
            assert [len(found[x]) for x in ('train', 'val')] == [4, 1]
            labels = found['val'][0].labels
            assert labels.tolist() == [5] * grid[0] * grid[1]
        assert len(read) == 5
