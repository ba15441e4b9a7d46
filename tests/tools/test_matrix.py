# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tests of tools/test_matrix.py, without a download."""
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location('matrix',
                                              ROOT / 'tools/test_matrix.py')
matrix = importlib.util.module_from_spec(spec)
sys.modules['matrix'] = matrix  # dataclasses look it up
spec.loader.exec_module(matrix)

pytestmark = pytest.mark.skipif(
    os.name != 'posix', reason='the set-up is for Linux')

OLDEST = matrix.Row('3.11', 'upstream', 'oldest')
NEWEST = matrix.Row('3.11', 'upstream', 'newest')
LOCKED = matrix.Row('3.11', 'onedl', 'locked')

TESTS = '''
import os, time
import pytest

def test_passes():
    assert os.environ['OMP_NUM_THREADS'] == '1'

def test_fails():
    assert not os.path.exists('fail')

def test_skips():
    pytest.skip()

@pytest.fixture
def broken():
    assert not os.path.exists('fail')

def test_errs(broken):
    pass

def test_hangs():
    if os.path.exists('hang'):
        with open('pid', 'w') as file:
            file.write(str(os.getpid()))
        time.sleep(600)
'''

# Stands for Python: notes what it was called with, makes an environment that
# holds itself, and fails at what the file `broken` names.
STAND_IN = '''#!{python}
import os, shutil, sys
from pathlib import Path
line = ' '.join(sys.argv[1:])
folder = Path({folder!r})
if sys.argv[1] == '-c':
    print('3.11')
    sys.exit()
with open(folder / 'called', 'a') as file:
    file.write(os.environ.get('MMCV_WITH_OPS', '') + '|' + line + '\\n')
broken = folder / 'broken'
if broken.exists() and broken.read_text() in line:
    sys.exit('WARNING: old pip\\nERROR: No matching distribution found\\n'
             'ERROR: all is lost')
if 'venv' in sys.argv:
    target = Path(sys.argv[-1]) / 'bin'
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, target / 'python')
'''


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / 'python3.11'
    path.write_text(
        STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def calls(tmp_path):

    def read():
        path = tmp_path / 'called'
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split('|', 1) for line in lines]

    return read


class TestRows:

    def test_all(self):
        rows = matrix.choose([])
        assert len({row.name for row in rows}) == 18

    def test_chosen(self):
        rows = matrix.choose(['py3.12-*-locked', 'py3.10-onedl-oldest'])
        assert [row.name for row in rows] == [
            'py3.10-onedl-oldest', 'py3.12-upstream-locked',
            'py3.12-onedl-locked'
        ]

    def test_unknown(self):
        with pytest.raises(ValueError, match='"py3.9-.*py3.10-upstream-lock'):
            matrix.choose(['py3.9-upstream-locked'])


class TestRequirements:

    def read(self, row):
        return {r.name: r for r in map(Requirement, matrix.requirements(row))}

    @pytest.mark.parametrize('stack', matrix.STACKS)
    def test_oldest_is_the_lower_bound(self, stack):
        newest = self.read(matrix.Row('3.11', stack, 'newest'))
        oldest = self.read(matrix.Row('3.11', stack, 'oldest'))
        assert set(newest) == set(oldest)
        exact = [r for r in oldest.values() if '==' in str(r.specifier)]
        assert len(exact) > 15
        for requirement in exact:
            (pin, ) = requirement.specifier
            assert pin.operator == '=='
            lower, = (
                x.version for x in newest[requirement.name].specifier
                if x.operator == '>=')
            assert Version(pin.version) == Version(lower)

    def test_what_only_the_tests_need_may_be_new(self):
        assert '>=' in str(self.read(OLDEST)['pytest'].specifier)

    def test_without_what_needs_ops(self):
        names = set(self.read(NEWEST))
        assert {'mmcv-lite', 'mmengine', 'mmpretrain', 'torch',
                'lmdb'} <= names
        assert not names & {'mmcv', 'mmdet', 'mmsegmentation'}

    def test_stacks_do_not_mix(self):
        names = set(self.read(matrix.Row('3.12', 'onedl', 'newest')))
        hosts = {x for x in names if re.match('(onedl-)?mm', x)}
        assert hosts == {'onedl-mmcv', 'onedl-mmengine', 'onedl-mmpretrain'}


