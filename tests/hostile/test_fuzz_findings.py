# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What led readers astray once, by fuzzing or by thought."""
import copy
import gc
import pickle
import runpy
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import lmdb
import pytest
import torch

from mmdensecl.datasets import UnlabeledList, UnlabeledLMDB, UnlabeledShards
from mmdensecl.datasets.lmdb import SharedLMDB
from mmdensecl.datasets.shards import find_shards, search_shard
from mmdensecl.engine.hooks import UnlabeledDataHook
from mmdensecl.transfer import (NoBackboneError, describe_architecture,
                                read_backbone)

TOOLS = Path(__file__).parents[2] / 'tools'


def names(dataset):
    return [info['img_path'] for info in dataset.data_list]


class TestBackbone:

    def test_one_dimensional_convolutions(self, tmp_path):
        state = {
            'conv1.weight': torch.ones(4),
            'layer1.0.conv1.weight': torch.ones(4),
            'layer1.0.conv2.weight': torch.ones(4),
        }
        assert describe_architecture(state) is None
        state['layer1.0.conv2.weight'] = torch.ones(4, 0, 3, 3)
        assert describe_architecture(state) is None
        torch.save(state, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='only zeros'):
            read_backbone(tmp_path / 'a.pth')

    def test_floats_of_a_byte(self, tmp_path):
        """torch cannot tell whether they are finite."""
        state = {'backbone.conv1.weight': torch.ones(4).to(torch.float8_e5m2)}
        torch.save(state, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match='16 bits or more'):
            read_backbone(tmp_path / 'a.pth')

    def test_many_stages_take_no_time(self):
        state = {
            f'layer{i}.{j}.conv{k}.weight': torch.ones(4, 4, 1, 1)
            for i in range(1, 3000)
            for j in range(2)
            for k in (1, 2)
        }
        start = time.process_time()
        words = describe_architecture({
            'conv1.weight': torch.ones(4, 3, 1, 1),
            **state
        })
        assert words.startswith('ResNet of 2-2-2-2-')
        assert time.process_time() - start < 5

    def test_a_dictionary_under_two_names(self, tmp_path):
        inner = dict(weight=torch.ones(1))
        torch.save(
            dict(left=inner, right=inner, self=[inner]), tmp_path / 'a.pth')
        with pytest.raises(NoBackboneError, match='only left'):
            read_backbone(tmp_path / 'a.pth')


class TestList:

    @pytest.mark.parametrize(
        'line, name', [
            ('a.jpg 1', 'a.jpg'),
            ('a.jpg ,\t -12', 'a.jpg'),
            ('a 1.jpg', 'a 1.jpg'),
            ('a.jpg1', 'a.jpg1'),
            (f'a{" " * 200_000}x.jpg', f'a{" " * 200_000}x.jpg'),
            (f'{"1," * 100_000}x.jpg', f'{"1," * 100_000}x.jpg'),
        ],
        ids=range(6))
    def test_labels(self, tmp_path, line, name):
        """The last two would take hours where each blank is tried."""
        (tmp_path / 'list.txt').write_text(line)
        start = time.process_time()
        assert names(UnlabeledList('list.txt', str(tmp_path))) == [name]
        assert time.process_time() - start < 5


def tar_header(kind, size):
    info = tarfile.TarInfo('././@LongLink')
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


class TestShards:

    @pytest.mark.parametrize(
        'data', [
            tar_header(tarfile.GNUTYPE_LONGNAME, 1 << 60),
            tar_header(tarfile.XHDTYPE, 1 << 60),
            tar_header(tarfile.GNUTYPE_LONGNAME, 1) + bytes(512),
            (tar_header(tarfile.GNUTYPE_LONGNAME, 1) + bytes(512)) * 3000,
        ],
        ids=['long', 'pax', 'alone', 'chain'])
    def test_headers(self, tmp_path, data):
        """Of 2**60 bytes, or of names of names of names."""
        (tmp_path / 'a.tar').write_bytes(data)
        with pytest.raises(ValueError, match='a.tar.*not a whole'):
            list(search_shard(str(tmp_path / 'a.tar')))

    @pytest.mark.parametrize('folder', ['a[1]', 'b{1,2}', 'c{', 'd[!x]*'])
    def test_names_that_look_like_patterns(self, tmp_path, folder):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / 'x[0]{1}.tar'
        path.touch()
        assert find_shards(str(path)) == [str(path)]
        assert find_shards(str(path.parent)) == [str(path)]

    def test_patterns_below_such_names(self, tmp_path):
        (tmp_path / 'a[1]').mkdir()
        paths = [tmp_path / 'a[1]' / f'{i}.tar' for i in range(3)]
        for path in paths:
            path.touch()
        found = find_shards(str(tmp_path / 'a[1]' / '{0..1}.tar'))
        assert found == [str(x) for x in paths[:2]]
        found = find_shards(str(tmp_path / 'a[1]' / '*.tar'))
        assert found == [str(x) for x in paths]
        with pytest.raises(FileNotFoundError, match='No shard'):
            find_shards(str(tmp_path / 'a[1]' / '[0].tar'))


