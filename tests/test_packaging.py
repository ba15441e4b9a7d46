# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tests of what `pip install .` builds, and of the requirement files."""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ('lock.txt', 'lock-onedl.txt')
RANGES = ('requirements.txt', 'requirements/optional.txt',
          'requirements/tests.txt')
# A distribution of the fork stands for one of upstream.
ONEDL = {
    'onedl-mmengine': 'mmengine',
    'onedl-mmcv': 'mmcv',
    'onedl-mmpretrain': 'mmpretrain',
    'onedl-mmdetection': 'mmdet',
    'onedl-mmsegmentation': 'mmsegmentation',
}
HOSTS = set(ONEDL.values())
PYTHONS = ('3.10', '3.11', '3.12')
# What a build reads.
SOURCES = ('mmdensecl', 'configs', 'tools', 'requirements', 'setup.py',
           'setup.cfg', 'pyproject.toml', 'MANIFEST.in', 'requirements.txt',
           'model-index.yml', 'README.md', 'LICENSE', 'CHANGELOG.md',
           'CITATION.cff')


def read_requirements(name):
    lines = (ROOT / name).read_text().splitlines()
    lines = [line.split('#')[0].strip() for line in lines]
    return [Requirement(line) for line in lines if line]


def read_lock(name, python):
    """Return {name: version} of a lock for a Python version on Linux."""
    environment = {
        'python_version': python,
        'python_full_version': f'{python}.1',
        'sys_platform': 'linux',
        'platform_system': 'Linux',
    }
    pins = {}
    for requirement in read_requirements(f'requirements/{name}'):
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        key = canonicalize_name(requirement.name)
        assert key not in pins, f'{key} is pinned twice on Python {python}'
        pin = re.fullmatch(r'==([^*]+)', str(requirement.specifier))
        assert pin, f'{requirement} is not an exact pin'
        pins[key] = Version(pin.group(1))
    return pins


def copy_sources(target):
    target.mkdir()
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info', '*.pyc')
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.is_file():
            shutil.copy2(source, target / name)
    return target


def files_below(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file() and '__pycache__' not in path.parts
    }


def python(*args, cwd, **env):
    result = subprocess.run([sys.executable, *map(str, args)],
                            cwd=cwd,
                            env={
                                **os.environ,
                                **env
                            },
                            text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(tree, target):
    # --no-index: a build that wanted to download something would fail.
    python(
        '-m',
        'pip',
        'wheel',
        '--quiet',
        '--no-deps',
        '--no-build-isolation',
        '--no-index',
        '--wheel-dir',
        target,
        tree,
        cwd=target.parent)
    (wheel, ) = target.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp('packaging') / 'tree')


@pytest.fixture(scope='module')
def wheel(tree):
    # What stood in build/ before must not get into the wheel.
    stale = tree / 'build' / 'lib' / 'mmdensecl' / '.mim' / 'configs'
    stale.mkdir(parents=True)
    (stale / 'removed_last_year.py').touch()
    return build_wheel(tree, tree.parent / 'wheel')


@pytest.fixture(scope='module')
def unpacked(wheel):
    target = wheel.parent / 'unpacked'
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope='module')
def metadata(unpacked):
    from email.parser import Parser
    (path, ) = unpacked.glob('*.dist-info/METADATA')
    return Parser().parsestr(path.read_text(encoding='utf-8'))


class TestWheel:

    def test_mim_data_equals_the_tree(self, tree, unpacked):
        mim = unpacked / 'mmdensecl' / '.mim'
        for name in ('configs', 'tools'):
            expected = files_below(tree / name)
            assert expected, f'{name}/ is empty'
            assert files_below(mim / name) == expected
        for name in ('model-index.yml', ):
            expected = ROOT / name
            assert (mim / name).read_bytes() == expected.read_bytes()
        assert {path.name
                for path in mim.iterdir()
                } == {'configs', 'tools', 'model-index.yml'}

    def test_build_leaves_no_mim_data_in_the_source(self, tree, wheel):
        assert not (tree / 'mmdensecl' / '.mim').exists()

    def test_every_module_is_in_it(self, tree, unpacked):
        expected = files_below(tree / 'mmdensecl')
        built = {
            name: data
            for name, data in files_below(unpacked / 'mmdensecl').items()
            if not name.startswith('.mim/')
        }
        assert built == expected
        assert 'benchmark/report.html.j2' in built

    def test_nothing_else_is_in_it(self, unpacked):
        names = {path.name for path in unpacked.iterdir()}
        assert {name.split('-')[0] for name in names} == {'mmdensecl'}

    def test_imports(self, unpacked, tmp_path):
        out = python(
            '-c', 'import mmdensecl, mmdensecl.registry;'
            'print(mmdensecl.__file__, mmdensecl.__version__)',
            cwd=tmp_path,
            PYTHONPATH=str(unpacked))
        path, version = out.split()
        assert Path(path).is_relative_to(unpacked)
        assert f"'{version}'" in (ROOT / 'mmdensecl/version.py').read_text()

    def test_source_distribution_builds_the_same(self, tree, unpacked,
                                                 tmp_path):
        python('setup.py', '-q', 'sdist', '--dist-dir', tmp_path, cwd=tree)
        (archive, ) = tmp_path.glob('*.tar.gz')
        shutil.unpack_archive(archive, tmp_path / 'source')
        (source, ) = (tmp_path / 'source').iterdir()
        again = tmp_path / 'again'
        with zipfile.ZipFile(build_wheel(source,
                                         tmp_path / 'wheel')) as archive:
            archive.extractall(again)
        assert files_below(again / 'mmdensecl') == files_below(unpacked /
                                                               'mmdensecl')


