# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import functools
import http.server
import os
import pickle
import struct
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmdensecl.checkpoint import UnsafeCheckpointError, load_from_local


class Attack:
    """Unpickling one calls a function of the attacker's choice."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def history():
    buffer = HistoryBuffer()
    for value in (3., 1., 2.):
        buffer.update(value)
    return buffer


class TestTrainingCheckpoint:

    def test_round_trip(self, tmp_path, history):
        torch.save(
            dict(
                state_dict=dict(weight=torch.arange(3.)),
                message_hub=dict(log_scalars=dict(loss=history)),
                meta=dict(epoch=3, cfg='model = dict()', seed=None)),
            tmp_path / 'epoch_3.pth')
        loaded = load_from_local(tmp_path / 'epoch_3.pth')
        assert torch.equal(loaded['state_dict']['weight'], torch.arange(3.))
        buffer = loaded['message_hub']['log_scalars']['loss']
        assert (buffer.min(), buffer.max(), buffer.current()) == (1, 3, 2)
        assert buffer.statistics('mean') == 2
        assert loaded['meta']['epoch'] == 3

    @pytest.mark.parametrize('dtype', ['f8', 'f4', 'i8', 'i4', '?'])
    def test_numpy_arrays(self, tmp_path, dtype):
        array = np.array([0, 1, 1], dtype)
        torch.save(array, tmp_path / 'a.pth')
        loaded = load_from_local(tmp_path / 'a.pth')
        assert loaded.dtype == array.dtype and (loaded == array).all()

    def test_numpy_scalars(self, tmp_path):
        torch.save(
            dict(seed=np.int64(3), lr=np.float64(.5)), tmp_path / 'a.pth')
        assert load_from_local(tmp_path / 'a.pth') == dict(seed=3, lr=.5)

    def test_numpy_1_and_2_names(self, tmp_path, history):
        """Both generations' module names are understood."""
        torch.save(history, tmp_path / 'new.pth')
        with zipfile.ZipFile(tmp_path / 'new.pth') as source, zipfile.ZipFile(
                tmp_path / 'old.pth', 'w') as target:
            for item in source.namelist():
                data = source.read(item)
                if item.endswith('data.pkl'):
                    assert b'numpy._core' in data or b'numpy.core' in data
                    data = data.replace(b'numpy._core', b'numpy.core')
                target.writestr(item, data)
        assert load_from_local(tmp_path / 'old.pth').mean() == 2

    def test_mmengine_reads_through_it(self, tmp_path, history):
        torch.save(history, tmp_path / 'a.pth')
        loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'))
        assert loaded.mean() == 2

    def test_naming_a_type_is_enough(self, tmp_path, history):
        """A config that uses mmdensecl makes loading work and safe."""
        torch.save(history, tmp_path / 'a.pth')
        code = ('from mmengine.registry import HOOKS\n'
                'from mmengine.runner import CheckpointLoader\n'
                "HOOKS.build(dict(type='mmdensecl.LambdaWarmupHook'))\n"
                f"CheckpointLoader.load_checkpoint(r'{tmp_path / 'a.pth'}')\n")
        subprocess.run([sys.executable, '-c', code], check=True)


class TestHostile:

    @pytest.mark.parametrize('legacy', [False, True])
    @pytest.mark.parametrize('function, args', [
        (os.system, ('touch {}', )),
        (subprocess.call, (['touch', '{}'], )),
        (exec, ("open(r'{}', 'w')", )),
        (eval, ("open(r'{}', 'w')", )),
        (getattr, (os.stat_result, 'n_fields')),
        (getattr, (HistoryBuffer, '__init__')),
        (__import__, ('os', )),
    ])
    def test_runs_nothing(self, tmp_path, function, args, legacy):
        canary = tmp_path / 'canary'

        def fill(x):
            if isinstance(x, list):
                return [fill(item) for item in x]
            return x.format(canary) if isinstance(x, str) else x

        attack = Attack(function, *map(fill, args))
        path = tmp_path / 'bad.pth'
        torch.save(
            dict(state_dict=dict(weight=attack)),
            path,
            _use_new_zipfile_serialization=not legacy)
        with pytest.raises(UnsafeCheckpointError, match='could run code'):
            load_from_local(path)
        with pytest.raises(UnsafeCheckpointError):
            CheckpointLoader.load_checkpoint(str(path))
        assert not canary.exists()

    def test_the_attack_would_work(self, tmp_path):
        """So that the test above can fail."""
        canary = tmp_path / 'canary'
        torch.save(Attack(os.system, f'touch {canary}'), tmp_path / 'bad.pth')
        torch.load(tmp_path / 'bad.pth', weights_only=False)
        assert canary.exists()

    def test_plain_pickle(self, tmp_path):
        (tmp_path / 'bad.pth').write_bytes(
            pickle.dumps(Attack(os.system, 'true')))
        with pytest.raises(UnsafeCheckpointError):
            load_from_local(tmp_path / 'bad.pth')


def pickled_text(value: bytes) -> bytes:
    return b'X' + struct.pack('<I', len(value)) + value


