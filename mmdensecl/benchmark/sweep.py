# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Sweeps: one pre-training for each value of a setting."""

import ast
import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS

from mmdensecl.engine import merge_options

from .data import build
from .plan import FLAGS, Checkpoint, Run, Setup, check_options, share_batch
from .suite import check_name

WARM_UP = 'mmdensecl.LambdaWarmupHook'
# The authors' advice: 10,000 of the iterations of 800 epochs of COCO.
WARM_UP_ITERS, WARM_UP_SHARE = 10000, 10000 / (800 * (118287 // 256))
# Settings that --pretrain-options must leave alone.
PRETRAIN_FLAGS = {
    **FLAGS,
    'data_root': 'use --pretrain-data',
    'load_from': 'start from weights by model.backbone.init_cfg',
    'randomness': "use --pretrain-seeds; the first is the config's",
}
del PRETRAIN_FLAGS['init_cfg']


@dataclass(frozen=True)
class Sweep:
    """A setting of the pre-training, and the values that it takes."""

    name: str  # becomes a folder and, with a value, the name of a method
    key: str  # of the config, dotted
    values: Sequence[Any]
    label: str  # of the plot's axis
    choices: Mapping[str, Any] = field(default_factory=dict)
    warm_up_from: float | None = None

    @property
    def methods(self) -> dict[str, Any]:
        """The value of each method, by the method's name."""
        found: dict[str, Any] = {}
        for value in self.values:
            text = re.sub(r'[^A-Za-z0-9._+-]+', '-', str(value)).strip('-')
            name = check_name('row', f'{self.name.split(".")[-1]}_{text}')
            if name in found:
                raise ValueError(
                    f'{found[name]!r} and {value!r} would both '
                    f'be called "{name}"'
                )
            found[name] = value
        return found

    @property
    def axis(self) -> str:
        """'linear', 'log' where numbers are far apart, or 'category'."""
        if not all(type(x) in (int, float) for x in self.values):
            return 'category'
        return (
            'log' if 0 < min(self.values) * 5 <= max(self.values) else 'linear'
        )

    @property
    def about(self) -> dict:
        """What ``suite.json`` keeps of it."""
        values = self.methods
        if self.axis == 'category':
            values = {k: str(v) for k, v in values.items()}
        return dict(
            key=self.key, label=self.label, axis=self.axis, values=values
        )


def _literal(text: str) -> Any:
    """A value as Python reads it, 1.0 as 1; what it does not is a text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def find_sweep(
    path: Path, name: str | None, key: str | None, values: Sequence[str]
) -> Sweep:
    """The sweep of a command line, by a key or by its name in a file."""
    known = yaml.safe_load(path.read_text(encoding='utf-8'))
    chosen = [_literal(x) for x in values]
    if (name is None) == (key is None) or (name and name not in known):
        raise ValueError(
            f'Name one sweep ({", ".join(known)}) or a setting of '
            f'the config with --key, got {name} and --key {key}'
        )
    if key:
        sweep = Sweep(check_name('sweep', key), key, chosen, key)
    elif name:
        sweep = Sweep(name, **known[name])
        sweep = replace(sweep, values=chosen or sweep.values)
    if len(sweep.methods) < 2:
        raise ValueError(
            f'A sweep compares at least two --values, got {values}'
        )
    other = [
        x for x in sweep.values if sweep.choices and x not in sweep.choices
    ]
    if other:
        raise ValueError(
            f'{sweep.label}: {other[0]!r} is none of '
            f'{", ".join(sweep.choices)}'
        )
    return sweep


def plan_pretraining(
    sweep: Sweep, config: str | Path, seeds: int, setup: Setup
) -> list[Run]:
    """The trainings of a sweep, for each value one or several seeds.

    Each model is built once, so that a value that it cannot take is refused
    before hours of training.

    Args:
        sweep: What differs.
        config: Of the pre-training, all else.
        seeds: Pre-training seeds of each value, from the config's on.
        setup: How; its ``data_root`` takes the place of the config's.
    """
    own = {sweep.key: 'it is what the sweep is about'}
    check_options(setup.options, PRETRAIN_FLAGS | own, '--pretrain-options')
    runs = []
    for method, value in sweep.methods.items():
        cfg = Config.fromfile(config)
        if cfg.get('load_from'):
            raise ValueError(
                f'"{config}" has load_from, which no resumed run '
                f'follows: {PRETRAIN_FLAGS["load_from"]}'
            )
        chosen = sweep.choices.get(value, value)
        options = {**setup.options, sweep.key: chosen}
        root = setup.data_root or cfg.get('data_root')
        if root:
            options['data_root'] = root = os.path.abspath(root)
        merge_options(cfg, options)
        try:
            share_batch(cfg, setup.processes)
            data = cfg.train_dataloader.dataset
            images = len(build(DATASETS, data, cfg))
            build(MODELS, cfg.model, cfg)
        except (
            AttributeError,  # of a config that lacks a part
            TypeError,
            ValueError,
            KeyError,
            OSError,
        ) as error:
            raise ValueError(
                f'"{config}" cannot be built with {sweep.key}='
                f'{value} and the images of "{root}", see '
                f'--pretrain-data: {error}'
            ) from error
        _warm_up(cfg, sweep, value, images)
        settings, _ = setup.settings(cfg, ['train_dataloader'])
        settings['images'] = images
        first = (cfg.get('randomness') or {}).get('seed') or 0
        for number in range(seeds):
            made = copy.deepcopy(cfg)
            seed = first + number
            made.randomness = dict(made.get('randomness') or {}, seed=seed)
            name = f'pretrain/{method}/pretrain{number}'
            folder = setup.work_dir / name
            run = Run(name, method, '', number, seed, folder, made, settings)
            runs.append(run)
    return runs


def _warm_up(cfg: Config, sweep: Sweep, value: Any, images: int) -> None:
    """Let a model without a global loss begin with one."""
    hooks = cfg.get('custom_hooks') or []
    if sweep.warm_up_from is None or value < sweep.warm_up_from:
        return
    if all(hook['type'] != WARM_UP for hook in hooks):
        loop, batch = cfg.train_cfg, cfg.auto_scale_lr.base_batch_size
        iters = loop.get('max_iters') or loop.max_epochs * (images // batch)
        start = min(WARM_UP_ITERS, round(WARM_UP_SHARE * iters))
        cfg.custom_hooks = [*hooks, dict(type=WARM_UP, start_iters=start)]


def weights_of(run: Run, finished: bool) -> Checkpoint:
    """What a pre-training gives: read if it is finished, else promised."""
    if finished:
        return Checkpoint.read(run.last_checkpoint)
    return Checkpoint(run.last_checkpoint, '', 'not pre-trained yet')
