# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Checkpoints that outlive kills, full disks and wrong files."""

import errno
import fcntl
import multiprocessing
import os
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
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine import work_dir_lock
from mmdensecl.engine.hooks.checkpoint_hook import SafeCheckpointHook, save_now
from mmdensecl.engine.resume import (
    ResumeError,
    find_resumable,
    last_good,
    prepare_resume,
)
from mmdensecl.engine.safe_write import remove_unfinished, write_safely
from mmdensecl.engine.work_dir_lock import WorkDirError, lock_work_dir

ITERS = 2  # of an epoch


class Toy(BaseModel):
    def __init__(self, ballast=1000):
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
    runner = Runner(
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
    )
    runner.train()
    return runner


def in_child(function, *args, **kwargs):
    """Call a function in a fork and return its exit status."""
    process = start(function, *args, **kwargs)
    process.join(60)
    process.kill()
    process.join()
    return process.exitcode


def start(function, *args, **kwargs):
    process = multiprocessing.get_context('fork').Process(
        target=function, args=args, kwargs=kwargs
    )
    process.start()
    return process


def files(folder):
    return sorted(x.name for x in Path(folder).iterdir() if x.suffix == '.pth')


def weights(folder, name):
    checkpoint = load_from_local(Path(folder) / name)
    return [
        checkpoint['state_dict']['linear.weight'],
        checkpoint['optimizer']['state'][0]['momentum_buffer'],
    ]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def name_of(path):
    return path and Path(path).name


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


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    original = MMLogger.callHandlers

    def record(self, entry):
        if entry.levelname == 'WARNING':
            seen.append(entry.getMessage())
        original(self, entry)

    monkeypatch.setattr(MMLogger, 'callHandlers', record)
    return seen


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder, moment, **checkpoint):
    """A run that is killed while it saves its second epoch."""
    unfinished = Path(folder, '.epoch_2.pth.saving')
    second = Path(folder, 'epoch_2.pth')
    fsync, unlink = os.fsync, Path.unlink

    def killing_fsync(handle):
        if (moment == 'written' and unfinished.exists()) or (
            moment == 'renamed' and second.exists()
        ):
            die()
        fsync(handle)

    def killing_unlink(path, *args, **kwargs):
        if moment == 'pruning' and second.exists():
            die()
        unlink(path, *args, **kwargs)

    os.fsync, Path.unlink = killing_fsync, killing_unlink
    if moment == 'writing':
        train(folder, epochs=1, **checkpoint)
        # The kernel stops the next one in the middle of its file.
        size = Path(folder, 'epoch_1.pth').stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    train(folder, **checkpoint)


class TestKill:
    @pytest.mark.parametrize(
        'moment, left',
        [
            ('writing', ['epoch_1.pth']),
            ('written', ['epoch_1.pth']),
            ('renamed', ['epoch_1.pth', 'epoch_2.pth']),
            ('pruning', ['epoch_1.pth', 'epoch_2.pth']),
        ],
    )
    def test_while_saving(self, whole, tmp_path, moment, left):
        """One checkpoint is kept: the last good one, at every moment."""
        folder = tmp_path / 'work'
        # Its log must not be what is too large.
        code = in_child(
            train_and_die, folder, moment, max_keep_ckpts=1, ballast=10**6
        )
        assert -code in (signal.SIGKILL, signal.SIGXFSZ)
        assert files(folder) == left
        unfinished = folder / '.epoch_2.pth.saving'
        assert unfinished.exists() == (moment in ('writing', 'written'))
        assert name_of(find_resumable(folder)) == left[-1]
        remove_unfinished(folder)
        assert not unfinished.exists()
        train(folder, max_keep_ckpts=1, ballast=10**6)
        assert files(folder) == ['epoch_3.pth']
        assert_same(
            weights(folder, 'epoch_3.pth'), weights(whole, 'epoch_3.pth')
        )


