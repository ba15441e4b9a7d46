# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import io
import os
import time

import pytest
from mmengine.dataset import ConcatDataset, RepeatDataset
from PIL import Image
from torch.utils.data import DataLoader

from mmdensecl.datasets import (
    UnlabeledFolder,
    UnlabeledList,
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
    @pytest.mark.parametrize(
        'arguments, words',
        [
            (dict(data_root='nowhere'), 'does not exist'),
            (dict(data_root='.'), 'No images in'),
            (dict(data_root='a', data_prefix='train'), 'data_root'),
            (dict(data_root='a', ann_file='train.txt'), 'data_root'),
            (dict(data_root='a', max_unreadable=5), 'got 5'),
        ],
    )
    def test_refused(self, tmp_path, monkeypatch, arguments, words):
        monkeypatch.chdir(tmp_path)
        write(tmp_path, ['notes.txt'], b'no image')
        if arguments['data_root'] == 'a':
            write(tmp_path, ['a/0.png'])
        with pytest.raises(
            (FileNotFoundError, TypeError, ValueError), match=words
        ):
            UnlabeledFolder(**arguments)

    @pytest.mark.parametrize('serialize', [True, False])
    def test_hands_over_the_right_file(self, tmp_path, serialize):
        """Also inside of wrappers."""
        write(tmp_path, ['0.png', '1.png'])
        dataset = UnlabeledFolder(
            str(tmp_path), [keep_bytes], serialize_data=serialize
        )
        wrapped = RepeatDataset(dataset, 2), ConcatDataset([dataset] * 2)
        for i, item in enumerate((dataset[0], dataset[1])):
            assert item['sample_idx'] == i
            assert item['img_bytes'] == (tmp_path / f'{i}.png').read_bytes()
            for other in wrapped:
                assert other[2 + i]['img_bytes'] == item['img_bytes']


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


class TestSearch:
    def test_names_and_order(self, tmp_path):
        """That of whole paths; hidden and other files are left out."""
        taken = ['B.jpg', 'a/z/x.PNG', 'b-1/x.jpg', 'b.jpg', 'b/x.JPeG']
        touch(tmp_path, *taken[::-1], 'c.webp', 'x.jpg/0.png')
        touch(tmp_path, 'no.jpg.txt', '._0.png', '__MACOSX/0.png', '.x/0.png')
        assert search_folder(tmp_path) == [*taken, 'c.webp', 'x.jpg/0.png']

    def test_links(self, tmp_path):
        """Elsewhere, in a circle, and to what has a name of its own."""
        touch(tmp_path, 'else/0.jpg', 'root/1.jpg', 'root/m/real/2.jpg')
        root = tmp_path / 'root'
        (root / 'x').symlink_to(tmp_path / 'else')
        (root / 'y').symlink_to(tmp_path / 'else')
        (root / 'self').symlink_to('self')
        (root / 'm/loop').symlink_to(root)
        (root / 'a').symlink_to(root / 'm/real')
        (root / 'one.jpg').symlink_to(tmp_path / 'else/0.jpg')
        expected = ['1.jpg', 'm/real/2.jpg', 'one.jpg', 'x/0.jpg']
        assert search_folder(root) == expected
        (tmp_path / 'other').symlink_to(root)
        assert search_folder(tmp_path / 'other') == expected

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


class TestList:
    def test_labels_blank_lines_and_spaces(self, tmp_path):
        write(tmp_path, ['a.png', 'b c.png', 'd 7.png'])
        (tmp_path / 'list.txt').write_bytes(
            b'\xef\xbb\xbfa.png,12\r\n\r\nb c.png -1\r\nd 7.png\t3\r\n'
        )
        dataset = UnlabeledList(
            'list.txt', str(tmp_path), pipeline=[keep_bytes]
        )
        assert paths(dataset) == ['a.png', 'b c.png', 'd 7.png']
        assert len([item['img_bytes'] for item in dataset]) == 3

    @pytest.mark.parametrize(
        'content, words',
        [
            (None, 'list file'),
            (b'\n', 'No images'),
            (b'\xff\xfe\x00\xd8', 'not UTF-8'),
        ],
    )
    def test_refused(self, tmp_path, content, words):
        if content is not None:
            (tmp_path / 'list.txt').write_bytes(content)
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            UnlabeledList('list.txt', str(tmp_path))

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

    def test_differ_by_picture_epoch_and_seed(self, dataset):
        """Not by workers; without the hook they never repeat."""
        seen = set()
        for epoch, seed in ((0, 0), (1, 0), (0, 1)):
            dataset.set_epoch(epoch, seed)
            seeds = self.seeds(dataset, 0)
            assert seeds == self.seeds(dataset, 2)
            seen.update(seeds)
        assert len(seen) == 3 * 6
        unset = UnlabeledFolder(dataset.data_root, [keep_bytes])
        assert len({unset[0]['seed'] for _ in range(10)}) == 10

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


class TestUnreadable:
    def test_a_bug_in_the_pipeline_is_no_broken_picture(self, tmp_path):

        def bug(results):
            raise KeyError('typo')

        write(tmp_path, ['0.png'])
        with pytest.raises(KeyError, match='typo'):
            UnlabeledFolder(str(tmp_path), [bug])[0]
