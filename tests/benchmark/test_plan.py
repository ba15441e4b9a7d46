# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Suites, data folders and the configs of the runs."""
import json
from dataclasses import replace

import pytest
import torch
from mmengine.config import Config
from torchvision.models import resnet34

from mmdensecl.benchmark.data import (check_files, fingerprint, fit_to_data,
                                      read_classes)
from mmdensecl.benchmark.plan import (Checkpoint, code_fingerprint, plan_runs,
                                      stack_versions, task_config)
from mmdensecl.benchmark.state import differences, status, write_suite
from mmdensecl.benchmark.suite import check_name, load_suite


@pytest.fixture
def suite(place):
    return load_suite(place / 'tiny.py')


@pytest.fixture
def runs(place, suite, weights):
    rows = dict(random=None, ours=Checkpoint.read(weights))
    return plan_runs(suite, rows, ('frozen', 'finetune'), (0, 1),
                     place / 'data', place / 'out' / 'tiny')


class TestSuite:

    def test_reads(self, suite, place):
        assert [task.name for task in suite.tasks] == ['seg', 'det']
        assert suite.tasks[0].configs['frozen'] == place / 'seg.py'
        assert suite.select(['det']).tasks == suite.tasks[1:]
        assert suite.select([]).tasks == suite.tasks

    def test_unknown_task(self, suite):
        with pytest.raises(ValueError, match='no task pose, only seg, det'):
            suite.select(['seg', 'pose'])

    @pytest.mark.parametrize('old, new, error, match', [
        ("'seg.py'", "'gone.py'", FileNotFoundError, 'does not exist'),
        ('frozen=', 'frosen=', ValueError, 'frosen'),
        ("layout='coco'", "layout='lvis'", ValueError, 'lvis'),
        ("title='Segmentation', ", '', ValueError, 'title'),
        ("name='seg'", "name='../seg'", ValueError, 'folder'),
    ])
    def test_refuses(self, place, old, new, error, match):
        path = place / 'tiny.py'
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(error, match=match):
            load_suite(path)

    def test_missing(self, place):
        with pytest.raises(FileNotFoundError, match='no suite'):
            load_suite(place / 'other.py')


@pytest.mark.parametrize('name',
                         ['', '.', '..', 'a/b', '-x', 'a b', 'ä', '.x'])
def test_names_are_folders(name):
    with pytest.raises(ValueError, match='letters'):
        check_name('row', name)
    assert check_name('row', 'MoCo-v2_200ep+x.1') == 'MoCo-v2_200ep+x.1'


