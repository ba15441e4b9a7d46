# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Which runs a benchmark consists of, each with its whole config."""

import ast
import copy
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import distributions
from itertools import product
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from mmdensecl.checkpoint import download
from mmdensecl.engine import (
    check_weight_sources,
    dicts,
    merge_options,
    override_data_root,
    set_pretrained,
)
from mmdensecl.transfer import PretrainedBackbone, read_backbone

from .data import PARTS, build, datasets, files_of, fingerprint, fit_to_data
from .suite import Suite, Task, check_name

ROOT = Path(__file__).parents[2]
RANDOM = 'random'
STACK = '(onedl-)?mm(engine|cv(-lite)?|det(ection)?|segmentation|pretrain)'
# Where the registries look for types, see mmdensecl/registry.py.
IMPORTED = (
    'models',
    'datasets',
    'engine',
    'transfer',
    'evaluation',
    'benchmark.hooks',
)
# Settings that --cfg-options must leave alone, and what to do instead.
FLAGS = {
    'data_root': 'use --data-root',
    'init_cfg': 'use --checkpoint',
    'load_from': 'use --checkpoint',
    'resume': 'runs resume, or start anew with --redo',
    'randomness': 'use --seeds',
    'work_dir': 'use --work-dir',
    'train_dataloader.batch_size': 'processes share the batch, see --gpus',
}


@dataclass(frozen=True)
class Checkpoint:
    """Weights: a file, its hash ('' while it is to be made), what it is."""

    path: Path
    sha256: str
    source: str
    arch: str | None = None

    @classmethod
    def read(cls, path: str | Path) -> 'Checkpoint':
        """Make sure that a file or an address holds a backbone."""
        if str(path).startswith(('http://', 'https://')):
            path = download(str(path))
        path = Path(path).expanduser().resolve()
        found = read_backbone(path)
        return cls(path, found.sha256, found.source, found.arch)


@dataclass(frozen=True)
class Run:
    """One training of one model, and its evaluation."""

    name: str  # its folder below the suite's
    method: str  # name of the weights
    mode: str  # 'frozen' or 'finetune'
    # Which of the method's checkpoints, from 0; None of random weights, which
    # are drawn anew by each seed.
    pretrain_seed: int | None
    seed: int
    folder: Path  # its work_dir
    config: Config
    settings: dict[str, Any]  # that all runs of a table share
    # None for a pre-training, whose result is its last checkpoint.
    task: Task | None = None
    checkpoint: Checkpoint | None = None  # None for random weights
    missing: Sequence[str] = field(default=())  # files of its datasets

    @property
    def key(self) -> dict:
        """What tells it from the other runs of a suite."""
        task = self.task.name if self.task else ''
        names = ('method', 'mode', 'pretrain_seed', 'seed')
        return dict(task=task, **{x: getattr(self, x) for x in names})

    @property
    def waits(self) -> bool:
        """Whether its weights are still to be made."""
        return self.checkpoint is not None and not self.checkpoint.sha256

    @property
    def length(self) -> tuple[int, str]:
        """Of the training, in 'iters' or 'epochs'; 0 of a probe."""
        loop = self.config.get('train_cfg') or {}
        if 'max_epochs' in loop:
            return loop['max_epochs'], 'epochs'
        return loop.get('max_iters', 0), 'iters'

    @property
    def last_checkpoint(self) -> Path:
        """Of the training's end."""
        length, unit = self.length
        return self.folder / f'{unit[:-1]}_{length}.pth'

    @property
    def identity(self) -> dict:
        """All that decides its result."""
        sha256 = self.checkpoint.sha256 if self.checkpoint else None
        return dict(key=self.key, settings=self.settings, sha256=sha256)


