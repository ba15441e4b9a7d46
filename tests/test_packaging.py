# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tests of what `pip install .` builds, and of the requirement files."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from itertools import combinations
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
LOCK = tomllib.loads((ROOT / 'uv.lock').read_text())
UPSTREAM = {'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmsegmentation'}
ONEDL = {'mmengine', 'mmcv', 'mmpretrain', 'mmdetection', 'mmsegmentation'}
ONEDL = {f'onedl-{name}' for name in ONEDL}
HOSTS = UPSTREAM | ONEDL | {'mmcv-lite'}
# The hosts that an extra brings.
EXTRAS = {
    'mim': {'mmengine', 'mmpretrain'},
    'lite': {'mmengine', 'mmpretrain', 'mmcv-lite'},
    'det': {'mmengine', 'mmpretrain', 'mmcv', 'mmdet'},
    'seg': {'mmengine', 'mmpretrain', 'mmcv', 'mmsegmentation'},
    'all': UPSTREAM,
    'onedl': ONEDL,
    'optional': set(),
    'tests': set(),
    'dev': set(),
}
# What a build reads.
SOURCES = (
    'mmdensecl configs tools setup.py pyproject.toml MANIFEST.in '
    'requirements.txt uv.lock model-index.yml README.md LICENSE CHANGELOG.md '
    'CITATION.cff'
)


def copy_sources(target):
    target.mkdir()
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info', '*.pyc')
    for name in SOURCES.split():
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
    result = subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **env},
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind, tree, target):
    """Build a wheel or sdist as pip and uv do, with what is installed."""
    call = f'from setuptools import build_meta; build_meta.build_{kind}'
    target.mkdir()
    python('-c', f'{call}({str(target)!r})', cwd=tree)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp('packaging') / 'tree')


@pytest.fixture(scope='module')
def wheel(tree):
    # What stood in build/ before must not get into the wheel.
    stale = tree / 'build' / 'lib' / 'mmdensecl' / '.mim' / 'configs'
    stale.mkdir(parents=True)
    (stale / 'removed_last_year.py').touch()
    return build('wheel', tree, tree.parent / 'wheel')


@pytest.fixture(scope='module')
def unpacked(wheel):
    target = wheel.parent / 'unpacked'
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope='module')
def metadata(unpacked):
    (path,) = unpacked.glob('*.dist-info/METADATA')
    return Parser().parsestr(path.read_text(encoding='utf-8'))


class TestWheel:
    def test_mim_data_equals_the_tree(self, tree, unpacked):
        mim = unpacked / 'mmdensecl' / '.mim'
        for name in ('configs', 'tools'):
            expected = files_below(tree / name)
            assert expected, f'{name}/ is empty'
            assert files_below(mim / name) == expected
        index = 'model-index.yml'
        assert (mim / index).read_bytes() == (ROOT / index).read_bytes()
        names = {path.name for path in mim.iterdir()}
        assert names == {'configs', 'tools', index}

    def test_every_module_is_in_it(self, tree, unpacked):
        expected = files_below(tree / 'mmdensecl')
        built = files_below(unpacked / 'mmdensecl')
        ours = {k: v for k, v in built.items() if not k.startswith('.mim/')}
        assert ours == expected
        assert 'benchmark/report.html.j2' in built

    def test_source_distribution_builds_the_same(
        self, tree, unpacked, tmp_path
    ):
        archive = build('sdist', tree, tmp_path / 'sdist')
        shutil.unpack_archive(archive, tmp_path / 'source')
        (source,) = (tmp_path / 'source').iterdir()
        wheel = build('wheel', source, tmp_path / 'wheel')
        shutil.unpack_archive(wheel, tmp_path / 'again', 'zip')
        again = files_below(tmp_path / 'again' / 'mmdensecl')
        assert again == files_below(unpacked / 'mmdensecl')


class TestMetadata:
    def test_python_versions(self, metadata):
        allowed = SpecifierSet(metadata['Requires-Python'])
        versions = ('3.9.18', '3.10.13', '3.11.7', '3.12.1', '3.13.0')
        assert [v for v in versions if v in allowed] == list(versions[1:4])

    def test_extras(self, metadata):
        for extra, hosts in EXTRAS.items():
            assert extra in metadata.get_all('Provides-Extra')
            assert self.names(metadata, extra) & HOSTS == hosts, extra
        # A host by name would pull upstream's packages over the fork's.
        names = self.names(metadata, '')
        assert not names & HOSTS
        assert {'torch', 'torchvision', 'numpy', 'pillow'} <= names

    def names(self, metadata, extra):
        """Return what pip would install, through extras of ours."""
        names = set()
        for requirement in map(Requirement, metadata.get_all('Requires-Dist')):
            marker = requirement.marker
            if marker and not marker.evaluate({'extra': extra}):
                continue
            names.add(canonicalize_name(requirement.name))
            if requirement.name == 'mmdensecl':
                for nested in requirement.extras:
                    names |= self.names(metadata, nested)
        return names

    def test_requirements_txt_names_an_extra_of_ours(self):
        lines = (ROOT / 'requirements.txt').read_text().splitlines()
        (line,) = [x for x in lines if not x.startswith('#')]
        assert line == '.[lite]'


class TestLock:
    """What uv itself does not see to; `uv sync --locked` says if it is old."""

    def test_setuptools_has_pkg_resources(self):
        """Which mmengine imports."""
        found = [x for x in LOCK['package'] if x['name'] == 'setuptools']
        assert all(Version(x['version']) < Version('82') for x in found)
        assert found

    def test_mmcv_is_built_from_source(self):
        (mmcv,) = [x for x in LOCK['package'] if x['name'] == 'mmcv']
        assert mmcv['sdist'] and 'wheels' not in mmcv

    def test_extras_with_the_same_modules_conflict(self):
        conflicts = [
            {x['extra'] for x in group}
            for group in PROJECT['tool']['uv']['conflicts']
        ]
        for pair in combinations(EXTRAS, 2):
            hosts = set.union(*(EXTRAS[extra] for extra in pair))
            twice = hosts & ONEDL and hosts & UPSTREAM
            lite = {'mmcv-lite', 'mmcv'} <= hosts
            assert (set(pair) in conflicts) == bool(twice or lite), pair
