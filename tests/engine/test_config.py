# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import inspect
import logging
import re
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from mmdensecl.engine import (
    check_weight_sources,
    merge_options,
    override_data_root,
    set_pretrained,
)
from mmdensecl.engine.config import check_data_root, parse_options

TRAIN = Path(__file__).parents[2] / 'tools/train.py'


def test_moves_every_path_below_the_root():
    cfg = Config(
        dict(
            data_root='data/coco',
            train_dataloader=dict(
                dataset=dict(data_root='data/coco/train2017')
            ),
            many=[dict(ann='data/coco/a.json'), ('data/coco', 'data/cocoa')],
            count=3,
        )
    )
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
    cfg = Config(
        dict(
            data_root='data/coco',
            train_dataloader=dict(dataset=dict(data_root='elsewhere')),
        )
    )
    with pytest.raises(KeyError, match='nothing .* below .* "data/coco"'):
        override_data_root(cfg, '/mnt/x')


def pretrained(**kwargs):
    return dict(
        type='mmdensecl.PretrainedBackbone', checkpoint='a.pth', **kwargs
    )


@pytest.fixture
def detector():
    return Config(
        dict(
            model=dict(
                backbone=dict(type='ResNet', init_cfg=pretrained()),
                neck=dict(init_cfg=dict(type='Xavier')),
                roi_head=[
                    dict(
                        shared_head=dict(
                            init_cfg=[
                                dict(type='Kaiming'),
                                pretrained(allow_random=['norm']),
                            ]
                        )
                    )
                ],
            )
        )
    )


def test_pretrained_everywhere(detector):
    set_pretrained(detector, 'b.pth')
    model = detector.model
    assert model.backbone.init_cfg == {**pretrained(), 'checkpoint': 'b.pth'}
    others, ours = model.roi_head[0].shared_head.init_cfg
    assert others == dict(type='Kaiming')
    assert (ours.checkpoint, ours.allow_random) == ('b.pth', ['norm'])
    assert model.neck.init_cfg == dict(type='Xavier')


def test_sha256_goes_with_the_file(detector):
    model = detector.model
    for part in (model.backbone, model.roi_head[0].shared_head):
        assert 'sha256' not in part.init_cfg
    set_pretrained(detector, 'b.pth', sha256='0123abcd')
    ours = [model.backbone.init_cfg, model.roi_head[0].shared_head.init_cfg[1]]
    assert [x.sha256 for x in ours] == ['0123abcd'] * 2
    set_pretrained(detector, 'b.pth')
    assert [x.sha256 for x in ours] == ['0123abcd'] * 2
    set_pretrained(detector, 'c.pth')
    assert not any('sha256' in x for x in ours)


def test_no_pretrained(detector):
    set_pretrained(detector, 'none')
    model = detector.model
    assert 'init_cfg' not in model.backbone
    assert model.roi_head[0].shared_head.init_cfg == [dict(type='Kaiming')]
    assert model.neck.init_cfg == dict(type='Xavier')


@pytest.mark.parametrize('checkpoint', ['b.pth', 'none'])
@pytest.mark.parametrize(
    'content',
    [
        dict(),
        dict(model=dict(backbone=dict(init_cfg=dict(type='Pretrained')))),
    ],
)
def test_no_place_for_pretrained(checkpoint, content):
    with pytest.raises(KeyError, match='PretrainedBackbone'):
        set_pretrained(Config(content), checkpoint)


