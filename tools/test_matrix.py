# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Run the tests on every Python, stack and set of versions that we allow.

A row is a Python, a stack (upstream or onedl) and one of three sets of
versions:

* ``locked``: the pinned set of requirements/lock*.txt, mmcv with its ops, by
  tools/setup_env.sh.
* ``oldest``: the lower bound of every range in requirements.txt,
  requirements/optional.txt and requirements/onedl.txt.
* ``newest``: what the package index has today within these ranges.

The last two have mmcv without its compiled ops, whose build takes long, and no
mmdet and mmseg, which need them: tests of these skip. In the folder each row
has its environment, which the next call uses again, that of ``newest`` on the
same day only, setup.log, test.log, junit.xml and result.json. Arguments after
-- go to pytest. The exit status is 1 unless all chosen rows passed; a row
without a result has not. A row needs 6 to 8 GiB of disk.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Dict, List, Optional
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ('3.10', '3.11', '3.12')
STACKS = ('upstream', 'onedl')
VERSIONS = ('locked', 'oldest', 'newest')
MODULES = ('torch', 'torchvision', 'numpy', 'mmengine', 'mmcv', 'mmpretrain',
           'mmdet', 'mmseg')
# What mmcv's source needs to be there before it is installed.
BUILD = ('torch', 'torchvision', 'numpy', 'setuptools', 'wheel', 'ninja',
         'psutil')
SETUP_MINUTES = 90
# Prints the versions of the modules that can be imported, as JSON.
LOOK = '''
import importlib, json, platform, sys
found = {'python': platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.import_module(name).__version__
    except ImportError:
        pass
print(json.dumps(found))
'''


class SetupError(Exception):
    """A row that cannot be set up, and why."""


@dataclass(frozen=True)
class Row:
    """One environment.

    Args:
        python (str): Its Python, such as '3.11'.
        stack (str): One of ``STACKS``.
        versions (str): One of ``VERSIONS``.
    """
    python: str
    stack: str
    versions: str

    @property
    def name(self) -> str:
        return f'py{self.python}-{self.stack}-{self.versions}'


@dataclass
class Result:
    """What became of a row.

    Args:
        row (str): Its name.
        commit (str): What was tested; '' if nothing was.
        arguments (List[str]): Of pytest.
        versions (Dict[str, str]): Of the modules that were imported.
        counts (Dict[str, int]): Tests ``passed``, ``failed``, ``skipped``.
        minutes (float): Of the tests. Defaults to 0.
        problem (str): Why there are no numbers, or cannot be trusted.
            Defaults to ''.
    """
    row: str
    commit: str
    arguments: List[str]
    versions: Dict[str, str] = field(default_factory=dict)
    counts: Dict[str, int] = field(default_factory=dict)
    minutes: float = 0.
    problem: str = ''

    @property
    def command(self) -> str:
        return ' '.join(['pytest', *map(shlex.quote, self.arguments)])

    @property
    def good(self) -> bool:
        return not (self.problem or self.counts.get('failed'))


def choose(patterns: List[str]) -> List[Row]:
    """The rows of which a pattern matches the name; all without a pattern."""
    rows = [Row(*x) for x in product(PYTHONS, STACKS, VERSIONS)]
    for pattern in patterns:
        if not any(fnmatch(row.name, pattern) for row in rows):
            raise ValueError(
                f'No row is called "{pattern}"; there are '
                f'{", ".join(row.name for row in rows)}. * and ? are allowed')
    return [
        row for row in rows
        if not patterns or any(fnmatch(row.name, x) for x in patterns)
    ]


def read_ranges(name: str) -> Dict[str, str]:
    """Specifier by project of a requirement file, such as '>=2.6,<3'."""
    lines = (ROOT / name).read_text(encoding='utf-8').splitlines()
    found = (re.match(r'([\w.-]+)([^#]*)', line) for line in lines)
    return {match[1]: match[2].strip() for match in found if match}


def requirements(row: Row) -> List[str]:
    """What is installed for a row that is not locked."""
    needed = read_ranges('requirements.txt')
    onedl = read_ranges('requirements/onedl.txt')
    del needed['mmdet'], needed['mmsegmentation']
    if row.stack == 'onedl':
        for host in ('mmengine', 'mmcv', 'mmpretrain'):
            del needed[host]
            needed[f'onedl-{host}'] = onedl[f'onedl-{host}']
    else:
        needed['mmcv-lite'] = needed.pop('mmcv')
    needed.update(read_ranges('requirements/optional.txt'))
    if row.versions == 'oldest':
        needed = {
            name: '==' + re.search(r'>=([^,]+)', ranges)[1]
            for name, ranges in needed.items()
        }
    # What only the tests need may be as new as it likes.
    tests = read_ranges('requirements/tests.txt')
    return [f'{name}{x}' for name, x in {**tests, **needed}.items()]


