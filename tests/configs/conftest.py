# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from functools import lru_cache

import pytest
from mmengine import fileio
from mmengine.config import Config


@pytest.fixture(scope='module')
def fast_configs():
    """Read the metafiles of a host once, not for each base of each config.

    And print configs without formatting them, which a run does four times.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'pretty_text', property(repr))
        patch.setattr(
            'mmengine.config.utils.load',
            lru_cache(maxsize=None)(fileio.load),
            raising=False,
        )
        yield
