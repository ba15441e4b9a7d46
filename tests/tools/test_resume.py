# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Runs that are ended by signals, in processes of their own, and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from random import Random

import pytest
import torch
from runs import (
    TOOLS,
    assert_same,
    ended,
    environment,
    prepare,
    tool,
    tool_ranks,
    train,
)

from mmdensecl.benchmark.runner import free_port
from mmdensecl.checkpoint import load_from_local

# Six iterations on one rank. Every one is logged.
EXACT = """
_base_ = './tiny.py'
custom_imports = dict(imports='broken_parts')
randomness = dict(deterministic=True)
custom_hooks = _base_.custom_hooks + [
    dict(type='Strike', **x) for x in %r]
"""
without_gpus = pytest.mark.skipif(
    torch.cuda.is_available(), reason='has GPUs, for which gloo is not used'
)


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp('resume'))
    (folder / 'exact.py').write_text(EXACT % [])
    return folder


def start(workplace, name, words='', options='', strikes=(), ranks=1):
    """Exit codes and logs of the ranks of a run in the folder ``name``."""
    (workplace / f'{name}.py').write_text(EXACT % [*strikes])
    words = f'{name}.py --work-dir {name} {words}'
    if ranks == 1:
        return [train(workplace, words, options, check=False)]
    options = f'--cfg-options data_root=pictures {options}'
    with tool_ranks(f'train.py {words} {options}', ranks, workplace) as jobs:
        return [job.result() for job in jobs]


def logged(folder):
    """The losses that were logged, by iteration; a later run counts."""
    losses = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            losses[entry['step']] = [
                entry[x] for x in ('loss', 'loss_dense', 'lr')
            ]
    return losses


def assert_same_run(a, b, name='epoch_2.pth'):
    """Bit for bit: losses, weights, key encoder, queues, optimiser."""
    assert logged(a) == logged(b)
    assert_same(a / name, b / name)


@pytest.fixture(scope='module')
def whole(workplace):
    """The folder of an uninterrupted run."""
    ended(start(workplace, 'whole'), 0)
    return workplace / 'whole'


def test_at_the_end_of_an_epoch_and_of_the_run(workplace, whole):
    """From a named file, with workers; there is nothing to do after that."""
    words = f'--resume {whole}/epoch_1.pth'
    workers = 'train_dataloader.num_workers=2'
    log = ended(start(workplace, 'epoch', words, workers), 0)
    assert 'resumed epoch: 1' in log
    assert '[1][1/3]' not in log and '[2][1/3]' in log
    assert logged(workplace / 'epoch') == {
        step: values for step, values in logged(whole).items() if step > 3
    }
    before = (whole / 'epoch_2.pth').read_bytes()
    log = ended(start(workplace, 'whole', '--resume'), 0)
    assert 'resumed epoch: 2' in log and '/3]' not in log
    assert (whole / 'epoch_2.pth').read_bytes() == before


@pytest.mark.parametrize(
    'name, persistent', [('SIGTERM', True), ('SIGINT', False)]
)
def test_signal_to_the_workers_too(workplace, whole, name, persistent):
    """As Slurm, torchrun and a terminal's Ctrl-C send it."""
    signum = getattr(signal, name)
    log = ended(
        start(
            workplace,
            name,
            strikes=[dict(at=5, name=name, workers=True)],
            options='train_dataloader.num_workers=2 '
            f'train_dataloader.persistent_workers={persistent}',
        ),
        128 + signum,
    )
    assert f'{name}: the run stops after iteration 5 of 6' in log
    assert ('Ctrl-C aborts' in log) == (name == 'SIGINT')
    assert 'Traceback' not in log
    for pid in re.search(r'struck (.*)', log)[1].split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    saved = load_from_local(workplace / name / 'iter_5.pth')['meta']
    assert (saved['epoch'], saved['iter']) == (1, 5)
    log = ended(start(workplace, name, '--resume'), 0)  # needs no workers
    assert '[2][2/3]' not in log and '[2][3/3]' in log
    assert_same_run(whole, workplace / name)


@pytest.mark.parametrize(
    'name, interval, strikes',
    [
        # At once, but not where a launcher and its rank both pass one on.
        ('SIGTERM', 1000, [dict(at=1), dict(at=1), dict(at=2, wait=2.1)]),
        # At once, without the patience that launchers need.
        ('SIGINT', None, [dict(at=1), dict(at=1)]),
    ],
)
def test_a_second_signal_aborts(workplace, name, interval, strikes):
    (workplace / 'patient.py').write_text(
        EXACT % [dict(x, name=name) for x in strikes] + 'for hook in '
        "custom_hooks:\n    if hook['type'] == 'mmdensecl.TerminationHook':\n"
        f'        hook.update(interval={interval}, patience=2)\n'
    )
    folder = workplace / f'second_{name}'
    words = f'patient.py --work-dir {folder}'
    done = train(workplace, words, check=False)
    assert done.returncode == -getattr(signal, name), done.stdout
    assert ('[1][1/3]' in done.stdout) == (name == 'SIGTERM')
    assert '[1][2/3]' not in done.stdout
    assert not [*folder.glob('*.pth')]


