# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import functools
import hashlib
import http.server
import threading

import formats
import pytest
import torch
from safetensors.torch import save_file

from mmdensecl import load_backbone
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
        formats.FORMATS.values(),
        ids=formats.FORMATS,
    )
    def test_is_recognised(self, tiny, save, write, source, prefix, left_out):
        path = save(write(tiny))
        found = read_backbone(path)
        assert_same(found.state_dict, tiny)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found.sha256 == sha256
        assert (found.source, found.prefix) == (source, prefix)
        assert found.arch == TINY
        if left_out is not None:
            assert found.left_out == tuple(left_out.split())

    def test_our_own_model(self, build_tiny, save):
        """Not the format as written down here, but as it is today."""
        model = build_tiny()
        for x in model.encoder_k.state_dict().values():
            x.fill_(9)
        found = read_backbone(save(dict(state_dict=model.state_dict())))
        assert_same(found.state_dict, model.backbone.state_dict())
        assert found.source == 'mmdensecl training checkpoint'

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
        assert found.source.startswith('momentum copy (key encoder) under')

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

    @pytest.mark.parametrize(
        'write, prefix, words',
        [
            (formats.mmdet, 'encoder_q.', 'no tensors under.*backbone'),
            (formats.authors_training, 'encoder_q.', '"encoder_q.0."'),
        ],
    )
    def test_nothing_there(self, tiny, save, write, prefix, words):
        with pytest.raises(NoBackboneError, match=words):
            read_backbone(save(write(tiny)), prefix)

    def test_two_containers(self, tiny, save):
        path = save(
            dict(model=tiny, state_dict={k: v + 1 for k, v in tiny.items()})
        )
        with pytest.raises(NoBackboneError, match='two candidates'):
            read_backbone(path)
        assert_same(read_backbone(path, 'model').state_dict, tiny)


class TestRefusals:
    @pytest.mark.parametrize(
        'content, words',
        [
            ({}, 'no tensors at all'),
            (dict(state_dict=dict(a=1)), 'no tensors at all'),
            ([1], 'is no checkpoint'),
            (torch.ones(2), 'is no checkpoint'),
            (
                {**formats.neck('neck.mlp'), 'queue.keys': torch.ones(1)},
                'only neck, queue',
            ),
        ],
    )
    def test_no_backbone(self, save, content, words):
        with pytest.raises(ValueError, match=words):
            read_backbone(save(content))

    @pytest.mark.parametrize(
        'change, words',
        [
            (lambda x: x.bool(), 'no floating-point'),
            (lambda x: x.to(torch.int8), 'no floating-point'),
            (lambda x: x.to(torch.complex64), 'no floating-point'),
            (lambda x: x.to(torch.float8_e5m2), '16 bits or more'),
            (lambda x: 'text', 'no tensors'),
            (lambda x: None, 'no tensors'),
            (lambda x: x.to_sparse(), 'sparse, quantised or without'),
            (lambda x: x.to('meta'), 'sparse, quantised or without'),
            (
                lambda x: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
                'sparse, quantised or without',
            ),
            (lambda x: x / 0, 'NaN or infinity'),
            (lambda x: x * float('nan'), 'NaN or infinity'),
        ],
    )
    @pytest.mark.parametrize('place', ['', 'module.backbone.'])
    def test_values(self, tiny, save, change, words, place):
        """Whatever stands in place of a weight is named; elsewhere not."""
        state = formats.under(place, tiny)
        bad = change(tiny['bn1.weight'])
        read_backbone(save(dict(state_dict={**state, 'fc.weight': bad})))
        state[f'{place}bn1.weight'] = bad
        with pytest.raises(ValueError, match=f'{words}.*bn1.weight'):
            read_backbone(save(dict(state_dict=state)))

    def test_zeros(self, tiny, save):
        """As zero_init_residual leaves the last norm of each block."""
        for name, allowed in (('bn2.weight', True), ('conv2.weight', False)):
            path = save(
                {k: 0 * v if name in k else v for k, v in tiny.items()}
            )
            if allowed:
                read_backbone(path)
                continue
            with pytest.raises(ValueError, match='8 of .*hold only zeros'):
                read_backbone(path)

    @pytest.mark.parametrize(
        'name, content, words',
        [
            ('page.pth', '<html>not found</html>', 'not a PyTorch checkpoint'),
            ('detectron2.pkl', '', 'could run code.*torch.save'),
            ('none.pth', None, 'does not exist'),
        ],
    )
    def test_files(self, tmp_path, name, content, words):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            read_backbone(tmp_path / name)

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


@pytest.fixture(scope='module')
def hrnet():
    return build_resnet('HRNet', arch='w18').state_dict()


@pytest.mark.parametrize(
    'write', [formats.mmdensecl, formats.mmseg, formats.authors_released]
)
def test_hrnet(hrnet, save, tmp_path, write):
    """It begins as a ResNet does, and is none: read, published, built."""
    found = read_backbone(save(write(hrnet)))
    assert_same(found.state_dict, hrnet)
    assert found.arch == 'HRNet-w18'
    with pytest.raises(ValueError, match='no tensor of a plain ResNet'):
        encode_backbone(found, 'torchvision')
    for to in ('openmmlab', 'safetensors'):
        path = tmp_path / f'b{SUFFIXES[to]}'
        path.write_bytes(encode_backbone(found, to))
        assert_same(read_backbone(path).state_dict, hrnet)
    backbone = load_backbone(path)
    assert backbone.cfg == dict(type='HRNet', arch='w18')
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 144, 2, 2)


@pytest.mark.parametrize('kind, settings, expected', [
    ('ResNet', dict(depth=34), 'ResNet-34'),
    ('ResNetV1c', dict(depth=50), 'ResNetV1c-50'),
    ('ResNetV1d', dict(depth=18), 'ResNetV1d-18'),
    ('ResNeXt', dict(depth=50, groups=32, width_per_group=4),
     'ResNet-50 with 128 channels in layer1 in 32 groups'),
    ('SwinTransformer', dict(arch='tiny'), None),
    ('Res2Net', dict(depth=50), None),
])  # fmt: skip
def test_architecture(kind, settings, expected):
    state = build_resnet(kind, **settings).state_dict()
    assert describe_architecture(state) == expected
    if kind == 'ResNet':
        cut = {k: v for k, v in state.items() if 'layer4' not in k}
        assert describe_architecture(cut) == f'{expected} without layer4'
        cut = {k: v for k, v in state.items() if 'layer1.1.' not in k}
        assert 'ResNet of 2-' in describe_architecture(cut)
