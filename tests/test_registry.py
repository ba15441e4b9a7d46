# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a config may name, and what docstrings say of defaults."""

import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mmdensecl
from mmdensecl import registry

ROOT = Path(mmdensecl.__file__).parents[1]
HOSTS = ('mmpretrain', 'mmdet', 'mmseg')

NECK = dict(in_channels=512, hid_channels=8, out_channels=4)
MODEL = dict(
    backbone=dict(type='mmpretrain.ResNet', depth=18),
    neck=dict(type='mmdensecl.DenseCLNeck', **NECK),
    queue_len=8,
    feat_dim=4,
)
# Arguments of those types that cannot do without.
ARGUMENTS = dict(
    FreezeHook=dict(parts=['backbone']),
    MoCoV2=MODEL,
    DenseCL=MODEL,
    DSC=dict(MODEL, category=dict(type='mmdensecl.KMeansCategoryHead')),
    DenseCLNeck=NECK,
    KNNHook=dict(data_root='labelled'),
    PretrainedBackbone=dict(checkpoint='epoch_200.pth'),
    # Nothing is read before the first image.
    UnlabeledFolder=dict(data_root='.', lazy_init=True),
    UnlabeledList=dict(ann_file='list.txt', lazy_init=True),
    UnlabeledShards=dict(data_root='.', lazy_init=True),
)

# Run in a fresh interpreter; only mmengine turns names into types.
BUILD = """
import importlib, sys
from mmengine.registry import init_default_scope
host, types = {host!r}, {types!r}
registries = importlib.import_module(host + '.registry')
assert not [name for name in sys.modules if name.startswith('mmdensecl')]
init_default_scope(host)
failed = []
# A loop needs a Runner, a sampler a data set and a wrapper an optimiser.
classes = ('LOOPS', 'DATA_SAMPLERS', 'OPTIM_WRAPPERS')
for registry, configs in types.items():
    for config in configs:
        try:
            host = getattr(registries, registry)
            kind = (host.get(config['type'])
                    if registry in classes else
                    type(host.build(config)))
            name = kind.__module__ + '.' + kind.__name__
            assert name.startswith('mmdensecl.'), name
            assert 'mmdensecl.' + kind.__name__ == config['type']
        except Exception as error:
            failed.append(f"{{config['type']}}: {{error!r}}")
assert not failed, '\\n'.join(failed)
print('built', sum(map(len, types.values())))
"""


def registered() -> dict[str, list[dict]]:
    """A config of each registered type, by registry."""
    types = {}
    for name in registry.__all__:
        own = getattr(registry, name)
        own.import_from_location()
        types[name] = [
            dict(type=f'mmdensecl.{key}', **ARGUMENTS.get(key, {}))
            for key, kind in sorted(own.module_dict.items())
            # By custom_imports alone: it needs mmdet. And no older names.
            # And none that another test registered.
            if kind.__module__.startswith('mmdensecl.')
            and kind.__module__ != 'mmdensecl.transfer.mmdet'
            and key == kind.__name__
        ]
    return types


