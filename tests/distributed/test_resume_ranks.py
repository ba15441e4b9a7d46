# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""All ranks resume from one checkpoint, and stay until it is written."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from ranks import run_ranks

from mmdensecl.engine.hooks.checkpoint_hook import save_now
from mmdensecl.engine.resume import ResumeError, prepare_resume

WHOLE = dict(
    meta=dict(epoch=3, iter=6),
    state_dict={},
    message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
    optimizer=dict(state={}, param_groups=[dict(params=[])]),
)
# Of the config of rank 0, below its work_dir; the other rank's machine does
# not see the files yet.
CASES = dict(
    chosen=('whole', {}),
    empty=('empty', {}),
    named=('whole', dict(load_from='epoch_3.pth')),
    wrong=('no\0path', {}),
)


def choose(rank, world_size, folder):
    """What comes of each case."""
    found = {}
    for case, (work_dir, keys) in CASES.items():
        work_dir = folder / work_dir if rank == 0 else folder / 'stale'
        cfg = Config(dict(launcher='pytorch', work_dir=str(work_dir)))
        for key, value in keys.items():
            cfg[key] = str(work_dir / value)
            cfg.param_scheduler = dict(type='CosineAnnealingLR')
        try:
            prepare_resume(cfg)
            found[case] = cfg.resume, cfg.load_from
        except ValueError as error:
            found[case] = isinstance(error, ResumeError), str(error)
    return found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('resume')
    for name in ('whole', 'empty'):
        (folder / name).mkdir()
    torch.save(WHOLE, folder / 'whole/epoch_3.pth')
    (folder / 'empty/epoch_3.pth').write_bytes(b'')
    return folder


def test_rank_0_chooses_for_all(folder):
    """Or refuses for all: nobody waits for a choice that does not come."""
    first, other = run_ranks(choose, 2, folder, folder)
    assert first == other
    assert first['chosen'] == (True, str(folder / 'whole/epoch_3.pth'))
    for case, expected, words in (
        ('empty', True, 'epoch_3.pth" is empty'),
        # Without the schedule that the config asks for.
        ('named', True, 'lacks param_schedulers'),
        ('wrong', False, 'null byte'),
    ):
        refused, why = first[case]
        assert refused is expected and words in why


def save(rank, world_size, folder):

    def save_checkpoint(folder, name, **kwargs):
        if rank == 0:  # mmengine's Runner has only it save
            time.sleep(1)
            Path(folder, name).touch()

    runner = SimpleNamespace(
        hooks=[],
        iter=4,
        work_dir=str(folder),
        save_checkpoint=save_checkpoint,
    )
    path = save_now(runner)
    return Path(path).exists() and (folder / 'last_checkpoint').read_text()


def test_nobody_leaves_before_it_is_written(tmp_path):
    found = run_ranks(save, 2, tmp_path, tmp_path)
    assert found == [str(tmp_path / 'iter_5.pth')] * 2
