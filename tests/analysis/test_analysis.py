# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Logs of runs: what is read, what is said of it, what is drawn."""
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mmdensecl.analysis import (as_html, in_one_line, judge, key_numbers,
                                read_run, read_runs, save_picture)
from mmdensecl.analysis.plots import HUMP, panels_of, thin
from mmdensecl.engine import ContrastMonitorHook

ROOT = Path(__file__).parents[2]


def row_of(step, full_at=40, **changes):
    """As mmengine writes it: the loss rises to 5 at ``full_at`` and falls."""
    loss = 3 + 2 * step / full_at if step <= full_at else (5 * math.exp(
        (full_at - step) / 200))
    return {
        'lr': 0.1,
        'data_time': 0.01,
        'time': 1.,
        'loss': loss,
        'loss_global': loss / 2,
        'loss_dense': loss / 2,
        'global_acc': 30.,
        'dense_acc': 50.,
        'feat_std': 0.9,
        'queue_fill': min(100., 100 * step / full_at),
        'position_r2': 20.,
        'match_acc': 20 + step / 10,
        'epoch': (step - 1) // 20 + 1,
        'iter': step,
        'step': step,
        **changes
    }


@pytest.fixture
def make_run(tmp_path):

    def make(*starts, name='run', epochs=10, saved=10):
        """A work_dir with a log for each list of rows or lines."""
        for number, rows in enumerate(starts):
            folder = tmp_path / name / f'2026010{number}_000000/vis_data'
            folder.mkdir(parents=True)
            lines = [x if isinstance(x, str) else json.dumps(x) for x in rows]
            (folder / 'scalars.json').write_text('\n'.join(lines))
            (folder / 'config.py').write_text(
                "model = dict(type='x')\ntrain_cfg = dict(by_epoch=True, "
                f'max_epochs={epochs},\n    type=\'Loop\')\n')
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        if saved:
            (tmp_path / name /
             'last_checkpoint').write_text(f'/somewhere/epoch_{saved}.pth')
        return tmp_path / name

    return make


def steps(first, last, **changes):
    return [row_of(step, **changes) for step in range(first, last + 1, 10)]


def finding(run, topic):
    found = [x for x in judge(run) if x.topic == topic]
    assert len(found) == 1, [x.topic for x in judge(run)]
    return found[0]


