# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Which runs a benchmark consists of, each with its whole config."""
import copy
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import (Any, ClassVar, Dict, List, Mapping, Optional, Sequence,
                    Tuple, Union)

from mmengine.config import Config

import mmdensecl
from mmdensecl.checkpoint import download
from mmdensecl.engine import merge_options, set_pretrained
from mmdensecl.transfer import read_backbone
from .data import check_files, fingerprint, fit_to_data
from .suite import Suite, Task, check_name

RANDOM = 'random'
STACK = ('torch', 'torchvision', 'numpy', 'mmengine', 'mmcv', 'mmdet',
         'mmsegmentation', 'mmpretrain')
# What a downstream run does not execute; what the benchmark puts into its
# config counts as config.
NOT_RUN = ('benchmark', 'visualization', 'testing.py')
# Settings that --cfg-options must leave alone, by part or whole of the name.
OWN_FLAGS = {
    'data_root':
    'use --data-root',
    'init_cfg':
    'use --checkpoint',
    'load_from':
    'use --checkpoint',
    'resume':
    'runs resume, or start anew with --redo',
    'randomness':
    'use --seeds',
    'work_dir':
    'use --work-dir',
    'train_dataloader.batch_size':
    'processes share auto_scale_lr.base_batch_size, see --gpus',
}

# Not in any suite: where the weights of an ablation's rows come from.
PRETRAIN = Task(
    name='pretrain',
    title='Pre-training',
    model='',
    configs={},
    data='',
    layout='',
    metrics=[dict(key='loss', name='loss', unit='')])


@dataclass(frozen=True)
class Checkpoint:
    """A row's weights.

    Args:
        path (Path): The file.
        sha256 (str): Of its content; empty while it is still to be made.
        source (str): What it is, from
            :func:`mmdensecl.transfer.read_backbone`.
        arch (str, optional): Such as ``'ResNet-50'``. Defaults to None.
    """
    path: Path
    sha256: str
    source: str
    arch: Optional[str] = None

    @classmethod
    def read(cls, path: Union[str, Path]) -> 'Checkpoint':
        """Make sure that a file holds a backbone, and say which.

        Args:
            path (str | Path): Any file that ``read_backbone`` takes, or the
                address of one, which is downloaded.
        """
        if str(path).startswith(('http://', 'https://')):
            path = download(str(path))
        path = Path(path).expanduser().resolve()
        backbone = read_backbone(path)
        return cls(path, backbone.sha256, backbone.source, backbone.arch)


@dataclass(frozen=True)
class Run:
    """One training of one model, and its evaluation.

    Args:
        task (Task): What is trained.
        protocol (str): ``'frozen'`` or ``'finetune'``.
        row (str): Name of the weights.
        seed (int): Of the run.
        folder (Path): Its work_dir.
        config (Config): All that mmengine needs.
        checkpoint (Checkpoint, optional): None for random weights.
        settings (dict): What all rows of a table must share.

    Attributes:
        scored (bool): Whether it ends with an evaluation.
    """
    scored: ClassVar[bool] = True
    task: Task
    protocol: str
    row: str
    seed: int
    folder: Path
    config: Config
    checkpoint: Optional[Checkpoint]
    settings: Dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder below the suite's."""
        return f'{self.task.name}/{self.protocol}/{self.row}/seed{self.seed}'

    @property
    def waits(self) -> bool:
        """Whether its weights are still to be made."""
        return self.checkpoint is not None and not self.checkpoint.sha256

    @property
    def trains(self) -> bool:
        """Whether there is a training before the evaluation."""
        return bool(self.config.get('train_cfg'))

    @property
    def length(self) -> Tuple[int, str]:
        """Of the training, in ``'iterations'`` or ``'epochs'``."""
        loop = self.config.get('train_cfg') or {}
        if 'max_epochs' in loop:
            return loop['max_epochs'], 'epochs'
        return loop.get('max_iters', 0), 'iterations'

    @property
    def last_checkpoint(self) -> Path:
        """Of the training's end."""
        length, unit = self.length
        name = 'epoch' if unit == 'epochs' else 'iter'
        return self.folder / f'{name}_{length}.pth'

    @property
    def batch_size(self) -> int:
        """Pictures a step, over all processes."""
        return self.config.auto_scale_lr.base_batch_size if self.trains else 0

    @property
    def identity(self) -> dict:
        """All that decides its result."""
        return dict(
            settings=self.settings,
            seed=self.seed,
            checkpoint=self.checkpoint and self.checkpoint.sha256)


