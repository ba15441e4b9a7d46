# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Runs that finish, fail, break off and go on, with pretending tools."""
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmdensecl.benchmark import state
from mmdensecl.benchmark.log import log_rows
from mmdensecl.benchmark.plan import Checkpoint, plan_runs
from mmdensecl.benchmark.runner import Benchmark, Launcher, only_one
from mmdensecl.benchmark.suite import load_suite


@pytest.fixture(autouse=True)
def heeded_signals():
    """Also where nohup or a shell in the background has them ignored."""
    previous = {
        sig: signal.signal(sig, signal.default_int_handler)
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    yield
    for sig, handler in previous.items():
        signal.signal(sig, handler)


@pytest.fixture
def bench(place, weights, monkeypatch):
    """Function that plans and executes the suite."""

    def make(seeds=(0, ), jobs=1, tasks=(), rows=None, **kwargs):
        suite = load_suite(place / 'tiny.py').select(list(tasks))
        rows = rows or dict(random=None, ours=Checkpoint.read(weights))
        runs = plan_runs(suite, rows, ('frozen', 'finetune'), seeds,
                         place / 'data', place / 'out' / 'tiny')
        console = Console(file=io.StringIO(), width=200)
        return Benchmark(
            runs,
            Launcher(place / 'tools', jobs=jobs),
            console=console,
            **kwargs)

    monkeypatch.setattr('mmdensecl.benchmark.runner.POLL', 0.02)
    monkeypatch.setattr('mmdensecl.benchmark.runner.collect_env',
                        lambda: dict(sys='test'))
    return make


def said(bench):
    return bench.console.file.getvalue()


def calls(run):
    return (run.folder / 'calls').read_text().splitlines()


def test_results(bench, weights):
    made = bench()
    done = made.execute()
    assert len(done['finished']) == 6 and not done['failed']
    run = done['finished'][1]
    result = json.loads((run.folder / 'result.json').read_text())
    assert result['row'] == 'ours' and result['seed'] == 0
    assert result['suite'] == 'tiny' and result['task'] == 'seg'
    assert 50 <= result['metrics']['mIoU'] < 57
    assert 'step' not in result['metrics']
    assert result['checkpoint']['path'] == str(weights)
    assert result['settings'] == run.settings
    assert result['environment'] == dict(sys='test')
    assert (result['length'], result['batch_size']) == (10, 4)
    assert not (run.folder / 'failed.json').exists()
    text = said(made)
    assert 'finished seg/frozen/ours/seed0: mIoU 5' in text
    assert 'finished det/finetune/ours/seed0: AP 25.00' in text


def test_a_finished_run_is_never_repeated(bench):
    runs = bench().execute()['finished']
    before = [(r.folder / 'result.json').read_bytes() for r in runs]
    again = bench(seeds=(0, 1)).execute()
    assert len(again['finished']) == 12
    assert [len(calls(r)) for r in again['finished']] == [1] * 12
    assert [(r.folder / 'result.json').read_bytes() for r in runs] == before


def test_a_failed_run_does_not_stop_the_rest(bench, monkeypatch):
    monkeypatch.setenv('FAIL', 'seg/frozen/ours')
    made = bench()
    done = made.execute()
    assert [run.name for run in done['failed']] == ['seg/frozen/ours/seed0']
    assert len(done['finished']) == 5
    folder = done['failed'][0].folder
    failed = json.loads((folder / 'failed.json').read_text())
    assert failed['returncode'] == 1
    assert 'this run was told to fail' in failed['tail']
    assert ('failed seg/frozen/ours/seed0: exit status 1, RuntimeError: this '
            'run was told to fail' in said(made))

    # Once more, mended: it resumes from its last checkpoint.
    monkeypatch.delenv('FAIL')
    done = bench().execute()
    assert len(done['finished']) == 6
    assert not (folder / 'failed.json').exists()
    steps = [row['iter'] for row in log_rows(folder) if 'lr' in row]
    assert steps == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]
    assert json.loads((folder / 'result.json').read_text())['resumed']


def test_a_killed_run_is_not_blamed_on_an_earlier_one(bench, monkeypatch):
    monkeypatch.setenv('FAIL', 'seg/frozen/ours')
    bench().execute()
    monkeypatch.delenv('FAIL')
    monkeypatch.setenv('KILL', 'seg/frozen/ours')
    run, = bench().execute()['failed']
    failed = state.read_json(run.folder / 'failed.json')
    assert failed['reason'] == 'exit status -9'
    assert 'told to fail' not in failed['tail']
    assert 'told to fail' in (run.folder / 'output.txt').read_text()


