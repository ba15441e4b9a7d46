# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Runs that finish, fail, break off and go on, with pretending tools."""
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from mmdensecl.benchmark import state
from mmdensecl.benchmark.log import log_rows
from mmdensecl.benchmark.plan import Checkpoint, plan_runs
from mmdensecl.benchmark.runner import Benchmark, Launcher, only_one
from mmdensecl.benchmark.suite import load_suite


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
    assert 'failed seg/frozen/ours/seed0: exit status 1' in said(made)

    # Once more, mended: it resumes from its last checkpoint.
    monkeypatch.delenv('FAIL')
    done = bench().execute()
    assert len(done['finished']) == 6
    assert not (folder / 'failed.json').exists()
    steps = [row['iter'] for row in log_rows(folder) if 'lr' in row]
    assert steps == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]
    assert json.loads((folder / 'result.json').read_text())['resumed']


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


def test_ctrl_c_is_safe(bench, monkeypatch):
    monkeypatch.setenv('SLOW', 'seg/frozen/ours')
    made = bench()
    slow = made.runs[1]

    def interrupt():
        while state.progress(slow) < 0.6:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.time()
    with pytest.raises(KeyboardInterrupt):
        made.execute()
    assert time.time() - began < 60
    assert 'goes on from their last checkpoints' in said(made)
    pids = subprocess.run(['pgrep', '-f', str(slow.folder)],
                          capture_output=True).stdout
    assert not pids, 'a run outlived the benchmark'
    assert state.status(slow) == 'started'
    assert state.status(made.runs[0]) == 'finished'
    monkeypatch.delenv('SLOW')
    assert len(bench().execute()['finished']) == 6
    assert len(calls(made.runs[0])) == 1 and len(calls(slow)) == 2


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
        import torch
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
