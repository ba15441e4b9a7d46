# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import inspect
import re

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmdensecl.engine import (
    ConfigError,
    check_weight_sources,
    merge_options,
    override_data_root,
    set_pretrained,
)
from mmdensecl.engine.config import check_variables, parse_options


def test_moves_every_path_below_the_root():
    many = [dict(ann='data/coco/a.json'), ('data/coco', 'data/cocoa')]
    dataset = dict(data_root='data/coco/train2017')
    cfg = Config(dict(data_root='data/coco', many=many, count=3))
    cfg.train_dataloader = dict(dataset=dataset)
    override_data_root(cfg, '/mnt/x/')
    assert cfg.data_root == '/mnt/x'
    assert cfg.train_dataloader.dataset.data_root == '/mnt/x/train2017'
    assert cfg.many[0].ann == '/mnt/x/a.json'
    # A longer name is another folder.
    assert tuple(cfg.many[1]) == ('/mnt/x', 'data/cocoa')
    assert cfg.count == 3


def test_nothing_to_move():
    with pytest.raises(KeyError, match='defines no data_root'):
        override_data_root(Config(dict(model=dict())), '/mnt/x')
    loader = dict(dataset=dict(data_root='elsewhere'))
    cfg = Config(dict(data_root='data/coco', train_dataloader=loader))
    with pytest.raises(KeyError, match='nothing .* below .* "data/coco"'):
        override_data_root(cfg, '/mnt/x')


def pretrained(checkpoint='a.pth', **kwargs):
    kwargs.update(type='mmdensecl.PretrainedBackbone', checkpoint=checkpoint)
    return kwargs


@pytest.fixture
def detector():
    inits = [dict(type='Kaiming'), pretrained(allow_random=['norm'])]
    model = dict(
        backbone=dict(type='ResNet', init_cfg=pretrained()),
        neck=dict(init_cfg=dict(type='Xavier')),
        roi_head=[dict(shared_head=dict(init_cfg=inits))],
    )
    return Config(dict(model=model))


def test_pretrained_everywhere(detector):
    """The digest of the old file goes with it."""
    set_pretrained(detector, 'b.pth', sha256='0123abcd')
    model = detector.model
    expected = dict(pretrained('b.pth'), sha256='0123abcd')
    assert model.backbone.init_cfg == expected
    others, ours = model.roi_head[0].shared_head.init_cfg
    assert others == dict(type='Kaiming')
    assert ours == dict(expected, allow_random=['norm'])
    assert model.neck.init_cfg == dict(type='Xavier')
    set_pretrained(detector, 'b.pth')
    assert ours.sha256 == model.backbone.init_cfg.sha256 == '0123abcd'
    set_pretrained(detector, 'c.pth')
    assert not {'sha256'} & {*ours, *model.backbone.init_cfg}


@pytest.mark.parametrize('frozen, told', [(1, 1), (-1, 0)])
def test_no_pretrained(detector, messages, warned, frozen, told):
    detector.model.backbone.frozen_stages = frozen
    set_pretrained(detector, 'none')
    model = detector.model
    assert 'init_cfg' not in model.backbone
    assert model.roi_head[0].shared_head.init_cfg == [dict(type='Kaiming')]
    assert model.neck.init_cfg == dict(type='Xavier')
    assert 'starts from random weights' in str(messages)
    assert len(warned('frozen_stages=1: the stem and 1 stages')) == told


@pytest.mark.parametrize('checkpoint', ['b.pth', 'none'])
def test_no_place_for_pretrained(checkpoint):
    backbone = dict(init_cfg=dict(type='Pretrained'))
    for content in (dict(), dict(model=dict(backbone=backbone))):
        with pytest.raises(KeyError, match='PretrainedBackbone'):
            set_pretrained(Config(content), checkpoint)


