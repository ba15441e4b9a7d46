# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The report of a benchmark: what its runs measured, and how sure that is."""
from .results import (DifferentSettingsError, ResultsError, check_planned,
                      load_suite)
from .tables import compare
from .writers import print_tables, write_report

__all__ = [
    'DifferentSettingsError', 'ResultsError', 'check_planned', 'compare',
    'load_suite', 'print_tables', 'write_report'
]