class TestFull:
    def test_file_too_large(self, tmp_path, whole, capfd):
        work = tmp_path / 'work'

        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
            train(work, ballast=10**6)

        train(work, epochs=1, ballast=10**6)
        before = (work / 'epoch_1.pth').read_bytes()
        assert in_child(limited) == 1
        text = capfd.readouterr().err
        assert 'epoch_2.pth" of 4.0 MB could not be written: File too' in text
        assert f'The last good checkpoint is {work / "epoch_1.pth"}' in text
        assert '--resume' in text
        assert files(work) == ['epoch_1.pth']
        assert not [*work.glob('.*.saving')]
        assert (work / 'epoch_1.pth').read_bytes() == before
        train(work, ballast=10**6)
        assert_same(
            weights(work, 'epoch_3.pth'), weights(whole, 'epoch_3.pth')
        )

    def test_disk_full(self, tmp_path):
        disk = tmp_path / 'disk'
        disk.mkdir()
        done = subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', 'size=10m', 'tmpfs', str(disk)],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip('mounting is not permitted here')
        try:
            with pytest.raises(OSError, match='No space left') as error:
                train(disk / 'work', ballast=10**6)
            assert error.value.errno == errno.ENOSPC
            left = disk / 'work'
            assert files(left) == ['epoch_1.pth', 'epoch_2.pth']
            assert not [*left.glob('.*.saving')]
            # Room for two, of which one is being written.
            (left / 'epoch_1.pth').unlink()
            train(left, ballast=10**6, max_keep_ckpts=1)
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
    def test_newest_stay(self, tmp_path):
        train(tmp_path, epochs=5, max_keep_ckpts=2)
        assert files(tmp_path) == ['epoch_4.pth', 'epoch_5.pth']

    def test_what_counts(self, work):
        """Also files from before; not other names."""
        for name in ('best_epoch_1.pth', 'epoch_1-a1b2.pth', 'my_1.pth'):
            shutil.copy(work / 'epoch_1.pth', work / name)
        others = set(files(work)) - {f'epoch_{i}.pth' for i in (1, 2, 3)}
        train(work, epochs=4, max_keep_ckpts=2)
        assert set(files(work)) == others | {'epoch_3.pth', 'epoch_4.pth'}

    def test_names_of_the_template(self, tmp_path):
        (tmp_path / 'my.1.pth').write_bytes(b'')
        train(
            tmp_path, epochs=4, max_keep_ckpts=1, filename_tmpl='my-{:02d}.pth'
        )
        assert files(tmp_path) == ['my-04.pth', 'my.1.pth']
        assert name_of(find_resumable(tmp_path)) == 'my-04.pth'

    def test_the_new_one_stays_when_it_is_the_oldest(self, work):
        """As after going back, or with a clock that was wrong."""
        ahead = time.time() + 1000
        for name in ('epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth'):
            os.utime(work / name, (ahead, ahead))
        train(work, epochs=4, max_keep_ckpts=1)
        assert files(work) == ['epoch_4.pth']

    def test_out_dir(self, tmp_path):
        out = tmp_path / 'out'
        train(tmp_path / 'work', max_keep_ckpts=1, out_dir=str(out))
        assert files(out / 'work') == ['epoch_3.pth']
        assert not files(tmp_path / 'work')
        assert find_resumable(tmp_path / 'work') == str(
            out / 'work' / 'epoch_3.pth'
        )

    @pytest.mark.parametrize(
        'elsewhere',
        [
            dict(out_dir='s3://bucket'),
            dict(backend_args=dict(backend='petrel')),
            dict(file_client_args=dict(backend='petrel')),
        ],
    )
    def test_other_places_are_left_to_mmengine(self, elsewhere):
        hook = SafeCheckpointHook(interval=2, max_keep_ckpts=3, **elsewhere)
        assert hook.max_keep_ckpts == 3
        assert hook.backend_args == elsewhere.get('backend_args')

    def test_what_cannot_be_resumed_is_said_once(self, tmp_path, warnings):
        train(tmp_path, save_optimizer=False)
        (said,) = [x for x in warnings if 'save_optimizer' in x]
        assert 'cannot be resumed from' in said