class TestOptionsAsTyped:
    @pytest.fixture
    def cfg(self):
        dataset = dict(data_root='data/old/images', indices=None)
        model = dict(queue_len='auto')
        return Config(
            dict(
                data_root='data/old',
                work_dir='a',
                model=model,
                train_cfg=dict(max_epochs=3),
                train_dataloader=dict(dataset=dataset),
                train=[dict(name='x')],
            )
        )

    @pytest.mark.parametrize(
        'option, name, value',
        [
            ('work_dir=/data/my pics', 'work_dir', '/data/my pics'),
            ('work_dir=2024_01', 'work_dir', '2024_01'),
            ('work_dir=a,b', 'work_dir', 'a,b'),
            ('work_dir=a=b', 'work_dir', 'a=b'),
            ('train.0.name=1e3', 'train.0.name', '1e3'),
            ('train_cfg.max_epochs=5', 'train_cfg.max_epochs', 5),
            ('randomness.seed=3', 'randomness.seed', 3),
            ('model.strides=1,2', 'model.strides', [1, 2]),
            ('model.queue_len=16', 'model.queue_len', 16),
            ('model.queue_len=auto', 'model.queue_len', 'auto'),
        ],
    )
    def test_strings_stay_literal(self, cfg, option, name, value):
        assert parse_options(cfg, [option]) == {name: value}

    def test_not_an_option(self, cfg):
        with pytest.raises(ValueError, match='KEY=VALUE, got'):
            parse_options(cfg, ['work_dir=/data/my', 'pics'])

    def test_a_folder_with_a_space(self, cfg):
        merge_options(cfg, parse_options(cfg, ['data_root=/data/my pics']))
        dataset = cfg.train_dataloader.dataset
        assert dataset.data_root == '/data/my pics/images'

    def test_all_that_the_runner_reads(self, cfg):
        """The installed Runner's source says what that is."""
        source = inspect.getsource(Runner)
        read = set(re.findall(r"(?<![a-z_])cfg\.get\(\s*'(\w+)'", source))
        assert {'sync_bn', 'compile', 'train_dataloader'} <= read
        for name in read - {'launcher'}:  # a flag
            merge_options(cfg, {name: cfg.get(name)})

    @pytest.fixture
    def base(self, tmp_path):
        (tmp_path / 'base.py').write_text(
            "data_root = 'data/old'\n"
            "train_pipeline = [dict(type='Old')]\n"
            'train_dataloader = dict(dataset=dict(\n'
            '    data_root=data_root, pipeline=train_pipeline))\n'
        )

        def child(text):
            path = tmp_path / 'child.py'
            path.write_text(f"_base_ = './base.py'\n{text}")
            return Config.fromfile(path)

        return child

    @pytest.mark.parametrize(
        'text, words',
        [
            (
                "data_root = '/my/images'",
                "is still.*'data/old', not '/my/images'.*"
                r'dataset=dict\(data_root=data_root',
            ),
            (
                "train_pipeline = [dict(type='New')]",
                r"is still.*\['Old'\], not \['New'\].* train_dataloader = "
                r'dict\(dataset=dict\(pipeline=train_pipeline\)\)$',
            ),
        ],
    )
    def test_variables_that_change_nothing(self, base, text, words):
        with pytest.raises(ConfigError, match=words):
            check_variables(base(text))

    @pytest.mark.parametrize(
        'text',
        [
            '',
            "train_dataloader = dict(dataset=dict(data_root='/my/images'))",
            "data_root = '/my/images'\n"
            'train_dataloader = dict(dataset=dict(data_root=data_root))',
            "train_pipeline = [dict(type='New')]\n"
            'train_dataloader = dict(dataset=dict(pipeline=train_pipeline))',
        ],
    )
    def test_variables_that_are_used(self, base, text):
        check_variables(base(text))


@pytest.mark.parametrize('kind', ['mmdensecl.DenseCL', 'mmdensecl.Own'])
def test_pre_training_has_a_place_for_pretrained(kind):
    init = [dict(type='Kaiming'), dict(type='Constant')]
    cfg = Config(dict(model=dict(type=kind, backbone=dict(init_cfg=init))))
    set_pretrained(cfg, 'x.pth')
    assert cfg.model.backbone.init_cfg == pretrained('x.pth')
    set_pretrained(cfg, 'none')
    assert 'init_cfg' not in cfg.model.backbone


OTHER = dict(type='Pretrained', checkpoint='y.pth')


class TestWeightSources:
    """Two files cannot both give the weights."""

    def test_one_source(self, detector):
        check_weight_sources(detector)
        check_weight_sources(Config(dict(load_from='y.pth', model=dict())))
        check_weight_sources(Config(dict(load_from='y.pth')))

    @pytest.mark.parametrize(
        'pretrained, ours',
        [
            (None, "'a.pth'"),
            ('x.pth', '--pretrained x.pth'),
            ('none', '--pretrained none'),
        ],
    )
    def test_load_from(self, detector, pretrained, ours):
        detector.load_from = 'y.pth'
        with pytest.raises(ValueError) as error:
            check_weight_sources(detector, pretrained)
        assert f'{ours} would be overwritten' in str(error.value)
        assert "load_from='y.pth'" in str(error.value)
        detector.resume = True
        check_weight_sources(detector, pretrained)

    @pytest.mark.parametrize(
        'other',
        [
            dict(init_cfg=[dict(OTHER, type='mmengine.PretrainedInit')]),
            dict(init_cfg=OTHER),
            dict(pretrained='y.pth'),
        ],
    )
    def test_outer_part(self, detector, other):
        model = detector.model
        for part in (model.roi_head[0], model):
            part.update(other)
            words = "'a.pth'.*'y.pth'.*outer part"
            with pytest.raises(ValueError, match=words):
                check_weight_sources(detector)


class TestOptions:
    """What --cfg-options sets has to be read by something."""

    @pytest.fixture
    def cfg(self):
        return Config(dict(max_epochs=20, train_cfg=dict(max_epochs=20)))

    def test_parts_of_the_runner(self, cfg):
        options = {
            'train_cfg.max_epochs': 3,
            'auto_scale_lr.enable': True,
            'env_cfg.dist_cfg.timeout': 60,
            'data_preprocessor.mean': [0, 0, 0],
            'find_unused_parameters': True,
        }
        merge_options(cfg, options)
        assert cfg.train_cfg.max_epochs == 3
        assert cfg.auto_scale_lr.enable and cfg.find_unused_parameters

    @pytest.mark.parametrize(
        'name, answer',
        [
            ('max_epochs', '"max_epochs" is a variable of.*print_config.py'),
            ('optim_wraper.optimizer.lr', 'Is "optim_wrapper" meant'),
            ('xyz', 'such as model, train_dataloader'),
            ('cfg', 'nothing reads it'),
            ('launcher', '--launcher'),
            ('data_preprocessor.mean', 'is "model.data_preprocessor.mean" me'),
            ('env_cfg.cudnn_bench', 'Is "env_cfg.cudnn_benchmark" meant'),
            ('env_cfg.foo', 'env_cfg has cudnn_benchmark, dist_cfg'),
            ('auto_scale_lr.base_batch', 'auto_scale_lr.base_batch_size'),
        ],
    )
    def test_not_read(self, cfg, name, answer):
        cfg.model = dict(data_preprocessor=dict(mean=[1, 2, 3]))
        with pytest.raises(KeyError, match=answer):
            merge_options(cfg, {name: 3})
