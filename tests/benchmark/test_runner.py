# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Runs that finish, fail, break off and resume, with pretending tools."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from made_up import calls
from rich.console import Console

from mmdensecl.benchmark import runner
from mmdensecl.benchmark.plan import Checkpoint, plan_runs
from mmdensecl.benchmark.results import log_rows, read_json
from mmdensecl.benchmark.suite import load_suite


@pytest.fixture(autouse=True)
def heeded_signals():
    """Also where nohup or a shell in the background has them ignored."""
    kinds = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    heed = signal.default_int_handler
    previous = {sig: signal.signal(sig, heed) for sig in kinds}
    yield
    for sig, handler in previous.items():
        signal.signal(sig, handler)


@pytest.fixture
def bench(place, setup, weights):
    """Function that plans the suite, two pre-trainings of a method."""

    def make(seeds=1, jobs=1, tasks=('seg', 'det'), keep=True):
        suite = load_suite(place / 'tiny.py').select(tasks)
        methods = dict(random=[None], ours=[*map(Checkpoint.read, weights)])
        modes = ('frozen', 'finetune')
        how = replace(setup, prints={})  # of data that may have changed
        runs = plan_runs(suite, methods, modes, range(seeds), how)
        launcher = runner.Launcher(place / 'tools', jobs=jobs)
        console = Console(file=io.StringIO(), width=200)
        return runner.Benchmark(runs, launcher, keep, console)

    return make


def said(made):
    return made.console.file.getvalue()


def read(run, name='result.json'):
    return read_json(run.folder / name)


def test_results_and_nothing_twice(bench, weights, setup):
    made = bench(jobs=2)
    assert not made.execute()
    result = read(made.runs[2])
    assert 50 <= result['metrics']['mIoU'] < 57
    assert result['weights']['path'] == str(weights[1])
    assert result['settings'] == made.runs[2].settings
    assert (result['length'], result['remarks']) == ('10 iters', [])
    assert read(made.runs[0])['remarks'] == ['predicts one class only, cup']
    assert 'AP 25.00' in said(made) and '0 runs to go' in said(made)
    before = calls(setup.work_dir)
    assert len(before) == 9 and {*before.values()} == {1}
    share = max(1, runner.count_cores() // 2)
    call = (made.runs[0].folder / 'calls').read_text()
    assert call.endswith(f' {share}\n')
    made = bench(seeds=2, jobs=2)
    assert not made.execute() and '9 of 18 runs are finished' in said(made)
    assert {*calls(setup.work_dir).values()} == {1}


def test_a_failed_run_stops_nothing_and_resumes(bench, monkeypatch):
    monkeypatch.setenv('FAIL', 'seg/frozen/random')
    made = bench(jobs=2)
    (run,) = made.execute()
    failed = read(run, 'failed.json')
    assert failed['reason'].endswith('RuntimeError: this run was told to fail')
    assert 'Traceback' in failed['tail']
    assert 'failed seg/frozen/random/seed0: exit status 1' in said(made)
    monkeypatch.delenv('FAIL')
    monkeypatch.setenv('KILL', 'seg/frozen/random')
    # Killed after its training; not blamed on what an earlier attempt said.
    assert bench().execute() and read(run, 'failed.json') == dict(
        read(run, 'failed.json'), reason='exit status -9', tail=''
    )
    monkeypatch.delenv('KILL')
    assert not bench().execute()  # only the score was missing
    steps = [row['iter'] for row in log_rows(run.folder) if 'lr' in row]
    assert steps == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]
    last = (run.folder / 'calls').read_text().splitlines()[-1]
    assert last.startswith(f'test.py {run.folder / "iter_10.pth"}')
    assert read(run)['resumed'] and not read(made.runs[1])['resumed']
    assert not (run.folder / 'failed.json').exists()


