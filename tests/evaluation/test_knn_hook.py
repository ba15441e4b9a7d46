# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
import os
import signal

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
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


def test_split(tmp_path):
    """A share of each class, or what lies in folders train and val."""
    write_classes(tmp_path / 'a', 10)
    root = str(tmp_path / 'a')
    train, val = split_labelled(root)
    assert [label for _, label in train].count(1) == 8
    assert len(train) == 24 and len(val) == 6 and not {*train} & {*val}
    for path, label in train + val:
        assert [*COLOURS][label] in path
    assert (train, val) == split_labelled(root)
    assert [len(x) for x in split_labelled(root, max_images=4)] == [4, 4]
    write_classes(tmp_path / 'b/train', 5)
    write_classes(tmp_path / 'b/val', 2)
    train, val = split_labelled(str(tmp_path / 'b'))
    assert len(train) == 15 and len(val) == 6
    assert all('/train/' in path for path, _ in train)
    assert all('/val/' in path for path, _ in val)
    write_classes(tmp_path / 'b/val', 2, dict(pink=(250, 9, 90)))
    with pytest.raises(ValueError, match=r"only in val: \['pink'\]"):
        split_labelled(str(tmp_path / 'b'))
    with pytest.raises(FileNotFoundError, match='labelled folder'):
        split_labelled(str(tmp_path / 'none'))
    write_classes(tmp_path / 'c', 1)
    with pytest.raises(ValueError, match='0 images to vote'):
        split_labelled(str(tmp_path / 'c'))
    for name in ('interval', 'k', 'size', 'max_images'):
        with pytest.raises(ValueError, match=f'{name} must be at least 1'):
            KNNHook('x', **{name: 0})


@pytest.fixture
def labelled(tmp_path):
    write_classes(tmp_path / 'labelled', 10)
    return str(tmp_path / 'labelled')


@pytest.mark.parametrize(
    'wrapper, workers',
    [('OptimWrapper', 1), ('mmdensecl.BFloat16OptimWrapper', 0)],
)
def test_training_does_not_notice(train, labelled, wrapper, workers):
    hook = dict(
        type='mmdensecl.KNNHook',
        data_root=labelled,
        k=3,
        size=32,
        num_workers=workers,
    )
    plain, drawn, losses = train('plain', [], wrapper)
    runner, seen, rows = train('hook', [hook], wrapper)
    expected, state = plain.model.state_dict(), runner.model.state_dict()
    assert expected.keys() == state.keys()
    for name, x in expected.items():
        assert torch.equal(x, state[name]), name
    assert drawn == seen
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


def test_labels_that_mean_nothing(train, labelled, tmp_path):
    """The value is that of the features, not always 100."""
    write_pictures(tmp_path / 'noise/a', 40, size=40, seed=1)
    write_pictures(tmp_path / 'noise/b', 40, size=40, seed=2)
    # One that cannot be read is left out.
    (tmp_path / 'noise/a/broken.png').write_bytes(b'no image')
    hook = KNNHook(
        str(tmp_path / 'noise'), interval=2, k=5, size=32, num_workers=0
    )
    with pytest.raises(ValueError, match='k=99 .* has [0-9]+ to vote'):
        train('few', [KNNHook(labelled, k=99)])
    *_, rows = train('noise_run', [hook])
    found = [row for row in rows if 'knn_top1' in row]
    assert [row['step'] for row in found] == [0, 4]
    assert all(20 < row['knn_top1'] < 80 for row in found)


class Armed(Hook):
    """Touches a file once the run trains."""

    def __init__(self, flag):
        self.flag = flag

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 0:
            self.flag.touch()


def test_a_signal_to_all_processes_waits(
    train, labelled, tmp_path, monkeypatch
):
    """As Slurm sends it, to the processes that read images too."""
    flag, number = tmp_path / 'flag', signal.SIGTERM

    def strike(*args):
        if flag.exists():
            flag.unlink()
            os.kill(os.getppid(), number)
            os.kill(os.getpid(), number)
        return as_rgb(*args)

    as_rgb = knn_hook.as_rgb
    monkeypatch.setattr(knn_hook, 'as_rgb', strike)
    hook = KNNHook(labelled, k=3, size=32, num_workers=1)
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
