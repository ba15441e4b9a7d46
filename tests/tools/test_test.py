# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""tools/test.py, alone and as two ranks.

What it does with each kind of config is tested in
tests/configs/test_mmpretrain_benchmarks.py.
"""

import json
import os
import runpy
import sys

import pytest
import torch
from runs import ROOT, TOOLS, run

from mmdensecl.benchmark.runner import free_port
from mmdensecl.testing import write_pictures

CONFIG = f"""
_base_ = '{ROOT}/configs/benchmarks/mmpretrain/resnet50_knn_in1k.py'
data_root = 'nowhere'
model = dict(backbone=dict(
    depth=18, stem_channels=4, base_channels=4, strides=(1, 1, 1, 2)))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=32),
    dict(type='PackInputs')]
test_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(
    data_root=data_root, classes=['a', 'b'], pipeline=pipeline))
test_cfg = dict(ks=(1, 5), train_dataloader=dict(
    batch_size=3, num_workers=0, dataset=dict(
        data_root=data_root, classes=['a', 'b'], pipeline=pipeline)))
"""
LINEAR = 'configs/benchmarks/mmpretrain/resnet50_8xb32-steplr-100e_in1k_linear'


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """13 and 7 pictures, so that two ranks get a repeated one each."""
    folder = tmp_path_factory.mktemp('test')
    for split, counts in (('train', (6, 7)), ('val', (4, 3))):
        for seed, (name, count) in enumerate(zip('ab', counts, strict=True)):
            images = folder / 'pictures' / split / name
            write_pictures(images, count, seed=seed)
    (folder / 'knn.py').write_text(CONFIG)
    return folder


@pytest.fixture
def call(monkeypatch, workplace):
    """Function that calls one of tools/test.py's with a command line."""
    script = runpy.run_path(str(TOOLS / 'test.py'))
    monkeypatch.chdir(workplace)

    def call(words, function='main'):
        monkeypatch.setattr(sys, 'argv', ['test.py', *words.split()])
        if function == 'main':
            return script['main']()
        return script[function](script['parse_args']())

    return call


@pytest.fixture
def read(call):
    """Function that reads a command line, no more."""
    return lambda words: call(words, 'build_config')


@pytest.mark.skipif(torch.cuda.is_available(), reason='has GPUs')
def test_two_ranks_measure_what_one_does(workplace, call):
    options = '--cfg-options data_root=pictures'
    call(f'knn.py none --out one.json {options}')
    words = f'knn.py none 2 --work-dir two --out two.json {options}'
    done = run(
        *['bash', TOOLS / 'dist_test.sh', *words.split()],
        cwd=workplace,
        env=dict(PORT=str(free_port())),
    )
    assert 'fitting to 13 training images' in done.stdout
    (written,) = (workplace / 'two').glob('*/[0-9]*.json')
    one, *others = (
        json.loads(x.read_text())
        for x in (workplace / 'one.json', workplace / 'two.json', written)
    )
    assert one['knn_1/top1'] == 100  # each val picture is in train
    assert others == [pytest.approx(one)] * 2


@pytest.mark.parametrize('words', ['w.pth', '--pretrained w.pth'])
def test_probe_reads_weights(read, words):
    cfg = read(f'knn.py {words}')
    assert cfg.model.backbone.init_cfg.checkpoint == 'w.pth'
    assert cfg.get('load_from') is None
    assert cfg.work_dir == os.path.join('work_dirs', 'knn')
    assert 'init_cfg' not in read('knn.py none').model.backbone


@pytest.mark.parametrize(
    'weights, other',
    [('w.pth', 'load_from=y.pth'), ('none', 'model.pretrained=y.pth')],
)
def test_no_other_weights_for_a_probe(read, weights, other):
    with pytest.raises(ValueError, match=f'{weights} would be overwritt'):
        read(f'knn.py {weights} --cfg-options {other}')


def test_pinned_weights_stay_pinned(read, workplace):
    """So does the benchmark plan its probes."""
    (workplace / 'pinned.py').write_text(
        "_base_ = 'knn.py'\nmodel = dict(backbone=dict(init_cfg=dict("
        "checkpoint='w.pth', sha256='0123abcd')))"
    )
    pinned = read('pinned.py w.pth').model.backbone.init_cfg
    assert pinned.sha256 == '0123abcd'
    assert 'sha256' not in read('pinned.py v.pth').model.backbone.init_cfg


def test_model_loads_its_checkpoint(read):
    cfg = read(f'{ROOT}/{LINEAR}.py epoch_100.pth')
    assert cfg.load_from == 'epoch_100.pth'
    assert cfg.custom_hooks[-1].type == 'mmdensecl.CheckpointKeysHook'


@pytest.mark.parametrize(
    'words, error, message',
    [
        (f'{ROOT}/{LINEAR}.py --pretrained w.pth', ValueError, 'is no probe'),
        (
            f'{ROOT}/configs/densecl_r50_8xb32-coslr-200e.py w.pth',
            ValueError,
            'no test_dataloader',
        ),
        ('knn.py', SystemExit, 'give a checkpoint'),
        ('knn.py w.pth --pretrained w.pth', SystemExit, 'checkpoint, once'),
    ],
)
def test_errors(read, capsys, words, error, message):
    with pytest.raises(error) as raised:
        read(words)
    assert message in capsys.readouterr().err + str(raised.value)