@dataclass(frozen=True)
class Setup:
    """How all runs of a benchmark are made."""

    work_dir: Path  # of the suite or sweep
    # Folder above each task's; None leaves the paths of a user's own config.
    data_root: str | Path | None = None
    # They share the batch of a suite's protocol; of a config of a user's own
    # each has the batch that stands there.
    processes: int = 1
    device: str = 'cpu'  # its kind
    options: Mapping[str, Any] = field(default_factory=dict)  # --cfg-options
    prints: dict[str, dict] = field(default_factory=dict)  # of data, by files

    @cached_property
    def shared(self) -> dict:
        """Settings that all of its runs have."""
        shared = dict(code=code_fingerprint(), stack=stack_versions())
        return dict(shared, processes=self.processes, device=self.device)

    def settings(self, cfg: Config, parts: Sequence[str] = PARTS) -> tuple:
        """Settings of a config's runs, and what of its data is missing."""
        files: dict[str, bool] = {}
        for node in datasets(cfg, parts):
            files.update(files_of(node))
        missing = [x for x in files if not (os.path.exists(x) or '{' in x)]
        key = str(sorted(files))
        if not missing and key not in self.prints:
            self.prints[key] = fingerprint(files)
        text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
        # The place of the data is no setting.
        text = text.replace(str(self.data_root or cfg.get('data_root')), '')
        settings = dict(self.shared, data=self.prints.get(key))
        settings['config'] = hashlib.sha256(text.encode()).hexdigest()
        return settings, missing


def code_fingerprint() -> str:
    """SHA-256 of the code that a run imports, without its comments."""
    finder = ModuleFinder(path=[str(ROOT)])
    for name in IMPORTED:
        finder.import_hook(f'mmdensecl.{name}')
    digest = hashlib.sha256()
    for _, module in sorted(finder.modules.items()):
        file = getattr(module, '__file__', None)  # a package may have none
        if file:
            source = Path(file).read_text(encoding='utf-8')
            digest.update(ast.unparse(ast.parse(source)).encode() + b'\0')
    return digest.hexdigest()


def stack_versions() -> dict[str, str]:
    """Versions of Python, torch and the hosts, either fork."""
    names = {x.name.lower(): x.version for x in distributions()}
    wanted = re.compile(f'torch|torchvision|numpy|{STACK}')
    found = {k: v for k, v in names.items() if wanted.fullmatch(k)}
    return dict(found, python=platform.python_version())


def share_batch(cfg: Config, processes: int) -> None:
    """Split the batch of a recipe over the processes of a run."""
    total = cfg.auto_scale_lr.base_batch_size
    if total % processes:
        raise ValueError(
            f'"{cfg.filename}" trains on {total} images a step, which '
            f'{processes} processes cannot share equally'
        )
    cfg.train_dataloader.batch_size = total // processes


def check_options(options: Mapping, flags: Mapping, flag: str) -> None:
    """Refuse overrides of what the benchmark sets and writes down itself."""
    for name in options:
        for part in {*name.split('.'), name} & {*flags}:
            raise ValueError(
                f'{flag} cannot set "{name}", which the benchmark sets '
                f'itself: {flags[part]}'
            )


def task_config(task: Task, mode: str, setup: Setup) -> Config:
    """A task's config on its data, before weights and seed are set."""
    check_options(setup.options, FLAGS, '--cfg-options')
    cfg = Config.fromfile(task.configs[mode], import_custom_modules=False)
    if task.layout:
        fit_to_data(cfg, Path(setup.data_root or '', task.data), task.layout)
    elif setup.data_root:
        override_data_root(cfg, str(setup.data_root))
    merge_options(cfg, setup.options)
    hooks = [*(cfg.get('custom_hooks') or [])]
    if not task.layout:
        parts = _place_weights(cfg)
        if mode == 'frozen':
            hooks.append(dict(type='mmdensecl.FreezeHook', parts=parts))
            cfg.find_unused_parameters = True
    if not cfg.get('train_cfg'):
        return cfg
    if task.layout:
        share_batch(cfg, setup.processes)
    _keep_results(cfg)
    hooks.append(dict(type='mmdensecl.PredictedClassesHook'))
    drawer = str((cfg.get('visualizer') or {}).get('type'))
    if drawer.endswith(('DetLocalVisualizer', 'SegLocalVisualizer')):
        hooks.append(dict(type='mmdensecl.SamplePredictionsHook'))
    cfg.custom_hooks = hooks
    return cfg


