# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a benchmark consists of: a list of tasks in a config file."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Union

import yaml
from mmengine.config import Config

PROTOCOLS = ('frozen', 'finetune')
LAYOUTS = ('coco', 'voc', 'voc0712', 'voc_seg', 'cityscapes', 'imagenet')
# Names that are folders as well.
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._+-]*')


def check_name(what: str, name: str) -> str:
    """Refuse a name that cannot be a folder's.

    Args:
        what (str): What is named, for the error.
        name (str): Its name.

    Returns:
        str: The name.

    Raises:
        ValueError: It has other characters than letters, digits and ``._+-``.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f'The name of a {what} becomes a folder: letters, '
                         f'digits and "._+-", got {name!r}')
    return name


@dataclass(frozen=True)
class Task:
    """One column of the table.

    Args:
        name (str): Short, becomes a folder.
        title (str): For the reader.
        model (str): For the reader.
        configs (Dict[str, Path]): Config file of each protocol.
        data (str): Folder below the benchmark's data root.
        layout (str): How that folder is laid out, one of ``LAYOUTS``.
        metrics (List[dict]): ``key`` in mmengine's log, ``name``, ``scale``
            to the printed unit, ``unit``. The first is the main one.
        published (Sequence[dict]): Others' numbers, each with ``row``,
            ``protocol``, ``metric``, ``value`` and ``source``. Defaults to
            ().
        seconds (Mapping[str, float]): About how long a run of a protocol
            takes on one CPU core, told before anything like it has run.
            Defaults to none.
        options (Mapping[str, Any]): Changes to all of its configs, as by
            ``--cfg-options``. Defaults to none.
    """
    name: str
    title: str
    model: str
    configs: Dict[str, Path]
    data: str
    layout: str
    metrics: List[dict]
    published: Sequence[dict] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A named list of tasks.

    Args:
        name (str): Short, becomes a folder.
        title (str): For the reader.
        description (str): For the reader.
        tasks (List[Task]): At least one.
    """
    name: str
    title: str
    description: str
    tasks: List[Task]

    def select(self, names: List[str]) -> 'Suite':
        """The suite with some of its tasks.

        Args:
            names (List[str]): Of tasks, all of them if empty.

        Raises:
            ValueError: There is no such task.
        """
        known = [task.name for task in self.tasks]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f'Suite "{self.name}" has no task '
                             f'{", ".join(unknown)}, only {", ".join(known)}')
        chosen = [t for t in self.tasks if not names or t.name in names]
        return Suite(self.name, self.title, self.description, chosen)


def read_published(path: Path) -> Dict[str, List[dict]]:
    """Read a table of other people's numbers.

    Args:
        path (Path): A yaml list of ``source``, ``task``, ``protocol``,
            ``metrics`` and, for each of the ``rows``, its values.

    Returns:
        Dict[str, List[dict]]: One entry a number, by task.
    """
    numbers: Dict[str, List[dict]] = {}
    for table in yaml.safe_load(path.read_text(encoding='utf-8')):
        for row, values in table['rows'].items():
            numbers.setdefault(table['task'], []).extend(
                dict(
                    row=row,
                    protocol=table['protocol'],
                    metric=metric,
                    value=float(value),
                    source=table['source'])
                for metric, value in zip(table['metrics'], values))
    return numbers


def load_suite(path: Union[str, Path]) -> Suite:
    """Read a suite's config file.

    Args:
        path (str | Path): A file with ``name``, ``title``, ``description``
            and ``tasks``, and perhaps ``published``, see
            :func:`read_published`. The files that it names are relative to
            it.

    Returns:
        Suite: What the file says.

    Raises:
        FileNotFoundError: The file, or a config that it names, is missing.
        ValueError: A task is incomplete.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no suite "{path}"')
    cfg = Config.fromfile(path)
    published = (
        read_published(path.parent /
                       cfg.published) if cfg.get('published') else {})
    tasks = []
    for entry in cfg.tasks:
        entry = entry.to_dict()
        configs = {
            protocol: (path.parent / name).resolve()
            for protocol, name in entry.pop('configs').items()
        }
        try:
            task = Task(
                configs=configs,
                published=published.get(entry.get('name'), ()),
                **entry)
        except TypeError as error:
            raise ValueError(f'A task of "{path}": {error}') from error
        check_name('task', task.name)
        wrong = set(configs) - set(PROTOCOLS)
        if wrong or task.layout not in LAYOUTS or not task.metrics:
            raise ValueError(
                f'Task "{task.name}" of "{path}" needs protocols among '
                f'{PROTOCOLS} (got {tuple(configs)}), a layout among '
                f'{LAYOUTS} (got {task.layout!r}) and at least one metric')
        for file in configs.values():
            if not file.is_file():
                raise FileNotFoundError(
                    f'Task "{task.name}" of "{path}" names "{file}", which '
                    'does not exist')
        tasks.append(task)
    return Suite(
        check_name('suite', cfg.name), cfg.title, cfg.description, tasks)
