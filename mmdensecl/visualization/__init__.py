# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Pictures of what a backbone has learnt."""

from .matches import (
    Panel,
    StrongMatches,
    draw_matches,
    legend,
    match_sheet,
    strongest_matches,
)

__all__ = [
    'Panel',
    'StrongMatches',
    'draw_matches',
    'legend',
    'match_sheet',
    'strongest_matches',
]
