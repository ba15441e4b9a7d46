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
from forks import run_script
from runs import CONFIG, ROOT, TOOLS, tool

from mmdensecl.testing import write_pictures

SCRIPTS = TOOLS / 'benchmarks'


def run(command, cwd):
    """Rows of a script's JSON, after it has printed them."""
    done = tool(f'benchmarks/{command} --out out.json', cwd)
    return rows_of(cwd / 'out.json', done.stdout)


def rows_of(path, printed):
    content = json.loads(path.read_text())
    for row in content['rows']:
        assert f'| {row["what"]} |' in printed
    return content['rows']


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
    rows = run(f'benchmark_comm.py {flags} --plot=ranks.png', tmp_path)
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
    assert (tmp_path / 'ranks.png').exists()


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
    few = 'benchmark_data.py --num-images=2 --rounds=1'
    assert len(run(few, tmp_path)) == 7
    for row in run(f'{few} --profile', tmp_path):
        if 'mmdensecl' in row['library']:
            assert row['mean_difference'] < 1


@pytest.mark.slow
def test_gpu(tmp_path):
    """Parts end, fail or are skipped, and the table says so."""
    words = f'--tiny --out {tmp_path} --minutes 15 --mini x.py --parts'
    parts = ['tests', 'compiled', 'mini', 'data']
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
        assert rows['pytest -m gpu tests/gpu'] == 'GPU: not run'
        assert rows['part `compiled`'].startswith('not run: ')
        assert ' skipped in ' in (tmp_path / 'gpu.log').read_text()
    assert '### Two views of 224 pixels' in text
    assert '\n| mmpretrain | ' in text


def test_compare_curves(scripts, tmp_path, monkeypatch, capsys):
    import compare_curves

    def run_fork(command, stdout, stderr):
        python, *command = command
        assert (python, stderr) == (sys.executable, subprocess.STDOUT)
        done = run_script(*command, cwd=tmp_path)
        stdout.write(done.stdout)
        return done

    write_pictures(tmp_path / 'pictures', 6)
    few = "train_dataloader.update(batch_size=2)\ndata_root = 'pictures'\n"
    few += "train_dataloader['dataset']['data_root'] = data_root\n"
    (tmp_path / 'tiny.py').write_text(CONFIG + few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_curves.subprocess, 'run', run_fork)
    words = ['compare_curves.py', 'tiny.py', '--out', 'out.json']
    variant = ['reference form', 'model.head.loss.form=reference']
    monkeypatch.setattr(sys, 'argv', [*words, '--variant', *variant])
    compare_curves.main()
    rows = rows_of(tmp_path / 'out.json', capsys.readouterr().out)
    found = {row['what']: row for row in rows}
    assert list(found) == ['reference', 'reference form', 'another seed']
    assert found['reference']['largest_distance'] == 0
    assert 0 <= found['reference form']['largest_distance'] < 1e-3
    assert found['another seed']['largest_distance'] > 1e-3
    assert (tmp_path / 'work_dirs/compare_curves/curves.png').exists()
