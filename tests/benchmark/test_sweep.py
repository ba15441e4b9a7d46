# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Sweeps: one pre-training for each value, then a suite, then a plot."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from made_up import calls
from mmengine.config import Config
from PIL import Image

from mmdensecl.benchmark import sweep as sweeps
from mmdensecl.benchmark.plan import Setup
from mmdensecl.benchmark.results import read_json
from mmdensecl.testing import write_pictures

CONFIGS = Path(__file__).parents[2] / 'configs'
FILE = CONFIGS / 'benchmarks' / 'sweeps.yml'
NAMED = yaml.safe_load(FILE.read_text())
FULL = 'densecl_r50_8xb32-coslr-800e_coco'
ITERS = 800 * (118287 // 256)


def find(name=None, key=None, values=()):
    return sweeps.find_sweep(FILE, name, key, values)


@pytest.fixture
def config(place, tiny_cfg, weights, monkeypatch):
    """A pre-training of ten iterations, by the pretending tool."""
    path = place / 'saved.pth'
    state = dict(state_dict=torch.load(weights[0]), meta=dict(iter=0))
    torch.save(dict(state, message_hub={}, optimizer={}), path)
    monkeypatch.setenv('WEIGHTS', str(path))
    write_pictures(place / 'images', 4, size=8)
    dataset = dict(type='mmdensecl.UnlabeledFolder', data_root='nowhere')
    cfg = dict(data_root='nowhere', default_scope='mmpretrain')
    cfg.update(
        model=tiny_cfg(loss_lambda=0.5),
        train_dataloader=dict(batch_size=1, dataset=dataset),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=10),
        auto_scale_lr=dict(base_batch_size=4),
        randomness=dict(seed=3),
    )
    Config(cfg).dump(place / 'pretrain.py')
    return place / 'pretrain.py'


@pytest.fixture
def run_sweep(tool, place, config):
    def call(*args, what=('lambda', '--values', 0, 0.3)):
        where = '--pretrain-data', place / 'images', '--config', config
        suite = '--suite', place / 'tiny.py', '--data-root', place / 'data'
        rest = '--work-dir', place / 'out', '--tasks', 'det', '--jobs', 2
        return tool('sweep', *what, *where, *suite, *rest, *args)

    return call


@pytest.mark.parametrize('name', NAMED)
def test_full_scale_configs_are_the_values(name):
    """Each value of a sweep has a file, or is the published recipe."""
    sweep, in_base = find(name), 0
    for value in sweep.values:
        own = Config.fromfile(CONFIGS / f'{FULL}.py')
        published = own.model.to_dict()
        own.merge_from_dict({sweep.key: sweep.choices.get(value, value)})
        sweeps._warm_up(own, sweep, value, 118287)
        short = dict(matching='match-', temperature='tau').get(name, name)
        word = f'{short}{value}'.replace('.', 'p')
        path = CONFIGS / 'ablations' / f'{FULL}_{word}.py'
        if path.is_file():
            shipped = Config.fromfile(path)
            assert own.model.to_dict() == shipped.model.to_dict()
            assert own.custom_hooks == shipped.custom_hooks
        else:
            in_base += 1
            assert own.model.to_dict() == published
    # The grid's base is the map as it is, None.
    assert in_base == (name != 'grid')


def test_plan(place, config):
    """Of settings of one's own, too."""
    found = find(key='model.momentum', values=['1e-3', '0.01'])
    assert (found.values, found.axis) == ([0.001, 0.01], 'log')
    assert [*found.methods] == ['momentum_0.001', 'momentum_0.01']
    found = find(key='a.type', values=['my.Rule', 'None']).about
    assert found['axis'] == 'category'
    setup = Setup(place / 'out', place / 'images')
    runs = sweeps.plan_pretraining(find('lambda'), config, 2, setup)
    assert [run.name for run in runs[1:3]] == [
        'pretrain/lambda_0/pretrain1',
        'pretrain/lambda_0.1/pretrain0',
    ]
    lambdas = [run.config.model.loss_lambda for run in runs[::2]]
    assert lambdas == NAMED['lambda']['values']
    assert [run.config.randomness.seed for run in runs[:2]] == [3, 4]
    assert runs[0].settings['images'] == 4
    # The dense loss alone begins with the global one.
    for iters, start in ((2 * ITERS, 10000), (ITERS // 10, 1000)):
        setup = replace(setup, options={'train_cfg.max_iters': iters})
        sweep = find('lambda', values=['0.9', '1'])
        other, one = sweeps.plan_pretraining(sweep, config, 1, setup)
        assert 'custom_hooks' not in other.config
        hook = dict(type=sweeps.WARM_UP, start_iters=start)
        assert one.config.custom_hooks == [hook]


def test_from_images_to_a_plot(run_sweep, place, monkeypatch):
    code, text = run_sweep('--dry-run')
    assert code == 0, text
    assert not calls(place / 'out')
    assert 'waiting, det/finetune/lambda_0.3/pretrain0/seed0' in text
    seeds = '--pretrain-seeds', 2
    # A broken pre-training stops neither the rest nor a later call.
    monkeypatch.setenv('FAIL', 'pretrain/lambda_0.3/pretrain1')
    code, text = run_sweep(*seeds)
    assert code == 1 and 'told to fail' in text
    monkeypatch.delenv('FAIL')
    assert run_sweep(*seeds)[0] == 0
    folder = place / 'out/lambda'
    # 2 values x 2 seeds, and the random weights beside 4 checkpoints.
    started = calls(folder)
    assert started.pop('pretrain/lambda_0.3/pretrain1') == 2
    assert len(started) == 3 + 5 and {*started.values()} == {1}
    report = folder / 'tiny/report'
    summary = pd.read_csv(report / 'summary.csv')
    assert summary['method'].tolist() == ['random', 'lambda_0', 'lambda_0.3']
    assert summary['pretrainings'].tolist() == [0, 2, 2]
    assert summary['model.loss_lambda'].tolist()[1:] == [0, 0.3]
    with Image.open(report / 'sweep.png') as image:
        assert image.width >= 600 and len(image.getcolors(1 << 24)) > 9
    run = folder / 'tiny/det/finetune/lambda_0/pretrain1/seed0/result.json'
    made = folder / 'pretrain/lambda_0/pretrain1/iter_10.pth'
    assert read_json(run)['weights']['path'] == str(made)
    # Further values come beside the first; other images do not.
    more = ('lambda', '--values', '0.3', '0.5')
    assert run_sweep(*seeds, what=more)[0] == 0
    assert len(calls(folder)) == 9 + 2 + 2
    sweep = read_json(folder / 'tiny/suite.json')['sweep']
    assert [*sweep['values'].values()] == [0, 0.3, 0.5]
    write_pictures(place / 'images', 5, size=8)
    code, text = run_sweep(*seeds)
    assert code == 2 and 'data.files: 4 -> 5' in text
    assert 'no table can hold both' in text


@pytest.mark.parametrize('what, words', [
    (('lamda',), 'Name one sweep (lambda, matching'),
    (('lambda', '--values', '0.5'), 'at least two --values'),
    (('lambda', '--values', '1.0', '1'), 'would both be called'),
    (('lambda', '--values', '0.5', '1.5'), 'must be in [0, 1]'),
    (('matching', '--values', 'random', 'best'), "'best' is none of"),
    (('--key', 'model.x.y', '--values', '1', '2'), 'cannot be built'),
])  # fmt: skip
def test_errors_are_one_line(run_sweep, place, what, words):
    code, text = run_sweep(what=what)
    assert code == 2 and words in text and text.startswith('ValueError: ')
    assert not calls(place)