class TestRegistry:
    def test_locations_register_something(self):
        for name, configs in registered().items():
            assert configs, f'{name} of mmdensecl.registry is empty'
        names = {x['type'] for x in registered()['MODELS']}
        assert {'mmdensecl.DenseCL', 'mmdensecl.MoCoV2'} <= names

    @pytest.mark.parametrize('host', HOSTS)
    def test_builds_from_a_host(self, host, tmp_path):
        """By prefix alone, in the host's default scope."""
        if importlib.util.find_spec(host) is None:
            pytest.skip(f'{host} is not installed')
        types = registered()
        script = BUILD.format(host=host, types=types)
        path = os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])
        )
        process = subprocess.run(
            [sys.executable, '-c', script],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr[-3000:]
        count = sum(map(len, types.values()))
        assert process.stdout.strip().endswith(f'built {count}')

    def test_types_are_unknown_without_the_prefix(self):
        """Nothing leaks into the root registry."""
        from mmengine.registry import MODELS

        registered()
        assert MODELS.get('DenseCLNeck') is None
        assert MODELS.get('mmdensecl.DenseCLNeck') is not None


# "Defaults to" and a literal; prose may follow instead.
DEFAULT = re.compile(
    r'Defaults? to\s+'
    r'(``.+?``|[\'"].*?[\'"]|\(.*?\)|-?[\d.]*\d|None|True|False)(?=[.,;:]?(\s|$))'
)


def documented_arguments(docstring: str) -> dict[str, str]:
    """Text of each argument in the Args section, in one line."""
    section = re.search(
        r'^Args:\n(.*?)(?:^\S|\Z)',
        inspect.cleandoc(docstring or ''),
        re.DOTALL | re.MULTILINE,
    )
    entries = re.split(
        r'^    (?=\S)', section[1] if section else '', flags=re.M
    )
    pairs = [entry.partition(':') for entry in entries if entry.strip()]
    return {
        name.split(' ')[0]: ' '.join(text.split()) for name, _, text in pairs
    }


def false_defaults(obj: Callable) -> list[str]:
    """Where the docstring and the signature of a callable disagree."""
    arguments = documented_arguments(obj.__doc__)
    if not arguments:
        return []
    own, parameters = inspect.signature(obj).parameters, {}
    if any(p.kind is p.VAR_KEYWORD for p in own.values()):
        # What **kwargs passes on to the parents.
        for base in getattr(obj, '__mro__', (object,))[-2:0:-1]:
            parameters.update(inspect.signature(base).parameters)
    parameters.update(own)
    wrong = []
    for name, text in arguments.items():
        stated = DEFAULT.search(text)
        if name.startswith('*'):
            continue
        if name not in parameters:
            wrong.append(f'{name} is no argument')
        elif stated:
            scope = vars(inspect.getmodule(obj))
            value = eval(stated[1].strip('`'), dict(scope))
            default = parameters[name].default
            if value != default or isinstance(value, bool) != isinstance(
                default, bool
            ):
                wrong.append(f'{name} defaults to {default!r}, not {value!r}')
    return wrong


def public_callables() -> Iterator[tuple[str, Callable]]:
    """Classes, functions and methods of the package, by full name."""
    for info in pkgutil.walk_packages(mmdensecl.__path__, 'mmdensecl.'):
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name.split('.')[0] == 'mmdensecl':
                raise
            continue  # what belongs to a host that is not installed
        for name, obj in vars(module).items():
            if (
                name.startswith('_')
                or getattr(obj, '__module__', None) != info.name
            ):
                continue
            if inspect.isclass(obj):
                yield f'{info.name}.{name}', obj
                for method_name, method in vars(obj).items():
                    method = getattr(method, '__func__', method)
                    if not method_name.startswith('_') and inspect.isfunction(
                        method
                    ):
                        yield f'{info.name}.{name}.{method_name}', method
            elif inspect.isfunction(obj):
                yield f'{info.name}.{name}', obj


def lying(a=1, b=0.2, c=None, d=(1, 2), e=True, f='x', *, g):
    """Something.

    Args:
        a: Defaults to 2.
        b: Text before it, and a line break. Defaults
            to 0.25, which is a quarter.
        c: Defaults to ``'none'``.
        d: Defaults to (1, 3).
        e: Defaults to 1.
        f: Defaults to 'x', which is true.
        g: Defaults to None.
        h: It does not exist.
    """


class TestStatedDefaults:
    def test_reader_finds_lies(self):
        wrong = false_defaults(lying)
        assert [x.split()[0] for x in wrong] == list('abcdegh')

    def test_equal_signatures(self):
        wrong, stated = [], 0
        for name, obj in public_callables():
            texts = documented_arguments(obj.__doc__).values()
            stated += sum(bool(DEFAULT.search(text)) for text in texts)
            wrong += [f'{name}: {x}' for x in false_defaults(obj)]
        assert not wrong, '\n'.join(wrong)
        assert stated  # the reader did find them