class TestRead:

    def test_healthy_run(self, make_run):
        run = read_run(make_run(steps(10, 200)))
        assert run.name == 'run' and run.starts == 1
        assert run.steps == list(range(10, 201, 10))
        assert (run.total, run.epochs, run.interval) == (200, 10, 10)
        assert run.finished is True
        assert run.full_at == 40 and run.hump == (10, 40)
        assert in_one_line(judge(run)) == 'nothing wrong to be seen'

    def test_resumed_run_is_merged(self, make_run):
        first = steps(10, 100, feat_std=0.1)
        second = steps(70, 150, feat_std=0.5)
        run = read_run(make_run(first, second, saved=7))
        assert run.steps == list(range(10, 151, 10))
        assert [run.curve('feat_std')[s]
                for s in (60, 70, 100)] == [0.1, 0.5, 0.5]
        assert (run.starts, run.repeated) == (2, 4)
        assert run.finished is False and run.last_step == 150

    def test_a_resumed_run_with_a_text_log(self, make_run):
        """It tells where a start began, where rows leave that open."""
        first, second = steps(10, 100), steps(90, 150)
        work_dir = make_run(first, second, saved=7)
        assert read_run(work_dir).steps == list(range(10, 151, 10))
        head = '2026/01/01 00:00:00 - mmengine - INFO - '
        for name, lines in (('20260100_000000',
                             ['Epoch(train)   [1][10/20]  loss: 3.0']),
                            ('20260101_000000', [
                                'Load checkpoint from epoch_3.pth',
                                'resumed epoch: 3, iter: 60',
                                'Epoch(train)   [5][10/20]  loss: 3.0',
                                'resumed epoch: 1, '
                                'iter: 0'
                            ])):
            (work_dir / name / f'{name}.log').write_text(''.join(
                f'{head}{line}\n' for line in lines))
        run = read_run(work_dir)
        # 70 and 80 were thrown away, and not logged again.
        assert run.steps == [*range(10, 61, 10), *range(90, 151, 10)]
        assert run.repeated == 4

    def test_a_run_that_was_started_anew(self, make_run):
        work_dir = make_run(steps(10, 100), steps(30, 60))
        name = '20260101_000000'
        (work_dir / name / f'{name}.log').write_text(
            'x - mmengine - INFO - Epoch(train)   [1][30/200]  loss: 3.0\n')
        run = read_run(work_dir)
        assert run.steps == [30, 40, 50, 60] and run.repeated == 10
        # Without rows of a training it does not tell.
        (work_dir / name / f'{name}.log').write_text('Environment: ...\n')
        assert read_run(work_dir).steps == [10, 20, 30, 40, 50, 60]

    def test_what_a_resumed_run_has_not_reached_again_is_gone(self, make_run):
        run = read_run(make_run(steps(10, 190), steps(70, 90), saved=4))
        assert run.last_step == 90 and run.repeated == 13

    def test_a_start_without_a_row_changes_nothing(self, make_run):
        run = read_run(make_run(steps(10, 200), []))
        assert run.last_step == 200 and run.starts == 1

    def test_truncated_and_bad_lines(self, make_run):
        lines = [*steps(10, 50), 'no json', '[1]', '{"loss": 2.1, "st']
        run = read_run(make_run(lines, saved=None))
        assert run.broken == 3 and run.last_step == 50
        assert '3 lines of the log cut off' in finding(run, 'progress').text

    def test_finished_needs_the_last_checkpoint(self, make_run):
        work_dir = make_run(steps(10, 200), saved=9)
        assert read_run(work_dir).finished is False

    def test_by_iterations(self, make_run):
        work_dir = make_run(steps(10, 190), saved=None)
        config = next(work_dir.glob('*/vis_data/config.py'))
        config.write_text("train_cfg = dict(max_iters=200, type='X')\n")
        run = read_run(work_dir)
        assert run.total == 200 and run.finished is False
        config.write_text('train_cfg = dict(max_iters=195)\n')
        assert read_run(work_dir).finished is True

    def test_the_config_is_not_run(self, make_run, tmp_path):
        work_dir = make_run(steps(10, 200))
        config = next(work_dir.glob('*/vis_data/config.py'))
        trace = tmp_path / 'trace'
        config.write_text(f'open({str(trace)!r}, "w")\n' + config.read_text())
        assert read_run(work_dir).total == 200
        assert not trace.exists()

    @pytest.mark.parametrize('content, message', [
        (None, 'no log <time>/vis_data/scalars.json'),
        (['{}', 'x'], 'no step with a loss'),
    ])
    def test_nothing_to_read(self, make_run, content, message):
        work_dir = make_run(*([] if content is None else [content]))
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            read_run(work_dir)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            read_run(tmp_path / 'none')

    def test_names(self, make_run):
        paths = [make_run(steps(10, 50), name=x) for x in ('a/run', 'b/run')]
        assert [x.name for x in read_runs(paths)] == ['a/run', 'b/run']
        assert [x.name for x in read_runs(paths, ['A', 'B'])] == ['A', 'B']
        for names in (['A'], ['A', 'A']):
            with pytest.raises(ValueError, match='2 runs need as many names'):
                read_runs(paths, names)


