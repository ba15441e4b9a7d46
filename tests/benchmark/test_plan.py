# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Suites, data folders, configs of a user's own, and the runs of all."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torchvision.models import resnet34

from mmdensecl.benchmark import plan
from mmdensecl.benchmark.data import fingerprint, read_classes
from mmdensecl.benchmark.hooks import PredictedClassesHook
from mmdensecl.benchmark.plan import Checkpoint, plan_runs, task_config
from mmdensecl.benchmark.suite import load_suite

MODES = ('frozen', 'finetune')


@pytest.fixture
def suite(place):
    return load_suite(place / 'tiny.py')


@pytest.fixture
def runs(suite, weights, setup):
    methods = dict(random=[None], ours=[*map(Checkpoint.read, weights)])
    return plan_runs(suite, methods, MODES, (0, 1), setup)


@pytest.mark.parametrize('old, new, match', [
    ("'seg.py'", "'gone.py'", 'does not exist'),
    ('frozen=', 'frosen=', 'frosen'),
    ("name='seg'", "name='../seg'", 'folder'),
    ("unit='%'", "better='up'", "'up'"),
])  # fmt: skip
def test_suites_that_are_refused(place, old, new, match):
    path = place / 'tiny.py'
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_suite(path)


class TestRuns:
    def test_batch_and_options(self, suite, setup):
        task = suite.tasks[0]
        cfg = task_config(task, 'frozen', replace(setup, processes=2))
        assert cfg.train_dataloader.batch_size == 2
        options = {'train_cfg.max_iters': 4}
        cfg = task_config(task, 'frozen', replace(setup, options=options))
        assert cfg.train_cfg.max_iters == 4
        with pytest.raises(ValueError, match='4 images .* 3 processes'):
            task_config(task, 'frozen', replace(setup, processes=3))
        lie = replace(setup, options={'model.backbone.init_cfg.checkpoint': 1})
        with pytest.raises(ValueError, match='init_cfg.*--checkpoint'):
            task_config(task, 'frozen', lie)

    def test_all_are_there(self, runs):
        kinds = 'seg/frozen', 'seg/finetune', 'det/finetune', 'knn/frozen'
        units = 'random', 'ours/pretrain0', 'ours/pretrain1'
        assert [run.name for run in runs] == [
            f'{kind}/{unit}/seed{seed}'
            for seed in (0, 1)
            for kind in kinds
            for unit in units
            if seed == 0 or kind != 'knn/frozen'  # the same weights again
        ]
        key = dict(task='det', mode='finetune', method='ours', seed=1)
        assert runs[-1].key == dict(key, pretrain_seed=1)
        random = [run for run in runs if run.method == 'random']
        assert {run.pretrain_seed for run in random} == {None}

    def test_weights_seeds_and_settings(self, runs, weights):
        random, ours = (run.config for run in runs[:2])
        assert 'init_cfg' not in random.model.backbone
        assert ours.model.backbone.init_cfg.checkpoint == str(weights[0])
        assert len(ours.model.backbone.init_cfg.sha256) == 64
        assert runs[-1].config.randomness.seed == 1
        assert ours.custom_hooks[-1].type == 'mmdensecl.PredictedClassesHook'
        own = [run for run in runs if run.name.startswith('seg/frozen')]
        assert all(run.settings == own[0].settings for run in own)
        assert runs[0].settings['data']['files'] == 1
        assert random.model.head.num_classes == 2  # of the data's own
        for name in ('train', 'val', 'test'):
            dataset = random[f'{name}_dataloader'].dataset
            assert dataset.metainfo.classes == ('cup', '<b>plate</b>')
        stack = runs[0].settings['stack']
        assert stack['torch'] == torch.__version__.split('+')[0]
        assert {'python', 'mmengine', 'mmpretrain'} <= {*stack}

    def test_other_weights_never_start(self, tmp_path, runs):
        pytest.importorskip('mmdet')
        run = copy.deepcopy(runs[1])
        path = tmp_path / 'deep.pth'
        torch.save(resnet34().state_dict(), path)
        plan.check_fit([run])
        other = dict(checkpoint=str(path), sha256=None)
        run.config.model.backbone.init_cfg.update(other)
        with pytest.raises(ValueError, match='does not fit the ResNet'):
            plan.check_fit([run])
        torch.save({'neck.mlp.0.weight': torch.zeros(2, 2)}, path)
        with pytest.raises(ValueError):
            Checkpoint.read(path)


