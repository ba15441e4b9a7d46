# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a config may name, and what docstrings say of defaults."""
import ast
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

import pytest

import mmdensecl
from mmdensecl import registry

ROOT = Path(mmdensecl.__file__).parents[1]
HOSTS = ('mmpretrain', 'mmdet', 'mmseg')

# Arguments of those types that cannot do without.
ARGUMENTS = dict(
    MoCoV2=dict(
        backbone=dict(type='mmpretrain.ResNet', depth=18),
        neck=dict(
            type='mmpretrain.MoCoV2Neck',
            in_channels=512,
            hid_channels=8,
            out_channels=4),
        queue_len=8,
        feat_dim=4),
    DenseCL=dict(
        backbone=dict(type='mmpretrain.ResNet', depth=18),
        neck=dict(
            type='mmdensecl.DenseCLNeck',
            in_channels=512,
            hid_channels=8,
            out_channels=4),
        queue_len=8,
        feat_dim=4),
    FreezeHook=dict(parts=['backbone']),
    KNNHook=dict(data_root='labelled'),
    DSC=dict(
        backbone=dict(type='mmpretrain.ResNet', depth=18),
        neck=dict(
            type='mmdensecl.DenseCLNeck',
            in_channels=512,
            hid_channels=8,
            out_channels=4),
        queue_len=8,
        feat_dim=4,
        category=dict(type='mmdensecl.KMeansCategoryHead')),
    DenseCLNeck=dict(in_channels=8, hid_channels=8, out_channels=4),
    PretrainedBackbone=dict(checkpoint='epoch_200.pth'),
    # Nothing is read before the first picture.
    UnlabeledFolder=dict(data_root='.', lazy_init=True),
    UnlabeledList=dict(ann_file='list.txt', lazy_init=True),
    UnlabeledShards=dict(data_root='.', lazy_init=True),
)

# Run in a fresh interpreter; only mmengine turns names into types.
BUILD = '''
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
'''


def registered() -> Dict[str, List[dict]]:
    """A config of each registered type, by registry."""
    types = {}
    for name in registry.__all__:
        own = getattr(registry, name)
        own.import_from_location()
        types[name] = [
            dict(type=f'mmdensecl.{key}', **ARGUMENTS.get(key, {}))
            for key, kind in sorted(own.module_dict.items())
            # By custom_imports alone: it needs mmdet. And no older names.
            if kind.__module__ != 'mmdensecl.transfer.mmdet'
            and key == kind.__name__
        ]
    return types


class TestRegistry:

    def test_locations_register_something(self):
        for name, configs in registered().items():
            assert configs, f'{name} of mmdensecl.registry is empty'
        names = {x['type'] for x in registered()['MODELS']}
        assert {'mmdensecl.DenseCL', 'mmdensecl.MoCoV2'} <= names

    def test_arguments_are_of_registered_types(self):
        names = {
            x['type']
            for configs in registered().values()
            for x in configs
        }
        assert {f'mmdensecl.{name}' for name in ARGUMENTS} <= names

    @pytest.mark.parametrize('host', HOSTS)
    def test_builds_from_a_host(self, host, tmp_path):
        """By prefix alone, in the host's default scope."""
        if importlib.util.find_spec(host) is None:
            pytest.skip(f'{host} is not installed')
        types = registered()
        script = BUILD.format(host=host, types=types)
        path = os.pathsep.join(
            filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        process = subprocess.run([sys.executable, '-c', script],
                                 cwd=tmp_path,
                                 env={
                                     **os.environ, 'PYTHONPATH': path
                                 },
                                 capture_output=True,
                                 text=True,
                                 timeout=120)
        assert process.returncode == 0, process.stderr[-3000:]
        count = sum(map(len, types.values()))
        assert process.stdout.strip().endswith(f'built {count}')

    def test_types_are_unknown_without_the_prefix(self):
        """Nothing leaks into the root registry."""
        from mmengine.registry import MODELS
        registered()
        assert MODELS.get('DenseCLNeck') is None
        assert MODELS.get('mmdensecl.DenseCLNeck') is not None


VALUE_NODES = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Call,
               ast.keyword, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop,
               ast.expr_context)
ENTRY = re.compile(r'^ {4}(\*{0,2}\w+)(?: \((.*?)\))?:(.*)$')


def documented_arguments(docstring: str) -> Dict[str, str]:
    """Text of each argument in the Args section, in one line."""
    arguments, current, inside = {}, None, False
    for line in inspect.cleandoc(docstring or '').splitlines():
        if not line.startswith(' ') and line:
            inside, current = line == 'Args:', None
        elif inside and ENTRY.match(line):
            current, _, text = ENTRY.match(line).groups()
            arguments[current] = text.strip()
        elif inside and current:
            arguments[current] = f'{arguments[current]} {line.strip()}'
    return arguments


def stated_default(text: str) -> Tuple[bool, str]:
    """Whether "Defaults to" is there, and the expression that follows.

    The expression is '' where prose follows, such as "mmpretrain's own".
    """
    found = re.search(r'\b[Dd]efaults? to\s+(.*)$', text)
    if not found:
        return False, ''
    rest = found[1]
    literal = re.match(r'``(.+?)``', rest)
    if literal:
        return True, literal[1]
    # The longest beginning that is a value and ends where a word does.
    for end in range(len(rest), 0, -1):
        if re.match(r'[.,;:]?(\s|$)', rest[end:]) and is_value(rest[:end]):
            return True, rest[:end]
    return True, ''