class TestVerdict:

    def judged(self, make_run, **changes):
        return read_run(make_run(steps(10, 200, **changes)))

    def test_limits_are_those_of_the_hook(self, make_run):
        hook = ContrastMonitorHook()
        for name, topic, limit, sign in (('feat_std', 'collapse', hook.min_std,
                                          -1), ('position_r2', 'position',
                                                hook.max_position,
                                                1), ('global_acc', 'leak',
                                                     hook.max_early_acc, 1),
                                         ('dense_acc', 'leak',
                                          hook.max_early_acc, 1),
                                         ('category_entropy', 'categories',
                                          hook.min_category_entropy, -1)):
            for beyond in (True, False):
                value = limit + (1 if beyond else -1) * sign * 1e-3
                run = read_run(
                    make_run(
                        steps(10, 200, **{name: value}),
                        name=f'{name}{beyond}'))
                found = finding(run, topic)
                assert found.warning is beyond, (name, found)
                verdict = in_one_line(judge(run))
                assert (verdict == f'look at: {topic}') is beyond

    def test_places_explain_an_easy_dense_loss(self, make_run):
        run = self.judged(make_run, position_r2=95., dense_acc=100.)
        assert finding(run, 'position').warning
        assert not finding(run, 'leak').warning

    def test_high_accuracy_is_no_leak_later_nor_before_the_queue_is_full(
            self, make_run):
        rows = [
            row_of(s, global_acc=100. if s < 40 or s > 60 else 50.)
            for s in range(10, 201, 10)
        ]
        assert not finding(read_run(make_run(rows)), 'leak').warning

    def test_loss_since_the_queue_was_full(self, make_run):
        run = self.judged(make_run)
        found = finding(run, 'loss')
        assert not found.warning and 'fell by' in found.text
        assert 'from 5.00 to' in found.text
        hump = finding(run, 'queue-fill hump').text
        assert '5.00 at its highest, step 40' in hump and 'at step 40' in hump

    def test_loss_below_zero(self, make_run):
        rows = [row_of(s) for s in range(10, 201, 10)]
        for row in rows:
            row['loss'] -= 6
        found = finding(read_run(make_run(rows)), 'loss')
        assert not found.warning and 'fell since' in found.text

    def test_loss_that_does_not_fall(self, make_run):
        found = finding(self.judged(make_run, loss=2.), 'loss')
        assert found.warning and 'did not fall' in found.text

    def test_queue_that_is_not_full_yet(self, make_run):
        run = read_run(make_run(steps(10, 30), saved=None))
        assert run.full_at is None and run.hump == (10, 30)
        assert 'too early' in finding(run, 'loss').text
        assert '75% full' in finding(run, 'queue-fill hump').text
        assert in_one_line(judge(run)) == 'too early to say'
        assert key_numbers(run)['loss, queue full'] == '–'

    def test_a_log_that_begins_with_a_full_queue_has_no_hump(self, make_run):
        run = self.judged(make_run, queue_fill=100.)
        assert run.hump is None
        assert not [x for x in judge(run) if x.topic == 'queue-fill hump']

    def test_nan(self, make_run):
        rows = steps(10, 200)
        for row in rows[12:]:
            row.update(loss=math.nan, dense_acc=math.nan)
        run = read_run(make_run(rows))
        found = finding(run, 'NaN')
        assert found.warning and 'loss is not finite at step 130' in found.text
        assert 'nan' not in ' '.join(key_numbers(run).values())

    @pytest.mark.parametrize('data_time, warned', [(0.5, True), (0.1, False)])
    def test_waiting_for_pictures(self, make_run, data_time, warned):
        found = finding(self.judged(make_run, data_time=data_time), 'time')
        assert found.warning is warned
        assert f'{100 * data_time:.0f}% of it waiting' in found.text

    @pytest.mark.parametrize('last, word', [(80., 'rose'), (5., 'fell'),
                                            (20.5, 'stayed')])
    def test_trend_of_matches(self, make_run, last, word):
        rows = steps(10, 200, match_acc=20.)
        for row in rows[-3:]:
            row['match_acc'] = last
        found = finding(read_run(make_run(rows)), 'matches')
        assert f'{word}, 20.0% at first and {last:.1f}% now' in found.text

    def test_categories_and_neighbours(self, make_run):
        rows = steps(
            10,
            200,
            loss_category=1.,
            category_used=80.,
            category_entropy=70.,
            category_agreement=60.)
        rows += [
            dict(knn_top1=x, knn_chance=10., step=s)
            for x, s in ((20., 0), (55., 200))
        ]
        run = read_run(make_run(rows))
        assert finding(run, 'categories').text == (
            '80% of them in use, entropy 70%, agreement 60%')
        text = finding(run, 'kNN').text
        assert '20.0% at first and 55.0% now; 10.0%' in text
        keys = {panel.key for panel in panels_of([run])}
        assert {'knn', 'categories', 'parts'} <= keys
        assert run.steps[0] == 10

    def test_mocov2_log(self, make_run):
        dense = ('loss_dense', 'dense_acc', 'position_r2', 'match_acc')
        rows = [{
            k: v
            for k, v in row.items() if k not in dense
        } for row in steps(10, 200)]
        run = read_run(make_run(rows))
        assert in_one_line(judge(run)) == 'nothing wrong to be seen'
        assert 'dense_acc' not in finding(run, 'leak').text
        assert key_numbers(run)['position'] == '–'
        assert 'position' not in {panel.key for panel in panels_of([run])}


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.values, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(k, v or '') for k, v in attrs]

    def handle_data(self, data):
        self.text.append(data)


