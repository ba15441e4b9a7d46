# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from mmdensecl.engine import TerminationHook
from mmdensecl.evaluation import KNNHook, knn_hook
from mmdensecl.evaluation.knn_hook import split_labelled
from mmdensecl.testing import write_pictures

COLOURS = dict(blue=(30, 30, 220), green=(30, 200, 30), red=(220, 30, 30))


def write_classes(root, count, colours=COLOURS):
    """Images of one colour each class, with some noise."""
    rng = np.random.default_rng(0)
    for name, colour in colours.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 30, (40, 50, 3)) + colour
            Image.fromarray(pixels.astype(np.uint8)).save(
                root / name / f'{i:02d}.png'
            )


class TestSplit:
    def test_a_share_of_each_class(self, tmp_path):
        write_classes(tmp_path, 10)
        train, val = split_labelled(str(tmp_path))
        assert (
            sorted(label for _, label in train) == [0] * 8 + [1] * 8 + [2] * 8
        )
        assert len(val) == 6 and not {*train} & {*val}
        for path, label in train + val:
            assert [*COLOURS][label] in path
        assert (train, val) == split_labelled(str(tmp_path))

    def test_folders_train_and_val(self, tmp_path):
        write_classes(tmp_path / 'train', 5)
        write_classes(tmp_path / 'val', 2)
        train, val = split_labelled(str(tmp_path))
        assert len(train) == 15 and len(val) == 6
        assert all('/train/' in path for path, _ in train)
        assert all('/val/' in path for path, _ in val)

    def test_limit(self, tmp_path):
        write_classes(tmp_path, 10)
        train, val = split_labelled(str(tmp_path), max_images=4)
        assert len(train) == len(val) == 4

    def test_bad_folders(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='labelled folder'):
            split_labelled(str(tmp_path / 'none'))
        write_pictures(tmp_path / 'a/one', 3, size=4)
        with pytest.raises(ValueError, match='has 1 classes'):
            split_labelled(str(tmp_path / 'a'))
        write_classes(tmp_path / 'b/train', 2)
        write_classes(tmp_path / 'b/val', 2, dict(COLOURS, pink=(250, 9, 90)))
        with pytest.raises(ValueError, match=r"only in val: \['pink'\]"):
            split_labelled(str(tmp_path / 'b'))
        write_classes(tmp_path / 'c', 1)
        with pytest.raises(ValueError, match='0 images to vote'):
            split_labelled(str(tmp_path / 'c'))

    @pytest.mark.parametrize('name', ['interval', 'k', 'size', 'max_images'])
    def test_bad_numbers(self, name):
        with pytest.raises(ValueError, match=f'{name} must be at least 1'):
            KNNHook('x', **{name: 0})


@pytest.fixture
def train(tmp_path, tiny_cfg):
    """Function that trains two epochs and returns what came of it."""
    write_pictures(tmp_path / 'unlabeled', 8, size=40)
    write_classes(tmp_path / 'labelled', 10)

    def run(name, hooks, amp=False):
        init_default_scope('mmpretrain')
        wrapper = 'mmdensecl.BFloat16OptimWrapper' if amp else 'OptimWrapper'
        cfg = tiny_cfg()
        cfg['backbone'] = dict(cfg['backbone'], frozen_stages=1)
        cfg['data_preprocessor'] = dict(mean=[120.0] * 3, std=[60.0] * 3)
        runner = Runner(
            model=cfg,
            work_dir=str(tmp_path / name),
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=dict(type='default_collate'),
                dataset=dict(
                    type='mmdensecl.UnlabeledFolder',
                    data_root=str(tmp_path / 'unlabeled'),
                    pipeline=[
                        dict(type='mmdensecl.DecodeRGB'),
                        dict(type='mmdensecl.TwoViews', size=32),
                        dict(type='mmdensecl.PackViews'),
                    ],
                ),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(
                type=wrapper, optimizer=dict(type='SGD', lr=0.1)
            ),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
            custom_hooks=hooks,
            randomness=dict(seed=0),
            default_scope='mmpretrain',
            experiment_name=f'{tmp_path.name}_{name}',
        )
        runner.train()
        states = (
            torch.get_rng_state(),
            torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
            random.getstate(),
        )
        rows = []
        for path in (tmp_path / name).glob('*/vis_data/scalars.json'):
            rows += map(json.loads, path.read_text().splitlines())
        return runner, states, rows

    return run


