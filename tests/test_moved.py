# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import importlib
import subprocess
import sys

import pytest

from mmdensecl import moved


@pytest.mark.parametrize(
    'old, name',
    [
        ('api', 'load_backbone'),
        ('benchmark.ablation', 'plan_pretraining'),
        ('benchmark.report.writers', 'write_report'),
        ('benchmark.state', 'write_json'),
        ('engine.hooks.knn_hook', 'KNNHook'),
        ('engine.probe_loop', 'SVMLoop'),
        ('transfer.dense_probes', 'fit_linear'),
        ('transfer.matching', 'measure'),
        ('transfer.probes', 'knn_accuracy'),
    ],
)
def test_modules(old, name):
    module = importlib.import_module(f'mmdensecl.{old}')
    with pytest.warns(DeprecationWarning, match=f'{old}'):
        found = getattr(module, name)
    new = importlib.import_module(f'mmdensecl.{moved.MODULES[old]}')
    assert found is getattr(new, name)
    with pytest.raises(AttributeError), pytest.warns(DeprecationWarning):
        getattr(module, 'nothing')  # noqa: B009


@pytest.mark.parametrize('path', [*moved.NAMES])
def test_names(path):
    package, _, name = path.rpartition('.')
    package = importlib.import_module(f'mmdensecl.{package}')
    with pytest.warns(DeprecationWarning, match='mmdensecl.evaluation'):
        found = getattr(package, name)
    assert found.__module__.startswith('mmdensecl.evaluation')
    with pytest.raises(AttributeError, match='no attribute'):
        getattr(package, 'nothing')  # noqa: B009


def test_as_an_old_program_imports():
    code = (
        'import mmdensecl.api\n'
        'from mmdensecl.transfer.probes import nearest\n'
        'from mmdensecl.transfer import matching\n'
        'from mmdensecl.engine import KNNHook\n'
        'assert mmdensecl.api.as_rgb and matching.measure\n'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'always::DeprecationWarning', '-c', code],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        '<string>:2: DeprecationWarning: mmdensecl.transfer.probes.nearest is '
        in done.stderr
    )
