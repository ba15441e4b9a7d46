# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Example predictions, the same pictures for every row."""
import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from PIL import Image

from .tables import Row, Table

FILE = re.compile(r'(\d+)_(gt|pred)\.png')
MAX_PICTURES = 4
HEIGHT, WIDTH = 300, 480  # at most, on the page


@dataclass(frozen=True)
class Examples:
    """Pictures side by side.

    Attributes:
        seed (int): Whose predictions they are.
        rows (List[Row]): The columns after the ground truth.
        pictures (List[Tuple]): Number of the picture, then a data address of
            the ground truth and of each row; None where there is none.
    """
    seed: int
    rows: List[Row]
    pictures: List[Tuple[int, List[Optional[str]]]]


def collect(table: Table) -> Optional[Examples]:
    """The examples of a table, of the first seed that it compares.

    Args:
        table (Table): The table.

    Returns:
        Examples | None: None where no run has any.
    """
    if not table.seeds:
        return None
    seed = table.seeds[0]
    files: Dict[str, Dict[Tuple[int, str], Path]] = {}
    for row in table.rows:
        if row.status == 'finished':
            found = _files(row.runs[seed].folder / 'predictions')
            if found:
                files[row.name] = found
    if not files:
        return None
    predicted = [{i
                  for i, kind in x if kind == 'pred'} for x in files.values()]
    shared = sorted(set.intersection(*predicted))[:MAX_PICTURES]
    pictures = []
    for index in shared:
        truth = next((x[index, 'gt']
                      for x in files.values() if (index, 'gt') in x), None)
        pictures.append((index, [
            embed(path)
            for path in (truth, *(x[index, 'pred'] for x in files.values()))
        ]))
    rows = [row for row in table.rows if row.name in files]
    return Examples(seed, rows, pictures) if pictures else None


def _files(folder: Path) -> Dict[Tuple[int, str], Path]:
    found = {}
    for path in sorted(folder.glob('*.png')):
        match = FILE.fullmatch(path.name)
        if match:
            found[int(match[1]), match[2]] = path
    return found


def embed(path: Optional[Path]) -> Optional[str]:
    """A picture as a data address, small enough for a page of many.

    It is drawn anew, so that the page holds pixels and nothing else of the
    file.

    Args:
        path (Path, optional): The file.

    Returns:
        str | None: None where there is no picture that can be read.
    """
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            picture = picture.convert('RGB')
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    picture.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, 'JPEG', quality=85, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode('ascii')
    return f'data:image/jpeg;base64,{data}'