def _keep_results(cfg: Config) -> None:
    """Let a training write what a result is read from."""
    # What a ConfigDict's setdefault returns is not what it keeps.
    default = dict(cfg.get('default_hooks') or {})
    by_epoch = 'max_epochs' in cfg.train_cfg
    # The log tells the score at the end from others by its step.
    logger = dict(type='LoggerHook') | dict(default.get('logger') or {})
    default['logger'] = dict(logger, log_metric_by_epoch=by_epoch)
    quarter = max(1, cfg.train_cfg.get('max_iters', 0) // 4)
    saver = dict(type='CheckpointHook', by_epoch=by_epoch)
    saver['interval'] = 1 if by_epoch else quarter
    default['checkpoint'] = saver | dict(default.get('checkpoint') or {})
    cfg.default_hooks = default
    if cfg.get('visualizer'):
        backends = [*(cfg.visualizer.get('vis_backends') or [])]
        if not any('LocalVisBackend' in str(x['type']) for x in backends):
            backends.append(dict(type='LocalVisBackend'))
        cfg.visualizer.vis_backends = backends


def _place_weights(cfg: Config) -> list[str]:
    """Let a config of a user's own start from a checkpoint.

    Returns:
        Names of the parts of the model that take its weights.
    """
    parts = {'backbone': cfg.model.get('backbone')}
    if not isinstance(parts['backbone'], dict):
        raise ValueError(f'The model of "{cfg.filename}" has no backbone')
    shared = (cfg.model.get('roi_head') or {}).get('shared_head')
    if shared:  # of a C4 detector, the last stage of its ResNet
        parts['roi_head.shared_head'] = shared
    for part in (cfg.model, *parts.values()):
        part.pop('pretrained', None)
    for part in parts.values():
        if 'PretrainedBackbone' not in str(part.get('init_cfg')):
            kind = 'mmdensecl.PretrainedBackbone'
            part['init_cfg'] = dict(type=kind, checkpoint=None)
    check_weight_sources(cfg, 'FILE')
    return [*parts]


def plan_runs(
    suite: Suite,
    methods: Mapping[str, Sequence[Checkpoint | None]],
    modes: Sequence[str],
    seeds: Sequence[int],
    setup: Setup,
) -> list[Run]:
    """All runs of a benchmark.

    Args:
        suite: The tasks.
        methods: The checkpoints of each row of the table, one for each
            pre-training seed; [None] for random weights.
        modes: Among those that a task has.
        seeds: One run for each; the first alone for a probe of fixed weights.
        setup: How.

    Returns:
        Seed by seed, so that a benchmark that is stopped has whole rows.
    """
    units = [(k, i, c) for k, x in methods.items() for i, c in enumerate(x)]
    runs = []
    for task, mode in product(suite.tasks, modes):
        if mode not in task.configs:
            continue
        cfg = task_config(task, mode, setup)
        settings, missing = setup.settings(cfg)
        # Further runs of a probe would measure the same weights again.
        own_seeds = seeds if cfg.get('train_cfg') else seeds[:1]
        for seed, (method, number, checkpoint) in product(own_seeds, units):
            own, part = copy.deepcopy(cfg), ''
            if checkpoint:
                # With its hash: the file is read again, days later.
                set_pretrained(own, str(checkpoint.path), checkpoint.sha256)
                part = f'pretrain{number}/'
            else:
                set_pretrained(own, 'none')
            own.randomness = dict(own.get('randomness') or {}, seed=seed)
            check_name('method', method)
            name = f'{task.name}/{mode}/{method}/{part}seed{seed}'
            which = number if checkpoint else None
            key = name, method, mode, which, seed, setup.work_dir / name
            runs.append(Run(*key, own, settings, task, checkpoint, missing))
    return sorted(runs, key=lambda run: run.seed)


def check_fit(runs: Sequence[Run]) -> None:
    """Load each checkpoint into each backbone, before the first run.

    Raises:
        ValueError: It is of another architecture, width or stem.
    """
    done = set()
    for run in runs:
        if run.checkpoint is None or run.waits:
            continue
        for node, _ in dicts(run.config.model):
            init = dict(node.get('init_cfg') or {})
            if not str(init.pop('type', '')).endswith('PretrainedBackbone'):
                continue
            part = {k: v for k, v in node.items() if k != 'init_cfg'}
            key = run.checkpoint.sha256, json.dumps(part, default=str)
            if key not in done:
                PretrainedBackbone(**init)(build(MODELS, part, run.config))
                done.add(key)
