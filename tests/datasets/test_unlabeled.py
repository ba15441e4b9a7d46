# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from mmengine.dataset import ConcatDataset, RepeatDataset
from PIL import Image
from torch.utils.data import DataLoader

from mmdensecl.datasets import (
    UnlabeledFolder,
    UnlabeledList,
    UnreadableImageError,
)
from mmdensecl.datasets.folder import search_folder
from mmdensecl.datasets.transforms.loading import decode_rgb


def picture(color=(10, 20, 30), size=(40, 30), mode='RGB', **kwargs) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, color).save(
        stream, kwargs.pop('format', 'PNG'), **kwargs
    )
    return stream.getvalue()


def write(folder, names, data=None):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or picture((i, 0, 0)))


def paths(dataset):
    return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]


def keep_bytes(results):
    """A pipeline that shows what the dataset hands over."""
    decode_rgb(results['img_bytes'])
    return results


class TestFolder:
    def test_nested_any_case_sorted(self, tmp_path):
        write(tmp_path, ['b/x.JPG', 'a/deep/y.jpeg', 'z.Png', 'c.webp'])
        write(tmp_path, ['notes.txt', 'a/labels.json', 'jpg'], b'no image')
        assert paths(UnlabeledFolder(str(tmp_path))) == [
            'a/deep/y.jpeg',
            'b/x.JPG',
            'c.webp',
            'z.Png',
        ]

    def test_hands_over_the_right_file(self, tmp_path):
        write(tmp_path, ['0.png', '1.png'])
        dataset = UnlabeledFolder(str(tmp_path), [keep_bytes])
        for i in range(2):
            item = dataset[i]
            assert item['sample_idx'] == i
            assert item['img_bytes'] == (tmp_path / f'{i}.png').read_bytes()

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            UnlabeledFolder(str(tmp_path / 'nowhere'))

    def test_folder_without_images(self, tmp_path):
        write(tmp_path, ['readme.txt'])
        with pytest.raises(FileNotFoundError, match='No images in'):
            UnlabeledFolder(str(tmp_path))

    def test_links_in_a_circle(self, tmp_path):
        write(tmp_path, ['a/0.png', '1.png'])
        (tmp_path / 'a' / 'loop').symlink_to(tmp_path)
        (tmp_path / 'again').symlink_to(tmp_path / 'a')
        assert len(UnlabeledFolder(str(tmp_path))) == 2

    def test_hidden_files(self, tmp_path):
        write(tmp_path, ['0.png', '._0.png', '__MACOSX/0.png', '.x/0.png'])
        assert paths(UnlabeledFolder(str(tmp_path))) == ['0.png']

    @pytest.mark.parametrize(
        'wrong',
        [
            dict(data_prefix='train'),
            dict(data_prefix=dict(img_path='a')),
            dict(ann_file='train.txt'),
        ],
    )
    def test_arguments_that_would_do_nothing(self, tmp_path, wrong):
        write(tmp_path, ['0.png'])
        with pytest.raises(TypeError, match='data_root'):
            UnlabeledFolder(str(tmp_path), **wrong)

    def test_bad_limit(self, tmp_path):
        with pytest.raises(ValueError, match='got 5'):
            UnlabeledFolder(str(tmp_path), max_unreadable=5)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


class TestSearch:
    def test_order_is_that_of_whole_paths(self, tmp_path):
        touch(tmp_path, 'b/x.jpg', 'b-1/x.jpg', 'b.jpg', 'a/z/x.PNG', 'B.jpg')
        assert search_folder(tmp_path) == [
            'B.jpg',
            'a/z/x.PNG',
            'b-1/x.jpg',
            'b.jpg',
            'b/x.jpg',
        ]

    def test_a_folder_keeps_its_own_name(self, tmp_path):
        """Whatever the order in which the disk names its entries."""
        touch(tmp_path, 'm/real/0.jpg', 'm/1.jpg')
        for link in ('a', 'm/a', 'z'):
            (tmp_path / link).symlink_to(tmp_path / 'm' / 'real')
        assert search_folder(tmp_path) == ['m/1.jpg', 'm/real/0.jpg']

    def test_links_to_elsewhere(self, tmp_path):
        touch(tmp_path, 'else/0.jpg', 'root/1.jpg')
        root = tmp_path / 'root'
        (root / 'x').symlink_to(tmp_path / 'else')
        (root / 'y').symlink_to(tmp_path / 'else')
        (root / 'self').symlink_to('self')
        (root / 'one.jpg').symlink_to(tmp_path / 'else/0.jpg')
        assert search_folder(root) == ['1.jpg', 'one.jpg', 'x/0.jpg']
        (tmp_path / 'other').symlink_to(root)
        assert search_folder(tmp_path / 'other') == search_folder(root)

    def test_a_folder_that_ends_like_an_image(self, tmp_path):
        touch(tmp_path, 'x.jpg/0.png', 'no.jpg.txt')
        assert search_folder(tmp_path) == ['x.jpg/0.png']

    def test_a_folder_that_may_not_be_read(self, tmp_path, monkeypatch):
        touch(tmp_path, 'a/0.jpg', 'b/0.jpg')
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith('b'):
                raise PermissionError(13, 'Permission denied', path)
            return scandir(path)

        monkeypatch.setattr(os, 'scandir', refuse)
        with pytest.raises(PermissionError, match='b'):
            search_folder(tmp_path)