def test_runs_without_a_score(bench, monkeypatch):
    monkeypatch.setenv('NO_VAL', 'seg')
    monkeypatch.setenv('NOTHING', 'det/finetune/random')
    made = bench()
    failed = made.execute()
    assert {run.task.name for run in failed} == {'seg'}
    reason = read(failed[0], 'failed.json')['reason']
    assert reason == 'it ended without a result'
    nothing = read(made.runs[6])
    assert nothing['metrics'] == dict(AP=0)
    assert nothing['remarks'] == ['detects nothing, counted as 0']


def interrupt(run, sig):
    """Send a signal to this process when a run is half done."""

    def wait():
        note = run.folder / 'last_checkpoint'
        while not (note.exists() and note.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), sig)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM])
def test_stopping_is_safe(bench, monkeypatch, setup, sig):
    monkeypatch.setenv('SLOW', 'det/finetune/ours/pretrain0')
    made = bench(tasks=['det'])
    slow = made.runs[1]
    interrupt(slow, sig)
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        made.execute()
    assert time.time() - began < 60
    assert signal.getsignal(sig) == signal.default_int_handler
    assert 'the same command resumes' in said(made)
    command = ['pgrep', '-f', str(slow.folder)]
    assert subprocess.run(command).returncode, 'a run outlived the benchmark'
    assert runner.status(slow) == 'started'
    assert not (slow.folder / 'failed.json').exists()
    monkeypatch.delenv('SLOW')
    # nohup's signal stops nothing; checkpoints can be dropped.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    made = bench(tasks=['det'], keep=False)
    interrupt(slow, signal.SIGHUP)
    assert not made.execute()
    assert not any([*run.folder.glob('*.pth')] for run in made.runs[1:])
    assert not bench(tasks=['det']).execute()
    started = calls(setup.work_dir)
    assert started.pop('det/finetune/ours/pretrain0/seed0') == 2
    assert {*started.values()} == {1}


def test_folders_of_other_settings(bench, monkeypatch):
    run = bench(tasks=['det']).runs[1]
    bench(tasks=['det']).execute()
    for changes, words in (
        (dict(checkpoint=replace(run.checkpoint, sha256='x')), 'sha256: '),
        (dict(settings=dict(run.settings, code='x')), 'settings.code: '),
    ):
        with pytest.raises(runner.StaleRunError, match=words):
            runner.status(replace(run, **changes))

    def stop(path, ignore_errors=False):
        if not ignore_errors:
            raise KeyboardInterrupt

    # Discarded at once or not at all: no rest counts as the new run's.
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'rmtree', stop)
        with pytest.raises(KeyboardInterrupt):
            runner.discard(run)
    assert runner.status(run) == 'new'
    run.folder.mkdir(exist_ok=True)
    (run.folder / 'iter_10.pth').touch()  # of nobody
    with pytest.raises(runner.StaleRunError):
        runner.status(run)


def test_commands(bench, monkeypatch):
    made = bench(tasks=['seg', 'knn'], seeds=2)
    run, probe = made.runs[0], made.runs[7]
    config, tools = str(run.folder / 'plan/config.py'), Path('tools')
    tail = ['--work-dir', str(run.folder), '--resume']
    one = runner.Launcher(tools).command(run)
    assert one == [sys.executable, 'tools/train.py', config, *tail]
    many = runner.Launcher(tools, 8).command(run)
    assert many == ['bash', 'tools/dist_train.sh', config, '8', *tail]
    slurm = runner.Launcher(tools, 8, 'part')
    start = ['bash', 'tools/slurm_train.sh', 'part', 'seg-frozen-random-seed0']
    assert slurm.command(run) == [*start, config, *tail]
    weights = str(probe.checkpoint.path)  # a probe is tested
    assert made.launcher.command(probe)[3:5] == [weights, '--work-dir']
    monkeypatch.setattr(runner.torch.cuda, 'device_count', lambda: 4)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    env = runner.Launcher(tools, 2, jobs=2).environment(slot=1)
    assert env['CUDA_VISIBLE_DEVICES'] == '2,3'


