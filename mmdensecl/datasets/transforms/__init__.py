# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .loading import DecodeRGB
from .render import render_view
from .two_views import PackViews, TwoViews
from .view import View

__all__ = ['DecodeRGB', 'PackViews', 'TwoViews', 'View', 'render_view']
