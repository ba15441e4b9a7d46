# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Sweeps: one pre-training for each value, then a suite, then a plot."""
import csv
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from mmdensecl.benchmark import state
from mmdensecl.benchmark.ablation import (ABLATIONS, find_ablation,
                                          plan_pretraining, set_value,
                                          weights_of)
from mmdensecl.testing import write_pictures

CONFIGS = Path(__file__).parents[2] / 'configs'
FULL = 'densecl_r50_8xb32-coslr-800e_coco'
FULL_ITERS = 800 * (118287 // 256)
# What the names of the full-scale configs call an ablation.
SHORT = {'matching': 'match-', 'temperature': 'tau'}
WARMUP = 'mmdensecl.LambdaWarmupHook'


@pytest.fixture
def config(place, tiny_cfg):
    """A pre-training of ten iterations, by the pretending tool."""
    model = tiny_cfg(
        loss_lambda=0.5,
        correspondence=dict(type='mmdensecl.RandomMatch'),
        head=dict(
            type='mmdensecl.ContrastiveHead',
            loss=dict(type='mmdensecl.InfoNCE', temperature=0.2)))
    write_pictures(place / 'pictures', 4, size=8)
    path = place / 'pretrain.py'
    Config(
        dict(
            data_root='nowhere',
            default_scope='mmpretrain',
            model=model,
            train_dataloader=dict(
                batch_size=1,
                dataset=dict(
                    type='mmdensecl.UnlabeledFolder', data_root='nowhere')),
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=10),
            auto_scale_lr=dict(base_batch_size=4),
            randomness=dict(seed=3))).dump(path)
    return path


@pytest.fixture
def plan(config, place):
    """Function that plans the trainings of an ablation."""

    def make(ablation='lambda', values=(), **kwargs):
        kwargs.setdefault('data_root', place / 'pictures')
        return plan_pretraining(
            find_ablation(ablation, values=values), config, place / 'out',
            **kwargs)

    return make


@pytest.fixture
def sweep(tool, place, config, trained_weights, monkeypatch):
    """Function that calls the tool to sweep over two lambdas."""
    monkeypatch.setenv('WEIGHTS', str(trained_weights))

    def call(*args, what=('lambda', '--values', 0, 0.3)):
        return tool('sweep', *what, '--config', config, '--pretrain-data',
                    place / 'pictures', '--suite', place / 'tiny.py',
                    '--data-root', place / 'data', '--work-dir', place / 'out',
                    '--tasks', 'det', '--jobs', 2, *args)

    return call


def calls(folder):
    """How often each run below a folder has been started."""
    return {
        str(path.parent.relative_to(folder)):
        len(path.read_text().splitlines())
        for path in sorted(folder.rglob('calls'))
    }


class TestTable:

    @pytest.mark.parametrize('name', ABLATIONS)
    def test_full_scale_configs_are_the_values(self, name):
        """Each value of a sweep has a file, or is the published recipe."""
        ablation, in_base = ABLATIONS[name], 0
        for value in ablation.values:
            own = Config.fromfile(CONFIGS / f'{FULL}.py')
            published = own.model.to_dict()
            set_value(own, ablation, value)
            if ablation.adjust:
                ablation.adjust(own, value, FULL_ITERS)
            word = f'{SHORT.get(name, name)}{value}'.replace('.', 'p')
            path = CONFIGS / 'ablations' / f'{FULL}_{word}.py'
            if not path.is_file():
                in_base += 1
                assert own.model.to_dict() == published
                continue
            shipped = Config.fromfile(path)
            assert own.model.to_dict() == shipped.model.to_dict()
            assert own.custom_hooks == shipped.custom_hooks
        # The grid's base is the map as it is, None.
        assert in_base == (name != 'grid')

    def test_issue_values(self):
        assert ABLATIONS['lambda'].values == (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)
        assert ABLATIONS['grid'].values == (1, 3, 5, 7, 9)

    def test_a_rule_takes_no_arguments_of_another(self):
        cfg = Config(
            dict(model=dict(correspondence=dict(type='Mine', sharp=2))))
        set_value(cfg, ABLATIONS['matching'], 'geometric')
        assert cfg.model.correspondence == dict(
            type='mmdensecl.GeometricMatch')

    def test_values_that_are_lists(self):
        cfg = Config(dict(model=dict(type='Mine', strides=[1, 2])))
        found = find_ablation(key='model.strides', values=['[1,2]', '[2,2]'])
        set_value(cfg, found, found.values[1])
        assert list(cfg.model.strides) == [2, 2]

    def test_own_settings(self):
        found = find_ablation(key='model.momentum', values=['1e-3', '0.01'])
        assert (found.values, found.axis) == ([0.001, 0.01], 'log')
        assert [*found.rows] == ['momentum_0.001', 'momentum_0.01']
        found = find_ablation(key='a.b', values=['1', '2.0', '3'])
        assert (found.values, found.axis) == ([1, 2, 3], 'linear')
        found = find_ablation(key='a.type', values=['my.Rule', 'None'])
        assert (found.values, found.axis) == (['my.Rule', None], 'category')
        assert found.sweep['values']['type_None'] == 'None'

    def test_a_value_has_one_row_however_it_is_written(self):
        assert [*find_ablation('lambda', values=['0.0', '1']).rows
                ] == ['lambda_0', 'lambda_1']
        with pytest.raises(ValueError, match='would both be the row'):
            find_ablation('lambda', values=['1.0', '1'])


