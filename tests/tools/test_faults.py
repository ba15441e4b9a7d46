# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""tools/train.py through kills, full disks and wrong folders."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from forks import run_script
from runs import TOOLS, assert_same_weights, prepare, run, train

# Mounts a folder read-only for one command: modes do not keep root out.
READ_ONLY = [
    'unshare',
    '--user',
    '--map-root-user',
    '--mount',
    'bash',
    '-ec',
    'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"',
]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The work_dir of an uninterrupted run of two epochs."""
    folder = prepare(tmp_path_factory.mktemp('whole'))
    log = train(folder, '--resume').stdout
    assert '"work_dirs/tiny" has no checkpoint to resume: start anew' in log
    return folder / 'work_dirs' / 'tiny'


@pytest.fixture
def workplace(tmp_path):
    return prepare(tmp_path)


def refused(workplace, *flags):
    """The last line of a run that says one and stops with status 2."""
    done = run_script(
        TOOLS / 'train.py',
        'tiny.py',
        *flags,
        '--cfg-options',
        'data_root=pictures',
        cwd=workplace,
    )
    assert done.returncode == 2
    assert 'Traceback' not in done.stdout
    # Before the data are looked at and the model is built.
    assert 'System environment' not in done.stdout
    return done.stdout.strip().splitlines()[-1]


def test_a_second_run_and_a_kill(workplace, whole):
    """The second run is refused; it may go on once the first is killed."""
    folder = workplace / 'work_dirs' / 'tiny'

    def first():
        # Its workers outlive it, for a while.
        results.append(
            run_script(
                TOOLS / 'train.py',
                'tiny.py',
                '--cfg-options',
                'data_root=pictures',
                'train_cfg.max_epochs=1000',
                'train_dataloader.num_workers=2',
                cwd=workplace,
            )
        )

    results = []
    thread = threading.Thread(target=first)
    thread.start()
    while not (folder / 'last_checkpoint').exists() and thread.is_alive():
        time.sleep(0.01)
    assert thread.is_alive(), results[0].stdout
    pid = int(re.match(r'process (\d+) ', (folder / '.lock').read_text())[1])
    try:
        line = refused(workplace, '--resume')
        assert f'Another run works in "work_dirs/tiny": process {pid}' in line
    finally:
        os.kill(pid, signal.SIGKILL)
        thread.join()
    assert results[0].returncode == -signal.SIGKILL
    for path in folder.glob('*.pth'):
        if path.name != 'epoch_1.pth':
            path.unlink()
    if not (folder / 'epoch_1.pth').exists():  # three are kept
        shutil.copy(whole / 'epoch_1.pth', folder)
    (folder / 'last_checkpoint').write_text('')
    (folder / '.epoch_2.pth.saving').write_bytes(b'half')
    (folder / 'epoch_2.pth').write_bytes(b'PK\3\4half')
    log = train(workplace, '--resume').stdout
    assert 'passed over for' in log and 'resumed epoch: 1' in log
    assert_same_weights(whole, folder)
    assert not [*folder.glob('.*.saving')]


@pytest.mark.parametrize('work_dir', ['/proc/work', 'tiny.py/work'])
def test_work_dir_that_cannot_be_written(workplace, work_dir):
    line = refused(workplace, '--work-dir', work_dir)
    assert line.startswith('train.py: error: Cannot write into the work_dir')
    assert work_dir in line and line.endswith('--work-dir')


def test_read_only_work_dir(workplace):
    (workplace / 'work').mkdir()
    mounted = [*READ_ONLY, workplace / 'work']
    try:
        if subprocess.run([*mounted, 'true']).returncode:
            pytest.skip('no mounts of our own here')
    except FileNotFoundError:
        pytest.skip('needs unshare')
    done = run(
        *mounted,
        sys.executable,
        TOOLS / 'train.py',
        'tiny.py',
        '--work-dir',
        'work',
        cwd=workplace,
        check=False,
    )
    assert done.returncode == 2
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith('train.py: error: Cannot write into the work_dir')
    assert '"work": Read-only file system' in line
    assert not [*(workplace / 'work').iterdir()]
