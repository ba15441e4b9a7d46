# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .loading import DecodeRGB
from .two_views import PackViews, TwoViews, View, render_view

__all__ = ['DecodeRGB', 'PackViews', 'TwoViews', 'View', 'render_view']
