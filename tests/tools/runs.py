# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Training runs of a tiny model, and what they leave behind."""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from forks import run_script

from mmdensecl.benchmark.runner import free_port
from mmdensecl.checkpoint import load_from_local
from mmdensecl.testing import write_pictures

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'

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
    """Write pictures and configs: three iterations an epoch, two epochs."""
    write_pictures(folder / 'pictures', 12)
    (folder / 'tiny.py').write_text(CONFIG)
    (folder / 'fast.py').write_text(FAST_CONFIG)
    return folder


def environment(**changes):
    """For a process of its own, with broken_parts.py at hand."""
    return dict(
        os.environ,
        PYTHONPATH=f'{ROOT}{os.pathsep}{Path(__file__).parent}',
        PYTHON=sys.executable,
        OMP_NUM_THREADS='1',
        **changes,
    )


def checked(done, check=True):
    if check and done.returncode:
        raise AssertionError(done.stdout[-5000:])
    return done


def run(*command, cwd, env=None, check=True):
    """Run a command as a process from scratch."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment(**(env or {})),
        timeout=300,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return checked(done, check)


def tool(command, cwd, env=None, check=True):
    """Run ``python tools/command`` as a fork that has less to import."""
    script, *words = shlex.split(command)
    done = run_script(TOOLS / script, *words, cwd=cwd, env=env)
    return checked(done, check)


def train(folder, words='tiny.py', options='', **kwargs):
    """Run tools/train.py with the pictures of a folder."""
    options = f'--cfg-options data_root=pictures {options}'
    return tool(f'train.py {words} {options}', folder, **kwargs)


@contextmanager
def tool_ranks(command, count, cwd, **env):
    """Start a tool as so many ranks, as Slurm does: their futures."""
    env.update(
        WORLD_SIZE=str(count),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(free_port()),
    )

    def rank(number):
        own = dict(env, RANK=str(number), LOCAL_RANK=str(number))
        return tool(f'{command} --launcher pytorch', cwd, own, check=False)

    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(rank, number) for number in range(count)]


def ended(done, *codes):
    """What the first rank said, after a look at all exit codes."""
    assert [x.returncode for x in done] == list(codes), done[0].stdout[-5000:]
    return done[0].stdout


def last_line(done):
    """The one line with which a tool refuses to work."""
    assert done.returncode == 2, done.stdout[-5000:]
    assert 'Traceback' not in done.stdout
    return done.stdout.strip().splitlines()[-1]


def final(folder):
    return load_from_local(folder / 'epoch_2.pth')


def flat(node, path=''):
    """The leaves of nested dicts and lists, by their path."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    else:
        return {path: node}
    leaves = {}
    for key, value in items:
        leaves.update(flat(value, f'{path}.{key}'))
    return leaves


def assert_same(a, b, parts=('state_dict', 'optimizer', 'param_schedulers')):
    """Bit for bit all that two checkpoint files hold to go on from."""
    a, b = load_from_local(a), load_from_local(b)
    old, new = (flat({x: each[x] for x in parts}) for each in (a, b))
    assert old.keys() == new.keys() and len(old) > 20
    for key, x in old.items():
        same = torch.equal if torch.is_tensor(x) else lambda a, b: a == b
        assert same(x, new[key]), key
