# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The tools as a user starts them, in processes of their own.

The first run is a process from scratch; the others need not import the
libraries again.
"""

import os
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    TOOLS,
    assert_same,
    ended,
    final,
    last_line,
    prepare,
    run,
    tool,
    tool_ranks,
    train,
)

from mmdensecl.testing import write_pictures

SHOWN = (
    'lr eta time data_time loss loss_global loss_dense global_pos_sim '
    'global_neg_sim global_acc dense_pos_sim dense_neg_sim dense_acc '
    'position_r2 match_coverage match_acc feat_std queue_fill'
)
MINI = TOOLS.parent / 'configs/benchmarks/mini/fcn_r18w16-d16_voc.py'


@pytest.fixture
def workplace(tmp_path):
    return prepare(tmp_path)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """An uninterrupted run of two epochs: its log and its folder."""
    folder = prepare(tmp_path_factory.mktemp('whole'))
    words = 'tiny.py', '--cfg-options', 'data_root=pictures'
    done = run(sys.executable, TOOLS / 'train.py', *words, cwd=folder)
    return done.stdout, folder / 'work_dirs' / 'tiny'


def test_log_work_dir_and_checkpoints(whole):
    log, folder = whole
    assert log.startswith('Importing torch')  # what it waits for
    assert (folder / 'last_checkpoint').read_text().endswith('epoch_2.pth')
    line = next(x for x in log.splitlines() if '[2][3/3]' in x)
    assert not [x for x in SHOWN.split() if f'{x}: ' not in line]
    state = final(folder)['state_dict']
    # Six batches of four keys, around the end of a queue of 14.
    assert int(state['queue.enqueued']) == 24
    assert state['queue.keys'].shape == (14, 128)


@pytest.mark.parametrize(
    'command, answers',
    [
        ('train.py tiny.py', ['"nowhere" does not exist', '--data-root']),
        # Of a host.
        (f'train.py {MINI}', ['VOC2012" of ', '--data-root PATH']),
        (f'test.py {MINI} x.pth', ['VOC2012" of ', '--data-root PATH']),
        # Configs that cannot be meant.
        ('train.py val.py', ['error: ', 'KNNHook']),
        ('train.py list.py', ['error: ', '[dict(...)]']),
    ],
)
def test_refused_in_one_line(workplace, command, answers):
    """Before anything is trained."""
    for name, text in dict(
        val="train_dataloader = dict(dataset=dict(data_root='pictures'))\n"
        'val_dataloader = dict(batch_size=1)\n'
        'val_cfg = val_evaluator = dict()\n',
        list='model = dict(backbone=dict('
        "init_cfg=dict(type='Kaiming', layer='Conv2d')))\n",
    ).items():
        (workplace / f'{name}.py').write_text(f"_base_ = './tiny.py'\n{text}")
    done = tool(command, workplace, check=False)
    if answers[0].startswith('"nowhere'):
        assert done.returncode
        line = done.stdout.strip().splitlines()[-1]
    else:
        line = last_line(done)
    assert not [x for x in answers if x not in line], line


def test_flags_reach_the_config(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    script, said = runpy.run_path(str(TOOLS / 'train.py')), []
    build = script['build_config']
    monkeypatch.setitem(
        build.__globals__, 'print_log', lambda text, **_: said.append(text)
    )

    def read(words):
        words = f'train.py tiny.py {words}'
        monkeypatch.setattr(sys, 'argv', words.split())
        return build(script['parse_args']())

    flags = '--amp --auto-scale-lr --resume x.pth --pretrained w.pth'
    flags += ' --data-root pictures'
    cfg = read(f'{flags} --cfg-options optim_wrapper.optimizer.lr=0.5')
    # As is right for a CPU and for today's GPUs.
    assert cfg.optim_wrapper.type == 'mmdensecl.BFloat16OptimWrapper'
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    assert cfg.auto_scale_lr.enable
    assert cfg.train_dataloader.dataset.data_root == 'pictures'
    assert (cfg.resume, cfg.load_from) == (True, 'x.pth')
    assert cfg.model.backbone.init_cfg.checkpoint == 'w.pth'
    assert cfg.work_dir == os.path.join('work_dirs', 'tiny')
    # Without a file, the config's is not what is resumed.
    assert read('--resume --cfg-options load_from=y.pth').load_from is None
    assert "load_from='y.pth' of the config is not used" in said[-1]


def test_a_loop_by_iterations(workplace):
    """Not ours, and custom_hooks replaced: what it needs is there."""
    (workplace / 'iters.py').write_text(
        "_base_ = './tiny.py'\ncustom_hooks = []\n"
        'train_cfg = dict(_delete_=True, by_epoch=False, max_iters=2)\n'
        'optim_wrapper = dict(accumulative_counts=2)\n'
        'auto_scale_lr = dict(base_batch_size=8)\n'
    )
    log = train(workplace, 'iters.py --auto-scale-lr').stdout
    for name in ('UnlabeledDataHook', 'ContrastMonitorHook'):
        assert name in log.partition('Added to the hooks')[2]
    # Two iterations of four images are the eight of the config.
    assert 'Scaling the original LR by 1.0.' in log


@pytest.mark.skipif(torch.cuda.is_available(), reason='for CPU ranks')
def test_fast_in_two_processes(workplace):
    """Compiled, on views of the device; a resumed run is the same run."""
    options = '--cfg-options data_root=pictures train_dataloader.batch_size=2'

    def both(words):
        command = f'train.py fast.py {words} {options}'
        with tool_ranks(command, 2, workplace) as ranks:
            ended([x.result() for x in ranks], 0, 0)

    both('--work-dir whole')
    half = workplace / 'whole' / 'epoch_1.pth'
    both(f'--work-dir resumed --resume {half}')
    assert_same(*(workplace / x / 'epoch_2.pth' for x in ('whole', 'resumed')))
    state = final(workplace / 'whole')['state_dict']
    assert int(state['dense_queue.enqueued']) == 24
    assert all(x.isfinite().all() for x in state.values())
    # One process of the published kind can take it up, too.
    assert '[2][3/3]' in train(workplace, f'tiny.py --resume {half}').stdout


def test_shards_train_like_the_folder(whole, workplace):
    convert = 'dataset_converters/folder_to_shards.py pictures copy'
    tool(convert, workplace)
    kind = 'train_dataloader.dataset.type=mmdensecl.UnlabeledShards'
    tool(f'train.py tiny.py --cfg-options data_root=copy {kind}', workplace)
    found = workplace / 'work_dirs/tiny/epoch_2.pth'
    assert_same(whole[1] / 'epoch_2.pth', found)
    again = tool(convert, workplace, check=False)
    assert 'exists already' in last_line(again)


def test_print_config(workplace):
    options = '--cfg-options model.queue_len=77 data_root=/x'
    command = 'analysis_tools/print_config.py tiny.py --save-path whole.py'
    out = tool(f'{command} {options}', workplace).stdout
    assert "data_root='/x'" in out and 'nowhere' not in out
    assert 'queue_len=77' in out and 'CosineAnnealingLR' in out
    assert 'queue_len=77' in (workplace / 'whole.py').read_text()


def test_browse_dataset(workplace):
    """Where views are rendered hardly shows; a broken image is left out."""
    write_pictures(workplace / 'messy', 2)
    (workplace / 'messy/zzz.png').write_text('no image')
    shown = []
    for name in ('tiny', 'fast'):
        done = tool(
            f'analysis_tools/browse_dataset.py {name}.py --show-number 3 '
            f'--output-dir {name} --cfg-options data_root=messy',
            workplace,
        )
        assert "left out: 'zzz.png'" in done.stdout
        images = sorted((workplace / name).iterdir())
        assert [x.name for x in images] == ['000000.png', '000001.png']
        shown.append(np.asarray(Image.open(images[0]), float))
    assert np.abs(shown[0] - shown[1]).mean() < 1