class TestSetUp:

    def test_installs_torch_before_the_rest(self, stand_in, calls, tmp_path):
        python = matrix.set_up(OLDEST, tmp_path, [stand_in])
        venv, first, rest = calls()
        assert venv[1] == f'-m venv --clear {tmp_path}/venv'
        assert python == tmp_path / 'venv/bin/python'
        assert ' torch==' in first[1] and 'mmcv' not in first[1]
        assert rest[0] == '0' and '--no-build-isolation' in rest[1]
        listed = (tmp_path / 'requirements.txt').read_text().splitlines()
        assert listed == matrix.requirements(OLDEST)
        assert str(tmp_path / 'requirements.txt') in rest[1]

    def test_is_used_again(self, stand_in, calls, tmp_path):
        matrix.set_up(OLDEST, tmp_path, [stand_in])
        calls()
        matrix.set_up(OLDEST, tmp_path, [stand_in])
        assert calls() == []

    def test_is_made_anew_for_other_ranges(self, stand_in, calls, tmp_path,
                                           monkeypatch):
        matrix.set_up(OLDEST, tmp_path, [stand_in])
        calls()
        monkeypatch.setattr(matrix, 'requirements', lambda row: ['torch==9'])
        matrix.set_up(OLDEST, tmp_path, [stand_in])
        assert len(calls()) == 3

    @pytest.mark.parametrize('row, made', [(NEWEST, [3, 0, 3]),
                                           (OLDEST, [3, 0, 0])])
    def test_newest_is_made_anew_each_day(self, stand_in, calls, tmp_path,
                                          monkeypatch, row, made):
        """Its ranges stay, what the package index has does not."""

        def on(day):
            monkeypatch.setattr(matrix.time, 'strftime',
                                lambda *_: f' 2026-01-{day}')
            matrix.set_up(row, tmp_path, [stand_in])
            return len(calls())

        assert [on('01'), on('01'), on('02')] == made

    def test_a_broken_one_is_not_used(self, stand_in, calls, tmp_path):
        (tmp_path / 'broken').write_text('--no-build-isolation')
        with pytest.raises(
                matrix.SetupError, match='^ERROR: No matching.*setup.log'):
            matrix.set_up(OLDEST, tmp_path, [stand_in])
        (tmp_path / 'broken').unlink()
        calls()
        matrix.set_up(OLDEST, tmp_path, [stand_in])
        assert len(calls()) == 3

    def test_locked_is_left_to_setup_env(self, stand_in, calls, tmp_path,
                                         monkeypatch):
        (tmp_path / 'tools').mkdir()
        script = tmp_path / 'tools/setup_env.sh'
        script.write_text(f'echo "|$*" >>"{tmp_path}/called"')
        monkeypatch.setattr(matrix, 'ROOT', tmp_path)
        python = matrix.set_up(LOCKED, tmp_path, [stand_in])
        line = f'--current-env --python {python} --stack onedl'
        assert calls()[-1][1] == line
        # Which knows by itself what is done, so it is asked again.
        matrix.set_up(LOCKED, tmp_path, [stand_in])
        assert [x[1] for x in calls()] == [line]
        script.write_text('echo "setup_env: ERROR: no C++ compiler found" >&2;'
                          'exit 4')
        with pytest.raises(matrix.SetupError, match='no C.. compiler found'):
            matrix.set_up(LOCKED, tmp_path, [stand_in])

    def test_no_interpreter(self, stand_in, tmp_path, monkeypatch):
        monkeypatch.setenv('PATH', str(tmp_path / 'empty'))
        with pytest.raises(matrix.SetupError, match='no Python 3.12'):
            matrix.find_python('3.12', [stand_in])
        assert matrix.find_python('3.11', ['nothing', stand_in]) == stand_in


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tree with a few tests, whose rows are all this interpreter."""
    (tmp_path / 'test_it.py').write_text(TESTS)
    monkeypatch.setattr(matrix, 'ROOT', tmp_path)
    monkeypatch.setattr(matrix, 'MODULES', ('pytest', 'no_such_module'))
    monkeypatch.setattr(matrix, 'set_up', lambda *_: Path(sys.executable))
    return tmp_path


def run_main(folder, monkeypatch, capsys, *args):
    argv = ['test_matrix.py', '--folder', str(folder / 'rows'), *args]
    monkeypatch.setattr(sys, 'argv', argv)
    with pytest.raises(SystemExit) as caught:
        matrix.main()
    return caught.value.code, capsys.readouterr().out


PYTEST = ('--', '-n', '0', '-p', 'no:cacheprovider', 'test_it.py')
ROWS = ('--row', 'py3.10-upstream-*')


class TestRuns:

    def test_all_pass(self, tiny, monkeypatch, capsys):
        code, out = run_main(tiny, monkeypatch, capsys, *ROWS, *PYTEST)
        assert code == 0
        lines = out.splitlines()
        assert len(lines) == 7  # heads, rule, three rows, blank, command
        cells = [x.strip() for x in lines[2].strip('|').split('|')]
        assert cells[0] == 'py3.10-upstream-locked'
        assert cells[2:7] == [pytest.__version__, '-', '4', '0', '1']
        assert '`pytest -n 0 -p no:cacheprovider test_it.py`' in lines[-1]

    def test_goes_on_after_what_fails(self, tiny, monkeypatch, capsys):

        def set_up(row, *_):
            if row.versions == 'oldest':
                raise matrix.SetupError('no Python 3.10 was found')
            (tiny / 'fail').unlink(missing_ok=True)
            if row.versions == 'locked':
                (tiny / 'fail').touch()
            return Path(sys.executable)

        monkeypatch.setattr(matrix, 'set_up', set_up)
        code, out = run_main(tiny, monkeypatch, capsys, *ROWS, *PYTEST)
        assert code == 1
        locked, oldest, newest = out.splitlines()[2:5]
        assert '| 2 | 2 | 1 |' in locked
        assert '| 4 | 0 | 1 |' in newest
        assert 'py3.10-upstream-oldest: no Python 3.10 was found' in out
        # Kept, to be shown again.
        assert run_main(tiny, monkeypatch, capsys, *ROWS,
                        '--report') == (1, out)
        rows = tiny / 'rows'
        assert (rows / 'py3.10-upstream-locked/junit.xml').is_file()
        log = (rows / 'py3.10-upstream-locked/test.log').read_text()
        assert '2 passed, 1 skipped, 1 error' in log
        result = json.loads(
            (rows / 'py3.10-upstream-oldest/result.json').read_text())
        assert result['counts'] == {}

    def test_report_of_what_was_not_run(self, tiny, monkeypatch, capsys):
        one = ('--row', 'py3.10-upstream-locked')
        code, out = run_main(tiny, monkeypatch, capsys, *one, *PYTEST)
        assert code == 0
        assert run_main(tiny, monkeypatch, capsys, *one,
                        '--report') == (0, out)
        code, more = run_main(tiny, monkeypatch, capsys, *ROWS, '--report')
        assert code == 1
        assert out.splitlines()[2] in more.splitlines()
        below = more.split('\n\n')[1:]
        for name, text in zip(('oldest', 'newest'), below):
            assert text.startswith(f'py3.10-upstream-{name}: not run yet')
            assert f'py3.10-upstream-{name}/result.json' in text
        assert below[2:] == out.split('\n\n')[1:]

    def test_no_tests_are_no_success(self, tiny, monkeypatch, capsys):
        code, out = run_main(tiny, monkeypatch, capsys, *ROWS, *PYTEST, '-k',
                             'nothing')
        assert code == 1
        assert 'pytest ended with 5' in out

    def test_what_hangs_is_killed(self, tiny, monkeypatch, capsys):
        (tiny / 'hang').touch()
        code, out = run_main(tiny, monkeypatch, capsys, '--row',
                             'py3.10-onedl-locked', '--minutes', '0.2',
                             *PYTEST)
        assert code == 1
        assert 'it took more than 0.2 minutes' in out
        pid = int((tiny / 'pid').read_text())
        time.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_environment_is_removed_only_on_request(self, tiny, monkeypatch,
                                                    capsys):
        row = ('--row', 'py3.10-onedl-locked')
        venv = tiny / 'rows/py3.10-onedl-locked/venv'
        venv.mkdir(parents=True)
        run_main(tiny, monkeypatch, capsys, *row, *PYTEST, '-k', 'passes')
        assert venv.exists()
        run_main(tiny, monkeypatch, capsys, *row, '--remove', *PYTEST, '-k',
                 'passes')
        assert not venv.exists()

    def test_what_does_not_import_is_named(self, tiny, monkeypatch, capsys):
        (tiny / 'no_such_module.py').write_text('1 / 0')
        code, out = run_main(tiny, monkeypatch, capsys, *ROWS, *PYTEST)
        assert code == 1
        assert 'ZeroDivisionError' in out

    def test_imports_that_take_too_long(self, tiny, monkeypatch, capsys):
        (tiny / 'no_such_module.py').write_text('import time; time.sleep(60)')
        code, out = run_main(tiny, monkeypatch, capsys, '--row',
                             'py3.10-onedl-locked', '--minutes', '0.05',
                             *PYTEST)
        assert code == 1
        assert 'the imports took more than 0.05 minutes' in out
