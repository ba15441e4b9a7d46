# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import functools
import http.server
import subprocess
import sys
import threading
import zipfile
from contextlib import nullcontext
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmdensecl.checkpoint import (
    UnsafeCheckpointError,
    load_from_local,
    register_checkpoint_loader,
)

register_checkpoint_loader()


@pytest.fixture
def history():
    buffer = HistoryBuffer()
    for value in (3.0, 1.0, 2.0):
        buffer.update(value)
    return buffer


class TestTrainingCheckpoint:
    def test_round_trip(self, tmp_path, history):
        content = dict(
            state_dict=dict(weight=torch.arange(3.0)),
            message_hub=dict(log_scalars=dict(loss=history)),
            meta=dict(epoch=3, cfg='model = dict()', seed=None),
        )
        torch.save(content, tmp_path / 'epoch_3.pth')
        loaded = load_from_local(tmp_path / 'epoch_3.pth')
        assert torch.equal(loaded['state_dict']['weight'], torch.arange(3.0))
        buffer = loaded['message_hub']['log_scalars']['loss']
        assert (buffer.min(), buffer.max(), buffer.current()) == (1, 3, 2)
        assert buffer.statistics('mean') == 2
        assert loaded['meta']['epoch'] == 3

    def test_numpy(self, tmp_path):
        kinds = 'f8', 'f4', 'i8', 'i4', '?'
        saved = [np.array([0, 1, 1], x) for x in kinds]
        saved += [np.int64(3), np.float64(0.5)]
        torch.save(saved, tmp_path / 'a.pth')
        for a, b in zip(
            load_from_local(tmp_path / 'a.pth'), saved, strict=True
        ):
            assert a.dtype == b.dtype and (a == b).all()

    def test_numpy_1_and_2_names(self, tmp_path, history):
        """Both generations' module names are understood."""
        torch.save(history, tmp_path / 'new.pth')
        with (
            zipfile.ZipFile(tmp_path / 'new.pth') as source,
            zipfile.ZipFile(tmp_path / 'old.pth', 'w') as target,
        ):
            for item in source.namelist():
                data = source.read(item)
                if item.endswith('data.pkl'):
                    assert b'numpy._core' in data or b'numpy.core' in data
                    data = data.replace(b'numpy._core', b'numpy.core')
                target.writestr(item, data)
        assert load_from_local(tmp_path / 'old.pth').mean() == 2

    def test_what_others_allowed(self, tmp_path):
        torch.save(dict(where=PurePosixPath('a')), tmp_path / 'a.pth')
        with pytest.raises(UnsafeCheckpointError, match='PurePosixPath'):
            load_from_local(tmp_path / 'a.pth')
        with torch.serialization.safe_globals([PurePosixPath]):
            loaded = load_from_local(tmp_path / 'a.pth')
        assert loaded == dict(where=PurePosixPath('a'))

    def test_sparse_and_meta_tensors(self, tmp_path):
        """As mmengine and torch load them."""
        saved = [torch.eye(3).to_sparse(), torch.ones(3, device='meta')]
        torch.save(saved, tmp_path / 'a.pth')
        sparse, meta = load_from_local(tmp_path / 'a.pth')
        assert sparse.is_sparse and meta.is_meta

    def test_importing_changes_nothing(self, tmp_path, history):
        """Neither mmengine's loaders, nor how modules are found.

        A config that names one of our types makes loading work and safe.
        """
        torch.save(history, tmp_path / 'a.pth')
        code = (
            'import sys, torch\n'
            'from mmengine.config.utils import MODULE2PACKAGE\n'
            'from mmengine.registry import HOOKS\n'
            'from mmengine.runner import CheckpointLoader\n'
            'def state():\n'
            '    return (dict(CheckpointLoader._schemes), '
            'list(sys.meta_path), dict(MODULE2PACKAGE), '
            'torch.serialization.get_safe_globals())\n'
            'before = state()\n'
            'import mmdensecl\n'
            'assert state() == before\n'
            'assert "mmpretrain" not in sys.modules\n'
            'import mmdensecl.engine\n'
            # Every tool would wait seconds for them.
            'assert "mmdensecl.models" not in sys.modules\n'
            'import mmdensecl.models\n'
            'assert state()[0] == before[0]\n'
            "HOOKS.build(dict(type='mmdensecl.LambdaWarmupHook'))\n"
            f"CheckpointLoader.load_checkpoint(r'{tmp_path / 'a.pth'}')\n"
        )
        subprocess.run([sys.executable, '-c', code], check=True)


