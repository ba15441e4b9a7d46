# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tests of tools/setup_env.sh and tools/run_tests.sh, without a download.

They run the real scripts in a small copy of the tree, with a PATH that holds
only what a test puts there, stand-ins for compilers, df and pip, and a real
but empty virtual environment. The copy's folder has a space in its name.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import packaging
import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
# The commands that the scripts may use; neither a compiler nor a Python.
COMMANDS = (
    'awk bash basename cat cksum cut date df dirname du env find '
    'flock grep head mkdir mktemp mv nproc rm sed tail touch wc').split()
PINS = {'mmcv': '2.1.0', 'torch': '2.11.0', 'six': '1.17.0'}
PYTHON_TAG = f'{sys.version_info.major}{sys.version_info.minor}'

pytestmark = pytest.mark.skipif(
    sys.platform != 'linux', reason='the set-up script is for Linux')


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{text}\n')
    path.chmod(0o755)
    return path


def write_wheel(path, name='mmcv/_ext.cpython-311-x86_64-linux-gnu.so'):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr('mmcv/__init__.py', '')
        wheel.writestr(name, b'ops' * 1000)
    return path


class Tree:
    """A copy of the repository's root with the set-up in it."""

    def __init__(self, folder):
        self.root = folder / 'my tree'
        self.bin = folder / 'bin'
        self.cache = folder / 'cache'
        self.pip_called = folder / 'pip_called'
        self.venv = self.root / '.venv'
        self.stamp = self.venv / '.mmdensecl' / 'stamp.json'
        self.script = self.root / 'tools' / 'setup_env.sh'
        shutil.copytree(TOOLS, self.root / 'tools')
        (self.root / 'setup.py').write_text('# stands for setup.py\n')
        self.lock = self.root / 'requirements' / 'lock.txt'
        self.lock.parent.mkdir()
        self.lock.write_text('# a comment\n' +
                             ''.join(f'{name}=={pin}\n'
                                     for name, pin in PINS.items()) +
                             "tomli==2.0.0 ; python_full_version < '3.0'\n")
        (self.root / 'requirements' /
         'lock-onedl.txt').write_text('onedl-mmcv==2.3.6\n')
        self.bin.mkdir()
        for command in COMMANDS:
            found = shutil.which(command)
            if found:
                (self.bin / command).symlink_to(found)

    @property
    def env(self):
        return {
            'PATH': str(self.bin),
            'HOME': str(self.root),
            'MMDENSECL_CACHE': str(self.cache),
            'MMDENSECL_MIN_FREE_GIB': '0',
            'MMDENSECL_LOCK_WAIT': '1',
            'PIP_CALLED': str(self.pip_called),
            # Should a test ever reach a real pip, it has nothing to install
            # from and nowhere to install to.
            'PIP_CONFIG_FILE': os.devnull,
            'PIP_NO_INDEX': '1',
            'PIP_REQUIRE_VIRTUALENV': '1',
        }

    def run(self, *args, script=None, **env):
        return subprocess.run(
            ['bash', str(script or self.script), *args],
            env={
                **self.env,
                **env
            },
            cwd=self.root.parent,
            text=True,
            capture_output=True,
            timeout=60)

    def call(self, code, *args, **env):
        """Run shell code with the script's functions, after parse_args."""
        main = self.root / 'call.sh'
        main.write_text(f'source "{self.script}"\nparse_args "$@"\n{code}\n')
        return self.run(*args, script=main, **env)

    def start(self, *args):
        # Under a job in the background SIGINT may be ignored, and a shell
        # cannot trap what was ignored when it started.
        return subprocess.Popen(
            ['bash', str(self.script), *args],
            env=self.env,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    @property
    def site(self):
        return next(self.venv.glob('lib/python3*/site-packages'))

    def set_pip(self, code='sys.exit(1)'):
        """Put a stand-in for pip into the environment, that says it ran."""
        main = self.site / 'pip' / '__main__.py'
        main.parent.mkdir(exist_ok=True)
        (main.parent / '__init__.py').touch()
        main.write_text(
            'import os, sys, time\n'
            "with open(os.environ['PIP_CALLED'], 'a') as log:\n"
            "    log.write(' '.join([str(os.getpid())] + sys.argv) + '\\n')\n"
            f'{code}\n')

    def set_package(self, name, version):
        for old in self.site.glob(f'{name}-*.dist-info'):
            shutil.rmtree(old)
        if version:
            info = self.site / f'{name}-{version}.dist-info'
            info.mkdir()
            (info / 'METADATA').write_text(
                f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')

    def make_venv(self):
        subprocess.run(
            [sys.executable, '-m', 'venv', '--without-pip',
             str(self.venv)],
            check=True)
        # The script reads the lock's markers with it.
        shutil.copytree(
            Path(packaging.__file__).parent, self.site / 'packaging')
        self.set_pip()

    def complete(self):
        """Make an environment with all that a finished set-up leaves."""
        self.make_venv()
        for name, version in PINS.items():
            self.set_package(name, version)
        # The build that the index serves may carry a local version.
        self.set_package('torch', PINS['torch'] + '+cu130')
        self.set_package('mmdensecl', '0.1.0')
        mmcv = self.site / 'mmcv'
        mmcv.mkdir()
        (mmcv / '__init__.py').touch()
        (mmcv / '_ext.cpython-311-x86_64-linux-gnu.so').touch()
        self.stamp.parent.mkdir()
        # With a wheel in the cache no compiler is asked for.
        write_wheel(self.wheel('cpu'))
        done = self.call('locate_env; cd /; state write cpu')
        assert done.returncode == 0, done.stderr
        return self

    def wheel(self, ops):
        folder = f'cp{PYTHON_TAG}-torch{PINS["torch"]}+cu130-{ops}-x86_64'
        return (self.cache / 'wheels' / folder /
                f'mmcv-{PINS["mmcv"]}-cp{PYTHON_TAG}-linux_x86_64.whl')


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


@pytest.fixture
def complete(tree):
    return tree.complete()


def fake_python(path, version):
    return write_script(
        path, f'case "$2" in *version_info*) echo {version};; '
        '*executable*) echo "$0";; esac')


def wait_for(path, seconds=20):
    end = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < end, f'{path} did not appear'
        time.sleep(0.05)
    return path.read_text()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed orphan may be waiting for its new parent to take note.
    return 'State:\tZ' not in Path(f'/proc/{pid}/status').read_text()


class TestOptions:

    @pytest.mark.parametrize('args, message', [
        (['--stack', 'mine'], "--stack is upstream or onedl, not 'mine'"),
        (['--stack=mine'], "--stack is upstream or onedl, not 'mine'"),
        (['--stack'], '--stack needs a value'),
        (['--mmcv-ops', 'tpu'], "auto, cpu or cuda, not 'tpu'"),
        (['--curent-env'], 'unknown option --curent-env'),
    ])
    def test_wrong_usage(self, tree, args, message):
        result = tree.run(*args)
        assert result.returncode == 2
        assert message in result.stderr
        assert not tree.venv.exists()

    def test_help(self, tree):
        result = tree.run('--help')
        assert result.returncode == 0
        for option in ('--python', '--current-env', '--stack', '--mmcv-ops',
                       '--print-python', 'MMDENSECL_CACHE'):
            assert option in result.stdout

    def test_stacks_share_nothing(self, tree):
        code = 'locate_env; echo "$ENV_DIR|$LOCK|$MMCV_DIST|$(pin $MMCV_DIST)"'
        upstream = tree.call(code).stdout.strip().split('|')
        onedl = tree.call(code, '--stack', 'onedl').stdout.strip().split('|')
        assert upstream[0] == str(tree.root / '.venv')
        assert upstream[2:] == ['mmcv', '2.1.0']
        assert onedl[0] == str(tree.root / '.venv-onedl')
        assert onedl[1].endswith('requirements/lock-onedl.txt')
        assert onedl[2:] == ['onedl-mmcv', '2.3.6']


class TestPython:

    def test_none(self, tree):
        result = tree.run()
        assert result.returncode == 3
        assert 'Python 3.10, 3.11 or 3.12 is needed' in result.stderr
        assert 'python3.11: not found' in result.stderr
        assert '--python /path/to/python3.11' in result.stderr
        assert not tree.venv.exists()

    @pytest.mark.parametrize('version', ['3.9.18', '3.13.0', '2.7.18'])
    def test_wrong_version(self, tree, version):
        python = fake_python(tree.bin / 'python3', version)
        result = tree.run()
        assert result.returncode == 3
        assert f'python3: {python} is Python {version}' in result.stderr
        assert not tree.venv.exists()

    def test_wrong_version_named(self, tree):
        fake_python(tree.bin / 'python3.11', '3.11.7')
        python = fake_python(tree.root / 'python', '3.13.0')
        for result in (tree.run('--python',
                                str(python)), tree.run(PYTHON=str(python))):
            assert result.returncode == 3
            assert 'is Python 3.13.0' in result.stderr

    def test_order_and_shim_that_does_not_run(self, tree):
        write_script(tree.bin / 'python3.11', 'exit 127')
        expected = fake_python(tree.bin / 'python3.12', '3.12.1')
        fake_python(tree.bin / 'python3.10', '3.10.13')
        result = tree.call('choose_python; echo "$BASE_PYTHON $BASE_VERSION"')
        assert result.stdout.split() == [str(expected), '3.12.1']

    def test_without_venv_module(self, tree):
        write_script(
            tree.bin / 'python3.11', 'case "$2" in *ensurepip*) exit 1;; '
            '*) echo 3.11.2;; esac')
        result = tree.run()
        assert result.returncode == 3
        assert 'has no venv module' in result.stderr
        assert 'apt-get install python3.11-venv' in result.stderr

    def test_current_env_takes_the_active_python(self, tree):
        expected = fake_python(tree.bin / 'python', '3.10.13')
        fake_python(tree.bin / 'python3.11', '3.11.7')
        result = tree.call('choose_python; echo "$BASE_PYTHON"',
                           '--current-env')
        assert result.stdout.strip() == str(expected)


class TestCompiler:

    def run(self, tree):
        return tree.run('--python', sys.executable)

    def test_none(self, tree):
        result = self.run(tree)
        assert result.returncode == 4
        assert 'no C++ compiler found' in result.stderr
        assert 'apt-get install build-essential' in result.stderr
        assert not tree.venv.exists()

    def test_named_one_does_not_exist(self, tree):
        result = tree.run('--python', sys.executable, CXX='/nowhere/g++')
        assert result.returncode == 4
        assert 'no C++ compiler found (/nowhere/g++)' in result.stderr

    def test_broken(self, tree):
        python = write_script(tree.bin / 'python', f'echo "{tree.root}"')
        (tree.root / 'Python.h').touch()
        write_script(tree.bin / 'c++', 'echo "cannot find -lstdc++"; exit 1')
        result = tree.call(f'check_compiler "{python}"')
        assert result.returncode == 4
        assert "'c++' cannot compile and link" in result.stderr
        assert '| cannot find -lstdc++' in result.stderr

    def test_no_python_headers(self, tree):
        python = write_script(tree.bin / 'python', f'echo "{tree.root}"')
        write_script(tree.bin / 'c++', 'exit 0')
        result = tree.call(f'check_compiler "{python}"')
        assert result.returncode == 4
        assert f'{tree.root}/Python.h does not exist' in result.stderr
        assert 'python3-dev' in result.stderr

    def test_other_name_is_handed_on(self, tree):
        # torch's build looks for c++ only, unless CXX is set.
        python = write_script(tree.bin / 'python', f'echo "{tree.root}"')
        (tree.root / 'Python.h').touch()
        write_script(tree.bin / 'clang++', 'exit 0')
        result = tree.call(f'check_compiler "{python}"; env')
        assert 'CXX=clang++' in result.stdout.splitlines()

    def test_not_needed_with_a_cached_wheel(self, tree):
        write_wheel(tree.wheel('cpu'))
        result = tree.call(
            'choose_python; any_cached_wheel && echo no compiler needed',
            '--python', sys.executable)
        assert 'no compiler needed' in result.stdout


class TestDisk:

    def fake_df(self, tree, gib, mount='/'):
        (tree.bin / 'df').unlink()
        write_script(
            tree.bin / 'df', f'''case "$2" in
    */other*) mount=/other;;
    *) mount={mount};;
esac
echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'
echo "/dev/vda 263174212 1 {gib * 1024 * 1024} 1% $mount"''')

    def test_full(self, tree):
        self.fake_df(tree, 2)
        result = tree.run(
            '--python', sys.executable, MMDENSECL_MIN_FREE_GIB='9')
        assert result.returncode == 5
        assert 'no room on the disk at /: 2 GiB are free, 9 GiB are needed' \
            in result.stderr
        assert str(tree.root) in result.stderr
        assert 'TMPDIR' in result.stderr
        assert not tree.venv.exists()

    def test_full_by_default(self, tree):
        self.fake_df(tree, 2)
        # An empty variable counts as unset.
        result = tree.run(
            '--python', sys.executable, MMDENSECL_MIN_FREE_GIB='')
        assert result.returncode == 5

    def test_one_disk_holds_it_all(self, tree):
        (tree.root / 'other').mkdir()
        self.fake_df(tree, 8)
        unset = 'unset MMDENSECL_MIN_FREE_GIB; '
        one = tree.call(f'{unset} disk_lack 5 "{tree.root}" '
                        f'4 "{tree.root}/not/there/yet"')
        assert '8 GiB are free, 9 GiB are needed' in one.stdout
        two = tree.call(f'{unset} disk_lack 5 "{tree.root}" '
                        f'4 "{tree.root}/other"')
        assert two.returncode == 0, two.stderr
        assert two.stdout == ''

    @pytest.mark.parametrize('gib, off', [(8, False), (9, True), (11, True),
                                          (12, False)])
    def test_cache_of_downloads_only_where_it_fits(self, tree, gib, off):
        self.fake_df(tree, gib)
        result = tree.call(
            'STATE_DIR=$ENV_DIR/state; check_room; '
            'echo "cache off: ${PIP_NO_CACHE_DIR:-}"',
            MMDENSECL_MIN_FREE_GIB='')
        if gib < 9:
            assert result.returncode == 5
            return
        assert result.returncode == 0, result.stderr
        assert f'cache off: {"1" if off else ""}\n' in result.stdout
        assert ('goes without it' in result.stderr) is off

    def test_cache_that_is_filled_is_used(self, tree):
        """It needs no more room, and its downloads no more time."""
        self.fake_df(tree, 9)
        (tree.bin / 'du').unlink()
        write_script(tree.bin / 'du', 'echo "$((3 * 1048576)) $2"')
        result = tree.call(
            'STATE_DIR=$ENV_DIR/state; check_room; '
            'echo "cache off: ${PIP_NO_CACHE_DIR:-}"',
            MMDENSECL_MIN_FREE_GIB='')
        assert 'cache off: \n' in result.stdout, result.stderr


class TestTorch:
    CALL = ('STATE_DIR=$ROOT/state; mkdir -p "$STATE_DIR"; '
            'pip_install() { echo "$1:" $(cat "${@: -1}"); }; '
            'MODE=current; install_torch')

    def test_libraries_first_in_a_round_of_their_own(self, tree):
        with open(tree.lock, 'a') as file:
            file.write('nvidia-nccl-cu13==2\ncuda-toolkit==13\n')
        rounds = tree.call(self.CALL).stdout.splitlines()
        assert rounds[0] == ("torch's libraries: nvidia-nccl-cu13==2 "
                             'cuda-toolkit==13')
        assert rounds[1].startswith('torch: torch==')
        assert len(rounds) == 2

    def test_without_cuda(self, tree):
        line, = tree.call(self.CALL).stdout.splitlines()
        assert line.startswith('torch: torch==')

    def test_lock_that_is_missing(self, tree):
        tree.lock.unlink()
        result = tree.call(self.CALL)
        assert result.returncode == 6
        assert 'lock.txt does not name' in result.stderr
        assert not (tree.root / 'state' / 'torch').exists()


class TestSecondRun:

    def test_does_nothing(self, complete):
        before = complete.stamp.stat().st_mtime_ns
        begin = time.monotonic()
        result = complete.run('--print-python')
        assert time.monotonic() - begin < 3
        assert result.returncode == 0, result.stderr
        assert result.stdout == f'{complete.venv}/bin/python\n'
        assert 'complete' in result.stderr
        assert '[1/6]' not in result.stderr
        assert not complete.pip_called.exists()
        assert complete.stamp.stat().st_mtime_ns == before

    def test_through_a_link_to_the_tree(self, complete):
        link = complete.root.parent / 'link'
        link.symlink_to(complete.root)
        result = complete.run(script=link / 'tools' / 'setup_env.sh')
        assert result.returncode == 0, result.stderr
        assert not complete.pip_called.exists()

    def remove_stamp(self, tree):
        tree.stamp.unlink()

    def truncate_stamp(self, tree):
        text = tree.stamp.read_text()
        tree.stamp.write_text(text[:len(text) // 2])

    def empty_stamp(self, tree):
        tree.stamp.write_text('')

    def strange_stamp(self, tree):
        tree.stamp.write_text('[]')

    def change_lock(self, tree):
        tree.lock.write_text(tree.lock.read_text() + '# new\n')

    def change_setup(self, tree):
        (tree.root / 'setup.py').write_text('# other extras\n')

    def change_package(self, tree):
        tree.set_package('six', '1.16.0')

    def remove_package(self, tree):
        tree.set_package('six', None)

    def remove_ours(self, tree):
        tree.set_package('mmdensecl', None)

    def remove_ops(self, tree):
        next(tree.site.glob('mmcv/_ext*.so')).unlink()

    def remove_mmcv(self, tree):
        shutil.rmtree(tree.site / 'mmcv')

    @pytest.mark.parametrize('change, reason', [
        (remove_stamp, 'an earlier run did not finish'),
        (truncate_stamp, 'cannot be read'),
        (empty_stamp, 'cannot be read'),
        (strange_stamp, 'cannot be read'),
        (change_lock, 'the lock file, setup.py or Python changed since'),
        (change_setup, 'the lock file, setup.py or Python changed since'),
        (change_package, 'six is 1.16.0, not 1.17.0'),
        (remove_package, 'six is missing, not 1.17.0'),
        (remove_ours, 'mmdensecl itself is missing'),
        (remove_ops, "mmcv's compiled ops are missing"),
        (remove_mmcv, "mmcv's compiled ops are missing"),
    ])
    def test_not_trusted(self, complete, change, reason):
        change(self, complete)
        result = complete.run()
        assert reason in result.stderr
        # It went on with the environment, as far as the stand-in for pip.
        assert 'Using the virtual environment' in result.stderr
        assert complete.pip_called.exists()
        assert result.returncode == 6
        assert 'run this again' in result.stderr
        assert not complete.stamp.exists()

    def test_moved_tree(self, complete):
        # Scripts of an environment hold its path, and an editable install
        # that of the tree.
        moved = complete.root.with_name('moved')
        complete.root.rename(moved)
        result = complete.run(script=moved / 'tools' / 'setup_env.sh')
        assert 'changed since' in result.stderr
        assert complete.pip_called.exists()

    def test_other_ops_wanted(self, complete):
        assert complete.run('--mmcv-ops', 'cpu').returncode == 0
        assert not complete.pip_called.exists()
        result = complete.run('--mmcv-ops', 'cuda')
        assert 'mmcv has cpu ops and cuda ops are wanted' in result.stderr
        assert complete.pip_called.exists()

    def test_other_python_wanted(self, complete):
        assert complete.run('--python', sys.executable).returncode == 0
        other = '3.10.1' if sys.version_info[:2] != (3, 10) else '3.11.1'
        python = fake_python(complete.bin / 'other', other)
        tag = ''.join(other.split('.')[:2])
        write_wheel(
            Path(
                str(complete.wheel('cpu')).replace(f'cp{PYTHON_TAG}',
                                                   f'cp{tag}')))
        result = complete.run('--python', str(python))
        assert f'{other} is wanted' in result.stderr
        assert f'Creating {complete.venv} again' in result.stderr


class TestInterrupted:

    @pytest.mark.parametrize('leftover', ['no python', 'dead python'])
    def test_environment_is_made_again(self, tree, leftover):
        (tree.venv / '.mmdensecl').mkdir(parents=True)
        (tree.venv / 'leftover').touch()
        if leftover == 'dead python':
            (tree.venv / 'bin').mkdir()
            (tree.venv / 'bin' / 'python').symlink_to('/nowhere/python3.11')
        # Without pip, which takes seconds to unpack.
        venv = write_script(tree.bin / 'fast_python',
                            f'exec "{sys.executable}" "$@" --without-pip')
        result = tree.call(f'locate_env; BASE_PYTHON="{venv}" '
                           'BASE_VERSION=3.x create_venv')
        assert result.returncode == 0, result.stderr
        assert f'Creating {tree.venv} again' in result.stderr
        assert not (tree.venv / 'leftover').exists()
        assert (tree.venv / 'bin' / 'python').exists()

    def test_a_folder_of_the_user_is_left_alone(self, tree):
        tree.venv.mkdir()
        (tree.venv / 'thesis.tex').touch()
        write_wheel(tree.wheel('cpu'))
        result = tree.run('--python', sys.executable)
        assert result.returncode == 2
        assert 'Move it away' in result.stderr
        assert (tree.venv / 'thesis.tex').exists()

    def test_killed_in_pip(self, complete):
        complete.stamp.unlink()
        complete.set_pip('time.sleep(60)')
        first = complete.start()
        pip = int(wait_for(complete.pip_called).split()[0])
        first.kill()
        first.wait()
        assert alive(pip), 'the test needs a pip that outlives it'
        complete.pip_called.unlink()
        complete.set_pip()
        second = complete.run()
        assert f'ending that (process {pip})' in second.stderr
        assert not alive(pip)
        assert 'an earlier run did not finish' in second.stderr
        assert complete.pip_called.exists()
        assert not complete.stamp.exists()

    def test_other_process_is_not_ended(self, complete):
        # The number that a killed set-up noted may be another's by now.
        bystander = subprocess.Popen(['sleep', '60'], start_new_session=True)
        dead = subprocess.Popen(['true'])
        dead.wait()
        try:
            result = complete.call(
                f'locate_env; end_orphan {dead.pid} {bystander.pid}')
            assert result.returncode == 1
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    def test_two_at_a_time(self, complete):
        complete.stamp.unlink()
        complete.set_pip('time.sleep(60)')
        first = complete.start()
        pip = wait_for(complete.pip_called)
        try:
            second = complete.run()
            assert second.returncode == 7
            assert 'Another set-up of' in second.stderr
            assert f'process {first.pid}' in second.stderr
            assert 'did not finish in time' in second.stderr
            assert alive(int(pip.split()[0]))
            assert complete.pip_called.read_text() == pip
        finally:
            first.terminate()
            first.wait()

    @pytest.mark.parametrize('damage', ['missing', 'truncated', 'no record'])
    def test_half_installed_package(self, complete, damage):
        complete.stamp.unlink()
        broken = complete.site / 'six-1.17.0.dist-info'
        module = complete.site / 'six.py'
        module.write_text('whole = True\n')
        for info in complete.site.glob('*.dist-info'):
            (info / 'RECORD').write_text(f'{info.name}/METADATA,,\n')
        (broken / 'RECORD'
         ).write_text('six.py,sha256=x,13\nsix-1.17.0.dist-info/RECORD,,\n')
        result = complete.run()
        assert 'half installed' not in result.stderr
        if damage == 'missing':
            module.unlink()
        elif damage == 'truncated':
            module.write_text('who')
        else:
            (broken / 'RECORD').unlink()
        result = complete.run()
        assert 'half installed, will be again: six\n' in result.stderr
        # pip asks the metadata only: without it it installs again.
        assert not broken.exists()
        assert (complete.site / 'mmcv-2.1.0.dist-info').exists()

    @pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
    def test_ended_in_pip(self, complete, number):
        complete.stamp.unlink()
        complete.set_pip('time.sleep(60)')
        first = complete.start()
        pip = int(wait_for(complete.pip_called).split()[0])
        first.send_signal(number)
        assert first.wait(timeout=10) == 128 + number
        assert not alive(pip)
        assert not complete.stamp.exists()


class TestCurrentEnv:

    def run(self, tree):
        path = f'{tree.venv}/bin:{tree.bin}'
        return tree.run('--current-env', PATH=path)

    @pytest.mark.parametrize('rival', ['mmcv-lite', 'onedl-mmcv'])
    def test_clash(self, complete, rival):
        complete.stamp.unlink()
        complete.set_package(rival, '2.1.0')
        result = self.run(complete)
        assert result.returncode == 2
        assert f"the 'upstream' stack: {rival}" in result.stderr
        assert f'pip uninstall {rival}' in result.stderr
        assert not complete.pip_called.exists()

    def test_installs_there(self, complete):
        complete.stamp.unlink()
        result = self.run(complete)
        assert 'Using the active environment' in result.stderr
        assert complete.pip_called.exists()
        # Neither pip itself nor anything else is changed unasked.
        assert 'install pip==' not in complete.pip_called.read_text()

    def test_without_pip(self, complete):
        complete.stamp.unlink()
        shutil.rmtree(complete.site / 'pip')
        result = self.run(complete)
        assert result.returncode == 3
        assert 'has no pip' in result.stderr


class TestMmcvWheel:

    def cached(self, tree, path):
        return tree.call(f'ENV_PYTHON="{sys.executable}"; '
                         f'cached_wheel "{path.parent}"')

    def test_valid(self, tree):
        path = write_wheel(tree.wheel('cpu'))
        result = self.cached(tree, path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == str(path)

    def test_none(self, tree):
        result = self.cached(tree, tree.wheel('cpu'))
        assert result.returncode == 1
        assert result.stdout == ''

    def test_other_version(self, tree):
        path = tree.wheel('cpu')
        write_wheel(path.with_name(path.name.replace('2.1.0', '2.0.1')))
        assert self.cached(tree, path).returncode == 1

    @pytest.mark.parametrize('damage',
                             ['truncated', 'empty', 'flipped', 'no ops'])
    def test_damaged(self, tree, damage):
        path = write_wheel(tree.wheel('cpu'))
        data = bytearray(path.read_bytes())
        if damage == 'truncated':
            path.write_bytes(data[:len(data) // 2])
        elif damage == 'empty':
            path.write_bytes(b'')
        elif damage == 'flipped':
            data[data.index(b'opsops')] ^= 1
            path.write_bytes(data)
        else:
            write_wheel(path, name='mmcv/version.py')
        result = self.cached(tree, path)
        assert result.returncode == 1
        assert 'is damaged: removing it' in result.stderr
        assert not path.exists()

    def test_damaged_one_saves_no_compiler(self, tree):
        tree.wheel('cpu').parent.mkdir(parents=True)
        tree.wheel('cpu').write_bytes(b'PK')
        result = tree.run('--python', sys.executable)
        assert result.returncode == 4

    def test_folders_of_killed_builds_go(self, tree):
        killed = subprocess.Popen(['true'])
        killed.wait()
        mine = tree.cache / f'build-{os.getpid()}'
        stale = tree.cache / f'build-{killed.pid}'
        mine.mkdir(parents=True)
        stale.mkdir()
        assert tree.call('remove_stale_builds').returncode == 0
        assert mine.exists() and not stale.exists()

    def build(self, tree, pip):
        """Call build_wheel with a stand-in for pip."""
        tree.make_venv()
        tree.set_pip(pip)
        return tree.call('check_compiler() { :; }; locate_env; '
                         'mkdir -p "$STATE_DIR"; OPS_WHY=test; '
                         'build_wheel cpu "$CACHE/wheels/key"')

    def test_build(self, tree):
        result = self.build(
            tree, 'import zipfile\n'
            "assert os.environ['MMCV_WITH_OPS'] == '1'\n"
            "assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
            "folder = sys.argv[sys.argv.index('--wheel-dir') + 1]\n"
            "name = os.path.join(folder, 'mmcv-2.1.0-cp311.whl')\n"
            "with zipfile.ZipFile(name, 'w') as wheel:\n"
            "    wheel.writestr('mmcv/_ext.so', 'ops')")
        assert result.returncode == 0, result.stderr
        assert (tree.cache / 'wheels/key/mmcv-2.1.0-cp311.whl').is_file()
        assert not list(tree.cache.glob('build-*'))

    def test_build_that_skips_the_ops(self, tree):
        result = self.build(
            tree, 'import zipfile\n'
            "folder = sys.argv[sys.argv.index('--wheel-dir') + 1]\n"
            "name = os.path.join(folder, 'mmcv-2.1.0-py3.whl')\n"
            "with zipfile.ZipFile(name, 'w') as wheel:\n"
            "    wheel.writestr('mmcv/__init__.py', '')")
        assert result.returncode == 1
        assert 'holds no mmcv/_ext*.so' in (
            tree.venv / '.mmdensecl/mmcv-build.log').read_text()
        assert not list((tree.cache / 'wheels').rglob('*.whl'))

    @pytest.mark.parametrize('gpu, nvcc, ops, why', [
        (False, '13.0', 'cpu', 'no GPU'),
        (True, None, 'cpu', 'no nvcc'),
        (True, '12.4', 'cpu', 'nvcc is 12.4, torch was built with CUDA 13.0'),
        (True, '13.1', 'cuda', 'a GPU, and nvcc 13.1'),
    ])
    def test_choice_of_ops(self, tree, gpu, nvcc, ops, why):
        python = write_script(
            tree.bin / 'python', 'case "$2" in *version.cuda*) echo 13.0;; '
            f'*is_available*) exit {int(not gpu)};; esac')
        if nvcc:
            write_script(
                tree.bin / 'nvcc',
                f'echo "Cuda compilation tools, release {nvcc}, V{nvcc}.88"')
        result = tree.call(f'ENV_PYTHON="{python}"; choose_ops; '
                           'echo "$OPS|$OPS_WHY|$OPS_NOTE"')
        assert result.returncode == 0, result.stderr
        chosen, reason, note = result.stdout.strip().split('|')
        assert chosen == ops
        assert why in reason
        # A GPU that mmcv's ops will not use is worth a word.
        assert bool(note) == (gpu and ops == 'cpu')


class TestRunTests:

    def fake_pytest(self, tree):
        (tree.site / 'pytest.py').write_text(
            'import json, os, sys\n'
            "print(json.dumps(dict(argv=sys.argv[1:], cwd=os.getcwd(),\n"
            "    threads=os.environ['OMP_NUM_THREADS'],\n"
            "    data=os.environ.get('MMDENSECL_DATA_ROOT'))))\n"
            'sys.exit(5)\n')

    def run(self, tree, *args, **env):
        return tree.run(
            *args, script=tree.root / 'tools' / 'run_tests.sh', **env)

    def test_hands_on_arguments_and_status(self, complete):
        self.fake_pytest(complete)
        result = self.run(complete, '--python', sys.executable, '-k', 'a b',
                          'tests/test_x.py')
        assert result.returncode == 5, result.stderr
        *lines, last = result.stdout.splitlines()
        called = json.loads(last)
        assert called['argv'][-3:] == ['-k', 'a b', 'tests/test_x.py']
        assert called['cwd'] == str(complete.root)
        workers = called['argv'][called['argv'].index('-n') + 1]
        assert 1 <= int(workers) <= 8 and called['threads'] == '1'
        assert called['data'] is None
        assert any('MMDENSECL_DATA_ROOT is not set' in line for line in lines)

    def test_workers_do_not_depend_on_threads(self, complete):
        """nproc heeds OMP_NUM_THREADS; the cores are what counts."""
        self.fake_pytest(complete)
        calls = [
            json.loads(
                self.run(complete, OMP_NUM_THREADS=x).stdout.splitlines()[-1])
            for x in ('1', '5')
        ]
        assert [call['threads'] for call in calls] == ['1', '5']
        assert calls[0]['argv'] == calls[1]['argv']

    def test_data_folder_is_made_absolute(self, complete):
        self.fake_pytest(complete)
        (complete.root.parent / 'pictures').mkdir()
        result = self.run(complete, MMDENSECL_DATA_ROOT='pictures')
        called = json.loads(result.stdout.splitlines()[-1])
        assert called['data'] == str(complete.root.parent / 'pictures')

    def test_missing_data_folder(self, complete):
        self.fake_pytest(complete)
        result = self.run(complete, MMDENSECL_DATA_ROOT='/nowhere')
        assert result.returncode == 2
        assert 'names no folder' in result.stderr

    def test_failed_set_up_runs_no_tests(self, complete):
        self.fake_pytest(complete)
        complete.stamp.unlink()
        result = self.run(complete)
        assert result.returncode == 6
        assert 'argv' not in result.stdout