class TestMetadata:

    def test_parses(self, metadata):
        assert metadata['Name'] == 'mmdensecl'
        assert str(Version(metadata['Version'])) == metadata['Version']
        assert 'Apache' in (metadata['License']
                            or metadata['License-Expression'])
        for requirement in metadata.get_all('Requires-Dist'):
            Requirement(requirement)

    def test_python_versions(self, metadata):
        from packaging.specifiers import SpecifierSet
        allowed = SpecifierSet(metadata['Requires-Python'])
        versions = ('3.9.18', '3.10.13', '3.11.7', '3.12.1', '3.13.0')
        assert [v for v in versions if v in allowed] == list(versions[1:4])

    def requirements(self, metadata, extra=''):
        requirements = map(Requirement, metadata.get_all('Requires-Dist'))
        return {
            r.name: r
            for r in requirements
            if r.marker is None or r.marker.evaluate({'extra': extra})
        }

    def test_requires_no_host_by_name(self, metadata):
        # It would pull upstream's packages over those of the fork.
        names = set(self.requirements(metadata))
        assert not names & (HOSTS | set(ONEDL) | {'mmcv-lite'})
        assert {'torch', 'torchvision', 'numpy', 'pillow'} <= names

    @pytest.mark.parametrize('extra, hosts', [
        ('lite', {'mmengine', 'mmcv-lite', 'mmpretrain'}),
        ('mim', {'mmengine', 'mmpretrain'}),
        ('det', {'mmengine', 'mmcv', 'mmpretrain', 'mmdet'}),
        ('seg', {'mmengine', 'mmcv', 'mmpretrain', 'mmsegmentation'}),
        ('all', HOSTS),
        ('onedl', set(ONEDL)),
        ('optional', set()),
        ('tests', set()),
    ])
    def test_extras(self, metadata, extra, hosts):
        assert extra in metadata.get_all('Provides-Extra')
        names = set(self.requirements(metadata, extra))
        assert names & (HOSTS | set(ONEDL) | {'mmcv-lite'}) == hosts

    def test_extra_all_has_the_optional_packages(self, metadata):
        names = set(self.requirements(metadata, 'all'))
        for requirement in read_requirements('requirements/optional.txt'):
            assert requirement.name in names


class TestRequirements:

    def test_names_the_six(self):
        names = {r.name for r in read_requirements('requirements.txt')}
        assert {
            'torch', 'mmengine', 'mmcv', 'mmpretrain', 'mmdet',
            'mmsegmentation'
        } <= names

    @pytest.mark.parametrize('name', RANGES)
    def test_are_ranges(self, name):
        for requirement in read_requirements(name):
            assert '==' not in str(requirement.specifier), requirement
            assert '>=' in str(requirement.specifier), requirement

    @pytest.mark.parametrize('python_version', PYTHONS)
    @pytest.mark.parametrize('name', RANGES)
    def test_lock_satisfies_them(self, name, python_version):
        pins = read_lock('lock.txt', python_version)
        for requirement in read_requirements(name):
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin, f'{requirement.name} is not in the lock'
            assert pin in requirement.specifier, f'{requirement}: {pin}'

    @pytest.mark.parametrize('python_version', PYTHONS)
    @pytest.mark.parametrize('name', RANGES)
    def test_lock_of_the_fork_satisfies_them(self, name, python_version):
        pins = read_lock('lock-onedl.txt', python_version)
        assert not HOSTS & set(pins), 'upstream beside the fork'
        assert set(ONEDL) <= set(pins)
        for requirement in read_requirements(name):
            if requirement.name not in HOSTS:
                pin = pins[canonicalize_name(requirement.name)]
                assert pin in requirement.specifier, f'{requirement}: {pin}'

    @pytest.mark.parametrize('python_version', PYTHONS)
    def test_tested_set(self, python_version):
        pins = read_lock('lock.txt', python_version)
        expected = {
            'torch': '2.11.0',
            'torchvision': '0.26.0',
            'mmengine': '0.10.7',
            'mmcv': '2.1.0',
            'mmpretrain': '1.2.0',
            'mmdet': '3.3.0',
            'mmsegmentation': '1.2.2',
        }
        assert {name: str(pins[name]) for name in expected} == expected
        # mmcv 2.1.0 and its fork build with this range only.
        assert Version('80') <= pins['setuptools'] < Version('81')

    @pytest.mark.parametrize('python_version', PYTHONS)
    def test_both_locks_agree(self, python_version):
        upstream = read_lock('lock.txt', python_version)
        fork = read_lock('lock-onedl.txt', python_version)
        assert {
            name: (upstream[name], fork[name])
            for name in set(upstream) & set(fork)
            if upstream[name] != fork[name]
        } == {}

    @pytest.mark.parametrize('name', LOCKS + RANGES)
    def test_hold_no_address(self, name):
        path = ROOT / name
        if name in LOCKS:
            path = ROOT / 'requirements' / name
        text = path.read_text()
        for forbidden in ('://', 'file:', '--index', '--extra-index',
                          '--find-links', '--trusted-host', ' @ ', '-e ',
                          '+cpu', '+cu'):
            assert forbidden not in text, f'{forbidden} in {name}'
        # Absolute paths, as uv writes them into its header.
        assert not re.search(r'(^|\s)~?/\w', text), f'a path in {name}'
