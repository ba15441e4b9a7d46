# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Evaluation of features: probes with labels, matching without."""
