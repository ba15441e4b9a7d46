# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Transforms of unlabeled images."""

from .loading import DecodeRGB
from .render import View, render_view
from .two_views import PackImage, PackViews, SampleTwoCropParams, TwoViews

__all__ = [
    'DecodeRGB',
    'SampleTwoCropParams',
    'PackImage',
    'PackViews',
    'TwoViews',
    'View',
    'render_view',
]
