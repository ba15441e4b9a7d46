# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The report of a made-up suite says what was put into it."""
import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console

from mmdensecl.benchmark.plan import Run as PlannedRun
from mmdensecl.benchmark.report import (DifferentSettingsError, ResultsError,
                                        compare, load_suite, print_tables,
                                        write_report)
from mmdensecl.benchmark.report.curves import read_curves
from mmdensecl.benchmark.report.text import clean
from mmdensecl.benchmark.state import write_suite
from mmdensecl.benchmark.suite import load_suite as load_suite_file

# Of each row, by seed. Means 10, 12.2, 15.1.
VALUES = {
    'random': (9., 10., 11.),
    'MoCo-v2': (11.5, 12., 13.1),
    'DenseCL': (14.3, 15., 16.),
}
METRICS = [
    dict(key='mIoU', name='mIoU', scale=1., unit='%'),
    dict(key='acc', name='pixel accuracy', scale=100., unit='%')
]
PUBLISHED = dict(
    row='DenseCL',
    protocol='finetune',
    metric='mIoU',
    value=69.4,
    source='Wang et al. 2021, table 3')
SETTINGS = dict(
    config_sha256='c' * 64,
    data=dict(fingerprint='d' * 64, files=102, bytes=1000),
    code='e' * 64,
    stack=dict(torch='2.11.0', mmengine='0.10.7'),
    processes=1,
    device='cpu')


class FakeSuite:
    """Files as the benchmark writes them; ``write`` overwrites."""

    def __init__(self, folder, rows=None, protocols=('frozen', ), **changes):
        self.folder = folder / 'mini'
        self.values = VALUES if rows is None else rows
        task = dict(
            name='voc_seg',
            title='VOC segmentation',
            model='FCN R18-d8',
            metrics=METRICS,
            published=[])
        self.data = dict(
            schema=1,
            name='mini',
            title='Mini benchmark',
            description='Small sets, for a comparison.',
            rows=list(self.values),
            protocols=list(protocols),
            seeds=[0, 1, 2],
            tasks=[task],
            runs=[])
        self.data.update(changes)
        for task in self.data['tasks']:
            for protocol in protocols:
                for row, values in self.values.items():
                    for seed, value in enumerate(values):
                        self.add(task['name'], protocol, row, seed, value)
        self.save()

    @staticmethod
    def name(row, seed, protocol='frozen', task='voc_seg'):
        return f'{task}/{protocol}/{row}/seed{seed}'

    def add(self, task, protocol, row, seed, value):
        number = list(self.values).index(row)
        folder = f'{task}/{protocol}/row{number}/seed{seed}'
        if row.replace('-', '').isalnum():
            folder = self.name(row, seed, protocol, task)
        run = dict(task=task, protocol=protocol, row=row, seed=seed)
        self.data['runs'].append(dict(run, folder=folder))
        checkpoint = dict(
            path=f'weights/{number}.pth',
            sha256=f'{number}' * 64,
            source='mmdensecl checkpoint',
            arch='ResNet-18')
        self.write(
            folder,
            schema=1,
            suite='mini',
            **run,
            settings=SETTINGS,
            checkpoint=checkpoint if number else None,
            metrics=dict(mIoU=value, acc=value / 50),
            length=200,
            unit='iterations',
            batch_size=4,
            seconds=60.5,
            resumed=False,
            started='2026-01-01T00:00:00+00:00',
            finished='2026-01-01T00:01:00+00:00',
            environment=dict(sys_platform='linux'),
            config='config.py',
            command=['python', 'tools/train.py', 'config.py'])

    def save(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / 'suite.json').write_text(json.dumps(self.data))

    def path(self, name):
        return self.folder / name / 'result.json'

    def write(self, name, **result):
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))

    def change(self, name, **changes):
        result = json.loads(self.path(name).read_text())
        for key, value in changes.items():
            if isinstance(value, dict) and isinstance(result[key], dict):
                value = {**result[key], **value}
            result[key] = value
        self.path(name).write_text(json.dumps(result))

    def fail(self, name, **failure):
        self.path(name).unlink()
        path = self.folder / name / 'failed.json'
        path.write_text(
            json.dumps(dict(returncode=1, tail='', log='x.txt') | failure))

    def log(self, name, lines, start='20260101_000000'):
        path = self.folder / name / start / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(
            line if isinstance(line, str) else json.dumps(line)
            for line in lines))

    def draw(self, name, index, kind, colour=(200, 30, 30), size=(64, 48)):
        folder = self.folder / name / 'predictions'
        folder.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size, colour).save(folder / f'{index:05d}_{kind}.png')


