# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The benchmark_*.py scripts run, small; what does not vary is checked."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmdensecl.testing import write_pictures

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / 'tools/analysis_tools'


def run(script, *flags, cwd):
    """Rows of a script's JSON, after it has printed them."""
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run([
        sys.executable,
        str(SCRIPTS / script), '--out', 'out.json', *map(str, flags)
    ],
                          cwd=cwd,
                          env=env,
                          text=True,
                          timeout=400,
                          stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    content = json.loads((cwd / 'out.json').read_text())
    for row in content['rows']:
        assert f'| {row["what"]} |' in done.stdout
    return content['rows']


def test_loss(tmp_path):
    rows = run(
        'benchmark_loss.py',
        '--batch=2',
        '--queue-len=3000',
        '--rounds=1',
        cwd=tmp_path)
    assert [row['what'] for row in rows
            ] == ['mmdensecl, auto', 'mmdensecl, reference', 'mmpretrain']
    losses = [float(row['loss']) for row in rows]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_growth(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark_loss
    rows = [
        dict(what='grid', value=x, logits=x * x, seconds=1., extra_MiB=2.)
        for x in (3, 5)
    ]
    benchmark_loss.draw(rows, ['grid'], str(tmp_path / 'x.png'))
    assert (tmp_path / 'x.png').stat().st_size > 1000


@pytest.mark.slow
def test_comm(tmp_path):
    """Counted, not timed: the target holds on any machine."""
    rows = run(
        'benchmark_comm.py',
        '--ranks=2',
        '--extrapolate=8',
        '--batch=2',
        '--rivals=DenseCL',
        '--plot=ranks.png',
        cwd=tmp_path)
    found = {(row['what'], row['ranks']): row for row in rows}
    ours, peer = (
        found[x, 8] for x in ('mmdensecl DenseCL', 'mmpretrain DenseCL'))
    assert ours['exchanges'] == 3
    assert ours['calls'] == '1 all_gather, 2 all_to_all_single'
    assert ours['ratio'] == ours['MiB'] / peer['MiB'] < 1 / 4
    # mmpretrain gathers the views, the four features and both queues' keys.
    assert peer['calls'] == '7 all_gather, 1 broadcast'
    pictures = 2 * 3 * 224**2 * 4 / 2**20
    assert peer['MiB'] > 7 * pictures > ours['MiB']
    assert (tmp_path / 'ranks.png').exists()


@pytest.mark.slow
def test_step(tmp_path):
    rows = run(
        'benchmark_step.py',
        '--batch=2',
        '--size=64',
        '--rounds=1',
        '--rivals=MoCo-v2',
        '--configs',
        ROOT / 'configs/densecl_r50_8xb32-coslr-200e_amp.py',
        cwd=tmp_path)
    assert [row['what'] for row in rows] == [
        'both encoders alone', 'mmdensecl MoCo-v2', 'mmpretrain DenseCL',
        'mmdensecl densecl_r50_8xb32-coslr-200e_amp'
    ]
    types = [row['precision'] for row in rows]
    assert types == ['float32'] * 3 + ['bfloat16']
    assert all(row['seconds'] > 0 and row['peak_MiB'] > 100 for row in rows)


@pytest.mark.parametrize('flags', [(), ('--profile', )])
def test_data(tmp_path, flags):
    rows = run(
        'benchmark_data.py',
        '--num-images=2',
        '--rounds=1',
        *flags,
        cwd=tmp_path)
    if flags:
        for row in rows:
            if 'mmdensecl' in row['library']:
                assert row['mean_difference'] < 1
    else:
        assert len(rows) == 7


def test_listing(tmp_path):
    rows = run(
        'benchmark_listing.py',
        '--files=300',
        '--folders=3',
        '--rounds=1',
        cwd=tmp_path)
    assert len(rows) == 3


TINY = f"""
_base_ = '{ROOT}/configs/mini/densecl_r18_1xb32-coslr-40e_folder.py'
model = dict(queue_len=16, neck=dict(hid_channels=16))
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root='pictures'))
train_dataloader['dataset']['pipeline'] = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=32),
    dict(type='mmdensecl.PackViews')]
"""


def test_compare_curves(tmp_path):
    write_pictures(tmp_path / 'pictures', 6)
    (tmp_path / 'tiny.py').write_text(TINY)
    rows = run(
        'compare_curves.py',
        'tiny.py',
        '--variant',
        'reference form',
        'model.head.loss.form=reference',
        '--config',
        'again',
        'tiny.py',
        cwd=tmp_path)
    found = {row['what']: row for row in rows}
    assert list(found) == [
        'reference', 'again', 'reference form', 'another seed'
    ]
    for name in ('reference', 'again'):
        assert found[name]['largest_difference'] == 0
    assert 0 <= found['reference form']['largest_difference'] < 1e-3
    assert found['another seed']['largest_difference'] > 1e-3
    assert (tmp_path / 'work_dirs/compare_curves/curves.png').exists()
