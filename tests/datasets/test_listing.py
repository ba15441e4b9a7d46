# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import io
import logging
import os
import time
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch.multiprocessing  # noqa: F401  teaches it tensors
from mmengine.logging import MMLogger

from mmdensecl.datasets import UnlabeledFolder, listing
from mmdensecl.datasets.listing import Pictures, cache_file, search_folder

EXTENSIONS = ('.jpg', '.png')


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(pictures):
    return [info['img_path'] for info in pictures]


def found(folder):
    return names(search_folder(str(folder), EXTENSIONS).pictures)


class TestPictures:
    NAMES = ['a.jpg', '', 'b/ä 日本.png', '\udce4.jpg', 'new\nline\0.png']

    def test_is_a_sequence_of_data_infos(self):
        rows = Pictures(self.NAMES, size=range(5))
        expected = [
            dict(img_path=name, size=i) for i, name in enumerate(self.NAMES)
        ]
        assert list(rows) == expected
        assert rows[-1] == expected[-1] and rows[-5] == expected[0]
        assert list(rows[1:3]) == expected[1:3]
        assert list(rows[::-2]) == expected[::-2]
        assert list(Pictures.of(expected)) == expected
        assert len(rows[:0]) == 0 and list(Pictures.of([])) == []
        for wrong in (5, -6):
            with pytest.raises(IndexError):
                rows[wrong]

    def test_a_spawned_worker_gets_a_handle(self):
        rows = Pictures(f'{i:060d}.jpg' for i in range(10000))
        assert len(ForkingPickler.dumps(rows)) < 4000

    @pytest.mark.parametrize('change', [
        dict(edges=np.array([0, 5])),
        dict(edges=np.array([1, 4, 8])),
        dict(edges=np.array([0, 9, 8])),
        dict(edges=np.array([], dtype=np.int64)),
        dict(size=np.array([1, 2, 3])),
    ])
    def test_columns_that_do_not_fit(self, change):
        columns = dict(
            text=np.frombuffer(b'0123.jpg', np.uint8).copy(),
            edges=np.array([0, 4, 8]),
            size=np.array([1, 2]))
        assert names(Pictures.from_columns(columns)) == ['0123', '.jpg']
        with pytest.raises(ValueError, match='fit'):
            Pictures.from_columns({**columns, **change})


class TestSearch:

    def test_order_is_that_of_whole_paths(self, tmp_path):
        touch(tmp_path, 'b/x.jpg', 'b-1/x.jpg', 'b.jpg', 'a/z/x.PNG', 'B.jpg')
        assert found(tmp_path) == [
            'B.jpg', 'a/z/x.PNG', 'b-1/x.jpg', 'b.jpg', 'b/x.jpg'
        ]

    def test_a_folder_keeps_its_own_name(self, tmp_path):
        """Whatever the order in which the disk names its entries."""
        touch(tmp_path, 'm/real/0.jpg', 'm/1.jpg')
        for link in ('a', 'm/a', 'z'):
            (tmp_path / link).symlink_to(tmp_path / 'm' / 'real')
        assert found(tmp_path) == ['m/1.jpg', 'm/real/0.jpg']

    def test_links_to_elsewhere(self, tmp_path):
        touch(tmp_path, 'else/0.jpg', 'root/1.jpg')
        (tmp_path / 'root' / 'x').symlink_to(tmp_path / 'else')
        (tmp_path / 'root' / 'y').symlink_to(tmp_path / 'else')
        (tmp_path / 'root' / 'self').symlink_to('self')
        (tmp_path / 'root' / 'one.jpg').symlink_to(tmp_path / 'else/0.jpg')
        assert found(tmp_path / 'root') == ['1.jpg', 'one.jpg', 'x/0.jpg']
        (tmp_path / 'other').symlink_to(tmp_path / 'root')
        assert found(tmp_path / 'other') == found(tmp_path / 'root')

    def test_a_folder_that_ends_like_a_picture(self, tmp_path):
        touch(tmp_path, 'x.jpg/0.png', 'no.jpg.txt')
        assert found(tmp_path) == ['x.jpg/0.png']

    @pytest.mark.skipif(os.name != 'posix', reason='needs odd names')
    def test_a_name_that_is_no_utf8(self, tmp_path):
        path = os.fsencode(tmp_path) + b'/\xe4.jpg'
        with open(path, 'wb') as file:
            file.write(b'content')
        dataset = UnlabeledFolder(str(tmp_path))
        assert dataset.read(dataset.get_data_info(0)) == b'content'

    def test_a_folder_that_may_not_be_read(self, tmp_path, monkeypatch):
        touch(tmp_path, 'a/0.jpg', 'b/0.jpg')
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith('b'):
                raise PermissionError(13, 'Permission denied', path)
            return scandir(path)

        monkeypatch.setattr(os, 'scandir', refuse)
        with pytest.raises(PermissionError, match='b'):
            found(tmp_path)


