# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Runs that are ended by signals, in processes of their own, and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random

import pytest
import torch
from runs import ROOT, TOOLS, prepare, tool

from mmdensecl.benchmark.runner import free_port
from mmdensecl.checkpoint import load_from_local

# Twelve pictures: six iterations on one rank. Every one is logged.
STRIKE = f"""
import sys
_base_ = './tiny.py'
sys.path.append('{ROOT}/tests/tools')
custom_imports = dict(imports='strike')
randomness = dict(deterministic=True)
custom_hooks = _base_.custom_hooks + [dict(type='Strike', **%r)]
"""
STOPPED = 128 + signal.SIGTERM


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp('resume'))
    (folder / 'exact.py').write_text(STRIKE % dict(at=0, name='SIGTERM'))
    return folder


def start(workplace, name, *flags, strike=None, ranks=1, options=()):
    """Exit codes and logs of the ranks of a run in the folder ``name``."""
    config = f'{name}_struck.py' if strike else 'exact.py'
    if strike:
        (workplace / config).write_text(STRIKE % strike)
    flags = (*flags, '--work-dir', name)
    options = ('data_root=pictures', *options)
    if ranks == 1:
        return [
            tool(
                'train.py',
                config,
                *flags,
                '--cfg-options',
                *options,
                cwd=workplace,
                check=False,
            )
        ]
    port = str(free_port())
    with ThreadPoolExecutor(ranks) as pool:
        jobs = [
            pool.submit(
                tool,
                'train.py',
                config,
                *flags,
                '--launcher',
                'pytorch',
                '--cfg-options',
                *options,
                cwd=workplace,
                check=False,
                env=dict(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(ranks),
                    MASTER_ADDR='127.0.0.1',
                    MASTER_PORT=port,
                ),
            )
            for rank in range(ranks)
        ]
    return [job.result() for job in jobs]


def ended(done, *codes):
    assert [x.returncode for x in done] == list(codes), done[0].stdout[-5000:]
    return done[0].stdout


def logged(folder):
    """The losses that were logged, by iteration; a later run counts."""
    losses = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            losses[entry['step']] = (
                entry['loss'],
                entry['loss_dense'],
                entry['lr'],
            )
    return losses