def test_kill_in_mixed_precision(workplace):
    """SIGKILL, behind a checkpoint in the middle of the first epoch."""
    options = 'train_dataloader.num_workers=2 ' + ' '.join(
        f'default_hooks.checkpoint.{x}'
        for x in ('by_epoch=False', 'interval=2')
    )
    ended(start(workplace, 'amp', '--amp', options), 0)
    strikes = [dict(at=3, name='SIGKILL')]
    killed = start(workplace, 'amp_killed', '--amp', options, strikes)
    ended(killed, -signal.SIGKILL)
    assert (workplace / 'amp_killed' / 'iter_2.pth').exists()
    log = ended(start(workplace, 'amp_killed', '--amp --resume', options), 0)
    assert '[1][2/3]' not in log and '[1][3/3]' in log
    assert_same_run(workplace / 'amp', workplace / 'amp_killed', 'iter_6.pth')


@without_gpus
def test_one_of_three_ranks_on_shards(workplace):
    """All stop where one was asked to; one process starts the epoch again.

    Of three ranks, as DDP's buckets differ after a resume, and the order of
    its sums must not.
    """
    tool('dataset_converters/folder_to_shards.py pictures shards', workplace)
    options = (
        'data_root=shards train_dataloader.batch_size=1 '
        'train_dataloader.dataset.type=mmdensecl.UnlabeledShards '
        'train_dataloader.sampler.type=mmdensecl.ShardSampler '
        'train_dataloader.sampler.window=1'
    )
    ended(start(workplace, 'shards', '', options, ranks=3), 0, 0, 0)
    strikes = [dict(at=6, name='SIGUSR1', rank=1)]
    options += ' train_dataloader.num_workers=1'
    done = start(workplace, 'struck', '', options, strikes, 3)
    log = ended(done, *[128 + signal.SIGUSR1] * 3)
    assert 'SIGUSR1: the run stops after iteration 6 of 8' in log
    words = '--resume struck/iter_6.pth'
    log = ended(start(workplace, 'fewer', words, options), 0)
    assert 'world_size: 1, was 3' in log
    assert 'epoch 2 starts again' in log and '[2][ 1/12]' in log
    ended(start(workplace, 'struck', '--resume', options, ranks=3), 0, 0, 0)
    assert_same_run(workplace / 'shards', workplace / 'struck')


@without_gpus
def test_torchrun(workplace):
    """Its agent passes the signal on to the ranks and their workers."""
    output = workplace / 'torchrun.txt'
    options = [
        'data_root=pictures',
        'train_dataloader.batch_size=2',
        'train_cfg.max_epochs=10000',
        'train_dataloader.num_workers=1',
        'default_hooks.checkpoint.interval=10000',
    ]
    words = ['exact.py', '2', '--work-dir', 'torchrun', '--cfg-options']
    with open(output, 'wb') as stream:
        agent = subprocess.Popen(
            ['bash', TOOLS / 'dist_train.sh', *words, *options],
            cwd=workplace,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=environment(PORT=str(free_port())),
        )
    try:
        deadline = time.monotonic() + 240
        while '[2][1/3]' not in output.read_text():
            assert agent.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)
        agent.send_signal(signal.SIGTERM)
        agent.wait(60)
    finally:
        if agent.poll() is None:
            agent.terminate()  # it kills its ranks, after 30 s if need be
            agent.wait(60)
    log = output.read_text()
    assert 'killed by signal' not in log  # a worker, said by torch
    steps = int(re.search('the run stops after iteration ([0-9]+)', log)[1])
    saved = load_from_local(workplace / 'torchrun' / f'iter_{steps}.pth')
    state = saved['state_dict']
    assert int(state['queue.enqueued']) == 4 * steps
    # The permutations' seed and step are saved.
    assert int(state['batch_shuffle._extra_state'][1]) == steps


@pytest.fixture(scope='module')
def drilled(workplace):
    """Options of a run that often saves, and how one ends uninterrupted."""
    options = 'train_cfg.max_epochs=10 default_hooks.checkpoint.by_epoch=False'
    ended(start(workplace, 'drill', options=options), 0)
    return options.split()


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize('seed', range(10))
def test_kills_at_random_moments(workplace, drilled, seed):
    """SIGKILL again and again; the run ends with the same bits."""
    random = Random(seed)
    folder = workplace / f'drill_{seed}'
    command = [sys.executable, TOOLS / 'train.py', 'exact.py', '--resume']
    command += ['--work-dir', folder, '--cfg-options', 'data_root=pictures']
    command += drilled
    for _ in range(3):
        logs = len([*folder.glob('*/vis_data')])
        process = subprocess.Popen(
            command,
            cwd=workplace,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        while (
            process.poll() is None
            and len([*folder.glob('*/vis_data')]) == logs
        ):
            time.sleep(0.01)
        with suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0, 3))
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
    subprocess.run(command, cwd=workplace, env=environment(), check=True)
    assert_same_run(workplace / 'drill', folder, 'iter_30.pth')
