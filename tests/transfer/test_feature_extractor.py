# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import hashlib
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torchvision.models import resnet18

import mmdensecl
from mmdensecl.registry import MODELS
from mmdensecl.transfer import pretrained_backbone

STRIDES = (1, 2, 2, 1)


def save(path, state, backbone=None, text=None):
    """As mmengine saves a run, with its config as text."""
    cfg = Config(
        dict(
            model=dict(
                type='mmdensecl.DenseCL',
                clip=float('inf'),  # no literal in the text: lost alone
                data_preprocessor=dict(
                    mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0]
                ),
                backbone=backbone,
            )
        )
    )
    torch.save(
        dict(
            meta=dict(cfg=cfg.pretty_text if text is None else text),
            state_dict={f'backbone.{k}': v for k, v in state.items()},
        ),
        path,
    )
    return path


@pytest.fixture(scope='module')
def state():
    torch.manual_seed(0)
    model = resnet18()
    return {
        k: v for k, v in model.state_dict().items() if not k.startswith('fc.')
    }


@pytest.fixture
def plain(state, tmp_path):
    path = tmp_path / 'plain.pth'
    torch.save(state, path)
    return path


class TestLoadBackbone:
    def test_is_what_the_file_holds(self, plain, state):
        backbone = mmdensecl.load_backbone(plain)
        torch.nn.Sequential(backbone).train()  # but it is frozen
        assert not any(x.training for x in backbone.modules())
        assert not any(x.requires_grad for x in backbone.parameters())
        assert backbone.cfg['type'] == 'ResNet'
        assert backbone.cfg['strides'] == (1, 2, 2, 2)
        own = backbone.backbone.state_dict()
        assert own.keys() == state.keys()
        assert all(torch.equal(own[k], state[k]) for k in own)
        # The same map as the network that the tensors are of, normalised.
        images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
        reference = resnet18()
        reference.fc = reference.avgpool = torch.nn.Identity()
        reference.load_state_dict(state)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        expected = reference.eval()((images / 255 - mean) / std)
        given = backbone(images)
        assert given.shape == (2, 512, 2, 3)
        torch.testing.assert_close(
            given.flatten(1), expected, rtol=1e-3, atol=1e-4
        )

    def test_a_file_is_read_once_and_hashed_once(self, plain, monkeypatch):
        read, hashed = [], []
        load, sha256 = torch.load, hashlib.sha256
        monkeypatch.setattr(
            torch, 'load', lambda *a, **k: read.append(a) or load(*a, **k)
        )
        monkeypatch.setattr(
            hashlib, 'sha256', lambda *a: hashed.append(a) or sha256(*a)
        )
        backbone = mmdensecl.load_backbone(plain)
        assert len(read) == len(hashed) == 1
        assert (
            backbone.origin['sha256'] == sha256(plain.read_bytes()).hexdigest()
        )
        assert backbone.origin['checkpoint'] == str(plain)

    def test_strides_of_the_saved_config(self, state, tmp_path):
        path = save(
            tmp_path / 'run.pth',
            state,
            dict(type='ResNet', depth=18, strides=STRIDES),
        )
        backbone = mmdensecl.load_backbone(path)
        assert backbone.cfg['strides'] == STRIDES
        assert backbone(torch.zeros(1, 3, 64, 64)).shape[2:] == (4, 4)
        assert backbone.mean.flatten().tolist() == [1, 2, 3]
        assert backbone.std.flatten().tolist() == [4, 5, 6]

    @pytest.mark.parametrize(
        'text',
        [
            "model = dict(backbone=dict(type='os.system', depth=152, "
            "norm_cfg=dict(type='os.system'), strides=(1, 2, 2, 10**9), "
            "plugins=[dict(type='x')]))",
            "model = dict(backbone=__import__('pathlib').Path('{0}').touch())",
            "__import__('pathlib').Path('{0}').touch()\nmodel = 3",
            "model = dict(backbone=dict(conv_cfg=dict(type='os.system', "
            "padding_mode='x')), a=[{[1]: 2}])",
            'model = ' + '(' * 5000,
            'not Python at all',
            '\0',
        ],
    )
    def test_a_saved_config_is_never_run(self, state, tmp_path, text):
        touched = tmp_path / 'touched'
        path = save(
            tmp_path / 'run.pth', state, text=text.replace('{0}', str(touched))
        )
        backbone = mmdensecl.load_backbone(path)
        assert not touched.exists()
        assert backbone.cfg['depth'] == 18
        assert backbone.cfg['strides'] == (1, 2, 2, 2)
        assert not {'norm_cfg', 'conv_cfg'} & set(backbone.cfg)

    def test_arguments_come_before_the_file(self, plain, tmp_path):
        cfg = dict(type='ResNet', depth=18, strides=STRIDES)
        given = mmdensecl.load_backbone(plain, backbone=cfg)
        assert given.cfg['strides'] == STRIDES
        path = tmp_path / 'cfg.py'
        path.write_text(f'model = dict(backbone={cfg})')
        read = mmdensecl.load_backbone(plain, config=path)
        images = torch.rand(1, 3, 64, 64) * 255
        assert torch.equal(read(images), given(images))

    @pytest.mark.parametrize('mean, told', [([1, 2, 3], 0), ([9, 9, 9], 1)])
    def test_another_normalisation_is_told(self, state, tmp_path, mean, told):
        cfg = dict(type='ResNet', depth=18)
        path = save(tmp_path / 'run.pth', state, cfg)
        rgb = dict(mean=mean, std=[4, 5, 6])
        model = dict(
            type='mmdensecl.DenseCL', backbone=cfg, data_preprocessor=rgb
        )
        config = Config(dict(model=model))
        with mock.patch.object(pretrained_backbone, '_warn') as warn:
            backbone = mmdensecl.load_backbone(path, config=config)
        assert backbone.mean.flatten().tolist() == mean
        assert warn.call_count == told
        assert not told or 'of mean [1.0, 2.0, 3.0]' in str(warn.call_args)

    def test_nothing_stays_random(self, state, tmp_path):
        path = tmp_path / 'part.pth'
        torch.save(
            {k: v for k, v in state.items() if 'layer3.1' not in k}, path
        )
        with pytest.raises(ValueError, match='layer3|cannot be built'):
            mmdensecl.load_backbone(path)
        with pytest.raises(ValueError, match='layer3.1.conv1.weight'):
            mmdensecl.load_backbone(
                path, backbone=dict(type='ResNet', depth=18)
            )

    def test_an_oversized_architecture(self, state, tmp_path):
        """Few numbers under the names of a large ResNet."""
        wide = {name: torch.ones(1) for name in state}
        for name in ('layer1.0.conv1.weight', 'layer1.0.conv2.weight'):
            wide[name] = torch.ones(1024, 1024, 1, 1)
        torch.save(wide, tmp_path / 'wide.pth')
        with pytest.raises(ValueError, match='cannot be built.*layer1.0'):
            mmdensecl.load_backbone(tmp_path / 'wide.pth')

    def test_random_weights(self, plain, tmp_path):
        """Drawn as for a training, also where the run began from a file."""
        cfg = dict(type='ResNet', depth=18)
        torch.manual_seed(3)
        built = MODELS.build(dict(cfg, type='mmpretrain.ResNet'))
        built.init_weights()
        init_cfg = dict(
            type='mmdensecl.PretrainedBackbone', checkpoint=str(plain)
        )
        path = tmp_path / 'cfg.py'
        path.write_text(
            f'model = dict(backbone={dict(cfg, init_cfg=init_cfg)})'
        )
        for arguments in (dict(backbone=cfg), dict(config=path)):
            torch.manual_seed(3)
            own = mmdensecl.load_backbone(None, **arguments)
            assert torch.equal(own.backbone.conv1.weight, built.conv1.weight)
        ones = dict(type='Constant', layer='Conv2d', val=1.0)
        ones = dict(cfg, init_cfg=ones, norm_cfg=dict(type='SyncBN'))
        told = mmdensecl.load_backbone(None, backbone=ones)
        images = torch.rand(2, 3, 32, 32) * 255
        for backbone in (told, told.untrained(images)):
            assert (backbone.backbone.conv1.weight == 1).all()
        with pytest.raises(ValueError, match='need an architecture'):
            mmdensecl.load_backbone(None)
        with pytest.raises(ValueError, match='not both'):
            mmdensecl.load_backbone(None, config='x.py', backbone=cfg)

    def test_untrained(self, state, tmp_path):
        path = save(
            tmp_path / 'run.pth',
            state,
            dict(type='ResNet', depth=18, strides=STRIDES),
        )
        trained = mmdensecl.load_backbone(path)
        images = torch.rand(4, 3, 32, 32) * 255
        before = torch.get_rng_state()
        other, same, another = (
            trained.untrained(images, seed) for seed in (0, 0, 1)
        )
        assert torch.equal(torch.get_rng_state(), before)
        assert other.cfg == trained.cfg
        assert torch.equal(other.mean, trained.mean)
        assert torch.equal(other.std, trained.std)
        for name, x in other.state_dict().items():
            assert torch.equal(x, same.state_dict()[name]), name
        # Its norms have the statistics of the images, as they start out not.
        seen = []
        norm = other.backbone.bn1
        norm.register_forward_hook(lambda *args: seen.append(args[2].clone()))
        other(images)
        out = seen[0].transpose(0, 1).flatten(1)
        assert out.mean(dim=1).abs().max() < 0.01
        assert (out.std(dim=1) - 1).abs().max() < 0.02
        assert not norm.training and norm.momentum == 0.1
        weights = [x.backbone.conv1.weight for x in (trained, other, another)]
        assert not torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])