class SaveAt(Hook):
    priority = 'LOWEST'

    def __init__(self, done):
        self.done = done

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        if runner.iter + 1 == self.done:
            self.path = save_now(runner)


class TestSaveNow:
    @pytest.mark.parametrize(
        'kind', [SafeCheckpointHook, CheckpointHook, None]
    )
    def test_in_an_epoch(self, tmp_path, kind):
        saver = SaveAt(3)
        train(tmp_path, hooks=[saver], type=kind, save_begin=9)
        assert saver.path == str(tmp_path / 'iter_3.pth')
        checkpoint = load_from_local(saver.path)
        assert checkpoint['meta']['epoch'] == 1
        assert checkpoint['meta']['iter'] == 3
        assert checkpoint['optimizer']['state']
        assert not [*tmp_path.glob('.*')]

    def test_counts_as_one(self, tmp_path):
        train(tmp_path, hooks=[SaveAt(5)], max_keep_ckpts=2)
        assert files(tmp_path) == ['epoch_3.pth', 'iter_5.pth']

    def test_pointer_and_place(self, tmp_path):

        class Stop(SaveAt):
            def after_train_iter(self, runner, *args, **kwargs):
                super().after_train_iter(runner, *args, **kwargs)
                if runner.iter + 1 == self.done:
                    raise KeyboardInterrupt

        stop = Stop(3)
        with pytest.raises(KeyboardInterrupt):
            train(
                tmp_path / 'work',
                hooks=[stop],
                max_keep_ckpts=1,
                save_optimizer=False,
                out_dir=str(tmp_path / 'out'),
            )
        assert stop.path == str(tmp_path / 'out/work/iter_3.pth')
        assert (tmp_path / 'work/last_checkpoint').read_text() == stop.path
        assert files(tmp_path / 'out/work') == ['iter_3.pth']
        # It can always be resumed from.
        assert find_resumable(tmp_path / 'work') == stop.path


