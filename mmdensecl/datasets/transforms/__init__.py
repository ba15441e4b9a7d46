# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from .loading import DecodeRGB
from .render import render_view
from .two_views import DrawViews, PackPicture, PackViews, TwoViews
from .view import View

__all__ = [
    'DecodeRGB', 'DrawViews', 'PackPicture', 'PackViews', 'TwoViews', 'View',
    'render_view'
]
