# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Reads what a training run has logged, says what it means, and draws it."""
from .page import as_html
from .plots import save_picture
from .run_log import RunLog, read_run, read_runs
from .verdict import Finding, in_one_line, judge, key_numbers

__all__ = [
    'Finding', 'RunLog', 'as_html', 'in_one_line', 'judge', 'key_numbers',
    'read_run', 'read_runs', 'save_picture'
]