def test_a_run_without_a_result_has_failed(bench, monkeypatch):
    monkeypatch.setenv('NO_VAL', 'det')
    done = bench().execute()
    assert {run.task.name for run in done['failed']} == {'det'}
    failed = state.read_json(done['failed'][0].folder / 'failed.json')
    assert failed['reason'] == 'it ended without a result'


def test_a_run_killed_before_its_score_is_scored(bench, monkeypatch):
    monkeypatch.setenv('KILL', 'seg/finetune/random')
    done = bench().execute()
    run, = done['failed']
    assert state.read_json(run.folder / 'failed.json')['returncode'] == -9
    monkeypatch.delenv('KILL')
    assert not bench().execute()['failed']
    first, second = calls(run)
    assert first.startswith('train.py --work-dir')
    assert second.startswith(f'test.py {run.folder / "iter_10.pth"}')
    assert state.read_json(run.folder / 'result.json')['metrics']['mIoU'] >= 50


def test_a_run_that_lacks_a_metric_has_failed(bench, place):
    path = place / 'tiny.py'
    path.write_text(path.read_text().replace(
        "name='mIoU', scale=1., unit='%')]",
        "name='mIoU', scale=1., unit='%'), dict(key='aAcc', name='acc')]"))
    done = bench().execute()
    assert {run.task.name for run in done['failed']} == {'seg'}
    failed = state.read_json(done['failed'][0].folder / 'failed.json')
    assert failed['reason'] == 'its result lacks aAcc'


def test_no_detection_counts_as_zero(bench, place, monkeypatch):
    monkeypatch.setenv('NOTHING', 'det/finetune/random')
    done = bench(tasks=['det']).execute()
    assert not done['failed']
    results = [
        state.read_json(run.folder / 'result.json') for run in done['finished']
    ]
    assert [result['metrics']['AP'] for result in results] == [0, 0.25]
    assert 'counted as 0' in results[0]['note'] and not results[1]['note']


def test_only_the_last_evaluation_counts_as_zero(bench, monkeypatch):
    monkeypatch.setenv('NO_VAL', 'det')
    made = bench(tasks=['det'])
    run = made.runs[0]
    state.prepare(run)
    (run.folder / 'output.txt').write_text(  # of one before
        'Evaluating bbox...\n'
        'The testing results of the whole dataset is empty.\n')
    assert run in made.execute()['failed']


def interrupt(run, sig):
    """Send a signal to this process when a run is half done."""

    def wait():
        while state.progress(run) < 0.6:
            time.sleep(0.02)
        os.kill(os.getpid(), sig)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_is_safe(bench, monkeypatch, sig):
    monkeypatch.setenv('SLOW', 'seg/frozen/ours')
    made = bench()
    slow = made.runs[1]
    interrupt(slow, sig)
    handler = signal.getsignal(sig)
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        made.execute()
    assert time.time() - began < 60
    assert signal.getsignal(sig) == handler
    assert 'goes on from their last checkpoints' in said(made)
    pids = subprocess.run(['pgrep', '-f', str(slow.folder)],
                          capture_output=True).stdout
    assert not pids, 'a run outlived the benchmark'
    assert state.status(slow) == 'started'
    assert state.status(made.runs[0]) == 'finished'
    monkeypatch.delenv('SLOW')
    assert len(bench().execute()['finished']) == 6
    assert len(calls(made.runs[0])) == 1 and len(calls(slow)) == 2


@pytest.fixture
def signal_at_start(monkeypatch):
    """Function after which a process that starts brings a signal with it."""
    original, started = subprocess.Popen, []

    def make(sig):

        def start(*args, **kwargs):
            started.append(original(*args, **kwargs))
            os.kill(os.getpid(), sig)
            return started[-1]

        monkeypatch.setattr(subprocess, 'Popen', start)
        return started

    yield make
    for process in started:
        process.kill()


