# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Pictures of what a backbone has learnt."""

from .matches import StrongMatches, draw_matches, legend, strongest_matches

__all__ = ['StrongMatches', 'draw_matches', 'legend', 'strongest_matches']
