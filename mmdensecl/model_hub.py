# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Our configs by name, in mmpretrain's hub of models."""
import logging
import sys
from functools import lru_cache
from importlib.abc import MetaPathFinder
from pathlib import Path

from mmengine.logging import print_log

HOST = 'mmpretrain'
PACKAGE = Path(__file__).resolve().parent


def index_file() -> Path:
    """The ``model-index.yml`` of an installed package or a checkout.

    Raises:
        FileNotFoundError: There is none.
    """
    # An installed package carries it, a checkout has it beside the package.
    folders = PACKAGE / '.mim', PACKAGE.parent
    for folder in folders:
        if (folder / 'model-index.yml').is_file():
            return folder / 'model-index.yml'
    raise FileNotFoundError('There is no model-index.yml in '
                            f'"{folders[0]}" nor in "{folders[1]}"; install '
                            'mmdensecl anew')


@lru_cache(maxsize=None)
def register_models() -> None:
    """Put our models into mmpretrain's hub, once in a process."""
    from mmpretrain import ModelHub
    index = index_file()
    ModelHub.register_model_index(index, config_prefix=index.parent)


class _RegisterAfterImport(MetaPathFinder):
    """Registers our models when mmpretrain has been imported.

    mmpretrain takes seconds to import and many users of this package never
    ask its hub, so ``import mmdensecl`` must not bring it.
    """

    def find_spec(self, name, path=None, target=None):
        if name != HOST:
            return None
        found = (
            finder.find_spec(name, path, target) for finder in sys.meta_path
            if finder is not self)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    try:
        register_models()
    except Exception as error:  # whatever is wrong, mmpretrain itself works
        print_log(
            'mmpretrain.get_model will not know the models of mmdensecl: '
            f'{type(error).__name__}: {error}',
            logger='current',
            level=logging.WARNING)


def register_when_imported() -> None:
    """See to it that mmpretrain's hub has our models, without importing it."""
    if HOST in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