class TestTool:
    def test_run_and_report(self, run, tool, place, weights):
        a, b = weights
        code, text = run('--tasks', 'seg', '--checkpoint', f'ours={a},{b}')
        assert code == 0 and 'Segmentation, fine-tuned' in text
        suite = place / 'out/tiny'
        assert set(calls(suite).values()) == {1} and len(calls(suite)) == 6
        assert 'predicts one class only, cup' in text and 'looked at' in text
        # The same, named twice; the report alone, with another baseline.
        args = f'ours={a}', '--checkpoint', f'ours={b}', '--tasks', 'seg'
        assert run('--checkpoint', *args)[0] == 0
        assert set(calls(suite).values()) == {1}
        code, text = tool('report', suite, '--baseline', 'ours')
        assert code == 0 and 'against ours' in text
        assert tool('report', suite, '--baseline', 'x')[0] == 2
        path = suite / 'seg/frozen/random/seed0/result.json'
        result = json.loads(path.read_text())
        for text in ('{', '[1]', json.dumps(dict(result, metrics={}))):
            path.write_text(text)
            code, words = tool('report', suite)
            assert code == 2 and 'ResultsError' in words
            assert 'seed0/result.json' in words

    def test_dry_run_lists_all(self, run, place):
        shutil.rmtree(place / 'data')
        code, text = run('--dry-run', '--seeds', 2)
        assert code == 0 and not calls(place)
        assert text.count('runs to go') == 1
        for words in (
            'new, seg/frozen/random/seed1, 10 iters, data is missing',
            '/knn/frozen/random/seed0/plan/config.py none --work-dir',
            f'missing: {place}/data/coco 7 runs to go',
        ):
            assert words in text
        code, text = run()
        assert code == 2 and f'missing: {place}/data/coco.' in text
        assert '--data-root' in text and '--tasks' in text

    def test_what_no_table_can_mix(self, run, place, weights):
        seg = '--tasks', 'seg', '--mode', 'frozen'
        ours = '--checkpoint', f'ours={weights[0]}'
        assert run(*seg)[0] == 0
        (place / 'data/coco/annotations/new.json').write_text('[]')
        # A further task shares the code, not the data.
        assert run('--tasks', 'det', *ours)[0] == 0
        code, text = run(*seg, *ours)
        assert code == 2 and 'settings.data.files: 1 -> 2' in text
        code, text = run(*seg, '--redo', *ours)
        assert code == 0 and 'discarding seg/frozen/random/seed0' in text
        # Other weights under a known name, in another table.
        other = '--checkpoint', f'ours={weights[1]}'
        code, text = run('--tasks', 'knn', *other)
        assert code == 2 and 'checkpoint: ' in text and 'no table' in text
        for path in place.rglob('result.json'):  # and other code
            text = path.read_text().replace('"code": "', '"code": "x')
            path.write_text(text)
        code, text = run('--tasks', 'knn')
        assert code == 2 and 'code: x' in text

    @pytest.mark.parametrize('args, words', [
        (['--checkpoint', 'random={0}'], 'NAME other than "random"'),
        (['--checkpoint', 'a={0}', 'b={0}'], 'hold the same weights'),
        (['--checkpoint', 'a={0},{0}'], 'hold the same weights'),
        (['--checkpoint', '{0}'], 'takes NAME=FILE'),
        (['--checkpoint', 'a/b={0}'], 'becomes a folder'),
        (['--cfg-options', 'randomness.seed=7'], 'use --seeds'),
        (['--tasks', 'pose'], 'no task pose'),
    ])  # fmt: skip
    def test_errors_are_one_line(self, run, weights, place, args, words):
        code, text = run(*(x.format(weights[0]) for x in args))
        assert code == 2 and words in text and text.startswith('ValueError: ')
        assert not calls(place)

    def test_only_one_at_a_time(self, run, place):
        folder = place / 'out/tiny'
        folder.mkdir(parents=True)
        with FileLock(folder / '.lock'):
            code, text = run()
        assert code == 2 and 'Another run works in' in text
        assert run('--tasks', 'det')[0] == 0