class TestSubsets:
    @pytest.fixture
    def folder(self, tmp_path):
        write(tmp_path, [f'{i}.png' for i in range(6)])
        return str(tmp_path)

    @pytest.mark.parametrize(
        'indices, expected',
        [
            (2, '01'),
            (-2, '45'),
            ([5, 0, -2], '504'),
        ],
    )
    def test_both_ways_and_as_argument(self, folder, indices, expected):
        """Names, counts of unreadable pictures, and nothing left behind."""
        expected = [f'{i}.png' for i in expected]
        dataset = UnlabeledFolder(folder)
        dataset.unreadable[:] = True
        subset = dataset.get_subset(indices)
        assert len(dataset) == 6
        dataset.get_subset_(indices)
        early = UnlabeledFolder(folder, indices=indices)
        for one in (subset, dataset, early):
            assert paths(one) == expected and len(one) == len(expected)
            assert one.unreadable.tolist() == [False] * len(expected)

    def test_a_subset_has_an_epoch_of_its_own(self, folder):
        dataset = UnlabeledFolder(folder)
        dataset.set_epoch(1)
        first, second = dataset.get_subset(3), dataset.get_subset(3)
        assert first.draw_seed(0) == dataset.draw_seed(0)
        first.set_epoch(5)
        assert second.draw_seed(0) == dataset.draw_seed(0)
        assert first.draw_seed(0) != dataset.draw_seed(0)

    def test_lazy(self, folder):
        dataset = UnlabeledFolder(folder, lazy_init=True)
        write(Path(folder), ['6.png'])
        assert len(dataset) == 7 and paths(dataset)[-1] == '6.png'

    @pytest.mark.parametrize('serialize', [True, False])
    def test_inside_wrappers(self, folder, serialize):
        dataset = UnlabeledFolder(
            folder, [keep_bytes], serialize_data=serialize, metainfo=dict(a=1)
        )
        assert dataset.metainfo == dict(a=1)
        twice = RepeatDataset(dataset, 2)
        both = ConcatDataset([dataset, dataset])
        assert len(twice) == len(both) == 12
        assert twice[7]['img_path'] == both[7]['img_path'] == '1.png'

    def test_filtered(self, folder):

        class Odd(UnlabeledFolder):
            def filter_data(self):
                return [
                    info
                    for info in self.data_list
                    if int(info['img_path'][0]) % 2
                ]

        assert paths(Odd(folder)) == ['1.png', '3.png', '5.png']


class TestList:
    def test_labels_blank_lines_and_spaces(self, tmp_path):
        write(tmp_path, ['a.png', 'b c.png', 'd 7.png'])
        (tmp_path / 'list.txt').write_bytes(
            b'\xef\xbb\xbfa.png 12\r\n\r\nb c.png\r\nd 7.png 3\r\n'
        )
        dataset = UnlabeledList(
            'list.txt', str(tmp_path), pipeline=[keep_bytes]
        )
        assert paths(dataset) == ['a.png', 'b c.png', 'd 7.png']
        assert len([item['img_bytes'] for item in dataset]) == 3

    def test_label_separators(self, tmp_path):
        (tmp_path / 'list.txt').write_text(
            'a.png\t5\nb.png,3\nc.png -1\nd1.png\n0001.png\n'
        )
        dataset = UnlabeledList('list.txt', str(tmp_path))
        assert paths(dataset) == [
            'a.png',
            'b.png',
            'c.png',
            'd1.png',
            '0001.png',
        ]

    @pytest.mark.parametrize(
        'line',
        [
            f'a{" " * 200_000}x.jpg',
            f'{"1," * 100_000}x.jpg',
        ],
        ids=['blanks', 'commas'],
    )
    def test_long_lines(self, tmp_path, line):
        """They would take hours where each separator is tried."""
        (tmp_path / 'list.txt').write_text(line)
        start = time.process_time()
        assert paths(UnlabeledList('list.txt', str(tmp_path))) == [line]
        assert time.process_time() - start < 5

    def test_missing_list(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='list file'):
            UnlabeledList('list.txt', str(tmp_path))

    def test_empty_list(self, tmp_path):
        (tmp_path / 'list.txt').write_text('\n')
        with pytest.raises(FileNotFoundError, match='No images'):
            UnlabeledList('list.txt', str(tmp_path))

    def test_binary_list(self, tmp_path):
        (tmp_path / 'list.txt').write_bytes(b'\xff\xfe\x00\xd8')
        with pytest.raises(ValueError, match='not UTF-8'):
            UnlabeledList('list.txt', str(tmp_path))