class TestLMDB:

    @pytest.fixture
    def database(self, tmp_path):
        with lmdb.open(str(tmp_path / 'db'), map_size=1 << 24) as env:
            with env.begin(write=True) as transaction:
                for i in range(300):
                    transaction.put(f'{i}.png'.encode(), bytes(10_000))
        return tmp_path / 'db'

    def test_two_data_sets_of_one(self, database):
        """In a process, and in one that has both by pickle."""
        one = UnlabeledLMDB(str(database))
        two = UnlabeledLMDB(f'{database}/')
        three = copy.deepcopy(one)
        for dataset in (one, two, three,
                        *pickle.loads(pickle.dumps([one, two]))):
            assert len(dataset.read(dataset.get_data_info(5))) == 10_000
        del one, two, three, dataset
        gc.collect()
        with lmdb.open(str(database)):  # it is closed with the last of them
            pass

    def test_pickled_to_another_process(self, database):
        data = pickle.dumps(
            [UnlabeledLMDB(str(database)),
             UnlabeledLMDB(f'{database}/')])
        code = ('import pickle, sys\n'
                'for x in pickle.load(sys.stdin.buffer):\n'
                '    x.read(x.get_data_info(0))')
        subprocess.run([sys.executable, '-c', code],
                       input=data,
                       check=True,
                       timeout=120)

    def test_open_by_others(self, database):
        with lmdb.open(str(database), readonly=True):
            with pytest.raises(ValueError, match='open in this process'):
                UnlabeledLMDB(str(database))
        assert len(UnlabeledLMDB(str(database))) == 300

    @pytest.mark.parametrize('share', [.1, .5, .99])
    def test_truncated(self, database, share):
        """Reading on would end the process by a bus error."""
        file = database / 'data.mdb'
        data = file.read_bytes()
        file.write_bytes(data[:int(share * len(data))])
        with pytest.raises(ValueError, match='is truncated'):
            UnlabeledLMDB(str(database))

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='no data.mdb'):
            SharedLMDB.of(str(tmp_path)).get()

    def test_a_key_that_cannot_be(self, database):
        from mmdensecl.datasets.unlabeled import UnreadableImageError
        dataset = UnlabeledLMDB(str(database))
        for name in ('', 'x' * 600):
            with pytest.raises(UnreadableImageError):
                dataset.read(dict(img_path=name))


class TestConverters:

    @pytest.fixture
    def convert(self, tmp_path, monkeypatch):
        folder = tmp_path / 'pictures'
        folder.mkdir()
        (folder / 'a.jpg').write_bytes(b'content')

        def call(tool):
            path = TOOLS / 'dataset_converters' / f'{tool}.py'
            monkeypatch.setattr(
                sys, 'argv',
                [str(path), str(folder),
                 str(tmp_path / 'out')])
            monkeypatch.syspath_prepend(str(path.parent))
            runpy.run_path(str(path), run_name='__main__')

        call.folder = folder
        return call

    @pytest.mark.parametrize('tool', ['folder_to_lmdb', 'folder_to_shards'])
    def test_the_work_of_another_call_stays(self, convert, tmp_path, tool):
        other = tmp_path / 'out.unfinished'
        other.mkdir()
        (other / 'file').touch()
        with pytest.raises(SystemExit, match='out.unfinished" exists'):
            convert(tool)
        assert (other / 'file').exists() and not (tmp_path / 'out').exists()

    def test_nothing_is_left_of_a_failure(self, convert, tmp_path,
                                          monkeypatch):
        from mmdensecl.datasets import UnlabeledFolder

        def fail(*_):
            raise OSError('no disk')

        monkeypatch.setattr(UnlabeledFolder, 'read', fail)
        with pytest.raises(OSError, match='no disk'):
            convert('folder_to_shards')
        assert [x.name for x in tmp_path.iterdir()] == ['pictures']

    def test_a_key_too_long_for_an_lmdb(self, convert, tmp_path, capsys):
        path = convert.folder / ('ä' * 120) / ('b' * 250) / f'{"c" * 50}.jpg'
        path.parent.mkdir(parents=True)
        path.touch()
        with pytest.raises(SystemExit):
            convert('folder_to_lmdb')
        assert 'has 546 bytes' in capsys.readouterr().err
        assert not list(tmp_path.glob('out*'))
        convert('folder_to_shards')
        shards = UnlabeledShards(str(tmp_path / 'out'))
        assert len(shards) == 2


def test_unreadable_names_that_are_no_utf8(tmp_path):
    """As os.fsdecode makes of them."""
    path = tmp_path / 'unreadable.txt'
    runner = types.SimpleNamespace(
        work_dir=str(tmp_path),
        logger=types.SimpleNamespace(warning=lambda text: text.encode()))
    UnlabeledDataHook()._report(runner, ['\udce4.jpg', 'b.jpg'], 9)
    assert path.read_bytes() == b'\xe4.jpg\nb.jpg\n'


def test_the_fuzzer_finds(tmp_path, monkeypatch):
    """A reader that fails is reported, with the file and the seed."""
    pytest.importorskip('hypothesis')
    path = str(TOOLS / 'analysis_tools' / 'fuzz_readers.py')
    tool = types.ModuleType('fuzz_readers')
    tool.__dict__.update(runpy.run_path(path))
    targets = tool.fuzz.__globals__['TARGETS']

    def read(path):
        raise KeyError(path)

    targets['list'] = targets['list']._replace(read=read)
    found = tool.fuzz('list', .01, 3, tmp_path / 'out')
    assert found['examples']
    (what, file), = found['findings'].items()
    assert what.startswith('KeyError at test_fuzz_findings.py')
    assert Path(file).is_file()
