# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The same backbone for other projects: names back and forth, features."""

import hashlib
import json
import pickle
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdensecl import load_backbone
from mmdensecl.checkpoint import load_from_local
from mmdensecl.registry import MODELS
from mmdensecl.transfer import read_backbone
from mmdensecl.transfer.convert import (
    SUFFIXES,
    encode_backbone,
    missing_tensors,
    to_detectron2_name,
)

TOOL = Path(__file__).parents[2] / 'tools/model_converters/publish_backbone.py'


@pytest.fixture(scope='module')
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 64, 64, generator=generator)


@pytest.fixture(scope='module')
def features(resnet18, images):
    return backbone_features(resnet18, images)


@pytest.fixture(scope='module')
def written(file18, tmp_path_factory):
    """Function that gives the path of a backbone written for a project."""
    folder, backbone = tmp_path_factory.mktemp('out'), read_backbone(file18)

    def write(to):
        path = folder / f'{to}{SUFFIXES[to]}'
        if not path.exists():
            path.write_bytes(encode_backbone(backbone, to))
        return path

    return write


@torch.no_grad()
def backbone_features(model, images):
    """What comes out of the last stage of a torchvision ResNet."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
    return x


def mmpretrain_features(state, images):
    model = MODELS.build(dict(type='mmpretrain.ResNet', depth=18))
    model.load_state_dict(state)
    model.eval()
    with torch.no_grad():
        return model(images)[-1]


class TestFeatures:
    """To the last bit, in other projects and back here."""

    @pytest.mark.parametrize('to', [x for x in SUFFIXES if x != 'detectron2'])
    def test_are_the_same(self, to, written, images, features, backbone18):
        state = read_backbone(written(to)).state_dict
        assert state.keys() == backbone18.keys()
        for name, x in backbone18.items():
            assert torch.equal(state[name], x)
        if to == 'safetensors':
            state = load_file(written(to))
        else:
            state = load_from_local(written(to))
        if to == 'openmmlab':
            assert state['meta']['mmdensecl']['arch'] == 'ResNet-18'
            state = state['state_dict']
        assert torch.equal(mmpretrain_features(state, images), features)
        for build in (torchvision.models.resnet18, timm.models.resnet18):
            model = build()
            keys = model.load_state_dict(state, strict=False)
            assert keys.missing_keys == ['fc.weight', 'fc.bias']
            assert not keys.unexpected_keys
        with torch.no_grad():
            assert torch.equal(model.eval().forward_features(images), features)

    def test_detectron2(self, written, images, features, backbone18):
        with open(written('detectron2'), 'rb') as file:
            content = pickle.load(file)
        assert content['matching_heuristics'] is True
        assert isinstance(content['__author__'], str)
        assert all(
            isinstance(x, np.ndarray) for x in content['model'].values()
        )
        state = {
            name: torch.from_numpy(content['model'][to_detectron2_name(name)])
            for name in backbone18
        }
        assert len(state) == len(content['model'])
        assert torch.equal(mmpretrain_features(state, images), features)


class TestDetectron2Names:
    def test_whole_resnet(self, backbone50):
        """One to one, and as a chain of replacements has it."""
        names = [to_detectron2_name(x) for x in backbone50]
        assert len(set(names)) == len(names) == 318
        for plain, theirs in zip(backbone50, names, strict=False):
            chain = plain if 'layer' in plain else f'stem.{plain}'
            for number in (4, 3, 2, 1):
                chain = chain.replace(f'layer{number}', f'res{number + 1}')
            chain = re.sub(r'bn(\d)', r'conv\1.norm', chain)
            chain = chain.replace('downsample.0', 'shortcut')
            chain = chain.replace('downsample.1', 'shortcut.norm')
            assert theirs == chain


RUN = dict(
    method='DenseCL',
    config='densecl_r18',
    epochs=11,
    iters=4015,
    seed=1,
    dataset_size=23397,
    view_size=64,
    mean=[1.0, 2.0, 3.0],
    std=[4.0, 5.0, 6.0],
    position_r2=90.0,
)


@pytest.fixture(scope='module')
def trained(resnet18, tmp_path_factory):
    """As a run of ours saves it."""
    cfg = Config(
        dict(
            model=dict(
                type='mmdensecl.DenseCL',
                data_preprocessor=dict(mean=RUN['mean'], std=RUN['std']),
                backbone=dict(
                    type='ResNet',
                    depth=18,
                    strides=(1, 2, 2, 1),
                    init_cfg=dict(checkpoint='/home/me/secret.pth'),
                ),
            ),
            train_dataloader=dict(
                dataset=dict(
                    pipeline=[
                        dict(type='mmdensecl.DecodeRGB'),
                        dict(type='mmdensecl.TwoViews', size=64),
                    ]
                )
            ),
        )
    )
    path = tmp_path_factory.mktemp('run') / 'epoch_11.pth'
    torch.save(
        dict(
            meta=dict(
                cfg=cfg.pretty_text,
                experiment_name='densecl_r18_20260102_030405',
                epoch=11,
                iter=4015,
                seed=1,
            ),
            message_hub=dict(
                runtime_info=dict(loader_layout=dict(images=23397)),
                log_scalars={
                    'train/position_r2': HistoryBuffer([90.0] * 20, [1] * 20)
                },
            ),
            state_dict={
                f'backbone.{k}': v for k, v in resnet18.state_dict().items()
            },
        ),
        path,
    )
    return path


@pytest.mark.parametrize('to', ['openmmlab', 'safetensors'])
def test_a_published_file_says_what_it_is(trained, tmp_path, to):
    path = tmp_path / f'b{SUFFIXES[to]}'
    data = encode_backbone(read_backbone(trained), to)
    path.write_bytes(data)
    assert data == encode_backbone(read_backbone(trained), to)
    assert b'secret' not in data
    if to == 'safetensors':
        with safe_open(path, 'pt') as file:
            header = file.metadata()
        assert header['format'] == 'pt'
        entry = json.loads(header['mmdensecl'])
    else:
        entry = load_from_local(path)['meta']['mmdensecl']
    run = entry['run']
    assert {k: run[k] for k in RUN} == RUN
    assert {*run['backbone']} == {'strides', 'dilations'}
    assert len(entry['sha256']) == 64
    assert entry['arch'] == 'ResNet-18'
    assert entry['source'] == 'OpenMMLab model'
    assert entry['versions']['torch'] == torch.__version__
    # Published again, it still says so, and of the first file.
    assert read_backbone(path).run == run
    one, two = load_backbone(trained), load_backbone(path)
    assert two.cfg['strides'] == (1, 2, 2, 1)
    images = torch.rand(1, 3, 64, 64) * 255
    assert torch.equal(one(images), two(images))


class TestWhole:
    @pytest.mark.parametrize('kind', ['ResNetV1c', 'MobileNetV2'])
    def test_other_kinds(self, kind):
        """Of a ResNet of any stem a stage is missed, of others nothing."""
        settings = dict(depth=18) if 'ResNet' in kind else {}
        model = MODELS.build(dict(settings, type=f'mmpretrain.{kind}'))
        names = [*model.state_dict()]
        assert missing_tensors(names) == []
        names = [x for x in names if not x.startswith('layer4.')]
        assert bool(missing_tensors(names)) == ('ResNet' in kind)

    @pytest.mark.parametrize(
        'part, count',
        [
            ('layer4.', 50),
            ('conv1.weight', 17),
            ('layer2.1.conv2.weight', 1),
            ('running_mean', 53),
        ],
    )
    def test_holes(self, backbone50, part, count):
        names = [x for x in backbone50 if part not in x]
        missing = missing_tensors(names)
        assert set(missing) == {
            x
            for x in backbone50
            if part in x and not x.endswith('num_batches_tracked')
        }
        assert len(missing) == count


@pytest.mark.parametrize(
    'entry',
    [
        3,
        '[' * 9999,
        dict(run=3),
        dict(run=dict(mean='x', backbone=dict(type='os.system', depth=99))),
    ],
)
def test_a_description_is_not_trusted(backbone18, tmp_path, entry):
    """Neither a record nor a header."""
    meta = dict(mmdensecl=entry)
    torch.save(dict(state_dict=backbone18, meta=meta), tmp_path / 'a.pth')
    text = entry if isinstance(entry, str) else json.dumps(entry)
    save_file(backbone18, tmp_path / 'a.safetensors', dict(mmdensecl=text))
    for path in tmp_path.iterdir():
        assert load_backbone(path).cfg['depth'] == 18


@pytest.fixture
def publish(monkeypatch, capsys):
    """Function that runs the tool and gives its output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
        runpy.run_path(str(TOOL), run_name='__main__')
        return capsys.readouterr()

    return run