def is_value(text: str) -> bool:
    """Whether it is a literal, arithmetic of literals, or a dict(...)."""
    if text[-1] in '.,;: ':
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode='eval').body))
    except SyntaxError:
        return False
    return all(
        isinstance(node, VALUE_NODES) or (
            isinstance(node, ast.Name) and node.id == 'dict')
        for node in nodes)


def false_defaults(obj: Callable) -> List[str]:
    """Where the docstring and the signature of a callable disagree."""
    arguments = documented_arguments(obj.__doc__)
    if not arguments:
        return []
    own = inspect.signature(obj).parameters
    parameters = dict(own)
    if any(p.kind is p.VAR_KEYWORD for p in own.values()):
        # What **kwargs passes on to the parents.
        for base in getattr(obj, '__mro__', ())[1:]:
            if base is not object:
                for name, p in inspect.signature(base).parameters.items():
                    parameters.setdefault(name, p)
    wrong = []
    for name, text in arguments.items():
        stated, expression = stated_default(text)
        if name.startswith('*'):
            continue
        if name not in parameters:
            wrong.append(f'{name} is no argument')
        elif stated and parameters[name].default is inspect.Parameter.empty:
            wrong.append(f'{name} has no default')
        elif expression:
            scope = getattr(inspect.getmodule(obj), '__dict__', {})
            value = eval(expression, dict(scope))
            default = parameters[name].default
            if value != default or isinstance(value, bool) != isinstance(
                    default, bool):
                wrong.append(f'{name} defaults to {default!r}, not to '
                             f'{expression}')
    return wrong


def public_callables() -> Iterator[Tuple[str, Callable]]:
    """Classes, functions and methods of the package, by full name."""
    for info in pkgutil.walk_packages(mmdensecl.__path__, 'mmdensecl.'):
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name.split('.')[0] == 'mmdensecl':
                raise
            continue  # what belongs to a host that is not installed
        for name, obj in vars(module).items():
            if name.startswith('_') or getattr(obj, '__module__',
                                               None) != info.name:
                continue
            if inspect.isclass(obj):
                yield f'{info.name}.{name}', obj
                for method_name, method in vars(obj).items():
                    method = getattr(method, '__func__', method)
                    if not method_name.startswith('_') and inspect.isfunction(
                            method):
                        yield f'{info.name}.{name}.{method_name}', method
            elif inspect.isfunction(obj):
                yield f'{info.name}.{name}', obj


def honest(a, b: int = 3, c: str = 'x', d=(0.2, 1.0), e=None, f=True, g=0.5):
    """Something.

    Args:
        a (int): Needed.
        b (int): Of several lines, the last of which says more. Defaults
            to 3.
        c (str): Defaults to 'x', which is short.
        d (tuple): Defaults to (0.2, 1.0).
        e (dict, optional): Defaults to whatever is best.
        f (bool): Defaults to ``True``.
        g (float): Defaults to 0.5; half.

    Returns:
        b (int): Defaults to 99.
    """


def lying(a=1, b=0.2, c=None, d=(1, 2), e=True, *, f):
    """Something.

    Args:
        a (int): Defaults to 2.
        b (float): Text before it, and a
            line break. Defaults to
            0.25, which is a quarter.
        c (str): Defaults to ``'none'``.
        d (tuple): Defaults to (1, 3).
        e (bool): Defaults to 1.
        f (int): Defaults to None.
        g (int): It does not exist.
    """


class Parent:

    def __init__(self, size: int = 4, **kwargs) -> None:
        pass


class Child(Parent):
    """A child.

    Args:
        name (str): Defaults to 'a'.
        size (int): Passed on. Defaults to 5.
        **kwargs: Arguments of :class:`Parent`. Defaults to nothing.
    """

    def __init__(self, name: str = 'a', **kwargs) -> None:
        super().__init__(**kwargs)


class TestStatedDefaults:

    def test_reader_finds_lies(self):
        assert false_defaults(honest) == []
        assert false_defaults(lying) == [
            'a defaults to 1, not to 2', 'b defaults to 0.2, not to 0.25',
            "c defaults to None, not to 'none'",
            'd defaults to (1, 2), not to (1, 3)',
            'e defaults to True, not to 1', 'f has no default',
            'g is no argument'
        ]
        assert false_defaults(Child) == ['size defaults to 4, not to 5']

    @pytest.mark.parametrize('text, expected', [
        ('No word of it.', (False, '')),
        ('Defaults to 0.001.', (True, '0.001')),
        ('Defaults to -1.', (True, '-1')),
        ('Defaults to None; the head has none.', (True, 'None')),
        ('Defaults to (3 / 4, 4 / 3).', (True, '(3 / 4, 4 / 3)')),
        ("Defaults to ''.", (True, "''")),
        ("Defaults to ``dict(type='a')``.", (True, "dict(type='a')")),
        ("Defaults to the authors': 3 layers.", (True, '')),
        ('Defaults to :meth:`draw_seed`.', (True, '')),
    ])
    def test_reader(self, text, expected):
        assert stated_default(text) == expected

    def test_equal_signatures(self):
        wrong, stated = [], 0
        for name, obj in public_callables():
            stated += sum(
                stated_default(text)[0]
                for text in documented_arguments(obj.__doc__).values())
            wrong += [f'{name}: {x}' for x in false_defaults(obj)]
        assert not wrong, '\n'.join(wrong)
        assert stated > 40  # the reader did find them
