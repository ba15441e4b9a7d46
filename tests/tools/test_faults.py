# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""tools/train.py through kills, full disks and wrong folders."""

import os
import re
import shutil
import signal
import threading
import time

import pytest
from runs import assert_same, last_line, prepare, train


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The work_dir of an uninterrupted run of two epochs."""
    folder = prepare(tmp_path_factory.mktemp('whole'))
    log = train(folder, 'tiny.py --resume').stdout
    assert '"work_dirs/tiny" has no checkpoint to resume: start anew' in log
    return folder / 'work_dirs' / 'tiny'


@pytest.fixture
def workplace(tmp_path):
    return prepare(tmp_path)


def refused(workplace, words):
    """The last line of a run that says one and stops with status 2."""
    done = train(workplace, f'tiny.py {words}', check=False)
    # Before the data are looked at and the model is built.
    assert 'System environment' not in done.stdout
    return last_line(done)


def test_a_second_run_and_a_kill(workplace, whole):
    """The second run is refused; it may go on once the first is killed."""
    folder = workplace / 'work_dirs' / 'tiny'
    # Its workers outlive it, for a while.
    options = 'train_cfg.max_epochs=1000 train_dataloader.num_workers=2'
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            train(workplace, options=options, check=False)
        )
    )
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
    log = train(workplace, 'tiny.py --resume').stdout
    assert 'passed over for' in log and 'resumed epoch: 1' in log
    assert_same(whole / 'epoch_2.pth', folder / 'epoch_2.pth')
    assert not [*folder.glob('.*.saving')]


def test_work_dir_that_cannot_be_written(workplace):
    line = refused(workplace, '--work-dir tiny.py/work')
    assert line.startswith('train.py: error: Cannot write into the work_dir')
    assert 'tiny.py/work' in line and line.endswith('--work-dir')