def test_tool_writes_no_half_backbone(publish, backbone18, tmp_path):
    state = {k: v for k, v in backbone18.items() if k != 'bn1.running_mean'}
    torch.save(state, tmp_path / 'half.pth')
    for to in SUFFIXES:
        # One line and no traceback.
        with pytest.raises(
            SystemExit,
            match='^ValueError: .*1 tensors are missing: bn1.running',
        ):
            publish(tmp_path / 'half.pth', tmp_path / 'new/r18', '--to', to)
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('to', SUFFIXES)
def test_tool_tells_what_the_file_cannot(publish, trained, tmp_path, to):
    """The name loses the suffix of any format."""
    told = publish(trained, tmp_path / 'r18.pth', '--to', to).err
    expected = f"strides=(1, 2, 2, 1), and {to}'s ResNet has (1, 2, 2, 2)"
    assert (expected in told) == (to in ('torchvision', 'detectron2'))
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(rf'r18-\w{{8}}{SUFFIXES[to]}', path.name)


def test_tool(publish, file18, written, tmp_path):
    """The name holds the hash; nothing is overwritten."""
    arguments = file18, tmp_path / 'new/r18.pth', '--to', 'torchvision'
    text = publish(*arguments).out
    assert 'ResNet-18' in text and 'left out: fc' in text
    path = Path(text.splitlines()[-1])
    data = path.read_bytes()
    assert data == written('torchvision').read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    assert path == tmp_path / f'new/r18-{sha[:8]}.pth'
    assert publish(*arguments) == (text, '')
    assert list(path.parent.iterdir()) == [path]
    path.write_bytes(b'mine')
    with pytest.raises(SystemExit, match='holds something else'):
        publish(*arguments)
    assert path.read_bytes() == b'mine'
