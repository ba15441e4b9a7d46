# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import functools
import hashlib
import http.server
import os
import threading

import formats
import pytest
import torch
import torchvision
from mmengine.registry import DefaultScope
from safetensors.torch import save_file

from mmdensecl import load_backbone
from mmdensecl.checkpoint import UnsafeCheckpointError
from mmdensecl.registry import MODELS
from mmdensecl.transfer import (
    NoBackboneError,
    describe_architecture,
    read_backbone,
)
from mmdensecl.transfer.convert import SUFFIXES, encode_backbone

TINY = 'ResNet-18 with 4 channels in layer1'


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


def build_resnet(kind='ResNet', **kwargs):
    return MODELS.build(dict(type=f'mmpretrain.{kind}', **kwargs))


@pytest.fixture(scope='module')
def tiny():
    """A ResNet-18 of 4 channels."""
    return build_resnet(
        depth=18, stem_channels=4, base_channels=4
    ).state_dict()


@pytest.fixture
def save(tmp_path):

    def save(content, name='a.pth'):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


class TestFormats:
    @pytest.mark.parametrize(
        'write, source, prefix, left_out',
        formats.FORMATS,
        ids=[x[0].__name__ for x in formats.FORMATS],
    )
    def test_is_recognised(self, tiny, save, write, source, prefix, left_out):
        found = read_backbone(save(write(tiny)))
        assert_same(found.state_dict, tiny)
        assert (found.source, found.prefix) == (source, prefix)
        assert found.arch == TINY
        if left_out is not None:
            assert found.left_out == left_out

    def test_our_own_model(self, build_tiny, save):
        """Not the format as written down here, but as it is today."""
        model = build_tiny()
        for x in model.encoder_k.state_dict().values():
            x.fill_(9)
        found = read_backbone(save(dict(state_dict=model.state_dict())))
        assert_same(found.state_dict, model.backbone.state_dict())
        assert found.source == 'mmdensecl training checkpoint'

    def test_mmpretrain_own_model(self, save):
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = MODELS.build(
                dict(
                    type='mmpretrain.DenseCL',
                    queue_len=8,
                    feat_dim=4,
                    backbone=dict(
                        type='ResNet',
                        depth=18,
                        stem_channels=4,
                        base_channels=4,
                    ),
                    neck=dict(
                        type='DenseCLNeck',
                        in_channels=32,
                        hid_channels=8,
                        out_channels=4,
                    ),
                    head=dict(
                        type='ContrastiveHead',
                        loss=dict(type='CrossEntropyLoss'),
                    ),
                )
            )
        found = read_backbone(save(dict(state_dict=model.state_dict())))
        assert_same(found.state_dict, model.backbone.state_dict())
        assert found.source.startswith('mmselfsup or mmpretrain')

    @pytest.mark.parametrize('name', ['a.safetensors', 'a.bin'])
    def test_safetensors(self, tiny, tmp_path, name):
        save_file(formats.under('backbone.', tiny), tmp_path / name)
        found = read_backbone(str(tmp_path / name))
        assert_same(found.state_dict, tiny)

    @pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
    def test_http(self, tiny, save, tmp_path, monkeypatch, name):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
        if name == 'a.pth':
            save(formats.facebook_v2(tiny))
        else:
            save_file(formats.under('backbone.', tiny), tmp_path / name)
        handler = functools.partial(
            http.server.SimpleHTTPRequestHandler, directory=str(tmp_path)
        )
        with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), handler
        ) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            found = read_backbone(
                f'http://127.0.0.1:{server.server_port}/{name}'
            )
            server.shutdown()
        assert_same(found.state_dict, tiny)
        assert (
            found.sha256
            == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        )

    def test_sha256(self, tiny, save):
        path = save(tiny)
        assert (
            read_backbone(path).sha256
            == hashlib.sha256(path.read_bytes()).hexdigest()
        )

    def test_other_kind_of_backbone(self, save):
        state = {
            'patch_embed.weight': torch.rand(2),
            'norm3.bias': torch.ones(2),
        }
        found = read_backbone(
            save(dict(state_dict=formats.under('backbone.', state)))
        )
        assert_same(found.state_dict, state)
        assert found.arch is None and found.source == 'OpenMMLab model'


