# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Every picture of shards, counted over three ranks with two workers each.

Neither the ranks nor their batches divide the number of pictures. The run is
asked to end in the middle of its second epoch, and goes on.
"""

import json
import signal
import sys
from collections import Counter

import pytest
import torch
from mmengine.dataset import DefaultSampler
from ranks import ROOT, TOOLS, train_ranks
from torch.utils.data import BatchSampler

from mmdensecl.datasets import ShardSampler, UnlabeledShards
from mmdensecl.datasets.draws import current_draw
from mmdensecl.testing import write_pictures

sys.path.append(str(ROOT / 'tests/tools'))
from forks import run_script  # noqa: E402

COUNT, IN_SHARD = 49, 6  # the last shard holds one
RANKS, WORKERS, BATCH, EPOCHS, SEED, WINDOW = 3, 2, 4, 3, 0, 2
# 49 pictures are rounded up to 51, 17 a rank, of which a batch of 4 leaves 1.
STEPS = 4
STOP = dict(epoch=1, step=2)

CONFIG = f"""
import sys
sys.path.append('.')
_base_ = '{ROOT}/configs/demo/densecl_r18w16_1xb64-coslr-40e_tiles.py'
custom_imports = dict(imports=['counters'])
model = dict(
    queue_len=24, neck=dict(in_channels=32, hid_channels=16),
    backbone=dict(
        num_stages=2, strides=(2, 2), dilations=(1, 1), out_indices=(1, ),
        stem_channels=16, base_channels=16))
train_dataloader = dict(
    batch_size={BATCH}, num_workers={WORKERS},
    sampler=dict(_delete_=True, type='mmdensecl.ShardSampler',
                 window={WINDOW}, seed={SEED}),
    dataset=dict(type='mmdensecl.UnlabeledShards', data_root='shards'))
train_dataloader['dataset']['pipeline'] = [
    dict(type='mmdensecl.TraceReads'),
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=32),
    dict(type='mmdensecl.PackViews')]
optim_wrapper = dict(enabled=False)  # float32 on any processor
train_cfg = dict(max_epochs={EPOCHS})
default_hooks = dict(logger=dict(interval=1))
custom_hooks = _base_.custom_hooks + [dict(type='mmdensecl.TraceSteps')]
randomness = dict(seed={SEED})
"""

# A line for each picture that is read, and for each batch trained on.
TRACE = f"""
import json
import os
import signal
from pathlib import Path
from mmcv.transforms import BaseTransform
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from torch.utils.data import get_worker_info
from mmdensecl.registry import HOOKS, TRANSFORMS


def write(name, *content):
    with open(name, 'a') as file:
        file.write(json.dumps(content) + '\\n')


@TRANSFORMS.register_module()
class TraceReads(BaseTransform):

    def transform(self, results):
        worker = get_worker_info()
        write(f'reads_{{os.environ["RANK"]}}', worker.id, results['seed'],
              results['sample_idx'])
        return results


@HOOKS.register_module()
class TraceSteps(Hook):

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        write(f'steps_{{get_rank()}}', runner.epoch, batch_idx,
              [x.sample_idx for x in data_batch['data_samples']])
        if 'stops' in os.environ and get_rank() == 1 and (
                runner.epoch, batch_idx) == {tuple(STOP.values())}:
            os.kill(os.getpid(), signal.SIGTERM)
"""


def train(folder, **env):
    """What each rank's process ended with."""
    with train_ranks(folder, 'shards.py', RANKS, '--resume', **env) as ranks:
        return [x.result() for x in ranks]