def write_example(folder):
    """A suite with two tasks, curves and pictures, worth looking at."""
    rng = np.random.default_rng(0)
    tasks = [
        dict(
            name='voc_seg',
            title='VOC segmentation',
            model='FCN R18-d8, 200 iterations',
            metrics=METRICS,
            published=[
                PUBLISHED,
                dict(
                    PUBLISHED,
                    row='random',
                    value=40.7,
                    source='the same table')
            ]),
        dict(
            name='coco_det',
            title='COCO detection',
            model='RetinaNet R18-FPN, 300 iterations',
            metrics=[
                dict(key='ap', name='AP', scale=1., unit='%'),
                dict(key='ap50', name='AP50', scale=1., unit='%')
            ],
            published=[])
    ]
    suite = FakeSuite(folder, protocols=('frozen', 'finetune'), tasks=tasks)
    yy, xx = np.mgrid[:240, :320]
    for run in suite.data['runs']:
        name, level = run['folder'], list(VALUES).index(run['row'])
        goal = 10 + 3 * level + rng.normal(0, 0.6)
        suite.change(
            name,
            metrics=dict(
                mIoU=goal, acc=goal / 25, ap=goal / 2, ap50=goal / 1.2))
        key = 'mIoU' if run['task'] == 'voc_seg' else 'ap'
        lines = []
        for step in range(10, 210, 10):
            lines.append(
                dict(
                    loss=3 * math.exp(-step / (90 - 20 * level)) + 0.5 +
                    rng.normal(0, 0.06),
                    lr=0.01,
                    step=step,
                    iter=step))
            if step % 50 == 0:
                final = goal if key == 'mIoU' else goal / 2
                lines.append({
                    key: final * (1 - math.exp(-step / 60)),
                    'step': step
                })
        suite.log(name, lines)
        if run['seed']:
            continue  # the page shows the first one's predictions
        for index in range(0, 40, 10):
            picture = np.stack([(xx + 3 * index) % 256, yy,
                                (xx * yy // 60) % 256], -1).astype(np.uint8)
            for kind, noise in (('gt', 0), ('pred', 20 * (3 - level))):
                blob = (xx - 160 - noise)**2 + (yy - 110 + noise)**2 < 70**2
                drawn = picture.copy()
                drawn[blob] = drawn[blob] // 3 + np.array([150, 40, 20],
                                                          np.uint8)
                target = suite.folder / name / 'predictions'
                target.mkdir(exist_ok=True)
                Image.fromarray(drawn).save(target / f'{index:05d}_{kind}.png')
    suite.fail(
        suite.name('MoCo-v2', 2, 'finetune', 'coco_det'),
        returncode=1,
        tail='Traceback (most recent call last):\n  ...\n'
        'RuntimeError: CUDA out of memory',
        log='coco_det/finetune/MoCo-v2/seed2/output.txt')
    return suite


class Page(HTMLParser):
    """Elements, table cells by row, and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.rows, self.words = [], [], []
        self.inside = []
        self.feed(path.read_text(encoding='utf-8'))
        self.text = ' '.join(' '.join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside.append(tag)
        if tag == 'tr':
            self.rows.append([])
        elif tag in ('td', 'th'):
            self.rows[-1].append('')

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if 'style' in self.inside:
            return
        self.words.append(data)
        if {'td', 'th'} & set(self.inside):
            self.rows[-1][-1] = f'{self.rows[-1][-1]} {data.strip()}'.strip()

    def row(self, *start):
        """The only row that begins like this."""
        (found, ) = [r for r in self.rows if tuple(r[:len(start)]) == start]
        return found


def table_of(suite, baseline=None, number=0):
    return compare(load_suite(suite.folder), baseline)[number]


def row_of(table, name):
    (row, ) = [row for row in table.rows if row.name == name]
    return row


def markdown_rows(path):
    cells = [
        re.split(r'(?<!\\)\|', line)[1:-1]
        for line in path.read_text().splitlines() if line.startswith('| ')
    ]
    return {
        row[0].strip(): [x.strip() for x in row[1:]]
        for row in cells[::-1]
    }


@pytest.fixture
def suite(tmp_path):
    return FakeSuite(tmp_path)


@pytest.fixture(scope='module')
def example(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp('example'))


@pytest.fixture(scope='module')
def written(example):
    return write_report(example.folder)


class TestNumbers:

    def test_by_hand(self, suite):
        table = table_of(suite)
        assert table.seeds == (0, 1, 2)
        random, dense = row_of(table, 'random'), row_of(table, 'DenseCL')
        assert random.cells['mIoU'].own.mean == 10
        assert random.cells['mIoU'].own.std == 1  # of 9, 10, 11 over n - 1
        assert random.cells['mIoU'].difference is None
        own, gap = dense.cells['mIoU'].own, dense.cells['mIoU'].difference
        assert own.mean == pytest.approx(15.1)
        assert own.std == pytest.approx(0.8544003745)
        # Seed by seed 5.3, 5.0, 5.0; t of 2 degrees is 4.30265.
        assert (gap.mean, gap.n) == (pytest.approx(5.1), 3)
        assert gap.std == pytest.approx(0.1732050808)
        assert gap.interval == pytest.approx((4.6697347, 5.5302653))
        # The scale of 100 is applied: 15 / 50 is 30 %.
        assert dense.cells['acc'].own.mean == pytest.approx(30.2)

    def test_in_every_form(self, suite):
        paths = write_report(suite.folder)
        shown = ['15.1 ± 0.9', '+5.1 ± 0.2', '+4.7 to +5.5']
        assert markdown_rows(paths['md'])['DenseCL'][:4] == [
            '3', f'**{shown[0]}**', *shown[1:]
        ]
        page = Page(paths['html'])
        assert page.row('DenseCL',
                        '3')[2:4] == [shown[0], f'{shown[1]} {shown[2]}']
        assert page.row('random', '3')[2:4] == ['10.0 ± 1.0', 'baseline']
        data = json.loads(paths['json'].read_text())
        (row, ) = [
            x for x in data['tables'][0]['rows'] if x['row'] == 'DenseCL'
        ]
        assert row['metrics']['mIoU']['own']['mean'] == pytest.approx(15.1)
        assert row['metrics']['mIoU']['difference'] == dict(
            mean=pytest.approx(5.1),
            std=pytest.approx(0.1732050808),
            n=3,
            interval=pytest.approx([4.6697347, 5.5302653]))
        lines = list(csv.DictReader(paths['csv'].open()))
        assert len(lines) == 3 * 3 * 2
        (line, ) = [
            x for x in lines
            if (x['row'], x['metric'], x['seed']) == ('DenseCL', 'mIoU', '0')
        ]
        assert (line['value'], line['compared']) == ('14.3', 'yes')
        assert float(line['difference']) == pytest.approx(5.3)
        sentence = ('On VOC segmentation, frozen, by mIoU: MoCo-v2 is 2.2 '
                    'points above random (95% interval 1.5 to 2.9); DenseCL '
                    'is 5.1 points above random (95% interval 4.7 to 5.5). '
                    '3 seeds.')
        assert data['summary'] == [sentence]
        assert sentence in page.text
        assert f'- {sentence}' in paths['md'].read_text()

    def test_another_baseline(self, suite):
        table = table_of(suite, 'DenseCL')
        gap = row_of(table, 'MoCo-v2').cells['mIoU'].difference
        assert gap.mean == pytest.approx(-2.9)
        paths = write_report(suite.folder, baseline='DenseCL')
        assert '−2.9 ± 0.1' in markdown_rows(paths['md'])['MoCo-v2']
        assert 'MoCo-v2 is 2.9 points below DenseCL' in paths['md'].read_text()

    def test_unknown_baseline(self, suite):
        with pytest.raises(ValueError, match='no row "BYOL".*random, MoCo-v2'):
            write_report(suite.folder, baseline='BYOL')

    def test_one_seed_has_no_spread(self, tmp_path):
        suite = FakeSuite(
            tmp_path, dict(random=(9., ), DenseCL=(20., )), seeds=[0])
        cell = row_of(table_of(suite), 'DenseCL').cells['mIoU']
        assert (cell.own.std, cell.difference.interval) == (None, None)
        assert not cell.best
        text = write_report(suite.folder)['md'].read_text()
        assert '| DenseCL | 1 | 20.0 | +11.0 | – |' in text
        assert 'the spread is not known' in text

    def test_best_only_beyond_the_spread(self, tmp_path):
        rows = dict(a=(9., 10., 11.), b=(10., 10.9, 12.), c=(1., 1., 1.))
        near = table_of(FakeSuite(tmp_path / 'near', rows))
        assert not any(row.cells['mIoU'].best for row in near.rows)
        rows['b'] = (10.1, 11.1, 12.1)  # ahead by 1.1, spread 1.0
        far = table_of(FakeSuite(tmp_path / 'far', rows))
        best = [row.name for row in far.rows if row.cells['mIoU'].best]
        assert best == ['b']

    def test_best_beyond_every_spread(self, tmp_path):
        """The third is so uncertain that it may well be the first."""
        rows = dict(a=(69., 70., 71.), b=(67.5, 68., 68.5), c=(40., 67.7, 95.))
        table = table_of(FakeSuite(tmp_path, rows))
        assert not any(row.cells['mIoU'].best for row in table.rows)

    def test_a_probe_has_no_spread(self, suite):
        for run in suite.data['runs']:  # as older versions planned them
            suite.change(run['folder'], length=0)
        table = table_of(suite)
        assert table.seeds == (0, ) and not table.notes
        assert not any(row.cells['mIoU'].best for row in table.rows)
        text = write_report(suite.folder)['md'].read_text()
        assert '| DenseCL | 1 | 14.3 | +5.3 | – |' in text
        assert 'One run each, of fixed weights.' in text
        assert 'A probe of fixed weights: one run' in text

    def test_a_remark_of_a_run_is_shown(self, suite):
        suite.change(suite.name('DenseCL', 1), note='nothing was found')
        text = write_report(suite.folder)['md'].read_text()
        assert '- DenseCL, seed 1: nothing was found.' in text

    def test_interval_with_zero_is_said(self, tmp_path):
        suite = FakeSuite(tmp_path, dict(random=(9., 11.), DenseCL=(12., 11.)))
        text = write_report(suite.folder)['md'].read_text()
        assert 'which includes 0)' in text

    def test_out_dir(self, suite, tmp_path):
        (parent, ) = {p.parent for p in write_report(suite.folder).values()}
        assert parent == suite.folder / 'report'
        shutil.rmtree(parent)
        paths = write_report(suite.folder, tmp_path / 'new' / 'out')
        assert {p.parent for p in paths.values()} == {tmp_path / 'new' / 'out'}
        assert not (suite.folder / 'report').exists()


class TestUnfinishedRuns:

    def test_common_seeds(self, suite):
        """DenseCL's seed 1 failed, so nobody's seed 1 counts."""
        suite.fail(
            suite.name('DenseCL', 1), tail='first\n\x1b[31mlast words\x1b[0m')
        table = table_of(suite)
        assert table.seeds == (0, 2)
        assert row_of(table, 'random').cells['mIoU'].own.mean == 10
        assert row_of(table, 'MoCo-v2').cells['mIoU'].own.mean == 12.3
        assert table.notes == (
            'Seed 1 is left out, although 2 of 3 rows have finished it: '
            'DenseCL has failed.', )
        paths = write_report(suite.folder)
        page = Page(paths['html'])
        for text in (page.text, paths['md'].read_text()):
            assert 'last words' in text and table.notes[0] in text
            assert 'voc_seg/frozen/DenseCL/seed1' in text.replace('\\', '')
        lines = list(csv.DictReader(paths['csv'].open()))
        found = {
            (x['row'], x['seed']): (x['status'], x['value'], x['compared'])
            for x in lines if x['metric'] == 'mIoU'
        }
        assert found['DenseCL', '1'] == ('failed', '', 'no')
        assert found['random', '1'] == ('finished', '10.0', 'no')

    @pytest.mark.parametrize('status', ['failed', 'not run'])
    def test_a_row_without_runs_does_not_empty_the_others(self, suite, status):
        for seed in range(3):
            name = suite.name('MoCo-v2', seed)
            if status == 'failed':
                suite.fail(name)
            else:
                suite.path(name).unlink()
        table = table_of(suite)
        assert table.seeds == (0, 1, 2) and not table.notes
        paths = write_report(suite.folder)
        assert markdown_rows(paths['md'])['MoCo-v2'][:3] == ['0', status, '–']
        assert Page(paths['html']).row('MoCo-v2', '0')[2:4] == [status, '–']
        data = json.loads(paths['json'].read_text())
        assert data['provenance']['finished'] == 6
        assert data['provenance']['planned'] == 9

    def test_no_common_seed(self, suite):
        for row, seeds in (('random', (1, 2)), ('DenseCL', (0, )), ('MoCo-v2',
                                                                    ())):
            for seed in seeds:
                suite.path(suite.name(row, seed)).unlink()
        table = table_of(suite)
        assert table.seeds == ()
        paths = write_report(suite.folder)
        assert 'no common seed' in markdown_rows(paths['md'])['DenseCL']
        assert 'nothing to compare yet' in paths['html'].read_text()

    def test_nothing_has_run(self, suite):
        for run in suite.data['runs']:
            suite.path(run['folder']).unlink()
        paths = write_report(suite.folder)
        assert markdown_rows(paths['md'])['DenseCL'][1] == 'not run'
        assert '0 of 9' in Page(paths['html']).text

    def test_baseline_has_not_run(self, suite):
        for seed in range(3):
            suite.path(suite.name('random', seed)).unlink()
        cell = row_of(table_of(suite), 'DenseCL').cells['mIoU']
        assert cell.own.n == 3 and cell.difference is None

    @pytest.mark.parametrize('value, shown', [('NaN', 'nan'),
                                              ('-Infinity', '-inf')])
    def test_not_finite_is_never_averaged(self, suite, value, shown):
        suite.change(suite.name('DenseCL', 1), metrics=dict(mIoU=float(value)))
        table = table_of(suite)
        cell = row_of(table, 'DenseCL').cells['mIoU']
        assert not math.isfinite(cell.own.mean) and cell.own.std is None
        assert cell.difference is None and not cell.best
        assert 'DenseCL measured something' in table.notes[0]
        assert 'seed 1;' in table.notes[0]
        # The other metric and the other rows stay.
        assert row_of(table, 'DenseCL').cells['acc'].own.std is not None
        paths = write_report(suite.folder)
        assert markdown_rows(paths['md'])['DenseCL'][1:3] == [shown, '–']
        assert Page(paths['html']).row('DenseCL', '3')[2:4] == [shown, '–']
        data = json.loads(
            paths['json'].read_text(),
            parse_constant=lambda x: pytest.fail(f'{x} is not JSON'))
        values = data['tables'][0]['rows'][2]['metrics']['mIoU']
        assert values['values'] == {'0': 14.3, '1': shown, '2': 16.0}
        assert values['own']['mean'] == shown


class TestRefusals:

    @pytest.mark.parametrize('changes, names', [
        (dict(settings=dict(config_sha256='x')), ('config_sha256', 'x in')),
        (dict(settings=dict(data=dict(fingerprint='x'))), ('data', 'x in')),
        (dict(settings=dict(code='x')), ('code', 'e' * 64)),
        (dict(settings=dict(stack=dict(torch='2.10.0', mmengine='0.10.7'))),
         ('stack.torch', '2.10.0 in', '2.11.0 in')),
        (dict(settings=dict(stack=dict(torch='2.11.0'))),
         ('stack.mmengine', 'not stated in')),
        (dict(settings=dict(processes=2)), ('processes', '2 in')),
        (dict(settings=dict(device='cuda')), ('device', 'cuda in')),
        (dict(length=400), ('length', '400 in')),
        (dict(batch_size=8), ('batch_size', '8 in')),
    ])
    def test_different_settings(self, suite, changes, names):
        name = suite.name('DenseCL', 1)
        suite.change(name, **changes)
        with pytest.raises(DifferentSettingsError) as error:
            write_report(suite.folder)
        message = str(error.value)
        assert name in message and suite.name('random', 0) in message
        assert 'and 5 more' in message
        assert '--redo' in message and '--work-dir' in message
        for text in names:
            assert text in message
        assert message.count(' in voc_seg/') == 2  # one setting, two values
        assert not (suite.folder / 'report').exists()

    def test_code_is_shared_by_the_whole_suite(self, tmp_path):
        suite = FakeSuite(tmp_path, protocols=('frozen', 'finetune'))
        for run in suite.data['runs']:
            if run['protocol'] == 'finetune':
                suite.change(run['folder'], settings=dict(device='cuda'))
        load_suite(suite.folder)  # a table may have a device of its own
        for run in suite.data['runs']:
            if run['protocol'] == 'finetune':
                suite.change(run['folder'], settings=dict(code='x'))
        with pytest.raises(DifferentSettingsError, match='code'):
            load_suite(suite.folder)

    def test_one_checkpoint_a_row(self, suite):
        suite.change(suite.name('DenseCL', 2), checkpoint=dict(sha256='new'))
        with pytest.raises(DifferentSettingsError, match='new in .*seed2'):
            load_suite(suite.folder)
        suite.change(suite.name('DenseCL', 2), checkpoint=None)
        with pytest.raises(DifferentSettingsError, match='none in .*seed2'):
            load_suite(suite.folder)

    @pytest.mark.parametrize('changes, message', [
        (dict(metrics=dict(mIoU='12')),
         "metrics.mIoU is '12', expected a num"),
        (dict(metrics=dict(mIoU=True)),
         'metrics.mIoU is True, expected a num'),
        (dict(metrics=None), 'metrics is None, expected an object'),
        (dict(schema=2), r'schema is 2, expected one of \(1,\)|\[1\]'),
        (dict(seed=7), 'seed is 7'),
        (dict(row='random'), "row is 'random'"),
        (dict(settings=None), 'settings is None'),
        (dict(settings=dict(data=3)), 'settings.data is 3'),
        (dict(settings=dict(code=None)), 'settings.code is None'),
        (dict(seconds=float('nan')), 'seconds is nan, expected a finite'),
        (dict(seconds=-1), 'seconds is -1'),
        (dict(checkpoint=dict(sha256=5)), 'checkpoint.sha256 is 5'),
    ])
    def test_broken_result(self, suite, changes, message):
        name = suite.name('DenseCL', 1)
        suite.change(name, **changes)
        with pytest.raises(ResultsError, match=message) as error:
            load_suite(suite.folder)
        assert str(suite.path(name)) in str(error.value)

    def test_missing_metric(self, suite):
        path = suite.path(suite.name('DenseCL', 1))
        path.write_text(path.read_text().replace('"acc"', '"other"'))
        with pytest.raises(ResultsError, match='metrics.acc is missing'):
            load_suite(suite.folder)

    @pytest.mark.parametrize('text',
                             ['', '{"schema": 1', '[]', '\xff', '[' * 100000])
    def test_no_json(self, suite, text):
        path = suite.path(suite.name('DenseCL', 1))
        path.write_bytes(text.encode('latin-1'))
        with pytest.raises(ResultsError, match=re.escape(str(path))):
            load_suite(suite.folder)

    @pytest.mark.parametrize('changes, message', [
        (dict(rows=['a', 'a']), 'distinct'),
        (dict(rows=[]), 'at least one'),
        (dict(seeds=['0']), 'a list of int'),
        (dict(tasks=[]), 'at least one'),
        (dict(title=None), 'title is None, expected a text'),
        (dict(schema=3), 'schema is 3'),
    ])
    def test_broken_suite(self, suite, changes, message):
        suite.data.update(changes)
        suite.save()
        with pytest.raises(ResultsError, match=message) as error:
            load_suite(suite.folder)
        assert 'suite.json' in str(error.value)

    @pytest.mark.parametrize('changes, message', [
        (dict(folder='../elsewhere'), 'a folder below the suite'),
        (dict(folder='/etc'), 'a folder below the suite'),
        (dict(row='BYOL'), "row is 'BYOL'"),
        (dict(seed=0), 'not listed twice'),
    ])
    def test_broken_run(self, suite, changes, message):
        suite.data['runs'][1].update(changes)
        suite.save()
        with pytest.raises(ResultsError, match=message):
            load_suite(suite.folder)

    def test_published_of_an_unknown_metric(self, suite):
        suite.data['tasks'][0]['published'] = [
            dict(PUBLISHED, protocol='frozen', metric='AP')
        ]
        suite.save()
        with pytest.raises(ResultsError, match="metric is 'AP'"):
            load_suite(suite.folder)

    def test_no_suite(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='benchmark.py run'):
            load_suite(tmp_path)


class TestPublished:

    def test_own_column_with_source(self, example, written):
        page = Page(written['html'])
        heads = [r for r in page.rows if 'mIoU (%) published, not ours' in r]
        assert len(heads) == 1  # of the one table that has any
        column = heads[0].index('mIoU (%) published, not ours')
        start = page.rows.index(heads[0])
        cells = {r[0]: r[column] for r in page.rows[start + 1:start + 4]}
        assert cells == {
            'random': '40.7 the same table',
            'MoCo-v2': '–',
            'DenseCL': '69.4 Wang et al. 2021, table 3'
        }
        text = written['md'].read_text()
        assert '69.4 (Wang et al. 2021, table 3)' in text

    def test_never_mixed(self, example, written):
        """No number of ours moves when published ones are added."""
        with_them = table_of(example, number=1)
        for row in with_them.rows:
            assert len(row.cells['mIoU'].values) == 3
            assert row.cells['mIoU'].own.mean < 30
        data = json.loads(written['json'].read_text())
        table = data['tables'][1]
        assert '69.4' not in json.dumps(table['rows'])
        assert [x['value']
                for x in table['published_not_ours']] == [69.4, 40.7]
        for line in csv.DictReader(written['csv'].open()):
            assert line['value'] not in ('69.4', '40.7')
            expected = '69.4' if (line['task'], line['protocol'], line['row'],
                                  line['metric']) == ('voc_seg', 'finetune',
                                                      'DenseCL',
                                                      'mIoU') else ''
            if line['row'] == 'DenseCL':
                assert line['published'] == expected

    def test_rows_and_protocols_that_are_not_planned(self, suite):
        suite.data['tasks'][0]['published'] = [
            dict(PUBLISHED, protocol='frozen', row='BYOL'),
            dict(PUBLISHED, protocol='finetune', row='SwAV', value=70.1),
        ]
        suite.save()
        paths = write_report(suite.folder)
        row = markdown_rows(paths['md'])['BYOL']
        assert row[:5] == [
            '0', '–', '–', '–', '69.4 (Wang et al. 2021, table 3)'
        ]
        page = Page(paths['html'])
        assert page.row('BYOL', '0')[2] == '–'
        # A row of the one table, not of the overview or the plots' legend.
        assert page.text.count('BYOL') == 1
        # Nobody asked for the protocol.
        for path in paths.values():
            assert 'SwAV' not in path.read_text()
        assert len(table_of(suite).notes) == 0

    def test_suite_of_the_paper(self, tmp_path):
        """Some rows and one protocol, as `benchmark.py run` writes them."""
        root = Path(__file__).parents[2] / 'configs/benchmarks/suites'
        suite = load_suite_file(root / 'paper.py')
        runs = [
            PlannedRun(task, 'finetune', row, 0, tmp_path / task.name / row,
                       None, None, {}) for task in suite.tasks
            if 'finetune' in task.configs for row in ('random', 'ours')
        ]
        write_suite(tmp_path, suite, runs)
        for run in runs:
            folder = tmp_path / run.name
            folder.mkdir(parents=True)
            result = dict(
                schema=1,
                task=run.task.name,
                protocol=run.protocol,
                row=run.row,
                seed=0,
                settings=SETTINGS,
                metrics={x['key']: 0.5
                         for x in run.task.metrics},
                seconds=1)
            (folder / 'result.json').write_text(json.dumps(result))
        paths = write_report(tmp_path)
        text = paths['md'].read_text()
        assert '69.4 (Wang et al.' in text and '| DenseCL | 0 | – |' in text
        assert 'linear classification' not in text
        # Every table can be told from the others, everywhere.
        heads = re.findall('^## (.*, finetune)$', text, re.MULTILINE)
        data = json.loads(paths['json'].read_text())
        starts = [x.partition(', finetune:')[0] for x in data['summary']]
        for found in (heads, starts):
            assert len(set(found)) == len(found) == 10
        assert 'VOC07+12 detection (Faster R-CNN R50-C4, 24k), fine' in text
        # Alone of its title.
        assert '## VOC12 + aug segmentation, finetune' in text
        page = Page(paths['html'])
        columns = [x for x in page.rows if x[0] == 'weights'][0]
        assert len(set(columns)) == len(columns) == 11

    def test_not_shown_without_any(self, suite):
        paths = write_report(suite.folder)
        for kind in ('md', 'html'):
            assert 'not ours' not in paths[kind].read_text()


class TestPage:

    def test_needs_nothing_else(self, written):
        page = Page(written['html'])
        for tag, attributes in page.elements:
            assert tag not in ('script', 'link', 'iframe', 'object', 'base')
            for name, value in attributes.items():
                if name in ('src', 'href', 'xlink:href', 'action', 'data'):
                    assert value.startswith(('#', 'data:image/'))
        text = written['html'].read_text()
        assert '@import' not in text
        assert all(x.startswith('url(#') for x in re.findall(r'url\(..', text))

    def test_links_and_ids(self, written):
        elements = Page(written['html']).elements
        ids = [a['id'] for _, a in elements if 'id' in a]
        assert len(ids) == len(set(ids))
        targets = {
            a[name][1:]
            for _, a in elements
            for name in ('href', 'xlink:href') if name in a
        }
        assert targets <= set(ids)

    def test_plots(self, written):
        page = Page(written['html'])
        labels = [a['aria-label'] for tag, a in page.elements if tag == 'svg']
        assert labels == [
            label for metric in ('mIoU (%)', 'AP (%)')
            for label in (f'{metric} of each row and seed', 'Training loss',
                          f'{metric} during training') * 2
        ]
        assert 'iteration' in page.text and 'training loss' in page.text
        # Colours come from the page, which knows light and dark.
        text = written['html'].read_text()
        assert 'stroke: var(--row2)' in text
        assert not re.search('#0[123]0[0-9a-f]{3}[;"]', text)

    def test_a_single_score_is_no_curve(self, suite, monkeypatch):
        monkeypatch.setattr(
            'mmdensecl.benchmark.report.plots.read_curves',
            lambda *_: dict(loss={
                1: 2.,
                2: 1.
            }, metric={2: 50.}))
        text = write_report(suite.folder)['html'].read_text()
        assert 'Training loss' in text and 'during training' not in text

    def test_provenance(self, example, written):
        for text in (Page(written['html']).text,
                     written['md'].read_text().replace('\\', '')):
            for expected in ('1' * 64, '2' * 64, 'd' * 64, 'e' * 64,
                             'weights/2.pth', 'initialised at random',
                             '2.11.0', '35 of 36', '35 min 18 s',
                             'python tools/train.py config.py',
                             'CUDA out of memory', 'exit status 1'):
                assert expected in text


class TestHostileNames:
    NAME = '<script>alert(1)</script>"\'|$x^$\n# `[x](y)` \u202e_'

    @pytest.fixture
    def paths(self, tmp_path):
        bad = self.NAME
        rows = {bad: (9., 10., 11.), 'DenseCL': VALUES['DenseCL']}
        task = dict(
            name=bad,
            title=bad,
            model=bad,
            metrics=[dict(key='mIoU', name=bad, scale=1., unit=bad)],
            published=[{
                **PUBLISHED, 'row': bad,
                'protocol': bad,
                'source': bad
            }])
        suite = FakeSuite(tmp_path, {}, (bad, ), title=bad, tasks=[task])
        suite.data.update(rows=list(rows), description=bad)
        for number, (row, values) in enumerate(rows.items()):
            for seed, value in enumerate(values):
                run = dict(task=bad, protocol=bad, row=row, seed=seed)
                folder = f'run{number}/seed{seed}'
                suite.data['runs'].append(dict(run, folder=folder))
                suite.write(
                    folder,
                    schema=1,
                    **run,
                    settings={
                        **SETTINGS, 'device': bad
                    },
                    checkpoint=dict(
                        path=bad, sha256=bad + row, source=bad, arch=bad),
                    metrics=dict(mIoU=value),
                    seconds=1,
                    environment={bad: bad},
                    command=[bad])
                suite.log(folder, [
                    dict(loss=2., step=10),
                    dict(loss=1., step=20),
                    dict(mIoU=value, step=20)
                ])
                suite.draw(folder, 3, 'pred')
        suite.fail('run0/seed2', reason=bad, log=bad, tail=bad)
        suite.save()
        return write_report(suite.folder)

    def test_page(self, paths):
        page = Page(paths['html'])
        assert 'script' not in {tag for tag, _ in page.elements}
        assert self.NAME.split('\n')[0] in page.text
        assert '\u202e' not in page.text
        allowed = {'class', 'style', 'id', 'src', 'alt', 'scope', 'href'}
        for tag, attributes in page.elements:
            if tag in ('td', 'th', 'img', 'span', 'div', 'p', 'figure'):
                assert set(attributes) <= allowed
        (svg, *_) = [a for tag, a in page.elements if tag == 'svg']
        assert svg['aria-label'].startswith('<script>')

    def test_markdown(self, paths, tmp_path):
        renderer = MarkdownIt('commonmark', dict(html=True)).enable('table')
        rendered = tmp_path / 'rendered.html'
        rendered.write_text(renderer.render(paths['md'].read_text()))
        page = Page(rendered)
        assert {tag
                for tag, _ in page.elements} == {
                    'h1', 'h2', 'h3', 'p', 'ul', 'li', 'table', 'thead',
                    'tbody', 'tr', 'th', 'td', 'pre', 'code', 'strong'
                }
        shown = ' '.join(clean(self.NAME).split())
        row = page.row(clean(self.NAME), '2')
        assert row[2] == '9.50 ± 0.71'
        assert ' '.join(row[5].split()) == f'69.4 ({shown})'
        assert shown in page.text

    def test_data(self, paths):
        lines = list(csv.DictReader(paths['csv'].open(newline='')))
        assert {x['row'] for x in lines} == {self.NAME, 'DenseCL'}
        data = json.loads(paths['json'].read_text())
        assert data['tables'][0]['rows'][0]['row'] == self.NAME

    @pytest.mark.parametrize('name', ['=1+1', '+1', '-1', '@x', '\t=1'])
    def test_no_formulas(self, tmp_path, name):
        suite = FakeSuite(tmp_path, {name: (-1., 2.), 'b': (1., 3.)})
        path = write_report(suite.folder)['csv']
        lines = list(csv.DictReader(path.open(newline='')))
        assert {x['row'] for x in lines} == {f"'{name}", 'b'}
        assert {x['baseline'] for x in lines} == {f"'{name}"}
        assert lines[0]['value'] == '-1.0'

    def test_terminal(self, tmp_path):
        rows = {'[red]a': (1., 2.), '[/red]b': (2., 3.)}
        suite = FakeSuite(tmp_path, rows)
        console = Console(record=True, width=100, file=open('/dev/null', 'w'))
        print_tables(suite.folder, console=console)
        text = console.export_text()
        assert '[red]a' in text and '[/red]b' in text


class TestCurves:

    def curves(self, suite):
        loaded = load_suite(suite.folder)
        return read_curves(loaded.runs[0], loaded.tasks[0].metrics[0])

    def test_resumed_and_cut_off(self, suite):
        name = suite.name('random', 0)
        suite.log(name, [
            dict(loss=3., step=10),
            dict(loss=2., step=20),
            dict(mIoU=5., step=20),
            dict(loss=9., step=30), '{"loss": 1.0, "st'
        ])
        suite.log(
            name, [
                dict(loss=1., step=30), '[]', 'null',
                dict(loss='x', step=40),
                dict(loss=True, step=50),
                dict(mIoU=7., step=40)
            ],
            start='20260102_000000')
        curves = self.curves(suite)
        assert curves['loss'] == {10: 3., 20: 2., 30: 1.}
        assert curves['metric'] == {20: 5., 40: 7.}

    def test_validation_that_counts_epochs(self, suite):
        suite.log(
            suite.name('random', 0), [
                dict(loss=3., step=50, epoch=1),
                dict(loss=3., step=100, epoch=1),
                dict(mIoU=4., step=1),
                dict(loss=3., step=200, epoch=2),
                dict(mIoU=6., step=2)
            ])
        assert self.curves(suite)['metric'] == {100: 4., 200: 6.}

    def test_no_curves_no_plot(self, suite):
        page = Page(write_report(suite.folder)['html'])
        labels = [a['aria-label'] for tag, a in page.elements if tag == 'svg']
        assert labels == ['mIoU (%) of each row and seed']

    def test_loss_that_is_not_finite(self, suite):
        suite.log(
            suite.name('random', 0),
            [dict(loss=float('nan'), step=10),
             dict(loss=1., step=20)])
        write_report(suite.folder)
        assert math.isnan(self.curves(suite)['loss'][10])


class TestExamples:

    def alts(self, suite):
        page = Page(write_report(suite.folder)['html'])
        return [a['alt'] for tag, a in page.elements if tag == 'img']

    def test_same_pictures_for_every_row(self, suite):
        for index in (3, 20, 100):
            for row in VALUES:
                if (row, index) != ('DenseCL', 20):
                    suite.draw(suite.name(row, 0), index, 'pred')
                suite.draw(suite.name(row, 0), index, 'gt')
        assert self.alts(suite) == [
            f'Picture {index}, {what}' for index in (3, 100)
            for what in ('ground truth', *VALUES)
        ]

    def test_a_row_without_pictures_has_no_column(self, suite):
        for row in ('random', 'DenseCL'):
            suite.draw(suite.name(row, 0), 3, 'pred')
        suite.draw(suite.name('DenseCL', 0), 3, 'gt')
        assert self.alts(suite) == [
            'Picture 3, ground truth', 'Picture 3, random',
            'Picture 3, DenseCL'
        ]

    def test_broken_picture(self, suite):
        for row in VALUES:
            suite.draw(suite.name(row, 0), 3, 'pred')
        folder = suite.folder / suite.name('MoCo-v2', 0) / 'predictions'
        (folder / '00003_pred.png').write_bytes(b'\x89PNG\r\n\x1a\n cut')
        (folder / '<b>.png').write_bytes(b'')
        assert self.alts(suite) == ['Picture 3, random', 'Picture 3, DenseCL']
        text = (suite.folder / 'report/report.html').read_text()
        assert text.count('>no picture<') == 2

    def test_pictures_are_made_small(self, suite):
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 255, (900, 1600, 3), dtype=np.uint8)
        for row in VALUES:
            suite.draw(suite.name(row, 0), 3, 'pred')
        path = suite.folder / suite.name('random', 0) / 'predictions'
        Image.fromarray(noise).save(path / '00003_pred.png')
        size = write_report(suite.folder)['html'].stat().st_size
        assert size < 300_000


def test_terminal_table(suite):
    console = Console(record=True, width=100, file=open('/dev/null', 'w'))
    print_tables(suite.folder, console=console)
    text = console.export_text()
    assert re.search(r'DenseCL +│ +15\.1 ± 0\.9', text)
    assert '+5.1 ± 0.2' in text and 'n = 3' in text
    assert 'DenseCL is 5.1 points above random' in ' '.join(text.split())