class TestFind:
    def test_nothing_saved_yet(self, tmp_path):
        assert find_resumable(tmp_path) is None
        assert find_resumable(tmp_path / 'new') is None
        assert last_good(tmp_path) == 'There is no checkpoint yet.'

    def test_the_newest(self, work, warnings):
        """Here, though the pointer still names where it was copied from."""
        assert find_resumable(work) == str(work / 'epoch_3.pth')
        assert str(work / 'epoch_3.pth') in last_good(work)
        assert not warnings

    @pytest.mark.parametrize(
        'breaks, reason',
        [
            (cut_off, 'is truncated or not a PyTorch checkpoint'),
            (lambda path: path.write_bytes(b''), 'is empty'),
            (lambda path: path.write_bytes(b'garbage'), 'PyTorch checkpoint'),
            (
                lambda path: torch.save(dict(state_dict={}), path),
                'lacks meta, message_hub, optimizer',
            ),
            (lambda path: torch.save([1], path), 'lacks meta'),
        ],
        ids=range(5),
    )
    def test_newest_is_passed_over(self, work, warnings, breaks, reason):
        breaks(work / 'epoch_3.pth')
        assert find_resumable(work) == str(work / 'epoch_2.pth')
        (said,) = warnings
        assert reason in said
        assert f'"{work / "epoch_3.pth"}"' in said
        assert f'passed over for "{work / "epoch_2.pth"}"' in said
        assert 'epoch_3.pth' in files(work)

    @pytest.mark.parametrize(
        'text',
        [
            '',
            'nowhere/epoch_9.pth',
            'epoch_',
            'gone.pth',
            '\0\0\0',
            b'\xff\xfe',
            'x' * 5000,
            'a\nb',
        ],
        ids=range(8),
    )
    def test_a_pointer_that_makes_no_sense(self, work, text):
        """The file written last is taken."""
        pointer = work / 'last_checkpoint'
        pointer.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert name_of(find_resumable(work)) == 'epoch_3.pth'
        ahead = time.time() + 1000
        os.utime(work / 'epoch_2.pth', (ahead, ahead))
        assert name_of(find_resumable(work)) == 'epoch_2.pth'

    def test_the_last_written_counts(self, work):
        """A pointer is written after its file, or not at all.

        A run that went back, by --resume epoch_1.pth, wrote epoch_2 last.
        """
        (work / 'last_checkpoint').write_text(str(work / 'epoch_1.pth'))
        assert name_of(find_resumable(work)) == 'epoch_3.pth'
        ahead = time.time() + 1000
        os.utime(work / 'epoch_2.pth', (ahead, ahead))
        assert name_of(find_resumable(work)) == 'epoch_2.pth'

    def test_elsewhere_on_the_disk(self, work, tmp_path):
        """Where the checkpoint hook has an out_dir: the newest there."""
        (tmp_path / 'run').mkdir()
        pointer = tmp_path / 'run' / 'last_checkpoint'
        pointer.write_text(str(work / 'epoch_2.pth'))
        assert find_resumable(tmp_path / 'run') == str(work / 'epoch_3.pth')

    def test_none_can_be_read(self, work):
        for name in files(work):
            cut_off(work / name)
        with pytest.raises(ResumeError) as error:
            find_resumable(work)
        for name in files(work):
            assert name in str(error.value)
        assert '--work-dir' in str(error.value)
        assert 'no checkpoint to resume from' in last_good(work)

    @pytest.mark.parametrize('text', ['', '/gone/epoch_3.pth'])
    def test_what_was_there_is_gone(self, work, text):
        """Never taken for a run that has just begun."""
        for name in files(work):
            (work / name).unlink()
        (work / 'last_checkpoint').write_text(text)
        with pytest.raises(ResumeError, match='remove last_checkpoint'):
            find_resumable(work)

    def test_elsewhere_is_for_mmengine_to_find(self, tmp_path):
        (tmp_path / 'last_checkpoint').write_text('s3://bucket/epoch_3.pth')
        assert find_resumable(tmp_path) == 's3://bucket/epoch_3.pth'


class TestPrepareResume:
    def test_the_newest(self, work):
        cfg = Config(dict(work_dir=str(work), launcher='none', resume=True))
        prepare_resume(cfg)
        assert (cfg.resume, cfg.load_from) == (True, str(work / 'epoch_3.pth'))
        cfg = Config(dict(work_dir=str(work / 'new'), resume=True))
        prepare_resume(cfg)
        assert (cfg.resume, cfg.load_from) == (False, None)

    def test_a_file_that_the_user_names(self, work):
        path = work / 'epoch_2.pth'
        cfg = Config(
            dict(work_dir='elsewhere', resume=True, load_from=str(path))
        )
        prepare_resume(cfg)
        assert (cfg.resume, cfg.load_from) == (True, str(path))
        torch.save(dict(state_dict={}, meta={}), path)
        with pytest.raises(ResumeError, match='lacks message_hub, optimizer'):
            prepare_resume(cfg)
        path.unlink()
        with pytest.raises(ResumeError, match='epoch_2.pth'):
            prepare_resume(cfg)

    def test_state_of_the_schedule(self, tmp_path, warnings):
        """Without it the learning rate would begin anew, at its highest."""
        schedule = dict(type='CosineAnnealingLR', T_max=9)
        train(tmp_path, epochs=1, schedule=schedule)
        train(tmp_path, schedule=schedule, save_param_scheduler=False)
        cfg = dict(work_dir=str(tmp_path), param_scheduler=schedule)
        found = Config(cfg)
        prepare_resume(found)
        assert name_of(found.load_from) == 'epoch_1.pth'
        assert any(
            'lacks param_schedulers (save_optimizer and save_' in x
            for x in warnings
        )
        with pytest.raises(ResumeError, match='lacks param_schedulers'):
            prepare_resume(
                Config(dict(cfg, load_from=str(tmp_path / 'epoch_3.pth')))
            )

    def test_an_address_is_left_to_mmengine(self):
        cfg = Config(
            dict(resume=True, work_dir='x', load_from='s3://bucket/a.pth')
        )
        prepare_resume(cfg)
        assert cfg.resume and cfg.load_from == 's3://bucket/a.pth'