@pytest.mark.parametrize('amp, workers', [(False, 1), (True, 0)])
def test_training_does_not_notice(train, tmp_path, amp, workers):
    hook = dict(
        type='mmdensecl.KNNHook',
        data_root=str(tmp_path / 'labelled'),
        k=3,
        size=32,
        num_workers=workers,
    )
    plain, states, losses = train('plain', [], amp)
    runner, seen_states, rows = train('hook', [hook], amp)
    expected, state = plain.model.state_dict(), runner.model.state_dict()
    assert expected.keys() == state.keys()
    for name, x in expected.items():
        assert torch.equal(x, state[name]), name
    assert torch.equal(states[0], seen_states[0])
    assert torch.equal(states[1], seen_states[1])
    assert states[2] == seen_states[2]
    assert [x.training for x in plain.model.modules()] == [
        x.training for x in runner.model.modules()
    ]
    assert [row['loss'] for row in losses] == [
        row['loss'] for row in rows if 'loss' in row
    ]
    # Before the first epoch and after each; colours are easy to tell.
    found = [row for row in rows if 'knn_top1' in row]
    assert [row['step'] for row in found] == [0, 2, 4]
    assert all(row['knn_top1'] == 100 for row in found)
    assert all(row['knn_chance'] == pytest.approx(100 / 3) for row in found)


def test_labels_that_mean_nothing(train, tmp_path):
    """The value is that of the features, not always 100."""
    write_pictures(tmp_path / 'noise/a', 40, size=40, seed=1)
    write_pictures(tmp_path / 'noise/b', 40, size=40, seed=2)
    # One that cannot be read is left out.
    (tmp_path / 'noise/a/broken.png').write_bytes(b'no image')
    hook = KNNHook(
        str(tmp_path / 'noise'), interval=2, k=5, size=32, num_workers=0
    )
    *_, rows = train('noise_run', [hook])
    found = [row for row in rows if 'knn_top1' in row]
    assert [row['step'] for row in found] == [0, 4]
    assert all(20 < row['knn_top1'] < 80 for row in found)


def test_more_neighbours_than_images(train, tmp_path):
    hook = KNNHook(str(tmp_path / 'labelled'), k=25)
    with pytest.raises(ValueError, match='k=25 .* has 24 to vote'):
        train('few', [hook])


class Armed(Hook):
    """Touches a file once the run trains."""

    def __init__(self, flag):
        self.flag = flag

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 0:
            self.flag.touch()


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_a_signal_to_all_processes_waits(train, tmp_path, monkeypatch, name):
    """As Slurm sends it, to the processes that read images too."""
    flag, number = tmp_path / 'flag', getattr(signal, name)

    def strike(*args):
        if flag.exists():
            flag.unlink()
            os.kill(os.getppid(), number)
            os.kill(os.getpid(), number)
        return as_rgb(*args)

    as_rgb = knn_hook.as_rgb
    monkeypatch.setattr(knn_hook, 'as_rgb', strike)
    hook = KNNHook(str(tmp_path / 'labelled'), k=3, size=32, num_workers=1)
    with pytest.raises(SystemExit) as stopped:
        train('struck', [hook, Armed(flag), TerminationHook()])
    assert stopped.value.code == 128 + number
    assert not flag.exists()
    # What the signal waited for is there: the value, and one more iteration.
    rows = []
    for path in (tmp_path / 'struck').glob('*/vis_data/scalars.json'):
        rows += map(json.loads, path.read_text().splitlines())
    assert [row['step'] for row in rows if 'knn_top1' in row] == [0, 2]
    assert (tmp_path / 'struck/iter_3.pth').is_file()