class TestPrefix:
    @pytest.mark.parametrize(
        'prefix',
        [
            'encoder_k.backbone.',
            'encoder_k.backbone',
            'state_dict.encoder_k.backbone.',
        ],
    )
    def test_key_encoder_on_request(self, tiny, save, prefix):
        found = read_backbone(save(formats.mmdensecl(tiny)), prefix)
        assert_same(
            found.state_dict, {k: v + formats.OTHER for k, v in tiny.items()}
        )

    def test_one_of_several(self, tiny, save):
        path = save(
            {
                **formats.under('left.', tiny),
                **formats.under('right.', tiny, 1),
            }
        )
        with pytest.raises(
            NoBackboneError, match='"left.", "right.".*prefix='
        ):
            read_backbone(path)
        found = read_backbone(path, 'right.')
        assert_same(found.state_dict, {k: v + 1 for k, v in tiny.items()})

    def test_two_containers(self, tiny, save):
        path = save(
            dict(model=tiny, state_dict={k: v + 1 for k, v in tiny.items()})
        )
        with pytest.raises(NoBackboneError, match='two candidates'):
            read_backbone(path)
        assert_same(read_backbone(path, 'model').state_dict, tiny)

    def test_c4_stays_whole(self, tiny, save):
        found = read_backbone(save(formats.mmdet_c4(tiny)), 'backbone')
        assert_same(found.state_dict, tiny)

    def test_nothing_there(self, tiny, save):
        with pytest.raises(
            NoBackboneError, match='no tensors under.*backbone'
        ):
            read_backbone(save(formats.mmdet(tiny)), 'encoder_q.')

    def test_not_deep_enough(self, tiny, save):
        with pytest.raises(NoBackboneError, match='"encoder_q.0."'):
            read_backbone(save(formats.authors_training(tiny)), 'encoder_q.')

    def test_another_kind(self, save):
        path = save({'trunk.blocks.0.weight': torch.ones(2)})
        found = read_backbone(path, 'trunk')
        assert list(found.state_dict) == ['blocks.0.weight']


class TestRefusals:
    def test_key_encoder_alone(self, tiny, save):
        path = save(formats.under('module.encoder_k.', tiny))
        with pytest.raises(NoBackboneError, match='prefix="encoder_k."'):
            read_backbone(path)

    @pytest.mark.parametrize(
        'place', ['momentum_encoder', 'momentum_backbone', 'target_encoder']
    )
    def test_other_copies(self, tiny, save, place):
        copy = formats.under(f'{place}.', tiny, formats.OTHER)
        with pytest.raises(NoBackboneError, match='is a momentum copy'):
            read_backbone(save(copy))
        path = save({**copy, **formats.under('base_encoder.', tiny)})
        assert_same(read_backbone(path).state_dict, tiny)

    def test_teacher_alone(self, tiny, save):
        """That of DINO is meant to be used."""
        path = save(dict(teacher=formats.under('backbone.', tiny)))
        assert_same(read_backbone(path).state_dict, tiny)

    def test_neck_only(self, save):
        with pytest.raises(NoBackboneError, match='only neck, queue'):
            read_backbone(
                save({**formats.neck('neck.mlp'), 'queue.keys': torch.ones(1)})
            )

    @pytest.mark.parametrize('content', [{}, dict(state_dict={}), dict(a=1)])
    def test_no_tensors(self, save, content):
        with pytest.raises(NoBackboneError, match='no tensors at all'):
            read_backbone(save(content))

    @pytest.mark.parametrize('content', [[1], torch.ones(2), 'text'])
    def test_no_dictionary(self, save, content):
        with pytest.raises(ValueError, match='is no checkpoint'):
            read_backbone(save(content))

    @pytest.mark.parametrize('value', [float('nan'), float('inf')])
    def test_not_finite(self, tiny, save, value):
        bad = tiny['layer3.0.conv1.weight'].clone()
        bad[0, 0, 0, 0] = value
        path = save({**tiny, 'layer3.0.conv1.weight': bad})
        with pytest.raises(ValueError, match='1 of .*: layer3.0.conv1.weight'):
            read_backbone(path)

    @pytest.mark.parametrize('name', ['conv1.weight', 'bn1.running_var'])
    def test_quantised(self, tiny, save, name):
        path = save({**tiny, name: tiny[name].to(torch.int8)})
        with pytest.raises(ValueError, match=f'no floating-point.*: {name}'):
            read_backbone(path)

    @pytest.mark.parametrize(
        'change, words',
        [
            (lambda x: x.bool(), 'no floating-point.*bn1.weight'),
            (lambda x: x.to(torch.complex64), 'no floating-point.*bn1.weight'),
            (lambda x: 'text', 'no tensors: .*bn1.weight'),
            (lambda x: None, '1 of .* no tensors: bn1.weight'),
            (
                lambda x: x.to_sparse(),
                'sparse, quantised or without.*bn1.weight',
            ),
            (
                lambda x: x.to('meta'),
                'sparse, quantised or without.*bn1.weight',
            ),
            (
                lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
                'sparse, quantised or without.*bn1.weight',
            ),
        ],
    )
    @pytest.mark.parametrize('place', ['', 'module.backbone.'])
    def test_types(self, tiny, save, change, words, place):
        """Whatever stands in place of a weight is named."""
        bad = change(tiny['bn1.weight'])
        path = save(
            dict(
                state_dict=dict(
                    formats.under(place, tiny), **{f'{place}bn1.weight': bad}
                )
            )
        )
        with pytest.raises(ValueError, match=words):
            read_backbone(path)

    def test_texts_elsewhere(self, tiny, save):
        read_backbone(
            save(
                dict(bias='none', state_dict=formats.under('backbone.', tiny))
                | {'fc.weight': 'none'}
            )
        )

    def test_floats_of_a_byte(self, save):
        """torch cannot tell whether they are finite."""
        with pytest.raises(ValueError, match='16 bits or more'):
            read_backbone(
                save(
                    {
                        'backbone.conv1.weight': torch.ones(4).to(
                            torch.float8_e5m2
                        )
                    }
                )
            )

    def test_a_dictionary_under_two_names(self, save):
        inner = dict(weight=torch.ones(1))
        inner['self'] = inner
        with pytest.raises(NoBackboneError, match='only left'):
            read_backbone(save(dict(left=inner, right=inner)))

    def test_zeros(self, tiny, save):
        zeros = {
            k: torch.zeros_like(v) if k.endswith('conv2.weight') else v
            for k, v in tiny.items()
        }
        with pytest.raises(ValueError, match='8 of .*hold only zeros'):
            read_backbone(save(zeros))
        # As zero_init_residual leaves the last norm of each block.
        norms = {
            k: torch.zeros_like(v) if k.endswith('bn2.weight') else v
            for k, v in tiny.items()
        }
        read_backbone(save(norms))

    def test_integers_elsewhere(self, save):
        index = {'relative_position_index': torch.arange(4)}
        path = save(formats.under('backbone.', index))
        assert_same(read_backbone(path).state_dict, index)

    def test_not_finite_elsewhere(self, tiny, save):
        read_backbone(save({**tiny, 'fc.weight': torch.tensor(float('nan'))}))

    @pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
    @pytest.mark.parametrize('share', [0, 0.001, 0.5, 0.99])
    def test_truncated(self, tiny, tmp_path, suffix, share):
        path = tmp_path / f'cut.{suffix}'
        if suffix == 'pth':
            torch.save(tiny, path)
        else:
            save_file(tiny, path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match='cut'):
            read_backbone(path)

    def test_text(self, tmp_path):
        path = tmp_path / 'page.pth'
        path.write_text('<html>not found</html>')
        with pytest.raises(ValueError, match='not a PyTorch checkpoint'):
            read_backbone(path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='does not exist'):
            read_backbone(tmp_path / 'none.pth')

    def test_code(self, save, tmp_path):

        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / 'canary'),)

        with pytest.raises(UnsafeCheckpointError):
            read_backbone(save(dict(state_dict=Attack())))
        assert not (tmp_path / 'canary').exists()

    def test_pickle(self, tmp_path):
        with pytest.raises(ValueError, match='could run code.*torch.save'):
            read_backbone(tmp_path / 'detectron2.pkl')