def hold(folder, ready, worker=False):
    lock_work_dir(folder)
    if worker:  # as a data loader's, which lives on
        multiprocessing.get_context('fork').Process(
            target=time.sleep, args=(60,)
        ).start()
    ready.put(multiprocessing.active_children()[0].pid if worker else 0)
    time.sleep(60)


class TestLock:
    @pytest.fixture
    def holder(self, tmp_path):
        """Function that starts a process which has the lock."""
        started = []

        def make(**kwargs):
            ready = multiprocessing.get_context('fork').SimpleQueue()
            process = multiprocessing.get_context('fork').Process(
                target=hold, args=(tmp_path, ready), kwargs=kwargs
            )
            process.start()
            started.append(process)
            return process, ready.get()

        yield make
        for process in started:
            process.kill()
            process.join()

    @staticmethod
    def try_lock(folder):
        """In another process: this one keeps what it gets."""
        with multiprocessing.get_context('fork').Pool(1) as pool:
            return pool.apply(lock_work_dir, (folder,))

    def test_a_second_run_names_the_first(self, holder, tmp_path):
        process, _ = holder()
        for _ in range(2):
            with pytest.raises(WorkDirError) as error:
                self.try_lock(tmp_path)
            assert f'process {process.pid} on ' in str(error.value)
            assert '--work-dir' in str(error.value)

    def test_killed_with_its_workers_alive(self, holder, tmp_path):
        process, worker = holder(worker=True)
        try:
            process.kill()
            process.join()
            os.kill(worker, 0)  # lives
            assert self.try_lock(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)

    def test_a_restart_waits(self, holder, tmp_path, monkeypatch):
        process, _ = holder()
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
        end = multiprocessing.get_context('fork').Process(
            target=lambda: (time.sleep(0.5), os.kill(process.pid, 9))
        )
        end.start()
        assert self.try_lock(tmp_path)
        monkeypatch.setattr(work_dir_lock, 'PATIENCE', 0)
        holder()
        with pytest.raises(WorkDirError):
            self.try_lock(tmp_path)

    def test_ranks(self, holder, tmp_path, monkeypatch):
        holder()
        monkeypatch.setenv('RANK', '3')
        assert not lock_work_dir(tmp_path, 'pytorch')
        monkeypatch.setenv('SLURM_PROCID', '3')
        assert not lock_work_dir(tmp_path, 'slurm')
        for launcher, rank in (('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID')):
            monkeypatch.setenv(rank, '0')
            with pytest.raises(WorkDirError):
                lock_work_dir(tmp_path, launcher)
        # Without a launcher there is one process, whatever srun says.
        monkeypatch.setenv('RANK', '3')
        with pytest.raises(WorkDirError):
            lock_work_dir(tmp_path)

    def test_without_locks(self, tmp_path, monkeypatch, warnings):
        """As on some network disks."""

        def no_locks(*_):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, 'flock', no_locks)
        assert not lock_work_dir(tmp_path)
        assert 'cannot be locked' in warnings[0]

    def test_twice_in_one_process(self, tmp_path):

        def twice():
            lock_work_dir(tmp_path)
            assert lock_work_dir(tmp_path / '..' / tmp_path.name)
            with pytest.raises(WorkDirError):
                self.try_lock(tmp_path)

        assert in_child(twice) == 0

    def test_nothing_can_be_written(self, tmp_path):
        (tmp_path / 'file').touch()
        for path in (tmp_path / 'file' / 'work', '/proc/work'):
            with pytest.raises(WorkDirError, match='--work-dir'):
                lock_work_dir(path)