class TestHttp:
    @pytest.fixture
    def address(self, tmp_path, monkeypatch):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
        (tmp_path / 'www').mkdir()
        handler = functools.partial(
            http.server.SimpleHTTPRequestHandler,
            directory=str(tmp_path / 'www'),
        )
        with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), handler
        ) as server:
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

    def test_broken_connection(self, tmp_path, address, monkeypatch):
        """Nothing is left that a later call would take for the file."""
        file = tmp_path / 'www' / 'cut.pth'
        torch.save(dict(a=torch.ones(9000)), file)
        whole, size = file.read_bytes(), file.stat().st_size
        send_head = http.server.SimpleHTTPRequestHandler.send_head

        def announce_more(self):
            file.write_bytes(whole[: size // 2])
            return send_head(self)

        def send_header(self, name, value):
            value = size if name == 'Content-Length' else value
            http.server.BaseHTTPRequestHandler.send_header(self, name, value)

        with monkeypatch.context() as broken:
            kind = http.server.SimpleHTTPRequestHandler
            broken.setattr(kind, 'send_head', announce_more)
            broken.setattr(kind, 'send_header', send_header, raising=False)
            words = f'got only {size // 2} out of {size}'
            with pytest.raises(OSError, match=words):
                CheckpointLoader.load_checkpoint(f'{address}/cut.pth')
        assert not [*(tmp_path / 'home').rglob('*.p*')]
        file.write_bytes(whole)
        loaded = CheckpointLoader.load_checkpoint(f'{address}/cut.pth')
        assert torch.equal(loaded['a'], torch.ones(9000))

    def test_files_of_one_name_are_kept_apart(self, tmp_path, address):
        for name in '12':
            (tmp_path / 'www' / name).mkdir()
            torch.save(name, tmp_path / 'www' / name / 'same.pth')
        for name in '12':
            same = f'{address}/{name}/same.pth'
            assert CheckpointLoader.load_checkpoint(same) == name


class TestOtherAddresses:
    """The other prefixes of mmengine's CheckpointLoader."""

    @pytest.fixture(autouse=True)
    def read(self, monkeypatch):
        """What arrives at the one function that reads files."""
        seen = []
        state = {'backbone.a': torch.ones(1), 'head.b': torch.ones(1)}

        def load(path, map_location=None):
            seen.append(str(path))
            return dict(state_dict=dict(state))

        monkeypatch.setattr('mmdensecl.checkpoint.load_from_local', load)
        monkeypatch.setattr(
            'mmdensecl.checkpoint.download', lambda address: f'got {address}'
        )
        return seen

    @pytest.mark.parametrize(
        'zoo, names',
        [
            ('torchvision', 'get_torchvision_models'),
            ('mmcls', 'get_mmcls_models'),
            ('open-mmlab', 'get_external_models'),
        ],
    )
    def test_zoo(self, read, monkeypatch, zoo, names):
        monkeypatch.setattr(
            f'mmdensecl.checkpoint.{names}',
            lambda: dict(a='https://x/a.pth', b='b.pth'),
        )
        found = CheckpointLoader.load_checkpoint(f'{zoo}://a')['state_dict']
        whole = ['backbone.a', 'head.b']
        assert [*found] == (['a'] if zoo == 'mmcls' else whole)
        monkeypatch.setenv('MMENGINE_HOME', '/home/mine')
        CheckpointLoader.load_checkpoint(f'{zoo}://b')
        assert read == ['got https://x/a.pth', '/home/mine/b.pth']
        with pytest.raises(ValueError, match=f'no "other" in {zoo}://'):
            CheckpointLoader.load_checkpoint(f'{zoo}://other')

    @pytest.mark.parametrize(
        'address', ['s3://a.pth', 'petrel://a.pth', 'one:s3://bucket/a.pth']
    )
    def test_object_storage(self, read, monkeypatch, address):
        monkeypatch.setattr(
            'mmdensecl.checkpoint.get_local_path',
            lambda *args: nullcontext(args),
        )
        CheckpointLoader.load_checkpoint(address)
        assert read == [str((address, dict(backend='petrel')))]


def test_no_such_prefix():
    with pytest.raises(FileNotFoundError, match='http'):
        CheckpointLoader.load_checkpoint('jhu://resnet50')
    with pytest.raises(ValueError, match='Download it'):
        CheckpointLoader.load_checkpoint('pavi://model')


class TestBroken:
    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            load_from_local(tmp_path / 'none.pth')
        with pytest.raises(FileNotFoundError, match='is a folder'):
            load_from_local(tmp_path)

    @pytest.mark.parametrize('share', [0, 0.01, 0.99])
    def test_truncated(self, tmp_path, share):
        path = tmp_path / 'cut.pth'
        torch.save(dict(weight=torch.rand(1000)), path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match='cut.pth'):
            load_from_local(path)