class TestRemember:

    @pytest.fixture
    def log(self):
        """Lines of mmengine's current logger."""
        lines = []

        class Keep(logging.Handler):

            def emit(self, record):
                lines.append(record.getMessage())

        logger, handler = MMLogger.get_current_instance(), Keep()
        logger.addHandler(handler)
        yield lines
        logger.removeHandler(handler)

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        folder = tmp_path / 'cache' / 'listings'
        monkeypatch.setenv('MMDENSECL_LISTINGS', str(folder))
        monkeypatch.setattr(listing, 'MIN_SECONDS', 0)
        return folder

    @pytest.fixture
    def root(self, tmp_path):
        touch(tmp_path / 'root', 'a/0.jpg', 'a/1.jpg', 'b/c/2.jpg')
        (tmp_path / 'else').mkdir()
        (tmp_path / 'root' / 'linked').symlink_to(tmp_path / 'else')
        age(tmp_path / 'root', tmp_path / 'else')
        return tmp_path / 'root'

    @pytest.fixture
    def searches(self, monkeypatch):
        """Counts them; the module's own function does the work."""
        count = []

        def search(*args):
            count.append(args)
            return search_folder(*args)

        monkeypatch.setattr('mmdensecl.datasets.folder.search_folder', search)
        return count

    def names(self, root):
        return names(UnlabeledFolder(str(root)).data_list)

    def test_searched_once(self, root, searches, log, tmp_path):
        first = self.names(root)
        assert first == ['a/0.jpg', 'a/1.jpg', 'b/c/2.jpg']
        # Another way to the same folder.
        (tmp_path / 'other').symlink_to(root)
        assert self.names(root) == self.names(tmp_path / 'other') == first
        assert len(searches) == 1
        said = [line for line in log if line.startswith('Found 3 pictures')]
        assert [' as remembered in ' in x for x in said] == [0, 1, 1]

    @pytest.mark.parametrize(
        'change', [
            lambda root: touch(root, 'a/3.jpg'),
            lambda root: os.remove(root / 'b/c/2.jpg'),
            lambda root: os.rename(root / 'a/0.jpg', root / 'a/9.jpg'),
            lambda root: touch(root, 'b/c/d/3.jpg'),
            lambda root: touch(root, '../else/3.jpg'),
            lambda root: os.rename(root / 'a', root / 'b/a'),
        ],
        ids='add remove rename deep linked move'.split())
    def test_a_change_is_seen(self, root, searches, change):
        before = self.names(root)
        change(root)
        after = self.names(root)
        assert after == names(search_folder(str(root),
                                            EXTENSIONS).pictures) != before
        assert len(searches) == 2

    def test_other_extensions_are_another_search(self, root, searches,
                                                 monkeypatch):
        self.names(root)
        touch(root, 'x.tga')
        age(root)
        monkeypatch.setattr('mmdensecl.datasets.folder.IMG_EXTENSIONS',
                            ('.tga', ))
        assert self.names(root) == ['x.tga']

    def test_another_format_is_another_search(self, root, searches,
                                              monkeypatch):
        self.names(root)
        monkeypatch.setattr(listing, 'FORMAT', 0)
        self.names(root)
        assert len(searches) == 2

    @pytest.mark.parametrize(
        'mtime', [None, 1.0, -3600.0],
        ids=['now', 'a second ago', 'in the future'])
    def test_a_folder_that_just_changed(self, root, cache, mtime):
        """Its time could stay as it is while another file comes."""
        os.utime(root / 'b', mtime and (time.time() - mtime, ) * 2)
        self.names(root)
        assert not cache.exists()

    def test_a_folder_without_a_time(self, root, cache):
        os.utime(root / 'b', (0, 0))
        self.names(root)
        assert not cache.exists()

    def test_a_link_that_leads_nowhere(self, root, cache, tmp_path):
        """Perhaps to a disk that is not there yet."""
        (root / 'b' / 'disk').symlink_to(tmp_path / 'disk')
        age(root)
        self.names(root)
        assert not cache.exists()

    def test_a_quick_search_leaves_nothing(self, root, cache, monkeypatch):
        monkeypatch.setattr(listing, 'MIN_SECONDS', 1e9)
        self.names(root)
        assert not cache.exists()

    def test_only_one_process_of_a_machine_writes(self, root, cache,
                                                  monkeypatch):
        monkeypatch.setenv('LOCAL_RANK', '1')
        self.names(root)
        assert not cache.exists()
        monkeypatch.setenv('LOCAL_RANK', '0')
        self.names(root)
        assert [path.suffix for path in cache.iterdir()] == ['.npz']

    @pytest.mark.parametrize(
        'damage', [
            lambda data: b'',
            lambda data: b'something else',
            lambda data: data[:-40],
            lambda data: data[:200] + b'garbage!' + data[208:],
            lambda data: npz(other=np.arange(3)),
            lambda data: npz(head=np.array([{}], dtype=object)),
            lambda data: npz(head=np.frombuffer(b'[1]', np.uint8)),
        ],
        ids='empty foreign cut garbage keys pickle head'.split())
    def test_a_damaged_file_is_searched_again(self, root, cache, searches, log,
                                              damage):
        before = self.names(root)
        file = cache_file(os.path.realpath(root))
        file.write_bytes(damage(file.read_bytes()))
        assert self.names(root) == before and len(searches) == 2
        assert any('does not hold what was remembered' in x for x in log)
        assert self.names(root) == before and len(searches) == 2

    def test_a_cache_that_cannot_be_written(self, root, tmp_path, monkeypatch,
                                            log):
        touch(tmp_path, 'file')
        monkeypatch.setenv('MMDENSECL_LISTINGS', str(tmp_path / 'file' / 'x'))
        assert len(self.names(root)) == 3
        assert any('not remembered' in line for line in log)

    def test_turned_off(self, root, cache, searches, monkeypatch):
        monkeypatch.setenv('MMDENSECL_LISTINGS', '')
        self.names(root)
        self.names(root)
        assert len(searches) == 2 and not cache.exists()

    def test_place(self, tmp_path, monkeypatch):
        monkeypatch.delenv('MMDENSECL_LISTINGS')
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
        assert cache_file('/r').parent == tmp_path / 'xdg/mmdensecl/listings'
        monkeypatch.delenv('XDG_CACHE_HOME')
        monkeypatch.setenv('HOME', str(tmp_path))
        assert cache_file(
            '/r').parent == tmp_path / '.cache/mmdensecl/listings'
        monkeypatch.setattr(os.path, 'expanduser', lambda path: path)
        assert cache_file('/r') is None  # nobody's home


def age(*folders):
    """Make folders look as if nothing had changed for a minute."""
    for folder in folders:
        for path, _, _ in os.walk(folder):
            os.utime(path, (time.time() - 60, ) * 2)


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()
