# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""All ranks go on from one checkpoint, and stay until it is written."""
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from ranks import run_ranks

from mmdensecl.engine.hooks.checkpoint_hook import save_now
from mmdensecl.engine.resume import ResumeError, prepare_resume


def choose(rank, world_size, work_dir):
    # The other rank's machine does not see the file yet.
    cfg = Config(
        dict(
            launcher='pytorch',
            resume=True,
            work_dir=str(work_dir if rank == 0 else work_dir / 'stale')))
    try:
        prepare_resume(cfg)
    except ResumeError:
        return 'says why'
    except SystemExit as error:
        return error.code
    return [cfg.resume, cfg.load_from]


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / 'work'
    folder.mkdir()
    (tmp_path / 'ranks').mkdir()
    return folder


def test_rank_0_chooses_for_all(work_dir):
    path = work_dir / 'epoch_3.pth'
    torch.save(
        dict(
            meta=dict(epoch=3, iter=6),
            state_dict={},
            message_hub={},
            optimizer={}), path)
    results = run_ranks(choose, 2, work_dir.parent / 'ranks', work_dir)
    assert results == [[True, str(path)]] * 2


def test_nothing_to_resume_from_ends_all(work_dir):
    (work_dir / 'epoch_3.pth').write_bytes(b'')
    results = run_ranks(choose, 2, work_dir.parent / 'ranks', work_dir)
    assert results == ['says why', 2]


def save(rank, world_size, work_dir):

    def save_checkpoint(folder, name, **kwargs):
        if rank == 0:  # mmengine's Runner has only it save
            time.sleep(1)
            Path(folder, name).touch()

    path = save_now(
        SimpleNamespace(
            hooks=[],
            iter=4,
            work_dir=str(work_dir),
            save_checkpoint=save_checkpoint))
    return Path(path).exists() and (work_dir / 'last_checkpoint').read_text()


def test_nobody_leaves_before_it_is_written(work_dir):
    results = run_ranks(save, 2, work_dir.parent / 'ranks', work_dir)
    assert results == [str(work_dir / 'iter_5.pth')] * 2
