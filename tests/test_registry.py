# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a config may name."""

import importlib.util

import pytest
from forks import run_script

from mmdensecl import registry

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

# Run where nothing of ours is imported; only mmengine turns names into types.
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
        (tmp_path / 'build.py').write_text(script)
        done = run_script(tmp_path / 'build.py', cwd=tmp_path)
        count = sum(map(len, types.values()))
        assert done.stdout.strip().endswith(f'built {count}'), done.stdout

    def test_types_are_unknown_without_the_prefix(self):
        """Nothing leaks into the root registry."""
        from mmengine.registry import MODELS

        registered()
        assert MODELS.get('DenseCLNeck') is None
        assert MODELS.get('mmdensecl.DenseCLNeck') is not None
