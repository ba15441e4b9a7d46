# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Training runs of a tiny model, and what they leave behind."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from forks import run_script

from mmdensecl.checkpoint import load_from_local
from mmdensecl.testing import write_pictures

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'
# What the launch scripts hand on in the tests of train.py and of test.py.
TORCHRUN_WORDS = (
    '--nnodes=2',
    '--node_rank=1',
    '--master_port=1234',
    '--master_addr=10.0.0.1',
    '--nproc_per_node=8',
)
SLURM_WORDS = (
    'gpu',
    '--job-name=job',
    '--ntasks=16',
    '--ntasks-per-node=8',
    '--gres=gpu:8',
    '--time=1',
    '--mem=2',
)

CONFIG = f"""
_base_ = '{ROOT}/configs/demo/densecl_r18w16_1xb64-coslr-40e_tiles.py'
data_root = 'nowhere'
model = dict(
    queue_len=14, neck=dict(in_channels=32, hid_channels=16),
    backbone=dict(
        num_stages=2, strides=(2, 2), dilations=(1, 1), out_indices=(1, ),
        stem_channels=16, base_channels=16))
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False,
    dataset=dict(data_root=data_root))
train_dataloader['dataset']['pipeline'] = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=32),
    dict(type='mmdensecl.PackViews')]
optim_wrapper = dict(enabled=False)  # float32 on any processor
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1))
"""

# What configs/*_fast.py switch on, with a compiler that takes no time.
FAST_CONFIG = """
_base_ = './tiny.py'
model = dict(
    channels_last=True, compile_encoders=dict(backend='aot_eager'),
    data_preprocessor=dict(type='mmdensecl.DeviceViews', size=32))
optim_wrapper = dict(enabled=True)
train_dataloader = dict(collate_fn=dict(type='pseudo_collate'))
train_dataloader['dataset'] = dict(pipeline=[
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.SampleTwoCropParams'),
    dict(type='mmdensecl.PackImage')])
"""


def prepare(folder):
    write_pictures(folder / 'pictures', 12)
    (folder / 'tiny.py').write_text(CONFIG)
    (folder / 'fast.py').write_text(FAST_CONFIG)
    return folder


def checked(done, check=True):
    if check and done.returncode:
        raise AssertionError(done.stdout[-5000:])
    return done


def run(*command, cwd, env=None, check=True):
    env = dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        PYTHON=sys.executable,
        OMP_NUM_THREADS='1',
        **(env or {}),
    )
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        timeout=300,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return checked(done, check)


def tool(name, *args, cwd, env=None, check=True):
    return checked(run_script(TOOLS / name, *args, cwd=cwd, env=env), check)


def train(workplace, *flags, config='tiny.py', options=(), env=None):
    return tool(
        'train.py',
        config,
        *flags,
        '--cfg-options',
        'data_root=pictures',
        *options,
        cwd=workplace,
        env=env,
    )


def final(folder):
    return load_from_local(folder / 'epoch_2.pth')


def assert_same_weights(a, b):
    a, b = final(a)['state_dict'], final(b)['state_dict']
    assert a.keys() == b.keys()
    for name, expected in a.items():
        assert torch.equal(b[name], expected), name