class TestOptionsAsTyped:
    @pytest.fixture
    def cfg(self):
        return Config(
            dict(
                data_root='data/old',
                work_dir='a',
                train_cfg=dict(max_epochs=3),
                train_pipeline=[dict(type='A', size=3)],
                train_dataloader=dict(
                    dataset=dict(data_root='data/old/images', indices=None)
                ),
                train=[dict(name='x')],
            )
        )

    @pytest.mark.parametrize(
        'option, name, value',
        [
            ('work_dir=/data/my pics', 'work_dir', '/data/my pics'),
            ('work_dir=2024_01', 'work_dir', '2024_01'),
            ('work_dir=a,b', 'work_dir', 'a,b'),
            ('work_dir=[1]', 'work_dir', '[1]'),
            ('work_dir=a=b', 'work_dir', 'a=b'),
            ('work_dir="quoted one"', 'work_dir', 'quoted one'),
            ('train.0.name=1e3', 'train.0.name', '1e3'),
            ('train_cfg.max_epochs=5', 'train_cfg.max_epochs', 5),
            (
                'train_dataloader.dataset.indices=7',
                'train_dataloader.dataset.indices',
                7,
            ),
            ('randomness.seed=3', 'randomness.seed', 3),
            ('model.strides=1,2', 'model.strides', [1, 2]),
        ],
    )
    def test_strings_stay_literal(self, cfg, option, name, value):
        assert parse_options(cfg, [option]) == {name: value}

    @pytest.mark.parametrize('option', ['work_dir', '=3', 'pics'])
    def test_not_an_option(self, cfg, option):
        with pytest.raises(ValueError, match='KEY=VALUE, got'):
            parse_options(cfg, ['work_dir=/data/my', option])

    def test_a_folder_with_a_space(self, cfg):
        merge_options(cfg, parse_options(cfg, ['data_root=/data/my pics']))
        dataset = cfg.train_dataloader.dataset
        assert dataset.data_root == '/data/my pics/images'

    def test_all_that_the_runner_reads(self, cfg):
        """The installed Runner's source says what that is."""
        source = inspect.getsource(Runner)
        read = set(re.findall(r"(?<![a-z_])cfg\.get\(\s*'(\w+)'", source))
        assert {'sync_bn', 'compile', 'train_dataloader'} <= read
        for name in read:
            merge_options(cfg, {name: cfg.get(name)})

    @pytest.fixture
    def base(self, tmp_path):
        (tmp_path / 'base.py').write_text(
            "data_root = 'data/old'\n"
            'train_dataloader = dict(dataset=dict(data_root=data_root))\n'
        )

        def child(text):
            path = tmp_path / 'child.py'
            path.write_text(f"_base_ = './base.py'\n{text}")
            return Config.fromfile(path)

        return child

    def test_data_root_that_moves_nothing(self, base):
        with pytest.raises(
            ValueError,
            match="data_root='/my/images', but .*'data/old'.*"
            r'dataset=dict\(data_root=data_root',
        ):
            check_data_root(base("data_root = '/my/images'"))

    @pytest.mark.parametrize(
        'text',
        [
            '',
            "data_root = 'data/old/'",
            "train_dataloader = dict(dataset=dict(data_root='/my/images'))",
            "data_root = '/my/images'\n"
            'train_dataloader = dict(dataset=dict(data_root=data_root))',
            "data_root = '/my'\n"
            "train_dataloader = dict(dataset=dict(data_root='/my/images'))",
        ],
    )
    def test_data_root_that_is_used(self, base, text):
        check_data_root(base(text))


