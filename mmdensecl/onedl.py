# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What the onedl fork of the hosts does not do by itself."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from mmengine.config.utils import MODULE2PACKAGE


def let_configs_name_mmseg() -> None:
    """Let `mmseg::...` in a config find the fork's mmsegmentation.

    mmengine looks for a package or module mmsegmentation (also in the fork,
    as of onedl-mmengine 0.10.12), and the fork's package is called
    onedl-mmsegmentation. Its module is mmseg as ever.
    """
    try:
        version('mmsegmentation')
    except PackageNotFoundError:
        if find_spec('mmseg'):
            MODULE2PACKAGE['mmseg'] = 'mmseg'
