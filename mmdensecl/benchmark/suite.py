# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a benchmark consists of: a suite of tasks, or a config of a user."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from mmdensecl.engine import dicts

MODES = ('frozen', 'finetune')
LAYOUTS = ('coco', 'voc', 'voc0712', 'voc_seg', 'cityscapes', 'imagenet')
# Of the hosts' evaluators: prefix and key in the log, name, scale to percent.
EVALUATORS = {
    'IoUMetric': [('', 'mIoU', 'mIoU', 1), ('', 'aAcc', 'pixel accuracy', 1)],
    'VOCMetric': [('pascal_voc/', 'mAP', 'AP', 100)],
    'CocoMetric': [
        ('coco/', 'bbox_mAP', 'box AP', 100),
        ('coco/', 'segm_mAP', 'mask AP', 100),
    ],
    'Accuracy': [('accuracy/', 'top1', 'top-1', 1)],
}


@dataclass
class Task:
    """A column of the table."""

    name: str  # becomes a folder
    title: str
    model: str  # for the reader
    configs: dict[str, Path]  # of each mode
    # Each with its key in mmengine's log, name, scale to the printed unit,
    # unit, and what is better: 'higher' or 'lower'. The first is the main one.
    metrics: list[dict]
    data: str = ''  # folder below the data root
    layout: str = ''  # of that folder; '' for a config with paths of its own
    published: Sequence[dict] = ()  # see read_published

    def __post_init__(self) -> None:
        """Refuse what no benchmark could run."""
        check_name('task', self.name)
        other = {*self.configs} - {*MODES}
        if other or self.layout not in ('', *LAYOUTS) or not self.metrics:
            raise ValueError(
                f'task "{self.name}" needs modes among {MODES}, a layout '
                f'among {LAYOUTS} and a metric, got {tuple(self.configs)}, '
                f'{self.layout!r} and {self.metrics}'
            )
        default = dict(scale=1.0, unit='', better='higher')
        self.metrics = [{**default, **metric} for metric in self.metrics]
        for metric in self.metrics:
            if metric['better'] not in ('higher', 'lower'):
                raise ValueError(f"better is 'higher' or 'lower': {metric}")


@dataclass
class Suite:
    """A named list of tasks."""

    name: str  # becomes a folder
    title: str
    description: str
    tasks: list[Task]

    def select(self, names: Sequence[str]) -> 'Suite':
        """The suite with these of its tasks, with all for no names."""
        known = {task.name: task for task in self.tasks}
        unknown = ', '.join(name for name in names if name not in known)
        if unknown:
            raise ValueError(
                f'Suite "{self.name}" has no task {unknown}, only '
                f'{", ".join(known)}'
            )
        return replace(self, tasks=[known[x] for x in names or known])


def check_name(what: str, name: Any) -> str:
    """Refuse a name that cannot be a folder's."""
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._+-]*', str(name)):
        raise ValueError(
            f'The name of a {what} becomes a folder: letters, digits and '
            f'"._+-", got {name!r}'
        )
    return name


def read_published(path: Path) -> dict[str, list[dict]]:
    """Other people's numbers, by task.

    Args:
        path: A yaml list of ``source``, ``task``, ``mode``, ``metrics`` and
            ``rows``, a list of values for each method; with ``over`` they are
            differences to that method.
    """
    numbers: dict[str, list[dict]] = {}
    for table in yaml.safe_load(path.read_text(encoding='utf-8')):
        shared = {key: table.get(key) for key in ('mode', 'source', 'over')}
        numbers.setdefault(table['task'], []).extend(
            dict(shared, method=method, metric=metric, value=float(value))
            for method, values in table['rows'].items()
            for metric, value in zip(table['metrics'], values, strict=False)
        )
    return numbers


def load_suite(path: str | Path, metric: str | None = None) -> Suite:
    """Read a suite, or make one of a config of a user's own.

    Args:
        path: A file with ``name``, ``title``, ``description``, ``tasks`` and
            perhaps ``published``; the files that it names are relative to it.
            Or a config of mmdet, mmseg or mmpretrain.
        metric: For such a config the metric's key in mmengine's log, with
            ':lower' after it where less is better. By default those of its
            evaluators.

    Raises:
        FileNotFoundError: The file, or a config that it names, is missing.
        ValueError: A task is incomplete.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f'There is no suite or config "{path}"')
    cfg = Config.fromfile(path, import_custom_modules=False)
    if 'tasks' not in cfg:
        return _suite_of_config(cfg, path, metric)
    published: dict[str, list[dict]] = {}
    if cfg.get('published'):
        published = read_published(path.parent / cfg.published)
    tasks = []
    for entry in cfg.to_dict()['tasks']:
        configs = entry['configs'].items()
        entry['configs'] = {k: (path.parent / x).resolve() for k, x in configs}
        entry['published'] = published.get(entry.get('name'), [])
        try:
            tasks.append(Task(**entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f'A task of "{path}": {error}') from error
        for file in entry['configs'].values():
            if not file.is_file():
                raise FileNotFoundError(
                    f'"{path}" names "{file}", which does not exist'
                )
    check_name('suite', cfg.name)
    return Suite(cfg.name, cfg.title, cfg.description, tasks)


def _suite_of_config(cfg: Config, path: Path, metric: str | None) -> Suite:
    """One task, in both modes."""
    parts = ('model', 'train_cfg', 'train_dataloader', 'val_evaluator')
    lacks = [x for x in parts if not cfg.get(x)]
    if lacks:
        raise ValueError(
            f'"{path}" is neither a suite (it lacks tasks) nor a '
            f'config to train and score ({", ".join(lacks)})'
        )
    metrics = []
    for node, _ in dicts(cfg.val_evaluator):
        kind = str(node.get('type')).split('.')[-1]
        wanted = node.get('metric', 'bbox')
        wanted = [wanted] if isinstance(wanted, str) else wanted
        for prefix, key, name, scale in EVALUATORS.get(kind, ()):
            if key[:4] in {'bbox', 'segm'} - {*wanted}:
                continue
            prefix = f'{node["prefix"]}/' if node.get('prefix') else prefix
            found = dict(key=prefix + key, name=name, scale=scale, unit='%')
            metrics.append(found)
    if metric:
        key, _, better = metric.partition(':')
        metrics = [dict(key=key, name=key, better=better or 'higher')]
    if not metrics:
        raise ValueError(
            f'Which metric counts? No evaluator of "{path}" is among '
            f'{", ".join(EVALUATORS)}: name its key in the log with --metric '
            'KEY, or KEY:lower where less is better'
        )
    name, kind = check_name('config', path.stem), str(cfg.model.get('type'))
    task = Task(name, name, kind, dict.fromkeys(MODES, path), metrics)
    return Suite(name, name, f'A config of your own, {path}.', [task])
