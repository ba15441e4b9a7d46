# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Small pre-trainings as a user's config builds them."""

import json
import time
import uuid
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from mmdensecl.checkpoint import register_checkpoint_loader
from mmdensecl.engine.config import complete_config
from mmdensecl.testing import write_pictures

BASE = f"""
_base_ = '{Path(__file__).parents[2]}/configs/densecl_r50_8xb32-coslr-200e.py'
model = dict(
    queue_len=8, feat_dim=4,
    backbone=dict(
        depth=18, stem_channels=4, base_channels=4, strides=(1, 1, 1, 2)),
    neck=dict(in_channels=32, hid_channels=8, out_channels=4))
train_dataloader = dict(
    batch_size=4, num_workers=0, pin_memory=False,
    dataset=dict(data_root='PICTURES', pipeline=[
        dict(type='mmdensecl.DecodeRGB'),
        dict(type='mmdensecl.TwoViews', size=32),
        dict(type='mmdensecl.PackViews')]))
train_cfg = dict(max_epochs=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1))
"""


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    write_pictures(folder, 12)
    return folder


@pytest.fixture(autouse=True)
def plain_config_text(monkeypatch):
    """A run formats its config several times, which takes longer than it."""
    monkeypatch.setattr(
        'mmengine.config.config.FormatCode', lambda text, **_: (text, True)
    )


@pytest.fixture
def build(tmp_path, pictures, monkeypatch):
    """Function that builds the Runner of a child config, three iterations an
    epoch, and returns it before it trains."""
    # Runs of one second would share a folder of logs.
    clock = SimpleNamespace(
        time=count(time.time()).__next__,
        strftime=time.strftime,
        localtime=time.localtime,
    )
    monkeypatch.setattr('mmengine.runner.runner.time', clock)

    def make(text='', resume=None, check=True, runner=Runner, **changes):
        (tmp_path / 'base.py').write_text(
            BASE.replace('PICTURES', str(pictures))
        )
        child = tmp_path / 'child.py'
        child.write_text(f"_base_ = './base.py'\n{text}")
        register_checkpoint_loader()
        cfg = Config.fromfile(child)
        cfg.merge_from_dict(changes)
        if check:
            complete_config(cfg)
        cfg.work_dir = str(tmp_path / 'work')
        cfg.experiment_name = uuid.uuid4().hex
        if resume is not None:
            cfg.resume, cfg.load_from = True, str(tmp_path / 'work' / resume)
        return runner.from_cfg(cfg)

    make.work_dir = tmp_path / 'work'
    return make


@pytest.fixture
def logged():
    """Function that reads the log lines of a run, by iteration."""

    def read(runner):
        (path,) = Path(runner.work_dir, runner.timestamp).rglob('scalars.json')
        lines = [json.loads(x) for x in path.read_text().splitlines()]
        return {x['step']: x for x in lines}

    return read


@pytest.fixture
def messages(monkeypatch):
    """Warnings and infos of mmengine's logger."""
    seen = []
    original = MMLogger.callHandlers

    def record(self, entry):
        seen.append((entry.levelname, entry.getMessage()))
        original(self, entry)

    # mmengine's logger does not propagate, so caplog would see nothing.
    monkeypatch.setattr(MMLogger, 'callHandlers', record)
    return seen


@pytest.fixture
def warned(messages):
    """Function that gives the warnings until now that hold some words."""
    return lambda words='': [
        text
        for level, text in messages
        if level == 'WARNING' and words in text
    ]
