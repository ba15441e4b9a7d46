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


def choose(rank, world_size, work_dir, keys, relative):
    # The other rank's machine does not see the files yet.
    folder = work_dir if rank == 0 else work_dir / 'stale'
    cfg = Config(dict(launcher='pytorch', work_dir=str(folder), **keys))
    for key, value in relative.items():
        cfg[key] = str(folder / value)
    try:
        prepare_resume(cfg)
    except ValueError as error:
        return isinstance(error, ResumeError), str(error)
    return [cfg.resume, cfg.load_from]


@pytest.fixture
def work_dir(tmp_path):
    folder = tmp_path / 'work'
    folder.mkdir()
    (tmp_path / 'ranks').mkdir()
    return folder


def choose_all(work_dir, keys=(), /, **relative):
    """What comes of it, on each of two ranks."""
    return run_ranks(
        choose, 2, work_dir.parent / 'ranks', work_dir, dict(keys), relative
    )


@pytest.fixture
def path(work_dir):
    path = work_dir / 'epoch_3.pth'
    torch.save(
        dict(
            meta=dict(epoch=3, iter=6),
            state_dict={},
            message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
            optimizer=dict(state={}, param_groups=[dict(params=[])]),
        ),
        path,
    )
    return path


def test_rank_0_chooses_for_all(work_dir, path):
    assert choose_all(work_dir) == [[True, str(path)]] * 2


def test_nothing_to_resume_from_ends_all(work_dir):
    (work_dir / 'epoch_3.pth').write_bytes(b'')
    (refused, why), other = choose_all(work_dir)
    assert refused and 'epoch_3.pth" is empty' in why
    assert other == (refused, why)


def test_a_named_file_without_the_schedule_ends_all(work_dir, path):
    (refused, why), other = choose_all(
        work_dir,
        dict(param_scheduler=dict(type='CosineAnnealingLR')),
        load_from=path.name,
    )
    assert refused and 'lacks param_schedulers' in why
    assert other == (refused, why)


def test_any_other_error_of_rank_0_ends_all(work_dir):
    """Nobody waits for a choice that does not come."""
    (refused, why), other = choose_all(work_dir, work_dir='no\0path')
    assert not refused and 'null byte' in why
    assert other == (refused, why)


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
            save_checkpoint=save_checkpoint,
        )
    )
    return Path(path).exists() and (work_dir / 'last_checkpoint').read_text()


def test_nobody_leaves_before_it_is_written(work_dir):
    results = run_ranks(save, 2, work_dir.parent / 'ranks', work_dir)
    assert results == [str(work_dir / 'iter_5.pth')] * 2