class TestRuns:

    def test_all_are_there(self, runs):
        names = [run.name for run in runs]
        kinds = [
            f'{t}/{p}' for t, p in (('seg', 'frozen'), ('seg', 'finetune'),
                                    ('det', 'finetune'))
        ]
        assert names == [
            f'{kind}/{row}/seed{seed}' for seed in (0, 1) for kind in kinds
            for row in ('random', 'ours')
        ]
        assert len({run.folder for run in runs}) == 12

    def test_weights_and_seed(self, runs, weights):
        random, ours = (run.config for run in runs[:2])
        assert 'init_cfg' not in random.model.backbone
        assert ours.model.backbone.init_cfg.checkpoint == str(weights)
        assert ours.randomness.seed == 0
        assert runs[-1].config.randomness.seed == 1
        assert runs[0].identity['checkpoint'] is None
        assert len(runs[1].identity['checkpoint']) == 64

    def test_rows_and_seeds_share_settings(self, runs):
        by_task = {}
        for run in runs:
            by_task.setdefault((run.task.name, run.protocol),
                               []).append(run.settings)
        for settings in by_task.values():
            assert all(s == settings[0] for s in settings)
        settings = runs[0].settings
        assert settings['data']['files'] == 1
        assert settings['stack']['torch'] == torch.__version__.split('+')[0]

    def test_config_goes_through_a_file(self, runs, tmp_path):
        runs[1].config.dump(tmp_path / 'config.py')
        again = Config.fromfile(tmp_path / 'config.py')
        assert again.to_dict() == runs[1].config.to_dict()

    def test_cost(self, runs):
        assert runs[0].length == (10, 'iterations')
        assert runs[0].batch_size == 4 and runs[0].trains

    def test_processes_share_the_batch(self, suite, place):
        for processes, share in ((1, 4), (2, 2), (4, 1)):
            cfg = task_config(suite.tasks[0], 'frozen', place / 'data',
                              processes)
            assert cfg.train_dataloader.batch_size == share
        with pytest.raises(ValueError, match='4 pictures .* 3 processes'):
            task_config(suite.tasks[0], 'frozen', place / 'data', 3)

    def test_options(self, suite, place):
        options = {'train_cfg.max_iters': 7}
        cfg = task_config(
            suite.tasks[0], 'frozen', place / 'data', options=options)
        assert cfg.train_cfg.max_iters == 7

    @pytest.mark.parametrize('name, flag', [
        ('data_root', '--data-root'),
        ('train_dataloader.dataset.data_root', '--data-root'),
        ('model.backbone.init_cfg.checkpoint', '--checkpoint'),
        ('load_from', '--checkpoint'),
        ('resume', '--redo'),
        ('randomness.seed', '--seeds'),
        ('work_dir', '--work-dir'),
        ('train_dataloader.batch_size', '--gpus'),
    ])
    def test_options_that_would_lie(self, suite, place, name, flag):
        with pytest.raises(ValueError, match=f'"{name}".*{flag}'):
            task_config(
                suite.tasks[0], 'frozen', place / 'data', options={name: 1})
        # Only the batch of the training is shared by processes.
        task_config(
            suite.tasks[0],
            'frozen',
            place / 'data',
            options={'val_dataloader.batch_size': 1})

    def test_the_hash_goes_along(self, runs):
        init_cfg = runs[1].config.model.backbone.init_cfg
        assert init_cfg.sha256 == runs[1].checkpoint.sha256
        assert len(init_cfg.sha256) == 64

    def test_a_probe_has_one_seed(self, probe, place, weights):
        rows = dict(random=None, ours=Checkpoint.read(weights))
        runs = plan_runs(
            load_suite(place / 'tiny.py'), rows, ('frozen', ), (3, 4),
            place / 'data', place / 'out')
        assert [run.name for run in runs if not run.trains
                ] == ['knn/frozen/random/seed3', 'knn/frozen/ours/seed3']
        assert len([run for run in runs if run.trains]) == 4

    def test_no_data(self, suite, place):
        with pytest.raises(FileNotFoundError, match='--data-root'):
            task_config(suite.tasks[0], 'frozen', place / 'nowhere')

    def test_options_of_a_task(self, suite, place):
        """The command line's come last."""
        task = replace(
            suite.tasks[0],
            options={
                'train_cfg.max_iters': 3,
                'default_hooks.logger.interval': 7
            })
        cfg = task_config(
            task, 'frozen', place / 'data', options={'train_cfg.max_iters': 4})
        assert cfg.train_cfg.max_iters == 4
        assert cfg.default_hooks.logger.interval == 7

    def test_another_depth_never_starts(self, suite, place, tmp_path):
        path = tmp_path / 'deeper.pth'
        torch.save(resnet34().state_dict(), path)
        rows = dict(random=None, deeper=Checkpoint.read(path))
        with pytest.raises(ValueError, match='"deeper" is ResNet-34.*-18'):
            plan_runs(suite, rows, ['frozen'], [0], place / 'data', tmp_path)

    def test_wrong_weights_never_start(self, tmp_path):
        path = tmp_path / 'neck.pth'
        torch.save({'neck.mlp.0.weight': torch.zeros(2, 2)}, path)
        with pytest.raises(ValueError):
            Checkpoint.read(path)

    def test_suite_json_grows(self, runs, suite, tmp_path):
        write_suite(tmp_path, suite.select(['seg']), runs[:1])
        write_suite(tmp_path, suite.select(['det']), runs[4:5])
        written = json.loads((tmp_path / 'suite.json').read_text())
        assert [task['name'] for task in written['tasks']] == ['seg', 'det']
        assert len(written['runs']) == 2
        assert written['rows'] == ['random'] and written['seeds'] == [0]

    def test_status(self, runs):
        assert status(runs[0]) == 'new'