def object_array_from_bytes() -> bytes:
    """A pickle of an array whose objects are pointers from the file.

    Only names of the allow-list occur in it: a copied float64 is given an
    object sub-dtype by its __setstate__.
    """

    def integer(n):
        return b'J' + struct.pack('<i', n)

    def raw(data):
        return (b'c_codecs\nencode\n' + pickled_text(data) +
                pickled_text(b'latin1') + b'\x86R')

    objects = b'cnumpy\ndtype\n(' + pickled_text(b'O') + b'tR'
    dtype = (b'cnumpy\ndtype\n(' + pickled_text(b'f8') + b'\x89\x88tR(' +
             integer(3) + pickled_text(b'<') + b'(' + objects + b'(' +
             integer(1) + b'ttNN' + integer(-1) + integer(-1) + integer(0) +
             b'tb')
    return (b'\x80\x02cnumpy._core.multiarray\n_reconstruct\n('
            b'cnumpy\nndarray\n(' + integer(0) + b't' + raw(b'b') + b'tR(' +
            integer(1) + b'(' + integer(4) + b't' + dtype + b'\x89' +
            raw(b'A' * 32) + b'tb.')


def test_bytes_do_not_become_objects(tmp_path):
    torch.save({}, tmp_path / 'empty.pth')
    path = tmp_path / 'bad.pth'
    with zipfile.ZipFile(tmp_path / 'empty.pth') as source, zipfile.ZipFile(
            path, 'w', zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            target.writestr(
                name,
                object_array_from_bytes()
                if name.endswith('data.pkl') else source.read(name))
    with pytest.raises(UnsafeCheckpointError, match="dtype 'O'"):
        load_from_local(path)


class TestHttp:

    @pytest.fixture
    def address(self, tmp_path, monkeypatch):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
        (tmp_path / 'www').mkdir()
        handler = functools.partial(
            http.server.SimpleHTTPRequestHandler,
            directory=str(tmp_path / 'www'))
        with http.server.ThreadingHTTPServer(('127.0.0.1', 0),
                                             handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f'http://127.0.0.1:{server.server_port}'
            server.shutdown()

    def test_arrives(self, tmp_path, address):
        torch.save(dict(a=torch.ones(2)), tmp_path / 'www' / 'good.pth')
        for _ in range(2):  # the second time from the hub folder
            loaded = CheckpointLoader.load_checkpoint(f'{address}/good.pth')
            assert torch.equal(loaded['a'], torch.ones(2))
        (tmp_path / 'www' / 'good.pth').unlink()
        again = CheckpointLoader.load_checkpoint(f'{address}/good.pth')
        assert torch.equal(again['a'], torch.ones(2))

    def test_files_of_one_name_are_kept_apart(self, tmp_path, address):
        for number in (1., 2.):
            folder = tmp_path / 'www' / str(number)
            folder.mkdir()
            torch.save(dict(a=torch.tensor(number)), folder / 'same.pth')
        for number in (1., 2.):
            loaded = CheckpointLoader.load_checkpoint(
                f'{address}/{number}/same.pth')
            assert loaded['a'] == number

    def test_runs_nothing(self, tmp_path, address):
        canary = tmp_path / 'canary'
        torch.save(
            Attack(os.system, f'touch {canary}'), tmp_path / 'www' / 'bad.pth')
        with pytest.raises(UnsafeCheckpointError):
            CheckpointLoader.load_checkpoint(f'{address}/bad.pth')
        assert not canary.exists()


class TestBroken:

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            load_from_local(tmp_path / 'none.pth')

    def test_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='is a folder'):
            load_from_local(tmp_path)

    def test_empty(self, tmp_path):
        path = tmp_path / 'none.pth'
        path.touch()
        with pytest.raises(ValueError, match='is empty'):
            load_from_local(path)

    @pytest.mark.filterwarnings('ignore:Detected pickle protocol')
    def test_another_protocol(self, tmp_path):
        """The words are ours, without torch's advice to load it anyhow."""
        path = tmp_path / 'numpy.pth'
        path.write_bytes(pickle.dumps(dict(a=np.zeros(3)), protocol=4))
        with pytest.raises(UnsafeCheckpointError) as error:
            load_from_local(path)
        assert 'a pickle of another protocol than 2' in str(error.value)
        assert 'weights_only' not in str(error.value)

    @pytest.mark.parametrize('share', [0, 0.01, 0.5, 0.99])
    def test_truncated(self, tmp_path, share):
        path = tmp_path / 'cut.pth'
        torch.save(dict(weight=torch.rand(1000)), path)
        data = path.read_bytes()
        path.write_bytes(data[:int(share * len(data))])
        with pytest.raises(ValueError, match='cut.pth'):
            load_from_local(path)

    def test_something_else(self, tmp_path):
        path = tmp_path / 'page.pth'
        path.write_text('<html>404 not found</html>')
        with pytest.raises(ValueError, match='not a PyTorch checkpoint'):
            load_from_local(path)