def tensors(node, path=''):
    """All that a checkpoint holds to go on from, flat."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return {path: node}
    flat = {}
    for key, value in items:
        flat.update(tensors(value, f'{path}.{key}'))
    return flat


def assert_same_run(a, b, name='epoch_2.pth'):
    """Bit for bit: losses, weights, key encoder, queues, optimiser."""
    assert logged(a) == logged(b)
    a, b = load_from_local(a / name), load_from_local(b / name)
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        old, new = tensors(a[part]), tensors(b[part])
        assert old and old.keys() == new.keys()
        for key, value in old.items():
            same = (
                torch.equal(value, new[key])
                if torch.is_tensor(value)
                else value == new[key]
            )
            assert same, f'{part}{key}'


@pytest.fixture(scope='module')
def whole(workplace):
    """The folder of an uninterrupted run."""
    ended(start(workplace, 'whole'), 0)
    return workplace / 'whole'


def test_at_the_end_of_an_epoch_and_of_the_run(workplace, whole):
    """From a named file, with workers; there is nothing to do after that."""
    options = ['train_dataloader.num_workers=2']
    log = ended(
        start(
            workplace,
            'epoch',
            '--resume',
            whole / 'epoch_1.pth',
            options=options,
        ),
        0,
    )
    assert 'resumed epoch: 1' in log
    assert '[1][1/3]' not in log and '[2][1/3]' in log
    assert logged(workplace / 'epoch') == {
        step: values for step, values in logged(whole).items() if step > 3
    }
    before = (whole / 'epoch_2.pth').read_bytes()
    log = ended(start(workplace, 'whole', '--resume'), 0)
    assert 'resumed epoch: 2' in log and '/3]' not in log
    assert (whole / 'epoch_2.pth').read_bytes() == before


@pytest.mark.parametrize('persistent', [False, True])
def test_signal_to_the_workers_too(workplace, whole, persistent):
    """As Slurm and torchrun send it; the resumed run needs no workers."""
    name = f'workers_{persistent}'
    log = ended(
        start(
            workplace,
            name,
            strike=dict(at=5, name='SIGTERM', workers=True),
            options=[
                'train_dataloader.num_workers=2',
                f'train_dataloader.persistent_workers={persistent}',
            ],
        ),
        STOPPED,
    )
    assert 'SIGTERM: the run stops after iteration 5 of 6' in log
    for pid in re.search(r'struck (.*)', log)[1].split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    saved = load_from_local(workplace / name / 'iter_5.pth')['meta']
    assert (saved['epoch'], saved['iter']) == (1, 5)
    log = ended(start(workplace, name, '--resume'), 0)
    assert '[2][2/3]' not in log and '[2][3/3]' in log
    assert_same_run(whole, workplace / name)


def test_kill_in_mixed_precision(workplace):
    """SIGKILL, behind a checkpoint in the middle of the first epoch."""
    flags = ('--amp',)
    options = [
        'train_dataloader.num_workers=2',
        'default_hooks.checkpoint.by_epoch=False',
        'default_hooks.checkpoint.interval=2',
    ]
    ended(start(workplace, 'amp', *flags, options=options), 0)
    ended(
        start(
            workplace,
            'amp_killed',
            *flags,
            strike=dict(at=3, name='SIGKILL'),
            options=options,
        ),
        -signal.SIGKILL,
    )
    assert (workplace / 'amp_killed' / 'iter_2.pth').exists()
    log = ended(
        start(workplace, 'amp_killed', *flags, '--resume', options=options), 0
    )
    assert '[1][2/3]' not in log and '[1][3/3]' in log
    assert_same_run(workplace / 'amp', workplace / 'amp_killed', 'iter_6.pth')


@pytest.mark.skipif(torch.cuda.is_available(), reason='has GPUs')
def test_one_of_two_ranks_on_shards(workplace):
    """Both stop where one was asked to; one process starts the epoch again."""
    tool(
        'dataset_converters/folder_to_shards.py',
        'pictures',
        'shards',
        cwd=workplace,
    )
    options = [
        'data_root=shards',
        'train_dataloader.batch_size=2',
        'train_dataloader.dataset.type=mmdensecl.UnlabeledShards',
        'train_dataloader.sampler.type=mmdensecl.ShardSampler',
        'train_dataloader.sampler.window=1',
    ]
    ended(start(workplace, 'shards_whole', ranks=2, options=options), 0, 0)
    done = start(
        workplace,
        'shards_struck',
        ranks=2,
        options=options,
        strike=dict(at=4, name='SIGUSR1', rank=1),
    )
    code = 128 + signal.SIGUSR1
    assert 'SIGUSR1: the run stops after' in ended(done, code, code)
    assert (workplace / 'shards_struck' / 'iter_4.pth').exists()
    struck = workplace / 'shards_struck' / 'iter_4.pth'
    log = ended(
        start(workplace, 'fewer', '--resume', struck, options=options), 0
    )
    assert 'world_size: 1, was 2' in log
    assert 'epoch 2 starts again' in log
    assert '[2][1/6]' in log
    ended(
        start(
            workplace, 'shards_struck', '--resume', ranks=2, options=options
        ),
        0,
        0,
    )
    assert_same_run(workplace / 'shards_whole', workplace / 'shards_struck')


@pytest.mark.skipif(torch.cuda.is_available(), reason='has GPUs')
def test_three_ranks(workplace):
    """DDP's buckets differ after a resume, the order of its sums must not."""
    options = ['train_dataloader.batch_size=1']
    codes = [STOPPED] * 3
    ended(start(workplace, 'three', ranks=3, options=options), 0, 0, 0)
    ended(
        start(
            workplace,
            'three_struck',
            ranks=3,
            options=options,
            strike=dict(at=2, name='SIGTERM'),
        ),
        *codes,
    )
    ended(
        start(workplace, 'three_struck', '--resume', ranks=3, options=options),
        0,
        0,
        0,
    )
    assert_same_run(workplace / 'three', workplace / 'three_struck')