class TestPlan:

    def test_names_values_and_states(self, plan, place):
        runs = plan()
        assert [run.name for run in runs[:2]
                ] == ['pretrain/lambda_0', 'pretrain/lambda_0.1']
        assert [run.config.model.loss_lambda
                for run in runs] == [*ABLATIONS['lambda'].values]
        for run in runs:
            assert run.folder == place / 'out' / run.name
            assert run.config.train_dataloader.dataset.data_root == str(
                place / 'pictures')
            assert run.config.train_dataloader.batch_size == 4
            assert (run.seed, run.length) == (3, (10, 'iterations'))
            assert state.status(run) == 'new'
        # One value does not share another's identity.
        assert len({run.settings['config_sha256'] for run in runs}) == 7
        promised = weights_of(runs[0], finished=False)
        assert promised.path == runs[0].folder / 'iter_10.pth'
        assert (promised.sha256, promised.arch) == ('', 'ResNet-18')

    @pytest.mark.parametrize('iters, start', [(FULL_ITERS, 10000),
                                              (2 * FULL_ITERS, 10000),
                                              (FULL_ITERS // 10, 1000)])
    def test_dense_only_is_warmed_up(self, plan, iters, start):
        zero, one = plan(
            values=['0', '1'], options={'train_cfg.max_iters': iters})
        assert 'custom_hooks' not in zero.config
        assert one.config.custom_hooks == [
            dict(type=WARMUP, start_iters=start)
        ]

    def test_a_warm_up_of_the_config_stays(self, plan, config):
        own = [dict(type=WARMUP, start_iters=7)]
        cfg = Config.fromfile(config)
        cfg.custom_hooks = own
        cfg.dump(config)
        for run in plan(values=['0.5', '1']):
            assert run.config.custom_hooks == own

    def test_processes_share_the_batch(self, plan):
        run = plan(processes=2)[0]
        assert run.config.train_dataloader.batch_size == 2
        assert run.batch_size == 4

    def test_pictures_are_a_setting_and_their_place_is_none(self, plan, place):
        before = plan()[0].settings
        (place / 'pictures').rename(place / 'moved')
        moved = plan(data_root=place / 'moved')[0].settings
        assert moved == before
        write_pictures(place / 'moved', 5, size=8)
        assert plan(data_root=place / 'moved')[0].settings != before

    def test_epochs(self, plan, config):
        cfg = Config.fromfile(config)
        cfg.train_cfg = dict(
            type='EpochBasedTrainLoop', max_epochs=FULL_ITERS // 10)
        cfg.dump(config)
        run = plan(values=['0', '1'])[1]  # one step of four pictures an epoch
        assert run.config.custom_hooks[-1].start_iters == 1000
        assert run.last_checkpoint.name == f'epoch_{FULL_ITERS // 10}.pth'


class TestSweep:

    def test_from_pictures_to_a_plot(self, sweep, place):
        what = ('lambda', '--values', 0, 0.3, 1)
        code, text = sweep('--tasks', 'seg', '--seeds', 2, what=what)
        assert code == 0, text
        folder = place / 'out' / 'lambda'
        rows = ('lambda_0', 'lambda_0.3', 'lambda_1')
        started = calls(folder)
        assert set(started.values()) == {1}
        assert {name
                for name in started if name.startswith('pretrain')
                } == {f'pretrain/{row}'
                      for row in rows}
        assert len(started) == 3 + 2 * 2 * 4
        for row in rows:
            result = state.read_json(folder / 'pretrain' / row / 'result.json')
            assert (result['suite'], result['row']) == ('lambda', row)
            assert result['metrics']['loss'] == pytest.approx(0.1)
            used = state.read_json(folder / 'tiny/seg/frozen' / row /
                                   'seed0/result.json')
            assert used['checkpoint']['path'] == str(folder / 'pretrain' /
                                                     row / 'iter_10.pth')
        assert 'needs a warm-up' in text and 'sweep.png' in text

        report = folder / 'tiny' / 'report'
        with open(report / 'sweep.csv') as file:
            lines = [*csv.DictReader(file)]
        assert [(x['protocol'], x['row'], x['value']) for x in lines
                ] == [(protocol, *row) for protocol in ('frozen', 'finetune')
                      for row in (('random', ''), ('lambda_0', '0'),
                                  ('lambda_0.3', '0.3'), ('lambda_1', '1'))]
        assert {(x['metric'], x['unit'], x['n'])
                for x in lines} == {('mIoU', '%', '2')}
        assert all(50 <= float(x['mean']) < 57 for x in lines)
        with Image.open(report / 'sweep.png') as picture:
            assert picture.width >= 600 and len(picture.getcolors(1 << 24)) > 9
        assert '(sweep.png)' in (report / 'report.md').read_text()
        assert json.loads(
            (report / 'report.json').read_text())['sweep']['values'] == dict(
                zip(rows, (0, 0.3, 1)))

    def test_nothing_is_done_twice(self, sweep, place):
        """And further values come beside the first."""
        folder = place / 'out' / 'lambda'
        assert sweep()[0] == 0
        started = calls(folder)
        assert len(started) == 2 + 3 and set(started.values()) == {1}
        assert sweep()[0] == 0
        assert calls(folder) == started
        assert sweep(what=('lambda', '--values', '0.3', '0.5'))[0] == 0
        assert len(calls(folder)) == len(started) + 2
        values = state.read_json(folder / 'tiny/suite.json')['sweep']['values']
        assert values == {'lambda_0': 0, 'lambda_0.3': 0.3, 'lambda_0.5': 0.5}

    def test_dry_run(self, sweep, place):
        code, text = sweep('--dry-run')
        assert code == 0
        assert 'pretrain/lambda_0.3 10 iters 4 40 new ?' in text
        assert '1 new, 2 waiting' in text and 'not pre-trained yet' in text
        assert not calls(place / 'out')

    def test_a_broken_pretraining(self, sweep, place, monkeypatch):
        """It stops neither the rest nor a later call, which resumes it."""
        monkeypatch.setenv('FAIL', 'pretrain/lambda_0.3')
        code, text = sweep()
        assert code == 1 and 'told to fail' in text
        folder = place / 'out' / 'lambda'
        before = calls(folder)
        assert len(before) == 2 + 2
        report = (folder / 'tiny/report/report.md').read_text()
        assert 'not run' in report
        # The axis still has a place for it.
        assert '>0.3<' in (folder / 'tiny/report/report.html').read_text()

        monkeypatch.delenv('FAIL')
        assert sweep()[0] == 0
        after = calls(folder)
        assert after['pretrain/lambda_0.3'] == 2
        assert all(after[name] == 1 for name in before if '0.3' not in name)
        broken = folder / 'pretrain/lambda_0.3'
        assert state.read_json(broken / 'result.json')['resumed']
        assert len(after) == len(before) + 1

    def test_ctrl_c(self, sweep, place, monkeypatch):
        monkeypatch.setenv('SLOW', 'pretrain/lambda_0.3')
        folder = place / 'out' / 'lambda'
        pointer = folder / 'pretrain/lambda_0.3/last_checkpoint'

        def interrupt():
            while not pointer.exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        code, text = sweep('--jobs', 1)
        assert code == 130 and 'goes on from their last checkpoints' in text
        assert calls(folder).keys() == {
            'pretrain/lambda_0', 'pretrain/lambda_0.3'
        }
        monkeypatch.delenv('SLOW')
        assert sweep()[0] == 0
        started = calls(folder)
        assert started.pop('pretrain/lambda_0.3') == 2
        assert set(started.values()) == {1}

    def test_stale(self, sweep, place):
        """Other pictures: refused, or all of it anew."""
        assert sweep()[0] == 0
        folder = place / 'out' / 'lambda'
        before = calls(folder)
        write_pictures(place / 'pictures', 5, size=8)
        for flags in ((), ('--dry-run', )):
            code, text = sweep(*flags)
            assert code == 2 and text.startswith('StaleRunError')
            assert 'settings.data.files: 4 -> 5' in text
        assert calls(folder) == before
        code, text = sweep('--redo')
        assert code == 0 and 'discarding pretrain/lambda_0' in text
        # Its weights are other files, so their runs are discarded, too.
        assert 'discarding det/finetune/lambda_0/seed0' in text
        assert 'discarding det/finetune/random' not in text
        assert calls(folder) == before

    def test_weights_that_are_gone_are_made_again(self, sweep, place):
        assert sweep()[0] == 0
        folder = place / 'out' / 'lambda'
        (folder / 'pretrain/lambda_0/iter_10.pth').unlink()
        code, text = sweep()
        # What they were used for is not theirs any more.
        assert code == 2 and 'checkpoint: ' in text
        code, text = sweep('--redo')
        assert code == 0, text
        assert (folder / 'pretrain/lambda_0/iter_10.pth').is_file()
        started = calls(folder)
        assert started.pop('pretrain/lambda_0') == 2
        assert set(started.values()) == {1}


@pytest.mark.parametrize('what, words', [
    (('lamda', ), 'There is no ablation "lamda", only lambda, matching'),
    ((), 'Name one ablation'),
    (('lambda', '--key', 'model.momentum'), 'Name one ablation'),
    (('lambda', '--values', '0.5'), 'at least two --values, got 1'),
    (('lambda', '--values', '0.5', 'x'), "'x' is no number"),
    (('lambda', '--values', '0.5', '1.5'), 'loss_lambda must be in [0, 1]'),
    (('queue', '--values', '0', '8'), 'must be above 0'),
    (('matching', '--values', 'random', 'best'), "'best' is none of backbone"),
    (('--key', 'model.x.y', '--values', '1', '2'), 'no setting "model.x.y"'),
    (('--key', 'model.x', '--values', '1', '2'), 'cannot be built'),
    (('lambda', '--pretrain-data', 'nowhere'), 'with --pretrain-data'),
    (('lambda', '--config', 'nowhere.py'), 'There is no config'),
    (('lambda', '--config', 'seg.py'), 'no setting "model.loss_lambda"'),
    (('lambda', '--config', 'tiny.py'), 'it lacks train_dataloader.dataset'),
    (('lambda', '--suite', 'nowhere'), 'There is no suite "nowhere"'),
    (('lambda', '--data-root', 'nowhere'), 'does not exist'),
    (('lambda', '--pretrain-options', 'data_root=x'), 'use --pretrain-data'),
    (('lambda', '--pretrain-options', 'load_from=x'), 'init_cfg'),
    (('lambda', '--pretrain-options', 'model.loss_lambda=1'),
     'what the sweep is about'),
])
def test_errors_are_one_line(sweep, place, what, words, monkeypatch):
    monkeypatch.chdir(place)
    flags = [x for x in what if x.startswith('--')]
    # The last of two equal flags counts.
    late = flags and flags[0] in ('--pretrain-data', '--config', '--suite',
                                  '--data-root')
    code, text = sweep(*what[1:], what=what[:1]) if late else sweep(what=what)
    assert code == 2 and words in text
    assert re.match(r'(Value|FileNotFound)Error: ', text)
    assert not calls(place)


class TestPlots:

    @pytest.fixture
    def report(self, sweep, tool, place):
        """Function that writes a report, the sweep being another one."""
        folder = place / 'out/lambda/tiny'
        assert sweep()[0] == 0

        def write(**changes):
            suite = state.read_json(folder / 'suite.json')
            suite['sweep'].update(changes)
            state.write_json(folder / 'suite.json', suite)
            code, text = tool('report', folder)
            if code:
                return text
            page = (folder / 'report/report.html').read_text()
            return page.partition('id="sweep"')[2].partition('</section>')[0]

        return write

    def test_all_that_a_plot_needs(self, report):
        card = report()
        for text in ('>0<', '>0.3<', '>AP (%)<', 'finetune, random weights',
                     'weight of the dense loss, lambda<', 'spread is not'):
            assert text in card, text
        # Random weights: dashed, in the protocol's own colour.
        assert card.count('stroke-dasharray') == 1
        assert card.count('var(--row1)') >= 3
        # Of other axes, and of broken files.
        rows = ('lambda_0', 'lambda_0.3')
        assert 'sweep.values.lambda_0 is 0, expected a number above 0' in (
            report(axis='log'))
        card = report(values=dict(zip(rows, (4096, 65536))))
        assert '>4096<' in card and '>65536<' in card
        assert 'expected a text' in report(axis='category')
        card = report(values=dict(zip(rows, ('one', '<b>'))))
        assert '>one<' in card and '>&lt;b&gt;<' in card
        assert "expected one of ['linear'" in report(axis='round')
        assert 'expected one of' in report(axis='linear', values=dict(x=1))
