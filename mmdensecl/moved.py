# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Old import paths, for one release: they work, with a DeprecationWarning."""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

MODULES = {
    'api': 'transfer.feature_extractor',
    'benchmark.ablation': 'benchmark.sweep',
    'benchmark.log': 'benchmark.results',
    'benchmark.report.results': 'benchmark.results',
    'benchmark.report.tables': 'benchmark.stats',
    'benchmark.report.writers': 'benchmark.report',
    'benchmark.state': 'benchmark.runner',
    'engine.hooks.knn_hook': 'evaluation.knn_hook',
    'engine.probe_loop': 'evaluation.probe_loop',
    'transfer.dense_probes': 'evaluation.dense_probes',
    'transfer.matching': 'evaluation.matching',
    'transfer.probes': 'evaluation.probes',
}
# Names that a package gave as well.
NAMES = {
    f'engine.{name}': 'evaluation'
    for name in (
        'KNNHook',
        'KNNLoop',
        'LowShotLoop',
        'SVMLoop',
        'hooks.KNNHook',
        'is_probe',
    )
}
RENAMED = {
    'datasets.DrawViews': 'datasets.SampleTwoCropParams',
    'datasets.PackPicture': 'datasets.PackImage',
    'engine.ExactEpochLoop': 'engine.ResumableEpochLoop',
}
ROOT = __name__.partition('.')[0]


def getattr_moved(package: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that names were moved out of."""
    place = package.partition('.')[2]

    def __getattr__(name: str) -> Any:
        old = f'{place}.{name}'
        found = f'{NAMES.get(old) or MODULES.get(place, "")}.{name}'
        new = RENAMED.get(old, found)
        # The import system asks for names such as __path__.
        if name.startswith('__') or new.startswith('.'):
            raise AttributeError(
                f"module '{package}' has no attribute '{name}'"
            )
        warnings.warn(
            f'{ROOT}.{old} is now {ROOT}.{new}; the old name goes with the '
            'next release',
            DeprecationWarning,
            stacklevel=2,
        )
        module, _, name = new.rpartition('.')
        return getattr(import_module(f'{ROOT}.{module}'), name)

    return __getattr__


def register_moved_modules() -> None:
    """Let the old modules be imported."""
    for old, new in MODULES.items():
        module = ModuleType(f'{ROOT}.{old}', f'Moved to ``{ROOT}.{new}``.')
        vars(module)['__getattr__'] = getattr_moved(module.__name__)
        sys.modules.setdefault(module.__name__, module)
        if '.' not in old:
            setattr(sys.modules[ROOT], old, module)