class TestExtractDense:
    @pytest.fixture(scope='class')
    def backbone(self):
        torch.manual_seed(0)
        return mmdensecl.load_backbone(
            None,
            backbone=dict(
                type='ResNet', depth=18, stem_channels=4, base_channels=4
            ),
        )

    def test_any_kind_of_image(self, backbone, tmp_path):
        array = np.random.default_rng(0).integers(
            0, 256, (64, 96, 3), dtype=np.uint8
        )
        image = Image.fromarray(array)
        image.save(tmp_path / 'a.png')
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        maps = [
            backbone.extract_dense(x)
            for x in (
                tmp_path / 'a.png',
                str(tmp_path / 'a.png'),
                image,
                array,
                tensor,
                tensor.float(),
            )
        ]
        assert maps[0].shape == (32, 2, 3) and maps[0].std() > 0
        assert all(torch.equal(x, maps[0]) for x in maps)
        # The ratio of the sides is kept.
        assert backbone.extract_dense(array, size=32).shape == (32, 1, 2)

    @pytest.mark.parametrize('most, told', [(1, 1), (0, 0), (255, 0)])
    def test_images_of_at_most_1_are_told(self, backbone, recwarn, most, told):
        backbone(most * torch.rand(2, 3, 32, 32))
        assert len(recwarn) == told
        assert not told or 'by 255' in str(recwarn[0].message)

    def test_a_list(self, backbone):
        """Of several shapes and kinds, in its order."""
        rng = np.random.default_rng(0)
        images = [
            rng.integers(0, 256, (64, width, 3), dtype=np.uint8)
            for width in (96, 64) * 20
        ]
        images[1] = Image.fromarray(images[1])
        images[2] = torch.from_numpy(images[2]).permute(2, 0, 1).float()
        calls = []
        handle = backbone.backbone.register_forward_hook(
            lambda *_: calls.append(1)
        )
        maps = backbone.extract_dense(images, size=32)
        handle.remove()
        assert isinstance(maps, list) and len(calls) == 5
        for one, image in zip(maps, images, strict=False):
            torch.testing.assert_close(
                one, backbone.extract_dense(image, size=32)
            )
        assert backbone.extract_dense([]) == []

    def test_bad_images(self, backbone, tmp_path):
        (tmp_path / 'x.png').write_text('no image')
        for bad, words in (
            (tmp_path / 'x.png', 'x.png'),
            (np.zeros((8, 8)), 'uint8'),
            (np.zeros((8, 8, 4), np.uint8), '4'),
            (torch.zeros(8, 8, 3), '8, 8, 3'),
            (3, 'int'),
        ):
            with pytest.raises(ValueError, match=words):
                backbone.extract_dense(bad)
        with pytest.raises(FileNotFoundError):
            backbone.extract_dense(tmp_path / 'none.png')
        with pytest.raises(ValueError, match='N, 3, H, W'):
            backbone(torch.zeros(3, 8, 8))


def test_models_are_in_the_hub_of_mmpretrain():
    import mmpretrain

    mmdensecl.register_models()
    mmdensecl.register_models()
    names = mmpretrain.list_models('densecl*')
    assert 'densecl_r50_8xb32-coslr-200e' in names
    assert 'resnet18_8xb32_in1k' in mmpretrain.list_models('resnet18*')
    model = mmpretrain.get_model(
        'densecl_r50_8xb32-coslr-200e',
        queue_len=8,
        backbone=dict(depth=18),
        neck=dict(in_channels=512),
    )
    assert type(model) is MODELS.get('mmdensecl.DenseCL')
