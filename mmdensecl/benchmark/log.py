# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
from pathlib import Path
from typing import Iterator


def log_rows(folder: Path) -> Iterator[dict]:
    """mmengine's log of a run, over all its starts, in order.

    Args:
        folder (Path): Its work_dir.
    """
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        text = path.read_text(encoding='utf-8', errors='replace')
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut off where the run was stopped
            if isinstance(row, dict):
                yield row