class TestSeeds:
    @pytest.fixture
    def dataset(self, tmp_path):
        write(tmp_path, [f'{i}.png' for i in range(6)])
        return UnlabeledFolder(str(tmp_path), [keep_bytes])

    def seeds(self, dataset, workers):
        loader = DataLoader(
            dataset, num_workers=workers, collate_fn=lambda batch: batch[0]
        )
        return [item['seed'] for item in loader]

    def test_do_not_depend_on_workers(self, dataset):
        dataset.set_epoch(3, seed=7)
        assert self.seeds(dataset, 0) == self.seeds(dataset, 2)

    def test_differ_by_picture_epoch_and_seed(self, dataset):
        seen = set()
        for epoch, seed in ((0, 0), (1, 0), (0, 1)):
            dataset.set_epoch(epoch, seed)
            seen.update(self.seeds(dataset, 0))
        assert len(seen) == 3 * 6

    def test_epoch_reaches_workers_that_live_on(self, dataset):
        loader = DataLoader(
            dataset,
            num_workers=2,
            persistent_workers=True,
            collate_fn=lambda batch: batch[0],
        )
        dataset.set_epoch(0)
        first = [item['seed'] for item in loader]
        dataset.set_epoch(1)
        second = [item['seed'] for item in loader]
        dataset.set_epoch(0)
        assert first != second
        assert first == [item['seed'] for item in loader]

    def test_never_repeat_without_the_hook(self, dataset):
        assert len({dataset[0]['seed'] for _ in range(10)}) == 10


class TestUnreadable:
    BROKEN = {
        'empty.jpg': b'',
        'text.jpg': b'<html>404</html>',
        'truncated.png': picture(size=(300, 300))[:-200],
        'truncated.jpg': picture((9, 9, 9), (300, 300), format='JPEG')[:500],
    }

    def test_replaced_and_counted_also_in_workers(self, tmp_path):
        write(tmp_path, [f'good{i}.png' for i in range(36)])
        for name, data in self.BROKEN.items():
            (tmp_path / name).write_bytes(data)
        dataset = UnlabeledFolder(str(tmp_path), [keep_bytes])
        loader = DataLoader(
            dataset, num_workers=2, collate_fn=lambda batch: batch[0]
        )
        assert all(item['img_path'].startswith('good') for item in loader)
        names = np.array(paths(dataset))[dataset.unreadable.numpy()]
        assert sorted(names) == sorted(self.BROKEN)

    def test_a_bug_in_the_pipeline_is_no_broken_picture(self, tmp_path):

        def bug(results):
            raise KeyError('typo')

        write(tmp_path, ['0.png'])
        with pytest.raises(KeyError, match='typo'):
            UnlabeledFolder(str(tmp_path), [bug])[0]


class TestModes:
    @pytest.mark.parametrize(
        'mode, color, expected',
        [
            ('L', 77, (77, 77, 77)),
            ('LA', (77, 0), (77, 77, 77)),
            ('RGBA', (1, 2, 3, 0), (1, 2, 3)),
            ('1', 1, (255, 255, 255)),
            ('P', 0, (0, 0, 0)),
        ],
    )
    def test_become_rgb(self, mode, color, expected):
        image = decode_rgb(picture(color, mode=mode))
        assert image.mode == 'RGB' and image.size == (40, 30)
        assert image.getpixel((5, 5)) == expected

    def test_cmyk_jpeg(self):
        data = picture((0, 0, 0, 0), mode='CMYK', format='JPEG')
        assert decode_rgb(data).getpixel((5, 5)) == (255, 255, 255)

    def test_large_jpegs_at_a_fraction(self):
        """Not below min_side, nearly the same, and broken is broken."""
        ramp = np.linspace(0, 255, 800).astype(np.uint8)[None].repeat(600, 0)
        stream = io.BytesIO()
        Image.fromarray(ramp).convert('RGB').save(stream, 'JPEG', quality=95)
        data = stream.getvalue()
        assert decode_rgb(data, min_side=301).size == (800, 600)
        half = decode_rgb(data, min_side=300)
        assert half.size == (400, 300)
        whole = decode_rgb(data).reduce(2)
        difference = np.asarray(half, int) - np.asarray(whole, int)
        assert np.abs(difference).max() <= 2
        with pytest.raises(UnreadableImageError, match='truncated'):
            decode_rgb(data[: len(data) // 2], min_side=300)
        small = picture(size=(800, 600))  # a PNG has no such sizes
        assert decode_rgb(small, min_side=100).size == (800, 600)

    def test_floats_are_refused(self):
        stream = io.BytesIO()
        Image.new('F', (4, 4), 0.5).save(stream, 'TIFF')
        with pytest.raises(UnreadableImageError, match='floats'):
            decode_rgb(stream.getvalue())

    @pytest.mark.parametrize('bits', [10, 12, 16])
    def test_deep_grey_is_stretched(self, bits):
        top = 2**bits - 1
        ramp = np.linspace(0, top, 256).astype(np.uint16)[None].repeat(4, 0)
        stream = io.BytesIO()
        Image.fromarray(ramp).save(stream, 'PNG')
        values = np.asarray(decode_rgb(stream.getvalue()))[0, :, 0]
        assert np.abs(values.astype(int) - np.arange(256)).max() <= 1
