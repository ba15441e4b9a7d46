# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The benchmark_*.py scripts run, small; what does not vary is checked."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from runs import ROOT, TOOLS, tool

SCRIPTS = TOOLS / 'benchmarks'


def run(command, cwd):
    """Rows of a script's JSON, after it has printed them."""
    done = tool(f'benchmarks/{command} --out out.json', cwd)
    rows = json.loads((cwd / 'out.json').read_text())['rows']
    assert all(f'| {row["what"]} |' in done.stdout for row in rows)
    return rows


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_loss(tmp_path):
    flags = '--batch=2 --queue-len=3000 --rounds=1'
    rows = run(f'benchmark_loss.py {flags}', tmp_path)
    names = ['mmdensecl, auto', 'mmdensecl, reference', 'mmpretrain']
    assert [row['what'] for row in rows] == names
    losses = [float(row['loss']) for row in rows]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.slow
def test_comm(tmp_path):
    """Counted, not timed: the target holds on any machine."""
    flags = '--ranks=2 --extrapolate=8 --batch=2 --baselines=DenseCL'
    rows = run(f'benchmark_comm.py {flags}', tmp_path)
    found = {(row['what'], row['ranks']): row for row in rows}
    ours = found['mmdensecl DenseCL', 8]
    peer = found['mmpretrain DenseCL', 8]
    assert ours['exchanges'] == 3
    assert ours['calls'] == '1 all_gather, 2 all_to_all_single'
    assert ours['ratio'] == ours['MiB'] / peer['MiB'] < 1 / 4
    # mmpretrain gathers the views, the four features and both queues' keys.
    assert peer['calls'] == '7 all_gather, 1 broadcast'
    pictures = 2 * 3 * 224**2 * 4 / 2**20
    assert peer['MiB'] > 7 * pictures > ours['MiB']


@pytest.mark.slow
@pytest.mark.parametrize(
    'name, size, precision',
    [
        ('mmpretrain DenseCL', 32, 'bfloat16'),
        ('DSC-PM', 128, 'float32'),  # it draws 16 cells
        ('configs/densecl_r50_8xb32-coslr-200e_amp.py', 32, 'bfloat16'),
    ],
)
def test_step(scripts, monkeypatch, name, size, precision):
    """One step, in the precision that the table will name."""
    import benchmark_step

    used = []
    monkeypatch.setattr(
        benchmark_step.measure,
        'precision',
        lambda name, _: used.append(name) or nullcontext(),
    )
    given = precision
    if name.endswith('.py'):  # which says it itself
        name, given = str(ROOT / name), 'float32'
    benchmark_step.make(name, 2, size, given, 'cpu')()
    assert used == [precision]


def test_iterations_of_a_run(scripts):
    """Also behind many others, of which nothing is kept."""
    import benchmark_step
    from mmengine.logging import MessageHub

    shape = 2, 32, 'float32', 'cpu', 2
    for ours in (True, False):
        benchmark_step.make_run(*shape, 1000, ours)()
        hub = MessageHub.get_current_instance()
        kept = len(hub.log_scalars['train/loss'].data[0])
        assert (kept == 100) if ours else (kept == 1002)


def test_data(tmp_path):
    few = '--num-images=2 --rounds=1 --size=64'
    rows = [x['what'] for x in run(f'benchmark_data.py {few}', tmp_path)]
    assert len([x for x in rows if 'albumentations' not in x]) == 8
    assert 'mmdensecl, decoded at a fraction' in rows


@pytest.mark.slow
def test_startup(tmp_path):
    rows = run('benchmark_startup.py --rounds=1', tmp_path)
    assert len(rows) == 7 and all(x['seconds'] > 0 for x in rows)


@pytest.mark.slow
def test_gpu(tmp_path):
    """Parts end, fail or are skipped, and the table says so."""
    words = f'--tiny --out {tmp_path} --minutes 15 --mini x.py --parts'
    parts = ['compiled', 'mini', 'data']
    done = subprocess.run(
        ['bash', SCRIPTS / 'gpu.sh', *words.split(), *parts],
        env={**os.environ, 'PYTHON': sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    text = (tmp_path / 'gpu.md').read_text()
    assert text in done.stdout
    assert text.startswith('## On a GPU\n\n')
    rows = dict(re.findall(r'\| (.*?) \|.*\| (.*?) \| `.*` \|\n', text))
    assert rows['part `mini`'].startswith('failed: ')
    assert 'x.py' in rows['part `mini`']
    if not torch.cuda.is_available():
        assert rows['part `compiled`'].startswith('not run: ')
    assert '### Two views of 224 pixels' in text
    assert '\n| mmpretrain | ' in text
