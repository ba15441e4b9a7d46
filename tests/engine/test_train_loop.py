# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import multiprocessing
import os
import random
import signal
import subprocess
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from runs import assert_same
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine import ResumableEpochLoop, TerminationHook
from mmdensecl.engine.train_loop import seed_generators, skip_batches

IMAGES = 22
NAMES = count()


def draw():
    return (
        random.random(),
        np.random.rand(),
        torch.rand(()).item(),
        torch.randint(2**62, ()).item(),
    )


def test_seed_generators():
    """Each of the four numbers seeds each of the four generators."""
    draws = set()
    for entropy in [(0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]:
        seed_generators(*entropy)
        first = draw()
        seed_generators(*entropy)
        assert draw() == first
        draws.update(first)
    assert len(draws) == 4 * 4


class OwnBatches(BatchSampler):
    """Batches of growing size, which no index can be reckoned from."""

    def __iter__(self):
        indices = list(self.sampler)
        for size in range(2, 5):
            yield [indices.pop(0) for _ in range(size)]

    def __len__(self):
        return 3


@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('persistent', [None, False, True])
def test_skipped_batches(drop_last, persistent):
    data, workers = list(range(22)), {}
    if persistent is not None:
        workers = dict(num_workers=2, persistent_workers=persistent)
    loader = DataLoader(data, batch_size=4, drop_last=drop_last, **workers)
    whole = [x.tolist() for x in loader]
    assert len(whole) == len(loader)
    for skip in (2, len(loader)):
        with skip_batches(loader, skip) as to_drop:
            assert to_drop == 0
            assert [x.tolist() for x in loader] == whole[skip:]
            assert len(loader) == len(whole)
    assert [x.tolist() for x in loader] == whole


class Numbers(Dataset):
    """Items that draw from each global generator when they are read."""

    metainfo = {}

    def __init__(self):
        self.read = []

    def __len__(self):
        return IMAGES

    def __getitem__(self, idx):
        self.read.append(idx)
        noise = torch.rand(3) + random.random() + np.random.rand()
        return dict(inputs=noise.float() + idx)


class Noisy(BaseModel):
    """Its loss depends on all generators."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)]
        self.net = nn.Sequential(*layers, nn.Linear(8, 1))

    def forward(self, inputs, mode='loss'):
        value = self.net(inputs).square().mean()
        if mode == 'predict':
            return [dict(value=value)]
        return dict(loss=value * (1 + random.random() + np.random.rand()))


class Events(Hook):
    """Notes the steps, and sends a signal after one of them."""

    def __init__(self, at=None):
        self.at = at
        self.steps, self.losses, self.lrs = [], [], []

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        self.steps.append((runner.epoch, runner.iter, batch_idx))
        self.losses.append(outputs['loss'].item())
        self.lrs.append(runner.optim_wrapper.get_lr()['lr'][0])
        if runner.iter + 1 == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_train_epoch(self, runner):
        self.steps.append(('end', runner.epoch))


@pytest.fixture
def train(tmp_path):
    """Function that trains, is stopped after `at`, or resumes."""

    def run(
        folder='run',
        at=None,
        resume=False,
        epochs=3,
        batch_size=4,
        seed=7,
        lr=0.01,
        accumulate=1,
        saves='CheckpointHook',
        hooks=(),
        schedule=dict(type='MultiStepLR', milestones=[1, 2]),
        **kwargs,
    ):
        events = Events(at)
        torch.manual_seed(1 if resume else 0)  # weights are to be loaded
        runner = Runner(
            model=Noisy(),
            work_dir=str(tmp_path / folder),
            train_dataloader=dict(
                dataset=Numbers(),
                batch_size=batch_size,
                sampler=dict(type=DefaultSampler, shuffle=True),
                collate_fn=dict(type='default_collate'),
                **kwargs.pop('loader', {}),
            ),
            train_cfg=dict(
                type='mmdensecl.ResumableEpochLoop', max_epochs=epochs
            ),
            optim_wrapper=dict(
                accumulative_counts=accumulate,
                optimizer=dict(type='SGD', lr=lr, momentum=0.9),
            ),
            param_scheduler=schedule,
            default_hooks=dict(checkpoint=dict(type=saves, interval=1)),
            custom_hooks=[events, TerminationHook(), *hooks],
            randomness=dict(seed=seed),
            resume=resume,
            experiment_name=f'loop_{next(NAMES)}',
            **kwargs,
        )
        if at is None:
            runner.train()
        else:
            with pytest.raises(SystemExit) as stopped:
                runner.train()
            assert stopped.value.code == 128 + signal.SIGTERM
        loader = runner.train_dataloader
        events.read, events.sampler = loader.dataset.read, loader.sampler
        return events

    run.folder = tmp_path
    return run


def assert_same_end(train):
    """Everything a run resumes from is equal, bit for bit."""
    whole, run = (train.folder / x / 'epoch_3.pth' for x in ('whole', 'run'))
    assert_same(whole, run)


class TestResumableEpochLoop:
    @pytest.mark.parametrize('at', [8, 12, 18])
    def test_stopped_and_resumed(self, train, at):
        """In the middle and at the end of an epoch, and of the run."""
        whole = train('whole')
        first = train(at=at)
        second = train(resume=True)
        assert first.steps + second.steps == whole.steps
        assert first.losses + second.losses == whole.losses
        assert first.lrs + second.lrs == whole.lrs
        # Each image was read in one of the two, if not in advance.
        assert first.read + second.read == whole.read
        assert_same_end(train)

    def test_stopped_twice_in_an_epoch(self, train, warned):
        """The same layout says nothing."""
        whole = train('whole')
        parts = [train(at=8), train(resume=True, at=10), train(resume=True)]
        assert sum((x.losses for x in parts), []) == whole.losses
        assert not warned('resumes, but not')

    def test_own_batches(self, train):
        """What is drawn and thrown away draws the same numbers."""
        loader = dict(batch_sampler=dict(type=OwnBatches, drop_last=False))
        whole = train('whole', loader=loader)
        train(at=5, loader=loader)
        second = train(resume=True, loader=loader)
        assert second.losses == whole.losses[5:]

    def test_the_seed_of_a_run_without_one(self, train):
        first = train(seed=None, at=8)
        second = train(seed=None, resume=True)
        assert second.sampler.seed == first.sampler.seed
        epoch = first.read[IMAGES:] + second.read[:14]
        assert sorted(epoch) == [*range(IMAGES)]

    @pytest.mark.parametrize('at, start', [(8, (1, 4, 0)), (12, (2, 8, 0))])
    def test_another_batch(self, train, warned, messages, at, start):
        """The epoch starts again, except where it was at its end."""
        whole = train('whole')
        train(at=at)
        messages.clear()
        second = train(resume=True, batch_size=6)
        steps = [x for x in second.steps if x[0] != 'end']
        assert steps[0] == start
        epoch, images = start[0], IMAGES
        expected = whole.read[epoch * images : (epoch + 1) * images]
        assert second.read[:images] == expected
        (message,) = warned('resumes, but not')
        assert 'batch_size: 6, was 4' in message
        assert ('epoch 2 starts again' in message) == (at == 8)
        # The same learning rates in each epoch.
        assert second.lrs[0] == whole.lrs[6 * epoch]
        assert second.lrs[-1] == whole.lrs[-1]

    @pytest.mark.parametrize('at', [8, 12])
    def test_the_learning_rate_is_the_config_s(self, train, warned, at):
        """At the position reached, as if it had been so from the start.

        Also where an epoch's last iteration is done, and its end to come.
        """
        whole = train('whole', lr=0.001)
        train(at=at)
        second = train(resume=True, lr=0.001)
        assert second.lrs == whole.lrs[at:]
        (message,) = warned('The config differs')
        assert 'lr: 0.001, was 0.01' in message

    def test_accumulated_gradients(self, train):
        """A stop waits for the optimiser's step: no file holds gradients."""
        whole = train('whole', accumulate=4)
        train(at=5, accumulate=4)
        second = train(resume=True, accumulate=4)
        assert second.steps[0] == (1, 8, 2)
        assert second.losses == whole.losses[8:]
        assert_same_end(train)

    def test_a_checkpoint_without_a_layout(self, train, warned):
        """Of mmengine's own loop, which took up an epoch in its middle."""
        train(at=8)
        path = train.folder / 'run' / 'iter_8.pth'
        checkpoint = load_from_local(path)
        info = checkpoint['message_hub']['runtime_info']
        del info[ResumableEpochLoop.LAYOUT]
        torch.save(checkpoint, path)
        assert train(resume=True).steps[0] == (1, 8, 2)
        checkpoint['meta']['iter'] = 14
        torch.save(checkpoint, path)
        (train.folder / 'run' / 'last_checkpoint').write_text(str(path))
        assert train(resume=True).steps[0] == (1, 6, 0)
        assert warned('epoch 2 starts again')


class TestTerminationHook:
    def test_gives_the_signals_back(self, train):
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = [signal.getsignal(x) for x in signals]
        train(at=2)
        assert before == [signal.getsignal(x) for x in signals]

    def test_what_a_shell_ignores_stays_ignored(self, train):
        """Ctrl-C is not meant for a job in the background."""
        seen = []

        class Look(Hook):
            def before_train_epoch(self, runner):
                seen.append(signal.getsignal(signal.SIGINT))

        own = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            train(epochs=1, hooks=[Look()])
        finally:
            signal.signal(signal.SIGINT, own)
        assert seen == [signal.SIG_IGN]

    def test_workers_of_a_validation_are_shielded(self, train):
        """Slurm sends the signal to all processes; the run waits with it."""
        hit = []

        class SignalToAll(Hook):
            def after_val_iter(self, *args, **kwargs):
                if not hit:
                    os.kill(os.getpid(), signal.SIGUSR1)
                for worker in multiprocessing.active_children():
                    # Not from here: a worker obeys its parent.
                    subprocess.run(['kill', '-USR1', f'{worker.pid}'])
                    hit.append(worker.pid)

        val = dict(
            dataset=Numbers(),
            num_workers=1,
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=dict(type='default_collate'),
        )
        with pytest.raises(SystemExit) as stopped:
            train(
                hooks=[SignalToAll()],
                val_dataloader=val,
                val_cfg=dict(),
                val_evaluator=Evaluator([]),
            )
        assert stopped.value.code == 128 + signal.SIGUSR1
        # One worker, which lived to the last image.
        assert len({*hit}) == 1 and len(hit) >= IMAGES - 1
        # The first step after the validation.
        assert (train.folder / 'run' / 'iter_7.pth').is_file()


def test_the_old_name():
    import mmdensecl.engine
    from mmdensecl.registry import LOOPS

    assert LOOPS.get('mmdensecl.ExactEpochLoop') is ResumableEpochLoop
    with pytest.warns(DeprecationWarning, match='ResumableEpochLoop'):
        assert mmdensecl.engine.ExactEpochLoop is ResumableEpochLoop
