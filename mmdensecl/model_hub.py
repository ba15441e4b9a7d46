# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Our configs by name, in mmpretrain's hub of models."""

from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def index_file() -> Path:
    """Find the `model-index.yml` of an installed package or a checkout.

    Raises:
        FileNotFoundError: There is none.
    """
    # An installed package carries it, a checkout has it beside the package.
    folders = PACKAGE / '.mim', PACKAGE.parent
    for folder in folders:
        if (folder / 'model-index.yml').is_file():
            return folder / 'model-index.yml'
    raise FileNotFoundError(
        'There is no model-index.yml in '
        f'"{folders[0]}" nor in "{folders[1]}"; install '
        'mmdensecl anew'
    )


@cache
def register_models() -> None:
    """Put our models into mmpretrain's hub, once in a process.

    Afterwards `mmpretrain.list_models` and `mmpretrain.get_model` know them.
    """
    from mmpretrain import ModelHub

    index = index_file()
    ModelHub.register_model_index(index, config_prefix=index.parent)