class TestOwnConfig:
    """`run my_config.py`: no place for weights, no suite, own paths."""

    @pytest.fixture
    def config(self, place):
        text = (place / 'seg.py').read_text()
        text = text.replace('depth=18, init_cfg=dict(', 'depth=18, x=dict(')
        text += "model['backbone']['pretrained'] = 'torchvision://resnet18'\n"
        text += "model['roi_head'] = dict(shared_head=dict(type='ResLayer'))\n"
        text += "visualizer = dict(type='Visualizer')\n"
        (place / 'mine.py').write_text(text)
        return place / 'mine.py'

    def test_rows_and_modes(self, config, setup, weights):
        suite = load_suite(config)
        keys = [x['key'] for x in suite.tasks[0].metrics]
        assert keys == ['coco/bbox_mAP', 'coco/segm_mAP']
        methods = dict(random=[None], ours=[Checkpoint.read(weights[0])])
        setup = replace(setup, data_root=None)
        runs = plan_runs(suite, methods, MODES, (0,), setup)
        assert [run.name for run in runs] == [
            f'mine/{mode}/{row}/seed0'
            for mode in MODES
            for row in ('random', 'ours/pretrain0')
        ]
        frozen, tuned = runs[1].config, runs[3].config
        for part in (frozen.model.backbone, tuned.model.roi_head.shared_head):
            assert part.init_cfg.type == 'mmdensecl.PretrainedBackbone'
        assert 'pretrained' not in frozen.model.backbone
        parts = ['backbone', 'roi_head.shared_head']
        hook = dict(type='mmdensecl.FreezeHook', parts=parts)
        assert frozen.custom_hooks[0] == hook and hook not in (
            tuned.custom_hooks
        )
        assert frozen.find_unused_parameters
        # Its result can be read and it can resume, whatever it lacks.
        assert tuned.default_hooks.logger.log_metric_by_epoch is False
        assert tuned.default_hooks.checkpoint.interval == 2
        backends = [dict(type='LocalVisBackend')]
        assert tuned.visualizer.vis_backends == backends
        assert tuned.data_root == 'data/coco/'  # its own paths
        metric = load_suite(config, 'mae:lower').tasks[0].metrics[0]
        assert (metric['key'], metric['better']) == ('mae', 'lower')
        assert tuned.train_dataloader.batch_size == 2  # and batch


def test_code_is_what_a_run_imports(tmp_path, monkeypatch):
    """Without comments."""
    ignored = shutil.ignore_patterns('__pycache__')
    for name in ('mmdensecl', 'tools'):
        shutil.copytree(plan.ROOT / name, tmp_path / name, ignore=ignored)
    monkeypatch.setattr(plan, 'ROOT', tmp_path)
    before = plan.code_fingerprint()
    for name, counts in (
        ('benchmark/report.py', False),
        ('transfer/read_backbone.py', True),
        ('models/correspondence.py', True),
    ):
        path = tmp_path / 'mmdensecl' / name
        text = path.read_text()
        path.write_text(f'# a comment\n{text}\n\n')
        assert plan.code_fingerprint() == before, name
        path.write_text(f'{text}\nADDED = 1\n')
        assert (plan.code_fingerprint() != before) == counts, name
        path.write_text(text)


@pytest.mark.parametrize(
    'key', ['pred_sem_seg', 'pred_instances', 'pred_label']
)
def test_predicted_classes_hook(tmp_path, key):
    made = dict(
        pred_sem_seg=lambda x: PixelData(data=x.view(1, 1, -1)),
        pred_instances=lambda x: InstanceData(labels=x),
        pred_label=lambda x: x,
    )
    dataset = type('Set', (), dict(metainfo=dict(classes=('a', 'b', 'c'))))
    loader = type('Loader', (), dict(dataset=dataset))
    runner = type('R', (), dict(work_dir=tmp_path, val_dataloader=loader))
    hook = PredictedClassesHook()
    hook.before_val_epoch(runner)
    for labels in ([2, 2, 0], [2]):
        sample = BaseDataElement(**{key: made[key](torch.tensor(labels))})
        hook.after_val_iter(runner, batch_idx=0, outputs=[sample])
    hook.after_val_epoch(runner, metrics={})
    text = (tmp_path / 'predicted.json').read_text()
    assert text == '{"of": 3, "predicted": ["a", "c"]}'


@pytest.mark.parametrize('layout, folder, names', [
    ('voc', 'VOC2012', ['ship', 'sea']),
    ('voc_seg', '.', ['background', 'ship', 'sea']),
    ('cityscapes', '.', ['ship', 'sea']),
])  # fmt: skip
def test_own_classes(tmp_path, layout, folder, names):
    assert read_classes(tmp_path, layout) is None  # the standard ones
    (tmp_path / folder).mkdir(exist_ok=True)
    path = tmp_path / folder / 'class_names.txt'
    path.write_text('ship\n\nsea\n')
    assert read_classes(tmp_path, layout) == names
    path.write_text('ship\nship\n')
    with pytest.raises(ValueError, match='each class once'):
        read_classes(tmp_path, layout)


@pytest.mark.parametrize('name, content, changes', [
    ('labels.json', '[]', True),
    ('a/x.jpg', '1234', True),
    ('a/x.jpg', '321', False),  # an image: its size
    ('a/.hidden', '1', False),
    ('masks/x.png', '321', True),
])  # fmt: skip
def test_fingerprint_of_data(tmp_path, name, content, changes):
    paths = dict.fromkeys(('a', 'labels.json'), False) | dict(masks=True)
    paths = {str(tmp_path / k): x for k, x in paths.items()}
    for file in ('a/x.jpg', 'masks/x.png', 'labels.json'):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text('123')
    first = fingerprint(paths)
    assert (first['files'], first['bytes']) == (3, 9)
    (tmp_path / name).write_text(content)
    assert (fingerprint(paths) != first) == changes