class TestPretrainedForPreTraining:
    @pytest.mark.parametrize('kind', ['mmdensecl.DenseCL', 'mmdensecl.Own'])
    def test_the_backbone_starts_from_it(self, kind):
        init = [dict(type='Kaiming'), dict(type='Constant')]
        cfg = Config(dict(model=dict(type=kind, backbone=dict(init_cfg=init))))
        set_pretrained(cfg, 'x.pth')
        assert cfg.model.backbone.init_cfg == dict(
            type='mmdensecl.PretrainedBackbone', checkpoint='x.pth'
        )

    def test_none(self):
        cfg = Config(
            dict(model=dict(type='mmdensecl.MoCoV2', backbone=dict(depth=1)))
        )
        set_pretrained(cfg, 'none')
        assert cfg.model.backbone == dict(depth=1)

    def test_load_from_would_overwrite_it(self):
        cfg = Config(
            dict(
                load_from='y.pth',
                model=dict(type='mmdensecl.MoCoV2', backbone=dict()),
            )
        )
        set_pretrained(cfg, 'x.pth')
        with pytest.raises(ValueError, match='overwritten by load_from'):
            check_weight_sources(cfg, 'x.pth')


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
            dict(init_cfg=dict(type='Pretrained', checkpoint='y.pth')),
            dict(
                init_cfg=[
                    dict(type='Kaiming'),
                    dict(type='mmengine.PretrainedInit', checkpoint='y.pth'),
                ]
            ),
            dict(pretrained='y.pth'),
        ],
    )
    @pytest.mark.parametrize(
        'part',
        [
            lambda model: model,
            lambda model: model.roi_head[0],
        ],
    )
    def test_outer_part(self, detector, other, part):
        part(detector.model).update(other)
        with pytest.raises(ValueError, match="'a.pth'.*'y.pth'.*outer part"):
            check_weight_sources(detector)

    def test_other_initialisers_come_first(self, detector):
        """mmengine runs them before those of inner parts."""
        detector.model.init_cfg = dict(type='Normal', layer='Linear', std=1.0)
        detector.model.neck.init_cfg = dict(type='Pretrained', checkpoint='y')
        check_weight_sources(detector)


class TestTrain:
    @pytest.fixture
    def read(self, monkeypatch, tmp_path, detector):
        """Function that reads a command line of tools/train.py."""
        tool = runpy.run_path(str(TRAIN))

        def read(*argv, **settings):
            detector.update(settings)
            detector.dump(tmp_path / 'c.py')
            monkeypatch.setattr(
                sys, 'argv', ['train.py', str(tmp_path / 'c.py'), *argv]
            )
            return tool['build_config'](tool['parse_args']())

        return read

    @pytest.mark.parametrize('flags', [[], ['--pretrained', 'x.pth']])
    def test_two_sources(self, read, flags):
        with pytest.raises(ValueError, match="overwritten by load_from='y"):
            read(*flags, load_from='y.pth')
        with pytest.raises(ValueError, match='overwritten by pretrained='):
            read(*flags, load_from=None, model=dict(pretrained='y.pth'))

    def test_resume_from_a_file(self, read):
        cfg = read('--resume', 'y.pth', '--pretrained', 'x.pth')
        assert (cfg.resume, cfg.load_from) == (True, 'y.pth')
        assert cfg.model.backbone.init_cfg.checkpoint == 'x.pth'

    def test_resume_drops_load_from(self, read, request):
        log, handler = [], logging.Handler()
        handler.emit = lambda record: log.append(record.getMessage())
        MMLogger.get_instance(request.node.name).addHandler(handler)
        assert read('--resume', load_from='y.pth').load_from is None
        (line,) = log
        assert "load_from='y.pth' of the config is not used" in line
        read('--resume', load_from=None)
        assert log == [line]


class TestOptions:
    """What --cfg-options sets has to be read by something."""

    @staticmethod
    def merge(**options):
        cfg = Config(dict(max_epochs=20, train_cfg=dict(max_epochs=20)))
        merge_options(
            cfg,
            {
                name.replace('__', '.'): value
                for name, value in options.items()
            },
        )
        return cfg

    def test_parts_of_the_runner(self):
        cfg = self.merge(
            train_cfg__max_epochs=3,
            auto_scale_lr__enable=True,
            find_unused_parameters=True,
        )
        assert cfg.train_cfg.max_epochs == 3
        assert cfg.auto_scale_lr.enable and cfg.find_unused_parameters

    def test_variable_of_the_file(self):
        with pytest.raises(KeyError, match='"max_epochs" is a variable of'):
            self.merge(max_epochs=3)

    def test_misspelt(self):
        with pytest.raises(KeyError, match='Is "optim_wrapper" meant'):
            self.merge(optim_wraper__optimizer__lr=1)
        with pytest.raises(KeyError, match='such as model, train_dataloader'):
            self.merge(xyz=1)