@pytest.mark.skipif(torch.cuda.is_available(), reason='has GPUs')
def test_torchrun(workplace):
    """Its agent passes the signal on to the ranks and their workers."""
    output = workplace / 'torchrun.txt'
    with open(output, 'wb') as stream:
        agent = subprocess.Popen(
            [
                'bash',
                TOOLS / 'dist_train.sh',
                'exact.py',
                '2',
                '--work-dir',
                'torchrun',
                '--cfg-options',
                'data_root=pictures',
                'train_dataloader.batch_size=2',
                'train_cfg.max_epochs=10000',
                'train_dataloader.num_workers=1',
                'default_hooks.checkpoint.interval=10000',
            ],
            cwd=workplace,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=dict(
                os.environ,
                PYTHONPATH=str(ROOT),
                PYTHON=sys.executable,
                OMP_NUM_THREADS='1',
                PORT=str(free_port()),
            ),
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
    assert int(saved['state_dict']['queue.enqueued']) == 4 * steps


@pytest.fixture(scope='module')
def drilled(workplace):
    """Options of a run that often saves, and how one ends uninterrupted."""
    options = [
        'train_cfg.max_epochs=10',
        'default_hooks.checkpoint.by_epoch=False',
    ]
    ended(start(workplace, 'drill', options=options), 0)
    return options


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.parametrize('seed', range(10))
def test_kills_at_random_moments(workplace, drilled, seed):
    """SIGKILL again and again; the run ends with the same bits."""
    random = Random(seed)
    folder = workplace / f'drill_{seed}'
    command = [
        sys.executable,
        TOOLS / 'train.py',
        'exact.py',
        '--resume',
        '--work-dir',
        folder,
        '--cfg-options',
        'data_root=pictures',
        *drilled,
    ]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    for _ in range(3):
        logs = len([*folder.glob('*/vis_data')])
        process = subprocess.Popen(
            command, cwd=workplace, env=env, stdout=subprocess.DEVNULL
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
    subprocess.run(command, cwd=workplace, env=env, check=True)
    assert_same_run(workplace / 'drill', folder, 'iter_30.pth')


def test_a_second_signal_kills(workplace):
    """At once, but not where a launcher and its rank both pass one on."""
    (workplace / 'twice.py').write_text(
        STRIKE
        % dict(at=2, name='SIGTERM', wait=2.1)
        + 'strike = custom_hooks.pop()\ncustom_hooks[-1] = dict('
        "type='mmdensecl.TerminationHook', interval=1000, patience=2)\n"
        'first = dict(strike, at=1, wait=0)\n'
        'custom_hooks += [first, first, strike]\n'
    )
    done = tool(
        'train.py',
        'twice.py',
        '--cfg-options',
        'data_root=pictures',
        cwd=workplace,
        check=False,
    )
    assert done.returncode == -signal.SIGTERM
    assert '[1][1/3]' in done.stdout and '[1][2/3]' not in done.stdout
    assert not list((workplace / 'work_dirs' / 'twice').glob('iter_*.pth'))


def test_ctrl_c(workplace, whole):
    """Saves and leaves, as SIGTERM does; a terminal sends it to all."""
    log = ended(
        start(
            workplace,
            'ctrl_c',
            strike=dict(at=4, name='SIGINT', workers=True),
            options=['train_dataloader.num_workers=2'],
        ),
        128 + signal.SIGINT,
    )
    assert 'Saving after this iteration; Ctrl-C aborts' in log
    assert 'SIGINT: the run stops after iteration 4 of 6' in log
    assert 'Traceback' not in log
    ended(start(workplace, 'ctrl_c', '--resume'), 0)
    assert_same_run(whole, workplace / 'ctrl_c')


def test_a_second_ctrl_c_aborts(workplace):
    """At once, without the patience that launchers need."""
    (workplace / 'impatient.py').write_text(
        STRIKE % dict(at=1, name='SIGINT')
        + 'custom_hooks += [custom_hooks[-1]]\n'
    )
    done = tool(
        'train.py',
        'impatient.py',
        '--cfg-options',
        'data_root=pictures',
        cwd=workplace,
        check=False,
    )
    assert done.returncode == -signal.SIGINT
    assert '[1][1/3]' not in done.stdout
    assert not list((workplace / 'work_dirs' / 'impatient').glob('*.pth'))
