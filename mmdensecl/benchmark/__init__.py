# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Downstream runs of many weights, tasks and seeds, and their report."""
