# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Data preprocessors."""

from .device_views import DeviceViews
from .view_rendering import render_views

__all__ = ['DeviceViews', 'render_views']