class Pretraining(Run):
    """The training that makes a row's weights: its last checkpoint."""
    scored: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Its folder below the ablation's."""
        return f'{self.task.name}/{self.row}'


def code_fingerprint() -> str:
    """SHA-256 over the modules of mmdensecl that a run executes."""
    root = Path(mmdensecl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob('*.py')):
        name = path.relative_to(root)
        if name.parts[0] not in NOT_RUN:
            digest.update(str(name).encode() + b'\0' + path.read_bytes())
    return digest.hexdigest()


def stack_versions() -> Dict[str, str]:
    """Versions of torch and of the hosts, either fork."""
    found = {}
    for name in STACK:
        onedl = f'onedl-{name.replace("mmdet", "mmdetection")}'
        for candidate in (name, onedl, f'{name}-lite'):
            try:
                found[candidate] = version(candidate)
            except PackageNotFoundError:
                continue
            break
    return found


def config_sha256(cfg: Config, data_root: Union[str, Path]) -> str:
    """SHA-256 of everything in a config but the place of the data.

    Args:
        cfg (Config): With its data root.
        data_root (str | Path): That place.
    """
    text = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    text = text.replace(str(data_root), '<data>')
    return hashlib.sha256(text.encode()).hexdigest()


def share_batch(cfg: Config, processes: int) -> None:
    """Split the global batch of a recipe over the processes.

    Args:
        cfg (Config): Changed in place.
        processes (int): Of the run.

    Raises:
        ValueError: They cannot share it equally.
    """
    total = cfg.auto_scale_lr.base_batch_size
    if total % processes:
        raise ValueError(
            f'"{cfg.filename}" trains on {total} pictures a step, which '
            f'{processes} processes cannot share equally')
    cfg.train_dataloader.batch_size = total // processes


def check_options(options: Mapping[str, Any],
                  flags: Mapping[str, str] = OWN_FLAGS,
                  flag: str = '--cfg-options') -> None:
    """Refuse overrides of what the benchmark itself sets and writes down.

    Args:
        options (Mapping[str, Any]): The overrides.
        flags (Mapping[str, str]): What they must leave alone, with what to
            do instead. Defaults to ``OWN_FLAGS``.
        flag (str): That they were given by. Defaults to '--cfg-options'.

    Raises:
        ValueError: A name that has a flag of its own.
    """
    for name in options:
        parts = name.split('.')
        advice = next(
            (flags[part] for part in (*parts, name) if part in flags), None)
        if advice:
            raise ValueError(f'{flag} cannot set "{name}", which the '
                             f'benchmark itself sets: {advice}')


def task_config(task: Task,
                protocol: str,
                data_root: Union[str, Path],
                processes: int = 1,
                options: Mapping[str, Any] = {}) -> Config:
    """A task's config on this data, before weights and seed are set.

    Args:
        task (Task): The task.
        protocol (str): ``'frozen'`` or ``'finetune'``.
        data_root (str | Path): Folder above ``task.data``.
        processes (int): They share the protocol's batch. Defaults to 1.
        options (Mapping[str, Any]): As ``--cfg-options``. Defaults to {}.

    Returns:
        Config: With ``custom_hooks`` that also keep example predictions.

    Raises:
        FileNotFoundError: The folder lacks what the config's data sets name.
        ValueError: The batch cannot be shared by the processes, or the
            options override what the benchmark sets.
    """
    check_options(options)
    cfg = Config.fromfile(task.configs[protocol])
    fit_to_data(cfg, Path(data_root) / task.data, task.layout)
    merge_options(cfg, task.options)
    merge_options(cfg, options)
    check_files(cfg)
    if cfg.get('train_cfg'):
        share_batch(cfg, processes)
        # The log tells the score at the end from others by its step.
        cfg.default_hooks.logger.log_metric_by_epoch = ('max_epochs'
                                                        in cfg.train_cfg)
        if task.layout != 'imagenet':
            cfg.custom_hooks = [
                *cfg.get('custom_hooks', []),
                dict(type='mmdensecl.SamplePredictionsHook')
            ]
    return cfg


