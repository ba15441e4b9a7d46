# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Packaging of mmdensecl: metadata, extras and the data that MIM reads.

The version ranges stand in requirements.txt and requirements/; this file only
decides which of them `pip install .` brings and which an extra brings.
"""
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# What `mim train mmdensecl <config>` reads from the installed package.
MIM_DATA = ('configs', 'tools', 'model-index.yml')

# `pip install .` never requires a host by name. The onedl fork ships the same
# modules (mmcv, mmengine, ...) as other distributions (onedl-mmcv, ...), and
# pre-training is content with mmcv-lite instead of mmcv: a plain requirement
# would make pip install upstream over what is there. The hosts are extras.
HOSTS = ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmsegmentation')


def read_version() -> str:
    """Read the version without importing the package (which needs torch)."""
    text = (ROOT / 'mmdensecl' / 'version.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__\s*=\s*'([^']+)'", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(
            "mmdensecl/version.py has no line `__version__ = '...'`")
    return match.group(1)


def read_requirements(name: str) -> list[str]:
    """Return the requirements of a file, without comments."""
    lines = (ROOT / name).read_text(encoding='utf-8').splitlines()
    lines = [line.split('#')[0].strip() for line in lines]
    return [line for line in lines if line]


def project_name(requirement: str) -> str:
    """Return the distribution's name, e.g. ``mmcv`` of ``mmcv>=2.0.0``."""
    return re.split(r'[^A-Za-z0-9._-]', requirement)[0].lower()


def read_readme() -> str:
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


class BuildPyWithMim(build_py):
    """Copies configs, tools and the model index into the built package.

    They go to ``<build_lib>/mmdensecl/.mim`` only, so the source tree stays
    as it was. An editable install has no built package, hence no ``.mim``.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'mmdensecl' / '.mim'
        # build/ may hold the files of an earlier build.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in MIM_DATA:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source,
                    target / name,
                    ignore=shutil.ignore_patterns('__pycache__', '*.py[co]'))
            elif source.is_file():
                shutil.copy2(source, target / name)
            else:
                self.warn(f'{name} does not exist: MIM will not find it in '
                          'the installed package')

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        target = Path(self.build_lib) / 'mmdensecl' / '.mim'
        mim = [str(path) for path in target.rglob('*') if path.is_file()]
        return super().get_outputs(include_bytecode) + mim


RUNTIME = read_requirements('requirements.txt')
OPTIONAL = read_requirements('requirements/optional.txt')
TESTS = read_requirements('requirements/tests.txt')
ONEDL = read_requirements('requirements/onedl.txt')
HOST = {project_name(r): r for r in RUNTIME if project_name(r) in HOSTS}

# Pre-training. mmcv or mmcv-lite is left to the user: one of them, never
# both, and mmcv has to be built (`bash tools/setup_env.sh` does it).
MIM = [HOST['mmengine'], HOST['mmpretrain']]

setup(
    name='mmdensecl',
    version=read_version(),
    description='Dense self-supervised pre-training (DenseCL, MoCo-v2) for the '
    'OpenMMLab toolboxes',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='mmdensecl contributors',
    license='Apache-2.0',
    keywords='computer vision, self-supervised learning, dense contrastive '
    'learning, object detection, semantic segmentation',
    classifiers=[
        'Development Status :: 4 - Beta',
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=['mmdensecl', 'mmdensecl.*']),
    include_package_data=True,
    python_requires='>=3.10,<3.13',
    install_requires=[r for r in RUNTIME if project_name(r) not in HOSTS],
    extras_require={
        # Pre-training with the pure-Python mmcv, on any machine.
        'lite': MIM + [HOST['mmcv'].replace('mmcv', 'mmcv-lite')],
        'mim': MIM,
        'det': MIM + [HOST['mmcv'], HOST['mmdet']],
        'seg': MIM + [HOST['mmcv'], HOST['mmsegmentation']],
        'onedl': ONEDL,
        'optional': OPTIONAL,
        'tests': TESTS,
        'all': list(HOST.values()) + OPTIONAL,
    },
    cmdclass={'build_py': BuildPyWithMim},
    zip_safe=False)