@pytest.fixture(scope='module')
def hrnet():
    return build_resnet('HRNet', arch='w18').state_dict()


class TestHRNet:
    """It begins as a ResNet does, and is none."""

    @pytest.mark.parametrize(
        'write',
        [
            formats.mmdensecl,
            formats.mmselfsup,
            formats.mmseg,
            formats.authors_released,
        ],
    )
    def test_is_read_whole(self, hrnet, save, write):
        found = read_backbone(save(write(hrnet)))
        assert_same(found.state_dict, hrnet)
        assert found.arch == 'HRNet-w18'

    def test_is_built(self, hrnet, save):
        backbone = load_backbone(save(formats.mmdensecl(hrnet)))
        assert_same(backbone.backbone.state_dict(), hrnet)
        assert backbone.cfg == dict(type='HRNet', arch='w18')
        assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 144, 2, 2)

    def test_is_published(self, hrnet, save, tmp_path):
        found = read_backbone(save(formats.mmdensecl(hrnet)))
        for to in ('openmmlab', 'safetensors'):
            path = tmp_path / f'b{SUFFIXES[to]}'
            path.write_bytes(encode_backbone(found, to))
            assert_same(read_backbone(path).state_dict, hrnet)
        with pytest.raises(ValueError, match='no tensor of a plain ResNet'):
            encode_backbone(found, 'torchvision')


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_depth(depth):
    with torch.device('meta'):
        model = getattr(torchvision.models, f'resnet{depth}')()
    assert describe_architecture(model.state_dict()) == f'ResNet-{depth}'


@pytest.mark.parametrize(
    'config, expected',
    [
        (dict(kind='ResNetV1c', depth=50), 'ResNetV1c-50'),
        (dict(kind='ResNetV1d', depth=18), 'ResNetV1d-18'),
        (
            dict(kind='ResNeXt', depth=50, groups=32, width_per_group=4),
            'ResNet-50 with 128 channels in layer1 in 32 groups',
        ),
        (
            dict(
                depth=50,
                num_stages=3,
                strides=(1, 2, 2),
                dilations=(1, 1, 1),
                out_indices=(2,),
            ),
            'ResNet-50 without layer4',
        ),
        (
            dict(depth=18, base_channels=8),
            'ResNet-18 with 8 channels in layer1',
        ),
        (dict(kind='SwinTransformer', arch='tiny'), None),
        (dict(kind='Res2Net', depth=50), None),
    ],
)
def test_architecture(config, expected):
    state = build_resnet(**config).state_dict()
    assert describe_architecture(state) == expected


def test_architecture_of_another_depth(tiny):
    state = {k: v for k, v in tiny.items() if not k.startswith('layer3.1.')}
    assert describe_architecture(state) == 'ResNet of 2-2-1-2 basic blocks'