def _check_depth(cfg: Config,
                 checkpoints: Mapping[str, Optional[Checkpoint]]) -> None:
    """Refuse a row that could only fail, before the others have run."""
    backbone = cfg.model.backbone
    if str(backbone.type).split('.')[-1] != 'ResNet':
        return
    expected = f'ResNet-{backbone.depth}'
    for row, checkpoint in checkpoints.items():
        arch = checkpoint and checkpoint.arch
        if arch and re.fullmatch(r'ResNet-\d+', arch) and arch != expected:
            raise ValueError(f'The row "{row}" is {arch} ("{checkpoint.path}"'
                             f'), but "{cfg.filename}" is of {expected}')


def plan_runs(suite: Suite,
              checkpoints: Mapping[str, Optional[Checkpoint]],
              protocols: Sequence[str],
              seeds: Sequence[int],
              data_root: Union[str, Path],
              work_dir: Union[str, Path],
              processes: int = 1,
              device: str = 'cpu',
              options: Mapping[str, Any] = {}) -> List[Run]:
    """All runs of a benchmark, the same task's rows after each other.

    Args:
        suite (Suite): The tasks.
        checkpoints (Mapping[str, Checkpoint | None]): The weights of each
            row, None for random ones.
        protocols (Sequence[str]): Among those that a task has.
        seeds (Sequence[int]): One run for each; the first alone for
            a probe of fixed weights.
        data_root (str | Path): Folder above the tasks' data folders.
        work_dir (str | Path): Folder of the suite's runs.
        processes (int): Of each run. Defaults to 1.
        device (str): Kind of device, a setting that rows share. Defaults to
            'cpu'.
        options (Mapping[str, Any]): As ``--cfg-options``. Defaults to {}.

    Returns:
        List[Run]: In the order of execution: seed by seed, so that a
        benchmark that is stopped has whole rows.
    """
    for row in checkpoints:
        check_name('row', row)
    planned = [(task, protocol,
                task_config(task, protocol, data_root, processes, options))
               for task in suite.tasks for protocol in protocols
               if protocol in task.configs]
    code, stack = code_fingerprint(), stack_versions()
    prepared = []
    data: Dict[Path, dict] = {}
    for task, protocol, cfg in planned:
        _check_depth(cfg, checkpoints)
        root = Path(data_root) / task.data
        if root not in data:
            data[root] = fingerprint(root)
        settings = dict(
            config_sha256=config_sha256(cfg, root),
            data=data[root],
            code=code,
            stack=stack,
            processes=processes,
            device=device)
        prepared.append((task, protocol, cfg, settings))
    runs = []
    for seed in seeds:
        for task, protocol, cfg, settings in prepared:
            if not cfg.get('train_cfg') and seed != seeds[0]:
                continue  # it would measure the same weights again
            for row, checkpoint in checkpoints.items():
                own = copy.deepcopy(cfg)
                # With its hash: the file is read again, perhaps days later.
                weights = ('none', None)
                if checkpoint:
                    weights = str(checkpoint.path), checkpoint.sha256
                set_pretrained(own, *weights)
                own.randomness = dict(own.get('randomness') or {}, seed=seed)
                folder = Path(
                    work_dir) / task.name / protocol / row / f'seed{seed}'
                runs.append(
                    Run(task, protocol, row, seed, folder, own, checkpoint,
                        settings))
    return runs