def test_nohup(bench, signal_at_start):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at_start(signal.SIGHUP)
        assert len(bench(tasks=['det']).execute()['finished']) == 2
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_signal_while_a_run_starts_leaves_none_behind(
        bench, monkeypatch, signal_at_start):
    monkeypatch.setenv('SLOW', 'seg')
    started = signal_at_start(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        bench().execute()
    process, = started
    assert process.returncode is not None


def test_runs_of_a_killed_benchmark_keep_the_lock(bench, place, monkeypatch):
    monkeypatch.setenv('SLOW', 'seg/frozen/random')
    made = bench()
    run, folder = made.runs[0], place / 'out' / 'tiny'

    def work():
        with only_one(folder) as lock:
            made.execute(lock)

    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    while state.progress(run) < 0.6 and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    pids = subprocess.run(['pgrep', '-f', str(run.folder)],
                          capture_output=True,
                          text=True).stdout.split()
    assert len(pids) == 1
    with pytest.raises(RuntimeError, match='left behind when it was killed'):
        with only_one(folder):
            pass
    os.kill(int(pids[0]), signal.SIGKILL)
    for _ in range(200):
        try:
            with only_one(folder):
                break
        except RuntimeError:
            time.sleep(0.02)
    else:
        pytest.fail('the lock outlived the run')


class TestBrokenCheckpoints:
    """A run that was killed while mmengine replaced its checkpoint."""

    @pytest.fixture
    def run(self, bench, monkeypatch):
        monkeypatch.setenv('FAIL', 'det/finetune/random')
        run, = bench(tasks=['det']).execute()['failed']
        monkeypatch.delenv('FAIL')
        return run

    def steps(self, run):
        return [row['iter'] for row in log_rows(run.folder) if 'lr' in row]

    def finish(self, bench):
        made = bench(tasks=['det'])
        assert len(made.execute()['finished']) == 2
        return said(made)

    @pytest.mark.parametrize('name', ['iter_9.pth', ''])
    def test_pointer_to_nothing(self, bench, run, name):
        (run.folder / 'last_checkpoint').write_text(name)
        assert 'going on from iter_5.pth' in self.finish(bench)
        assert self.steps(run) == [*range(1, 7), *range(6, 11)]

    def test_cut_off(self, bench, run):
        last = run.folder / 'iter_8.pth'
        last.write_bytes((run.folder / 'iter_5.pth').read_bytes()[:20])
        (run.folder / 'last_checkpoint').write_text(str(last))
        assert 'iter_8.pth is gone or cut off, going on from iter_5' in (
            self.finish(bench))
        assert self.steps(run) == [*range(1, 7), *range(6, 11)]

    def test_a_newer_one_than_the_pointer_says(self, bench, run):
        """Killed between the two: the pointer decides, steps are repeated."""
        shutil.copy(run.folder / 'iter_5.pth', run.folder / 'iter_8.pth')
        assert 'cut off' not in self.finish(bench)
        assert self.steps(run) == [*range(1, 7), *range(6, 11)]

    def test_none_is_whole(self, bench, run):
        """Started afresh, though --resume alone would refuse to."""
        (run.folder / 'iter_5.pth').write_bytes(b'PK')
        assert 'starting afresh' in self.finish(bench)
        assert self.steps(run) == [*range(1, 7), *range(1, 11)]
        assert (run.folder / 'iter_5.unreadable').read_bytes() == b'PK'

    def test_none_is_left(self, bench, run):
        (run.folder / 'iter_5.pth').unlink()
        assert 'starting afresh' in self.finish(bench)
        assert self.steps(run) == [*range(1, 7), *range(1, 11)]

    def test_nothing_is_said_of_a_good_one(self, bench, run):
        assert 'cut off' not in self.finish(bench)


class TestProbes:

    def test_one_run_each(self, bench, probe):
        done = bench(seeds=(0, 1), tasks=['knn']).execute()
        assert [run.seed for run in done['finished']] == [0, 0]
        assert calls(done['finished'][1])[0].startswith('test.py')


class TestDiscard:

    def test_all_goes(self, bench):
        run = bench(tasks=['det']).execute()['finished'][0]
        state.discard(run)
        assert not [*run.folder.parent.iterdir()]
        assert state.status(run) == 'new'
        state.discard(run)  # nothing there

    def test_interrupted(self, bench, monkeypatch):
        """Whatever is left never counts as the new run's."""
        run = bench(tasks=['det']).execute()['finished'][0]

        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(state.shutil, 'rmtree', stop)
            with pytest.raises(KeyboardInterrupt):
                state.discard(run)
        assert not run.folder.exists()
        assert len(bench(tasks=['det']).execute()['finished']) == 2
        assert len(calls(run)) == 1
        state.discard(run)
        assert not [*run.folder.parent.iterdir()]

    @pytest.mark.parametrize('name', ['result.json', 'iter_10.pth'])
    def test_a_folder_of_nobody_is_refused(self, bench, name):
        made = bench()
        run = made.runs[0]
        run.folder.mkdir(parents=True)
        (run.folder / name).write_text('{}')
        for function in (state.status, state.prepare):
            with pytest.raises(state.StaleRunError, match='--redo'):
                function(run)
        with pytest.raises(state.StaleRunError, match='no plan/run.json'):
            made.execute()
        state.discard(run)
        assert state.status(run) == 'new'

    def test_a_plan_that_was_cut_off_is_written_again(self, bench):
        run = bench().runs[0]
        (run.folder / 'plan').mkdir(parents=True)
        (run.folder / 'plan' / 'config.py').write_text('half = ')
        assert state.status(run) == 'new'
        assert 'half' not in state.prepare(run).read_text()


def test_jobs_share_the_cores(bench):
    done = bench(jobs=2).execute()['finished']
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(calls(run)[0].endswith(f' {share}') for run in done)


def test_checkpoints_can_be_dropped(bench):
    kept = bench(tasks=['det']).execute()['finished']
    assert all((run.folder / 'iter_10.pth').exists() for run in kept)
    dropped = bench(tasks=['seg'], keep_checkpoints=False).execute()
    assert len(dropped['finished']) == 4
    assert not any([*r.folder.glob('*.pth')] for r in dropped['finished'])


class TestSettings:

    def test_other_data_are_refused(self, bench, place):
        bench().execute()
        (place / 'data' / 'coco' / 'new.txt').write_text('more')
        with pytest.raises(
                state.StaleRunError, match=r'settings\.data\.files: 1 -> 2'):
            bench().execute()

    def test_other_weights_are_refused(self, bench, place, weights):
        bench().execute()
        other = place / 'other.pth'
        state_dict = torch.load(weights)
        state_dict['conv1.weight'] += 1
        torch.save(state_dict, other)
        rows = dict(random=None, ours=Checkpoint.read(other))
        with pytest.raises(state.StaleRunError, match='checkpoint'):
            bench(rows=rows).execute()

    def test_another_config_is_refused(self, bench, place):
        bench().execute()
        path = place / 'seg.py'
        path.write_text(path.read_text().replace('max_iters=10',
                                                 'max_iters=9'))
        with pytest.raises(state.StaleRunError, match='config_sha256'):
            bench().execute()

    def test_the_place_of_the_data_is_no_setting(self, bench, place):
        bench().execute()
        (place / 'data').rename(place / 'moved')
        (place / 'data').symlink_to(place / 'moved')
        assert len(bench().execute()['finished']) == 6


def test_only_one_at_a_time(tmp_path):
    with only_one(tmp_path):
        with pytest.raises(RuntimeError, match='Another benchmark is running'):
            with only_one(tmp_path):
                pass
    with only_one(tmp_path):
        pass


def test_time_left(bench):
    made = bench()
    seg, det = made.runs[0], made.runs[-1]
    assert made.estimate(seg) is None
    assert 'not known' in made._time_left([seg], [])
    seg.task.seconds['frozen'] = 30.  # what the suite says
    assert made.estimate(seg) == 30
    seg.settings['device'] = 'cuda'
    assert made.estimate(seg) is None
    made.seconds[('seg', 'frozen')] = [60., 120.]
    assert made.estimate(seg) == 90
    # The other task is taken as like the known ones.
    assert made._time_left([seg, det], []) == '3 min 00 s left'


class TestCommands:

    @pytest.fixture
    def run(self, bench):
        return bench().runs[0]

    def test_one_process(self, run):
        command = Launcher(Path('tools')).command(run, Path('c.py'))
        assert command == [
            sys.executable, 'tools/train.py', 'c.py', '--work-dir',
            str(run.folder), '--resume'
        ]

    def test_gpus(self, run):
        launcher = Launcher(Path('tools'), gpus=8)
        assert launcher.command(run, Path('c.py')) == [
            'bash', 'tools/dist_train.sh', 'c.py', '8', '--work-dir',
            str(run.folder), '--resume'
        ]
        ports = {launcher.environment()['PORT'] for _ in range(3)}
        assert all(1024 < int(port) < 65536 for port in ports)

    def test_slurm(self, run):
        launcher = Launcher(Path('tools'), gpus=8, slurm='part')
        assert launcher.command(run, Path('c.py')) == [
            'bash', 'tools/slurm_train.sh', 'part', 'seg-random', 'c.py',
            '--work-dir',
            str(run.folder), '--resume'
        ]
        assert launcher.environment()['GPUS'] == '8'

    def test_the_environment_of_slurm_is_said_to_be_another_host(self, bench):
        made = bench(tasks=['det'])
        made.launcher = Launcher(made.launcher.tools, slurm='part')
        for kind in ('train', 'test'):
            (made.launcher.tools / f'slurm_{kind}.sh').write_text(
                f'shift 2; exec "$PYTHON" "$(dirname "$0")/{kind}.py" "$@"')
        run = made.execute()['finished'][0]
        found = state.read_json(run.folder / 'result.json')['environment']
        assert 'submitted' in found['collected on']
        assert found['sys'] == 'test'