def find_python(version: str, given: List[str]) -> str:
    """An interpreter of a version that runs.

    Args:
        version (str): Such as '3.11'.
        given (List[str]): Interpreters that the user named.

    Raises:
        SetupError: There is none.
    """
    for path in [*given, f'python{version}']:
        try:
            found = subprocess.run([
                path, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])'
            ],
                                   capture_output=True,
                                   encoding='utf-8',
                                   timeout=60)
        except OSError:
            continue
        if found.stdout.strip() == version:
            return path
    raise SetupError(f'no Python {version} was found; name one by --python')


def run(command: List[str],
        log: Path,
        minutes: float,
        env: Optional[Dict[str, str]] = None) -> int:
    """Run a command to its end, its output added to a log.

    Args:
        command (List[str]): The command.
        log (Path): The log.
        minutes (float): After which its process group is killed.
        env (Dict[str, str], optional): Added to the environment. Defaults to
            None.

    Returns:
        int: Its exit status.

    Raises:
        SetupError: It took too long.
    """
    with log.open('a', encoding='utf-8') as file:
        file.write(f'\n$ {" ".join(command)}\n')
        file.flush()
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={
                **os.environ,
                **(env or {})
            },
            start_new_session=True)
        try:
            return process.wait(minutes * 60)
        except subprocess.TimeoutExpired:
            raise SetupError(f'it took more than {minutes:g} minutes, see '
                             f'{log}') from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def reason(log: Path) -> str:
    """The line of a log that says most about an error."""
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines()
    errors = [x.strip() for x in lines if re.search(r'\berror\b:', x, re.I)]
    # pip's last error is often only that there was one.
    found = errors or [x for x in lines if x.strip()][-1:]
    return f'{found[0][:200] if found else "no message"} (see {log})'


def set_up(row: Row, folder: Path, pythons: List[str]) -> Path:
    """Make a row's environment, or take what an earlier call finished.

    Args:
        row (Row): The row.
        folder (Path): Of the row.
        pythons (List[str]): Interpreters that the user named.

    Returns:
        Path: Its interpreter.

    Raises:
        SetupError: It cannot be made.
    """
    venv, done = folder / 'venv', folder / 'done.txt'
    log = folder / 'setup.log'
    python = venv / 'bin' / 'python'
    wanted = [] if row.versions == 'locked' else requirements(row)
    # The package index goes on: what was newest once is not for long.
    day = time.strftime(' %Y-%m-%d') if row.versions == 'newest' else ''
    text = '\n'.join([row.name + day, *wanted, ''])
    if (wanted and python.exists() and done.is_file()
            and done.read_text(encoding='utf-8') == text):
        return python
    log.unlink(missing_ok=True)

    def step(*command, **env):
        if run([str(x) for x in command], log, SETUP_MINUTES, env):
            raise SetupError(reason(log))

    # A started environment of the locked set is gone on with.
    if wanted or not python.exists():
        done.unlink(missing_ok=True)
        step(find_python(row.python, pythons), '-m', 'venv', '--clear', venv)
    if not wanted:
        step('bash', ROOT / 'tools/setup_env.sh', '--current-env', '--python',
             python, '--stack', row.stack)
        return python
    (folder / 'requirements.txt').write_text(text.partition('\n')[2], 'utf-8')
    pip = (python, '-m', 'pip', 'install', '--disable-pip-version-check')
    first = [x for x in wanted if re.match(r'[\w.-]+', x)[0] in BUILD]
    step(*pip, *first)
    # mmcv's sdist builds its ops only when told to.
    step(
        *pip,
        '--no-build-isolation',
        '-r',
        folder / 'requirements.txt',
        MMCV_WITH_OPS='0')
    done.write_text(text, 'utf-8')
    return python


def read_junit(path: Path) -> Dict[str, int]:
    """Count the tests of a junit.xml; an error is a failed test."""
    suites = list(ElementTree.parse(path).getroot().iter('testsuite'))

    def total(*keys):
        return sum(int(suite.get(key, 0)) for suite in suites for key in keys)

    failed, skipped = total('failures', 'errors'), total('skipped')
    return dict(
        passed=total('tests') - failed - skipped,
        failed=failed,
        skipped=skipped)