class TestData:

    def test_coco_classes(self, place, suite):
        cfg = task_config(suite.tasks[0], 'frozen', place / 'data')
        names = ('cup', '<b>plate</b>')
        assert cfg.model.head.num_classes == 2
        for loader in ('train', 'val', 'test'):
            dataset = cfg[f'{loader}_dataloader'].dataset
            assert tuple(dataset.metainfo.classes) == names
            assert dataset.data_root == str(place / 'data' / 'coco') + '/'
            assert dataset.type == 'CocoDataset'
        assert cfg.val_evaluator.ann_file == str(place / 'data' / 'coco' /
                                                 'annotations' / 'x.json')

    @pytest.mark.parametrize('layout, folder, names, kind', [
        ('voc', 'VOC2012', ['ship', 'sea'], 'XMLDataset'),
        ('voc_seg', '.', ['background', 'ship', 'sea'], 'BaseSegDataset'),
        ('cityscapes', '.', ['ship', 'sea'], 'BaseSegDataset'),
    ])
    def test_own_classes(self, tmp_path, layout, folder, names, kind):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / 'class_names.txt').write_text('ship\n\nsea\n')
        assert read_classes(tmp_path, layout) == names
        cfg = Config(
            dict(
                data_root='data/x',
                model=dict(num_classes=20),
                train_dataloader=dict(
                    dataset=dict(type='Host', data_root='data/x'))))
        fit_to_data(cfg, tmp_path, layout)
        dataset = cfg.train_dataloader.dataset
        assert dataset.type == kind and cfg.model.num_classes == len(names)
        assert list(dataset.metainfo.classes) == names
        palette = [tuple(colour) for colour in dataset.metainfo.palette]
        assert len(set(palette)) == len(names)
        assert (palette[0] == (0, 0, 0)) == (kind == 'BaseSegDataset')

    def test_standard_classes_stay(self, tmp_path):
        for layout in ('voc', 'voc_seg', 'cityscapes'):
            assert read_classes(tmp_path, layout) is None

    @pytest.mark.parametrize('suffix', ['png', 'jpg'])
    def test_cityscapes_pictures(self, tmp_path, suffix):
        folder = tmp_path / 'leftImg8bit' / 'val' / 'town'
        folder.mkdir(parents=True)
        (folder / f'x_leftImg8bit.{suffix}').touch()
        cfg = Config(
            dict(
                data_root='data/x',
                train_dataloader=dict(
                    dataset=dict(type='CityscapesDataset',
                                 data_root='data/x'))))
        fit_to_data(cfg, tmp_path, 'cityscapes')
        dataset = cfg.train_dataloader.dataset
        assert dataset.img_suffix == f'_leftImg8bit.{suffix}'
        assert dataset.type == 'CityscapesDataset'

    def test_missing_files(self, tmp_path):
        (tmp_path / 'images').mkdir()
        (tmp_path / 'list.txt').touch()

        def data(**names):
            return Config(
                dict(
                    train_dataloader=dict(
                        dataset=dict(
                            type='Concat',
                            datasets=[
                                dict(
                                    type='Host',
                                    data_root=str(tmp_path),
                                    **names)
                            ]))))

        check_files(data())
        check_files(data(ann_file='list.txt', data_prefix=dict(img='images')))
        check_files(data(ann_file='', data_prefix='images'))
        with pytest.raises(FileNotFoundError) as error:
            check_files(data(ann_file='a.txt', data_prefix=dict(img='b')))
        assert f'{tmp_path}/a.txt, {tmp_path}/b. ' in str(error.value)
        assert '--tasks' in str(error.value)

    def test_missing_files_stop_the_plan(self, place, suite):
        with open(place / 'seg.py', 'a') as file:
            file.write("train_dataloader['dataset']['ann_file'] = 'gone.json'")
        with pytest.raises(FileNotFoundError, match='data/coco/gone.json'):
            task_config(suite.tasks[0], 'frozen', place / 'data')

    @pytest.mark.parametrize('node, names', [
        (dict(type='VOCDataset', data_prefix=dict(sub_data_root='VOC2007/')),
         ['VOC2007', 'VOC2007/JPEGImages', 'VOC2007/Annotations']),
        (dict(type='VOC', split='test'),
         ['JPEGImages', 'Annotations', 'ImageSets/Main/test.txt']),
        (dict(type='ImageNet', split='val', ann_file=''), ['val']),
    ])
    def test_folders_that_a_data_set_implies(self, tmp_path, node, names):
        """Also those of a probe's loop."""
        cfg = Config(
            dict(
                test_cfg=dict(
                    train_dataloader=dict(
                        dataset=dict(data_root=str(tmp_path), **node)))))
        with pytest.raises(FileNotFoundError) as error:
            check_files(cfg)
        missing = ', '.join(f'{tmp_path}/{name}' for name in names)
        assert f'do not exist: {missing}. ' in str(error.value)
        for name in names:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        check_files(cfg)

    def test_coco_without_annotations(self, tmp_path):
        with pytest.raises(FileNotFoundError, match='val2017.json.*--tasks'):
            read_classes(tmp_path, 'coco')

    def test_names_twice(self, tmp_path):
        (tmp_path / 'class_names.txt').write_text('ship\nship\n')
        with pytest.raises(ValueError, match='each class once'):
            read_classes(tmp_path, 'cityscapes')


class TestFingerprint:

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / 'x.jpg').write_bytes(b'123')
        (tmp_path / 'labels.json').write_text('{}')
        return tmp_path

    @pytest.fixture
    def masks(self, folder):
        for name in ('SegmentationClassAug', 'gtFine/val/town'):
            (folder / name).mkdir(parents=True)
        (folder / 'SegmentationClassAug' / 'x.png').write_text('123')
        (folder / 'gtFine/val/town/x_labelTrainIds.png').write_text('123')

    def test_same(self, folder):
        first = fingerprint(folder)
        (folder / '.DS_Store').touch()
        assert fingerprint(folder) == first
        assert (first['files'], first['bytes']) == (2, 5)

    @pytest.mark.parametrize('name, content', [
        ('labels.json', '[]'),
        ('a/x.jpg', '1234'),
        ('a/y.jpg', ''),
        ('SegmentationClassAug/x.png', '321'),
        ('gtFine/val/town/x_labelTrainIds.png', '321'),
    ])
    def test_changes(self, folder, masks, name, content):
        first = fingerprint(folder)
        (folder / name).write_text(content)
        assert fingerprint(folder)['fingerprint'] != first['fingerprint']


def test_code_and_stack():
    assert len(code_fingerprint()) == 64
    assert code_fingerprint() == code_fingerprint()
    assert any('mmengine' in name for name in stack_versions())


def test_differences():
    old = dict(a=1, b=dict(c=2, d=3))
    assert list(differences(old, old)) == []
    new = dict(a=1, b=dict(c=5), e=7)
    assert list(differences(
        old, new)) == ['b.c: 2 -> 5', 'b.d: 3 -> None', 'e: None -> 7']
