# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Checkpoints that outlive kills, full disks and wrong files."""

import errno
import fcntl
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine import work_dir_lock
from mmdensecl.engine.hooks.checkpoint_hook import SafeCheckpointHook, save_now
from mmdensecl.engine.resume import (
    ResumeError,
    check_resumable,
    find_resumable,
    last_good,
    prepare_resume,
)
from mmdensecl.engine.safe_write import remove_unfinished, write_safely
from mmdensecl.engine.work_dir_lock import WorkDirError, lock_work_dir

ITERS = 2  # of an epoch
LARGE = dict(ballast=10**6)  # 4 MB
fork = multiprocessing.get_context('fork')


class Toy(BaseModel):
    def __init__(self, ballast):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer('ballast', torch.zeros(ballast))

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=self.linear(inputs).square().mean())


def train(
    folder, epochs=3, ballast=1000, hooks=(), schedule=None, **checkpoint
):
    """Train a toy, or go on with it; the same weights come out."""
    torch.manual_seed(0)
    pictures = [dict(inputs=x) for x in torch.randn(2 * ITERS, 4)]
    checkpoint.setdefault('type', 'mmdensecl.SafeCheckpointHook')
    checkpoint.setdefault('interval', 1)
    found = find_resumable(folder)
    Runner(
        model=Toy(ballast),
        work_dir=str(folder),
        train_dataloader=DataLoader(pictures, batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=schedule,
        default_hooks=dict(
            checkpoint=checkpoint if checkpoint['type'] else None
        ),
        custom_hooks=list(hooks),
        load_from=found,
        resume=found is not None,
        experiment_name=uuid.uuid4().hex,
    ).train()


def in_child(function, *args, **kwargs):
    """Call a function in a fork and return its exit status."""
    process = fork.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    process.join(60)
    process.kill()
    process.join()
    return process.exitcode


def files(folder):
    return sorted(x.name for x in Path(folder).iterdir() if x.suffix == '.pth')


def assert_same_end(*folders):
    """Both runs ended with the same weights and the same momentum."""
    a, b = (load_from_local(Path(x, 'epoch_3.pth')) for x in folders)
    weights = [x['state_dict']['linear.weight'] for x in (a, b)]
    assert torch.equal(*weights)
    momenta = [x['optimizer']['state'][0]['momentum_buffer'] for x in (a, b)]
    assert torch.equal(*momenta)


def name_of(path):
    return path and Path(path).name


def put_ahead(*paths):
    """As if they had been written last, or with a clock that was wrong."""
    ahead = time.time() + 1000
    for path in paths:
        os.utime(path, (ahead, ahead))


def whole_of(**changes):
    content = dict(
        meta=dict(epoch=1, iter=2, seed=0),
        state_dict={},
        message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
        optimizer=dict(state={}, param_groups=[dict(params=[0])]),
        param_schedulers=[],
    )
    return content | changes


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The folder of an uninterrupted run: epoch_1, 2 and 3."""
    folder = tmp_path_factory.mktemp('whole')
    train(folder)
    return folder


@pytest.fixture
def work(whole, tmp_path):
    """A copy of it; the pointer names the original's epoch_3."""
    return Path(shutil.copytree(whole, tmp_path / 'work'))


def train_and_die(folder, moment, **settings):
    """A run that is killed while it saves its second epoch."""
    unfinished = Path(folder, '.epoch_2.pth.saving')
    second = Path(folder, 'epoch_2.pth')
    fsync, unlink = os.fsync, Path.unlink

    def killing_fsync(handle):
        if (moment == 'written' and unfinished.exists()) or (
            moment == 'renamed' and second.exists()
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    def killing_unlink(path, *args, **kwargs):
        if moment == 'pruning' and second.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(path, *args, **kwargs)

    os.fsync, Path.unlink = killing_fsync, killing_unlink
    if moment == 'writing':
        train(folder, epochs=1, **settings)
        # The kernel stops the next one in the middle of its file.
        size = Path(folder, 'epoch_1.pth').stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    train(folder, **settings)


@pytest.mark.parametrize(
    'moment, left',
    [
        ('writing', ['epoch_1.pth']),
        ('written', ['epoch_1.pth']),
        ('renamed', ['epoch_1.pth', 'epoch_2.pth']),
        ('pruning', ['epoch_1.pth', 'epoch_2.pth']),
    ],
)
def test_killed_while_saving(whole, tmp_path, moment, left):
    """One checkpoint is kept: the last good one, at every moment."""
    folder = tmp_path / 'work'
    # Its log must not be what is too large.
    settings = dict(LARGE, max_keep_ckpts=1)
    code = in_child(train_and_die, folder, moment, **settings)
    assert -code in (signal.SIGKILL, signal.SIGXFSZ)
    assert files(folder) == left
    unfinished = folder / '.epoch_2.pth.saving'
    assert unfinished.exists() == (moment in ('writing', 'written'))
    assert name_of(find_resumable(folder)) == left[-1]
    remove_unfinished(folder)
    assert not unfinished.exists()
    train(folder, **settings)
    assert files(folder) == ['epoch_3.pth']
    assert_same_end(folder, whole)


class TestFull:
    def test_file_too_large(self, tmp_path, whole, capfd):
        work = tmp_path / 'work'

        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
            train(work, **LARGE)

        train(work, epochs=1, **LARGE)
        before = (work / 'epoch_1.pth').read_bytes()
        assert in_child(limited) == 1
        text = capfd.readouterr().err
        for words in (
            'epoch_2.pth" of 4.0 MB could not be written: File too large',
            f'The last good checkpoint is {work / "epoch_1.pth"}',
            '--resume',
        ):
            assert words in text
        assert files(work) == ['epoch_1.pth']
        assert not [*work.glob('.*.saving')]
        assert (work / 'epoch_1.pth').read_bytes() == before
        train(work, **LARGE)
        assert_same_end(work, whole)

    def test_disk_full(self, tmp_path):
        disk = tmp_path / 'disk'
        disk.mkdir()
        mount = ['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip('mounting is not permitted here')
        left = disk / 'work'
        try:
            words = r'of 4\.0 MB could not be written: No space'
            with pytest.raises(OSError, match=words) as error:
                train(left, **LARGE)
            assert error.value.errno == errno.ENOSPC
            assert files(left) == ['epoch_1.pth', 'epoch_2.pth']
            assert not [*left.glob('.*.saving')]
            # Room for two, of which one is being written.
            (left / 'epoch_1.pth').unlink()
            train(left, max_keep_ckpts=1, **LARGE)
            assert files(left) == ['epoch_3.pth']
        finally:
            subprocess.run(['umount', '-l', str(disk)], check=True)

    def test_disk_full_when_synced(self, tmp_path, monkeypatch):
        """Disks over a network tell so late."""
        write_safely(tmp_path / 'x', b'old')

        def full(handle):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        monkeypatch.setattr(os, 'fsync', full)
        with pytest.raises(OSError):
            write_safely(tmp_path / 'x', b'new')
        assert [x.name for x in tmp_path.iterdir()] == ['x']
        assert (tmp_path / 'x').read_bytes() == b'old'


class TestKeep:
    def test_what_counts(self, work):
        """The newest stay, also from before; other names are left alone."""
        for name in ('best_epoch_1.pth', 'epoch_1-a1b2.pth', 'my_1.pth'):
            shutil.copy(work / 'epoch_1.pth', work / name)
        others = set(files(work)) - {f'epoch_{i}.pth' for i in (1, 2, 3)}
        train(work, epochs=5, max_keep_ckpts=2)
        assert set(files(work)) == others | {'epoch_4.pth', 'epoch_5.pth'}

    def test_the_new_one_stays_when_it_is_the_oldest(self, work):
        """As after going back."""
        put_ahead(*work.glob('*.pth'))
        train(work, epochs=4, max_keep_ckpts=1)
        assert files(work) == ['epoch_4.pth']

    def test_out_dir(self, tmp_path):
        work, out = tmp_path / 'work', tmp_path / 'out'
        train(work, max_keep_ckpts=1, out_dir=str(out))
        assert files(out / 'work') == ['epoch_3.pth']
        assert not files(work)
        assert find_resumable(work) == str(out / 'work' / 'epoch_3.pth')

    def test_what_cannot_be_resumed_is_said_once(self, tmp_path, warned):
        train(tmp_path, save_optimizer=False)
        (said,) = warned('save_optimizer')
        assert 'cannot be resumed from' in said


class SaveAt(Hook):
    """Saves in the middle of a run, and may end it."""

    priority = 'LOWEST'

    def __init__(self, done, stop=False):
        self.done, self.stop = done, stop

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        if runner.iter + 1 == self.done:
            self.path = save_now(runner)
            if self.stop:
                raise KeyboardInterrupt


class TestSaveNow:
    @pytest.mark.parametrize('kind', [SafeCheckpointHook, None])
    def test_in_an_epoch(self, tmp_path, kind):
        saver = SaveAt(3)
        train(tmp_path, hooks=[saver], type=kind, save_begin=9)
        assert saver.path == str(tmp_path / 'iter_3.pth')
        checkpoint = load_from_local(saver.path)
        assert checkpoint['meta']['epoch'] == 1
        assert checkpoint['meta']['iter'] == 3
        assert checkpoint['optimizer']['state']
        assert not [*tmp_path.glob('.*')]

    def test_pointer_and_place(self, tmp_path):
        """It can always be resumed from."""
        work, out, saver = tmp_path / 'work', tmp_path / 'out', SaveAt(3, True)
        settings = dict(max_keep_ckpts=1, save_optimizer=False)
        with pytest.raises(KeyboardInterrupt):
            train(work, hooks=[saver], out_dir=str(out), **settings)
        assert saver.path == str(out / 'work/iter_3.pth')
        assert (work / 'last_checkpoint').read_text() == saver.path
        assert files(out / 'work') == ['iter_3.pth']
        assert find_resumable(work) == saver.path


class TestFind:
    def test_the_newest(self, work, warned):
        """Here, though the pointer still names where it was copied from."""
        assert find_resumable(work) == str(work / 'epoch_3.pth')
        assert str(work / 'epoch_3.pth') in last_good(work)
        assert not warned()

    @pytest.mark.parametrize(
        'breaks, reason',
        [
            (cut_off, 'is truncated or not a PyTorch checkpoint'),
            (lambda path: path.write_bytes(b''), 'is empty'),
            (
                lambda path: torch.save(dict(state_dict={}), path),
                'lacks meta, message_hub, optimizer',
            ),
            (lambda path: torch.save([1], path), 'lacks meta'),
        ],
        ids=range(4),
    )
    def test_newest_is_passed_over(self, work, warned, breaks, reason):
        breaks(work / 'epoch_3.pth')
        assert find_resumable(work) == str(work / 'epoch_2.pth')
        (said,) = warned()
        assert reason in said
        assert f'"{work / "epoch_3.pth"}"' in said
        assert f'passed over for "{work / "epoch_2.pth"}"' in said
        assert 'epoch_3.pth' in files(work)

    @pytest.mark.parametrize(
        'changes, reason',
        [
            (dict(meta=dict(epoch=-5, iter=0)), 'of which epoch it is: -5'),
            (dict(meta=dict(epoch='7', iter=0)), "which epoch it is: '7'"),
            (dict(meta=dict(epoch=10**30, iter=0)), 'of which epoch it is'),
            (dict(meta=dict(epoch=0, iter=True)), 'which iter it is: True'),
            (dict(meta=dict(epoch=1, iter=2, seed=10**30)), 'the seed of its'),
            (dict(message_hub=dict(log_scalars=3)), 'message_hub does not'),
            (dict(state_dict=[]), 'its state_dict is none'),
            (dict(optimizer=dict(state={})), 'its optimizer has no param'),
            (dict(optimizer=[]), 'its optimizer has no param_groups'),
            (dict(param_schedulers=['a']), 'param_schedulers are no states'),
        ],
        ids=range(10),
    )
    def test_malformed(self, tmp_path, changes, reason):
        """One line, not a traceback of mmengine or torch."""
        torch.save(whole_of(), tmp_path / 'whole.pth')
        check_resumable(tmp_path / 'whole.pth')
        torch.save(whole_of(**changes), tmp_path / 'epoch_1.pth')
        with pytest.raises(ResumeError, match=re.escape(reason)):
            find_resumable(tmp_path)

    @pytest.mark.parametrize(
        'text',
        [b'', b'nowhere/epoch_9.pth', b'epoch_1.pth', b'\xff\xfe'],
    )
    def test_the_file_written_last_is_taken(self, work, text):
        """Whatever the pointer says, which is written after its file.

        A run that went back, by --resume epoch_1.pth, wrote epoch_2 last.
        """
        (work / 'last_checkpoint').write_bytes(text)
        assert name_of(find_resumable(work)) == 'epoch_3.pth'
        put_ahead(work / 'epoch_2.pth')
        assert name_of(find_resumable(work)) == 'epoch_2.pth'

    def test_none_can_be_read(self, work):
        for name in files(work):
            cut_off(work / name)
        with pytest.raises(ResumeError) as error:
            find_resumable(work)
        for words in (*files(work), '--work-dir'):
            assert words in str(error.value)
        assert 'no checkpoint to resume from' in last_good(work)

    @pytest.mark.parametrize('text', ['', '/gone/epoch_3.pth'])
    def test_what_was_there_is_gone(self, work, text):
        """Never taken for a run that has just begun."""
        for name in files(work):
            (work / name).unlink()
        (work / 'last_checkpoint').write_text(text)
        with pytest.raises(ResumeError, match='remove last_checkpoint'):
            find_resumable(work)


class TestPrepareResume:
    @staticmethod
    def prepared(work_dir, **settings):
        """Whether it resumes, and from where."""
        cfg = Config(dict(work_dir=str(work_dir), resume=True, **settings))
        prepare_resume(cfg)
        return cfg.resume, cfg.get('load_from')

    def test_the_newest(self, work):
        assert self.prepared(work) == (True, str(work / 'epoch_3.pth'))
        assert self.prepared(work / 'new') == (False, None)

    def test_a_file_that_the_user_names(self, work):
        path = work / 'epoch_2.pth'
        named = dict(load_from=str(path))
        assert self.prepared('elsewhere', **named) == (True, str(path))
        torch.save(dict(state_dict={}, meta={}), path)
        with pytest.raises(ResumeError, match='lacks message_hub, optimizer'):
            self.prepared('elsewhere', **named)
        path.unlink()
        with pytest.raises(ResumeError, match='epoch_2.pth'):
            self.prepared('elsewhere', **named)
        # An address is left to mmengine.
        found = self.prepared('elsewhere', load_from='s3://bucket/a.pth')
        assert found == (True, 's3://bucket/a.pth')

    def test_state_of_the_schedule(self, tmp_path, warned):
        """Without it the learning rate would begin anew, at its highest."""
        schedule = dict(type='CosineAnnealingLR', T_max=9)
        train(tmp_path, epochs=1, schedule=schedule)
        train(tmp_path, schedule=schedule, save_param_scheduler=False)
        _, found = self.prepared(tmp_path, param_scheduler=schedule)
        assert name_of(found) == 'epoch_1.pth'
        assert warned('lacks param_schedulers (save_optimizer and save_')
        named = dict(load_from=str(tmp_path / 'epoch_3.pth'))
        with pytest.raises(ResumeError, match='lacks param_schedulers'):
            self.prepared(tmp_path, param_scheduler=schedule, **named)


def hold(folder, ready):
    lock_work_dir(folder)
    ready.put(True)
    time.sleep(60)


class TestLock:
    """A run beside another, and after a kill, is in test_faults.py."""

    @pytest.fixture
    def holder(self, tmp_path):
        """Function that starts a process which has the lock."""
        started = []

        def make():
            ready = fork.SimpleQueue()
            started.append(fork.Process(target=hold, args=(tmp_path, ready)))
            started[-1].start()
            return ready.get() and started[-1]

        yield make
        for process in started:
            process.kill()
            process.join()

    @staticmethod
    def try_lock(folder):
        """In another process: this one keeps what it gets."""
        with fork.Pool(1) as pool:
            return pool.apply(lock_work_dir, (folder,))

    def test_a_restart_waits(self, holder, tmp_path, monkeypatch):
        process = holder()
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
        fork.Process(
            target=lambda: (time.sleep(0.5), os.kill(process.pid, 9))
        ).start()
        assert self.try_lock(tmp_path)
        monkeypatch.setattr(work_dir_lock, 'PATIENCE', 0)
        holder()
        with pytest.raises(WorkDirError):
            self.try_lock(tmp_path)

    def test_ranks(self, holder, tmp_path, monkeypatch):
        holder()
        for launcher, rank in (('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID')):
            monkeypatch.setenv(rank, '3')
            assert not lock_work_dir(tmp_path, launcher)
            monkeypatch.setenv(rank, '0')
            with pytest.raises(WorkDirError):
                lock_work_dir(tmp_path, launcher)
        # Without a launcher there is one process, whatever srun says.
        monkeypatch.setenv('RANK', '3')
        with pytest.raises(WorkDirError):
            lock_work_dir(tmp_path)

    def test_without_locks(self, tmp_path, monkeypatch, warned):
        """As on some network disks."""

        def no_locks(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, 'flock', no_locks)
        assert not lock_work_dir(tmp_path)
        assert warned('cannot be locked')