def lines(folder, name):
    """Of each rank, and how many there are until now."""
    return [
        [
            json.loads(line)
            for line in (folder / f'{name}_{rank}').read_text().splitlines()
        ]
        for rank in range(RANKS)
    ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    write_pictures(folder / 'pictures', COUNT, size=40)
    done = run_script(
        TOOLS / 'dataset_converters/folder_to_shards.py',
        'pictures',
        'shards',
        '--max-count',
        IN_SHARD,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout
    (folder / 'shards.py').write_text(CONFIG)
    (folder / 'counters.py').write_text(TRACE)
    return folder


@pytest.fixture(scope='module')
def dataset(folder):
    dataset = UnlabeledShards(str(folder / 'shards'))
    assert dataset.shard_sizes == [IN_SHARD] * 8 + [1]
    return dataset


@pytest.fixture
def batches(monkeypatch):
    """Function that gives the batches of each rank in an epoch."""

    def batches(sampler, dataset, epoch=0, ranks=RANKS, batch=BATCH):
        result = []
        for rank in range(ranks):
            for module in (ShardSampler, DefaultSampler):
                monkeypatch.setattr(
                    f'{module.__module__}.get_dist_info',
                    lambda at=(rank, ranks): at,
                )
            options = {} if sampler is DefaultSampler else dict(window=WINDOW)
            each = sampler(dataset, seed=SEED, **options)
            each.set_epoch(epoch)
            result.append([*BatchSampler(each, batch, drop_last=True)])
        return result

    return batches


def epochs_of_seeds(dataset, batches):
    """The epoch of each draw, by the seed that it gets."""
    epoch_of = {}
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch, SEED)
        for rank, own in enumerate(batches(ShardSampler, dataset, epoch)):
            for position, index in enumerate(sum(own, [])):
                current_draw.set(position * RANKS + rank)
                epoch_of[dataset.draw_seed(index)] = epoch
    current_draw.set(None)
    return epoch_of


@pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU ranks')
@pytest.mark.slow
def test_stopped_and_resumed(folder, dataset, batches):
    ended = train(folder, stops='')
    assert {x.returncode for x in ended} == {128 + signal.SIGTERM}, ended[
        0
    ].stdout[-3000:]
    stopped = [len(x) for x in lines(folder, 'reads')]
    steps = lines(folder, 'steps')
    assert [len(x) for x in steps] == [
        STOP['epoch'] * STEPS + STOP['step'] + 1
    ] * RANKS
    ended = train(folder)
    assert {x.returncode for x in ended} == {0}, ended[0].stdout[-3000:]

    # What is trained on is as if nothing had happened.
    for rank, steps in enumerate(lines(folder, 'steps')):
        assert [step[:2] for step in steps] == [
            [epoch, step] for epoch in range(EPOCHS) for step in range(STEPS)
        ]
        for epoch in range(EPOCHS):
            expected = batches(ShardSampler, dataset, epoch)[rank]
            assert expected == [
                x[2] for x in steps[epoch * STEPS : (epoch + 1) * STEPS]
            ], epoch

    epoch_of = epochs_of_seeds(dataset, batches)
    for rank, reads in enumerate(lines(folder, 'reads')):
        before, after = reads[: stopped[rank]], reads[stopped[rank] :]
        # The stop left the rest of its epoch to be read again, at most; what
        # was trained on before it is not read again.
        own = [batches(ShardSampler, dataset, x)[rank] for x in range(EPOCHS)]
        for run, first in ((before, 0), (after, 1)):
            for epoch in range(first, EPOCHS):
                skipped = STOP['step'] + 1 if (run, epoch) == (after, 1) else 0
                for worker in range(WORKERS):
                    read = [
                        index
                        for number, seed, index in run
                        if (epoch_of[seed], number) == (epoch, worker)
                    ]
                    # Workers take the batches in turn.
                    expected = sum(own[epoch][skipped + worker :: WORKERS], [])
                    if run is before and epoch > 0:
                        expected = expected[: len(read)]
                    assert read == expected, (rank, epoch, worker)


@pytest.mark.parametrize('sampler', [ShardSampler, DefaultSampler])
@pytest.mark.parametrize('ranks', [1, 3, 8])
@pytest.mark.parametrize('batch', [1, 4])
def test_what_comes_twice_and_what_is_left_out(
    sampler, ranks, batch, dataset, batches
):
    """Counted, against the formula of docs/reliability.md."""
    share = -(-COUNT // ranks)
    left_out = share % batch  # of each rank
    epochs = []
    for epoch in range(EPOCHS):
        each = batches(sampler, dataset, epoch, ranks, batch)
        assert {len(x) for x in each} == {share // batch}
        drawn = Counter(sum(sum(each, []), []))
        assert sum(drawn.values()) == ranks * (share - left_out)
        assert max(drawn.values()) <= 2
        twice = sum(x == 2 for x in drawn.values())
        assert twice <= ranks * share - COUNT < ranks
        if not left_out:
            assert len(drawn) == COUNT
            assert twice == ranks * share - COUNT
        epochs.append(each)
    # Other pictures are left out in each epoch.
    assert epochs[0] != epochs[1] != epochs[2]
