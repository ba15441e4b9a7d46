# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
from pathlib import Path
from typing import Iterator, List, Optional


def log_files(folder: Path) -> List[Path]:
    """mmengine's logs of a run, one for each start, in order.

    Args:
        folder (Path): Its work_dir.
    """
    return sorted(folder.glob('*/vis_data/scalars.json'))


def log_rows(folder: Path) -> Iterator[dict]:
    """The rows of all these logs.

    Args:
        folder (Path): The run's work_dir.
    """
    for path in log_files(folder):
        yield from rows_of(path)


def rows_of(path: Path, broken: Optional[List[str]] = None) -> Iterator[dict]:
    """The rows of one log.

    Args:
        path (Path): The file.
        broken (List[str], optional): Given the lines that are no rows, such
            as one cut off where the run was stopped. Defaults to None.
    """
    text = path.read_text(encoding='utf-8', errors='replace')
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        elif broken is not None:
            broken.append(line)