class TestPictures:

    @pytest.fixture
    def runs(self, make_run):
        broken = steps(10, 200)
        broken[15]['loss'] = math.inf
        return read_runs([
            make_run(steps(10, 200), name='a'),
            make_run(broken, name='b'),
        ])

    def test_page(self, runs):
        text = as_html(runs)
        page = Page(text)
        words = ' '.join(page.text)
        assert HUMP in words and 'queue-fill hump' in words
        assert 'Parts of the loss' in words and 'training step' in words
        assert 'not finite' in words and 'look at: NaN' in words
        assert page.tags.count('svg') == len(panels_of(runs))
        # Each run has a colour of its own, the hump a third.
        assert all(f'var(--row{i})' in text for i in (0, 1, 2))
        assert '#0300' not in text
        # Nothing is fetched.
        assert not {'script', 'link', 'img', 'iframe'} & {*page.tags}
        assert not [
            v for k, v in page.values
            if k in ('src', 'href') and not v.startswith('#')
        ]

    def test_hostile_names(self, runs, make_run):
        bad = '<script>alert(1)</script> $x_1^ "\'\x1b[2J{{ 1 }}'
        named = read_runs([make_run(steps(10, 60), name='c')], [bad])
        text = as_html(named)
        page = Page(text)
        assert 'script' not in page.tags and '\x1b' not in text
        assert '<script>alert(1)</script>' in ' '.join(page.text)

    def test_picture(self, runs, tmp_path):
        path = tmp_path / 'curves.png'
        save_picture(runs, path)
        with Image.open(path) as picture:
            assert picture.width > 1000 and len(picture.getcolors(10**7)) > 50

    def test_long_curves_are_thinned(self):
        curve = {step: float(step) for step in range(1, 2502)}
        short = thin(curve, 1000)
        assert len(short) == 834 and max(short) == 2501
        assert short[3] == 2. and short[2501] == 2500.5
        assert thin({1: 5.}, 1000) == {1: 5.} and thin({}) == {}


class TestTool:

    @pytest.fixture
    def call(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / 'tools/analysis_tools'))
        import analyze_run

        def run(*args):
            monkeypatch.setattr('sys.argv',
                                ['analyze_run.py', *map(str, args)])
            analyze_run.main()

        return run

    def test_two_runs(self, call, make_run, tmp_path, capsys):
        paths = [
            make_run(steps(10, 200), name='a'),
            make_run(steps(10, 200, feat_std=0.01), name='b')
        ]
        call(*paths, '--out', tmp_path / 'out', '--label', 'good [b]', 'bad')
        printed = capsys.readouterr().out
        assert 'good [b]: nothing wrong to be seen' in printed
        assert 'bad: look at: collapse' in printed
        assert sorted(x.name for x in (tmp_path / 'out').iterdir()) == [
            'curves.html', 'curves.png'
        ]

    def test_default_folder(self, call, make_run):
        path = make_run(steps(10, 50))
        call(path)
        assert (path / 'analysis/curves.png').exists()
        call(path)  # and does not read what it wrote

    def test_nothing_there(self, call, tmp_path, capsys):
        with pytest.raises(SystemExit) as stopped:
            call(tmp_path)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and 'has no log' in error
