# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The tests on every Python, stack and set of versions that we allow.

    nox -l                                      list the sessions
    nox -s "tests-3.12(upstream, newest)"       one of them
    nox -- tests/models -m "not slow"           all, with pytest's arguments

An environment takes 5 to 8 GiB; of mmcv, uv keeps the wheel it builds for a
Python and torch.
"""

import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
EXTRAS = {
    'upstream': ('all', 'tests'),
    'onedl': ('onedl', 'optional', 'tests'),
}
# The one set of uv.lock; the lower bound of every range in pyproject.toml;
# what the package index has today within them.
OPTIONS = {
    'locked': ('--locked',),
    'oldest': ('--resolution', 'lowest-direct'),
    'newest': ('--resolution', 'highest'),
}

# What uv reads to resolve.
PROJECT = (
    'pyproject.toml',
    'setup.py',
    'README.md',
    'LICENSE',
    'mmdensecl/version.py',
)

nox.options.default_venv_backend = 'uv'


@nox.session(python=['3.10', '3.11', '3.12'])
@nox.parametrize('versions', list(OPTIONS), ids=list(OPTIONS))
@nox.parametrize('stack', list(EXTRAS), ids=list(EXTRAS))
def tests(session: nox.Session, stack: str, versions: str) -> None:
    """Run the tests with one set of versions."""
    # uv resolves anew in a copy, which leaves our uv.lock as it is.
    project = Path(session.create_tmp(), 'project')
    shutil.rmtree(project, ignore_errors=True)
    (project / 'mmdensecl').mkdir(parents=True)
    for name in PROJECT:
        shutil.copy2(ROOT / name, project / name)
    if versions == 'locked':
        shutil.copy2(ROOT / 'uv.lock', project)
    session.run_install(
        'uv',
        'sync',
        f'--project={project}',
        '--no-install-project',
        *OPTIONS[versions],
        *(f'--extra={extra}' for extra in EXTRAS[stack]),
        env={'UV_PROJECT_ENVIRONMENT': session.virtualenv.location},
        external=True,
    )
    session.run(
        'python',
        '-m',
        'pytest',
        *(session.posargs or ['-n', 'auto', '--dist', 'loadfile']),
        env={'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
    )
