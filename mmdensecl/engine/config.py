# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import Any, Mapping

from mmengine.config import Config, ConfigDict


def override_data_root(cfg: Config, data_root: str) -> None:
    """Move a config to another data folder.

    A config's ``data_root`` is spliced into other values when the file is
    read, so setting the variable afterwards would do nothing. Here every
    value that is the old root, or a path below it, moves too.

    Args:
        cfg (Config): Changed in place; must define ``data_root``.
        data_root (str): The new folder.

    Raises:
        KeyError: The config has no ``data_root`` to replace.
    """
    old = cfg.get('data_root')
    if not old:
        raise KeyError(
            f'data_root={data_root} was asked for, but {cfg.filename} defines '
            'no data_root. Set the paths of its dataloaders one by one.')
    old, new = old.rstrip('/'), str(data_root).rstrip('/') or '/'

    def moved(value: Any) -> Any:
        if isinstance(value, str):
            is_below = value == old or value.startswith(f'{old}/')
            return new + value[len(old):] if is_below else value
        if isinstance(value, (ConfigDict, dict)):
            for key in value:
                value[key] = moved(value[key])
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(moved(item) for item in value)
        return value

    for key in list(cfg.keys()):
        cfg[key] = moved(cfg[key])


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Merge the ``--cfg-options`` of a command line.

    Args:
        cfg (Config): Changed in place.
        options (Mapping[str, Any]): Dotted names and values. ``data_root``
            goes through :func:`override_data_root`, the others through
            :meth:`mmengine.config.Config.merge_from_dict`.
    """
    options = dict(options)
    if 'data_root' in options:
        override_data_root(cfg, options.pop('data_root'))
    cfg.merge_from_dict(options)


def set_pretrained(cfg: Config, checkpoint: str) -> None:
    """Let a downstream model start from another pre-training.

    Args:
        cfg (Config): Changed in place: every init_cfg of the type
            ``mmdensecl.PretrainedBackbone`` in ``cfg.model``.
        checkpoint (str): What they load. 'none' takes them out, which leaves
            the host's own random initialisation.

    Raises:
        KeyError: The model has no such init_cfg.
    """

    def is_ours(value: Any) -> bool:
        name = value.get('type') if isinstance(value, dict) else None
        name = getattr(name, '__name__', name)
        return str(name).split('.')[-1] == 'PretrainedBackbone'

    def visit(node: Any) -> int:
        if isinstance(node, (list, tuple)):
            return sum(map(visit, node))
        if not isinstance(node, dict):
            return 0
        entries = node.get('init_cfg')
        entries = entries if isinstance(entries, (list, tuple)) else [entries]
        ours = [entry for entry in entries if is_ours(entry)]
        if ours and checkpoint == 'none':
            others = [entry for entry in entries if not is_ours(entry)]
            node.pop('init_cfg')
            if others:
                node['init_cfg'] = others
        for entry in ours:
            entry['checkpoint'] = checkpoint
        return len(ours) + sum(map(visit, node.values()))

    if not visit(cfg.get('model')):
        raise KeyError(
            f'--pretrained {checkpoint}: the model of {cfg.filename} has no '
            'place for it. Add to its backbone (and to the shared_head of a '
            "C4 detector) init_cfg=dict(type='mmdensecl.PretrainedBackbone', "
            "checkpoint='')")
