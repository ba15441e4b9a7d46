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
    'unshare', '--user', '--map-root-user', '--mount', 'bash', '-ec',
    'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"'
]

# A full disk of its own; the logs are small.
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
sys.path.insert(0, {tools!r})
runpy.run_path({script!r}, run_name='__main__')
"""


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


@pytest.fixture
def after_one_epoch(whole, workplace):
    """A work_dir with the first checkpoint of the same run."""
    folder = workplace / 'work_dirs' / 'tiny'
    folder.mkdir(parents=True)
    shutil.copy(whole / 'epoch_1.pth', folder)
    return folder


def refused(workplace, *flags):
    """The last line of a run that says one and stops with status 2."""
    done = run_script(
        TOOLS / 'train.py',
        'tiny.py',
        *flags,
        '--cfg-options',
        'data_root=pictures',
        cwd=workplace)
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
                cwd=workplace))

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


def test_disk_full_while_saving(workplace, after_one_epoch, whole):
    folder = after_one_epoch
    script = workplace / 'train.py'
    size = (folder / 'epoch_1.pth').stat().st_size // 2
    script.write_text(
        LIMITED.format(
            size=size, tools=str(TOOLS), script=str(TOOLS / 'train.py')))
    done = run_script(
        script,
        'tiny.py',
        '--resume',
        '--cfg-options',
        'data_root=pictures',
        cwd=workplace)
    assert done.returncode == 1
    line = done.stdout.strip().splitlines()[-1]
    assert 'epoch_2.pth" could not be written: File too large' in line
    assert f'last good checkpoint is {folder / "epoch_1.pth"}' in line
    assert [x.name for x in folder.glob('*.pth')] == ['epoch_1.pth']
    assert not [*folder.glob('.*.saving')]
    log = train(workplace, '--resume').stdout
    assert 'resumed epoch: 1' in log
    assert_same_weights(whole, folder)


def test_nothing_to_resume_from(workplace, after_one_epoch):
    """Never taken for a run that has just begun."""
    with open(after_one_epoch / 'epoch_1.pth', 'r+b') as file:
        file.truncate(1000)
    text = refused(workplace, '--resume')
    assert text.startswith('Give another file, --resume FILE')


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
        check=False)
    assert done.returncode == 2
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith('train.py: error: Cannot write into the work_dir')
    assert '"work": Read-only file system' in line
    assert not [*(workplace / 'work').iterdir()]