def test(python: Path, folder: Path, result: Result, minutes: float) -> None:
    """Run the tests of a row into ``result``.

    Args:
        python (Path): Of the row's environment.
        folder (Path): Of the row.
        result (Result): Is filled in.
        minutes (float): After which they are killed.

    Raises:
        SetupError: The packages do not import, or something took too long.
    """
    env = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    try:
        look = subprocess.run(
            [str(python), '-W', 'ignore', '-c', LOOK, *MODULES],
            capture_output=True,
            encoding='utf-8',
            env={
                **os.environ,
                **env
            },
            timeout=minutes * 60)
    except subprocess.TimeoutExpired:
        raise SetupError(
            f'the imports took more than {minutes:g} minutes') from None
    if look.returncode:
        raise SetupError(look.stderr.strip().splitlines()[-1])
    # Some packages print while they are imported.
    result.versions = json.loads(look.stdout.strip().splitlines()[-1])
    junit, log = folder / 'junit.xml', folder / 'test.log'
    for path in (junit, log):
        path.unlink(missing_ok=True)
    start = time.monotonic()
    workers = str(min(8, os.cpu_count() or 1))
    # As tools/run_tests.sh does it.
    status = run([
        str(python), '-m', 'pytest', f'--junitxml={junit}', '-n', workers,
        '--dist=loadfile', '--no-loadscope-reorder', *result.arguments
    ], log, minutes, env)
    result.minutes = round((time.monotonic() - start) / 60, 1)
    if junit.is_file():
        result.counts = read_junit(junit)
    # pytest's 1 is for failed tests, which are counted.
    if status not in (0, 1) or not result.counts:
        result.problem = f'pytest ended with {status}: {reason(log)}'


def try_row(row: Row, folder: Path, args: argparse.Namespace) -> Result:
    """Set a row up, test it, and keep what became of it."""
    folder.mkdir(parents=True, exist_ok=True)
    result = Result(row.name, commit(), args.pytest)
    try:
        python = set_up(row, folder, args.python)
        test(python, folder, result, args.minutes)
    except (SetupError, OSError, subprocess.SubprocessError) as error:
        result.problem = str(error)
    (folder / 'result.json').write_text(
        json.dumps(asdict(result), indent=2) + '\n', 'utf-8')
    if args.remove:
        shutil.rmtree(folder / 'venv', ignore_errors=True)
    return result


def read_result(row: Row, folder: Path) -> Result:
    """What became of a row when it was last tried."""
    path = folder / 'result.json'
    if not path.is_file():
        return Result(
            row.name, '', [], problem=f'not run yet, there is no {path}')
    return Result(**json.loads(path.read_text(encoding='utf-8')))


def commit() -> str:
    """The checkout's commit, with a + where files differ from it."""
    found = subprocess.run(['git', 'describe', '--always', '--dirty=+'],
                           cwd=ROOT,
                           capture_output=True,
                           encoding='utf-8')
    return found.stdout.strip() or 'unknown'


def table(results: List[Result]) -> str:
    """A Markdown table, and below it what could not be tested."""
    heads = ['row', 'Python', *MODULES, 'passed', 'failed', 'skipped', 'min']
    lines = [heads, ['---'] * len(heads)]
    for x in results:
        numbers = [x.counts.get(k, '') for k in heads[-4:-1]]
        lines.append([
            x.row,
            x.versions.get('python', ''),
            *(x.versions.get(name, '-') for name in MODULES), *numbers,
            x.minutes if x.counts else ''
        ])
    text = '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
    for x in results:
        if x.problem:
            text += f'\n\n{x.row}: {x.problem}'
    runs = {(x.commit, x.command) for x in results if x.commit}
    for sha, line in sorted(runs):
        text += f'\n\nCommit {sha}, `{line}`.'
    return text


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    ours, pytest = argv, []
    if '--' in argv:
        at = argv.index('--')
        ours, pytest = argv[:at], argv[at + 1:]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--folder',
        type=Path,
        required=True,
        help='where the environments and results are kept')
    parser.add_argument(
        '--row',
        nargs='+',
        default=[],
        metavar='NAME',
        help='rows, such as py3.11-upstream-locked or "*-oldest"; all '
        'without it')
    parser.add_argument(
        '--python',
        nargs='+',
        default=[],
        metavar='PATH',
        help='interpreters, where python3.10, python3.11 and python3.12 of '
        'the PATH will not do')
    parser.add_argument(
        '--minutes',
        type=float,
        default=180,
        help="for a row's tests, before they are killed; default: 180")
    parser.add_argument(
        '--remove',
        action='store_true',
        help="remove a row's environment after its tests")
    parser.add_argument(
        '--report',
        action='store_true',
        help='run nothing: the table of the results in the folder')
    args = parser.parse_args(ours)
    args.folder, args.pytest = args.folder.resolve(), pytest
    try:
        args.rows = choose(args.row)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    results = []
    for row in args.rows:
        folder = args.folder / row.name
        if args.report:
            results.append(read_result(row, folder))
            continue
        print(f'{time.strftime("%H:%M:%S")} {row.name}', file=sys.stderr)
        results.append(try_row(row, folder, args))
        if results[-1].problem:
            print(f'  {results[-1].problem}', file=sys.stderr)
    print(table(results))
    sys.exit(not all(x.good for x in results))


if __name__ == '__main__':
    main()
