# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmdensecl.checkpoint import UnsafeCheckpointError, load_checkpoint_file


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
        loaded = load_checkpoint_file(tmp_path / 'epoch_3.pth')
        assert torch.equal(loaded['state_dict']['weight'], torch.arange(3.))
        buffer = loaded['message_hub']['log_scalars']['loss']
        assert (buffer.min(), buffer.max(), buffer.current()) == (1, 3, 2)
        assert buffer.statistics('mean') == 2
        assert loaded['meta']['epoch'] == 3

    @pytest.mark.parametrize('dtype', ['f8', 'f4', 'i8', 'i4', '?'])
    def test_numpy_arrays(self, tmp_path, dtype):
        array = np.array([0, 1, 1], dtype)
        torch.save(array, tmp_path / 'a.pth')
        loaded = load_checkpoint_file(tmp_path / 'a.pth')
        assert loaded.dtype == array.dtype and (loaded == array).all()

    def test_numpy_scalars(self, tmp_path):
        torch.save(
            dict(seed=np.int64(3), lr=np.float64(.5)), tmp_path / 'a.pth')
        assert load_checkpoint_file(tmp_path / 'a.pth') == dict(seed=3, lr=.5)

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
        assert load_checkpoint_file(tmp_path / 'old.pth').mean() == 2

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
            load_checkpoint_file(path)
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
            load_checkpoint_file(tmp_path / 'bad.pth')


class TestBroken:

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            load_checkpoint_file(tmp_path / 'none.pth')

    @pytest.mark.parametrize('share', [0, 0.01, 0.5, 0.99])
    def test_truncated(self, tmp_path, share):
        path = tmp_path / 'cut.pth'
        torch.save(dict(weight=torch.rand(1000)), path)
        data = path.read_bytes()
        path.write_bytes(data[:int(share * len(data))])
        with pytest.raises(ValueError, match='cut.pth'):
            load_checkpoint_file(path)

    def test_something_else(self, tmp_path):
        path = tmp_path / 'page.pth'
        path.write_text('<html>404 not found</html>')
        with pytest.raises(ValueError, match='not a PyTorch checkpoint'):
            load_checkpoint_file(path)
