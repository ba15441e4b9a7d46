# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Changes to configs, checked."""

import ast
import inspect
import logging
import os
import os.path as osp
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import print_log
from mmengine.runner import Runner

from .loader import drop_worker_options


class ConfigError(ValueError):
    """A config that cannot be meant, with what to write instead."""


def override_data_root(cfg: Config, data_root: str) -> None:
    """Move a config to another data folder.

    A config's `data_root` is spliced into other values when the file is
    read, so setting the variable afterwards would do nothing. Here every
    value that is the old root, or a path below it, moves too.

    Args:
        cfg: Changed in place; must define `data_root`.
        data_root: The new folder.

    Raises:
        KeyError: The config has no `data_root` to replace, or no path below
            it, so that nothing would change.
    """
    old = cfg.get('data_root')
    if not old:
        raise KeyError(
            f'data_root={data_root} was asked for, but {cfg.filename} defines '
            'no data_root. Set the paths of its dataloaders one by one.'
        )
    old, new = old.rstrip('/'), str(data_root).rstrip('/') or '/'
    changed = 0

    def moved(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, str):
            is_below = value == old or value.startswith(f'{old}/')
            changed += is_below
            return new + value[len(old) :] if is_below else value
        if isinstance(value, (ConfigDict, dict)):
            for key in value:
                value[key] = moved(value[key])
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(moved(item) for item in value)
        return value

    for key in list(cfg.keys()):
        cfg[key] = moved(cfg[key])
    if changed < 2:  # data_root itself is one
        raise KeyError(
            f'data_root={data_root} was asked for, but nothing in '
            f'{cfg.filename} lies below its data_root, "{old}". Set the paths '
            'of its dataloaders, such as train_dataloader.dataset.data_root.'
        )


# What the Runner reads from its config beside its own parameters.
READ_BY_RUNNER = (
    'activation_checkpointing',
    'compile',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'sync_bn',
)
# And what is read of these.
READ_INSIDE = dict(
    auto_scale_lr={'base_batch_size', 'enable'},
    env_cfg={'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
)


def parse_options(cfg: Config, options: Sequence[str]) -> dict[str, Any]:
    """Read the `KEY=VALUE` of a command line.

    Where the config has a string now, the value is taken literally: mmengine's
    parser would drop spaces, read `2024_01` as a number and split at commas.
    In the place of 'auto' a number or bool is one.

    Args:
        cfg: What the options will change.
        options: As typed.

    Returns:
        Dotted names and values.

    Raises:
        ValueError: An option is not of that form.
    """
    parser = ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction)
    parsed = {}
    for option in options:
        name, equals, value = option.partition('=')
        if not equals or not name:
            raise ValueError(
                f'--cfg-options takes KEY=VALUE, got {option!r}. Quote values '
                'with spaces: "data_root=/data/my images"'
            )
        present = _present_value(cfg, name)
        if isinstance(present, str) and present != 'auto':
            if len(value) > 1 and value[0] == value[-1] in '"\'':
                value = value[1:-1]
            parsed[name] = value
        else:
            args = parser.parse_args(['--options', option])
            parsed.update(args.options)
    return parsed


def _present_value(cfg: Config, name: str) -> Any:
    """The value of a dotted name, None where there is none."""
    node: Any = cfg
    for part in name.split('.'):
        if isinstance(node, (list, tuple)) and part.isdigit():
            node = node[int(part)] if int(part) < len(node) else None
        elif isinstance(node, (Config, dict)):
            node = node.get(part)
        else:
            return None
    return node


# Variables that configs splice into a part of them, and the key there.
SPLICED = dict(
    data_root=('train_dataloader', 'data_root'),
    train_pipeline=('train_dataloader', 'pipeline'),
    val_pipeline=('val_dataloader', 'pipeline'),
    test_pipeline=('test_dataloader', 'pipeline'),
)


def check_variables(cfg: Config) -> None:
    """See that a `data_root` or pipeline of the config is the one it uses.

    A base config has put its own value into its dataloaders already, so that
    a child's new value would change nothing.

    Args:
        cfg: As it was read.

    Raises:
        ConfigError: It is not, with the line to write.
    """
    assigned = _assigned_in(cfg.filename)
    for name, (part, key) in SPLICED.items():
        new = cfg.get(name)
        used = ((cfg.get(part) or {}).get('dataset') or {}).get(key)
        if not {'_base_', name} <= assigned or type(used) is not type(new):
            continue
        rest = {k: x for k, x in cfg.items() if k != name}
        values = [x for node, _ in dicts(rest) for x in node.values()]
        if not any(x == new or _is_below(x, new) for x in values):
            raise ConfigError(
                f'{cfg.filename} sets {name}, but {part}.dataset.{key} is '
                f'still what a base config has put there: {_short(used)}, not '
                f'{_short(new)}. Add the line {part} = '
                f'dict(dataset=dict({key}={name}))'
                + (
                    ', or leave it out and use --data-root'
                    if name == 'data_root'
                    else ''
                )
            )


def _is_below(path: Any, root: Any) -> bool:
    return (
        isinstance(path, str)
        and isinstance(root, str)
        and f'{path}/'.startswith(f'{root.rstrip("/")}/')
    )


def _short(value: Any) -> str:
    """A path, or of a pipeline the names of its transforms."""
    names = [type_name(x) for x in value] if type(value) is list else value
    return repr(names)


def _assigned_in(filename: str | None) -> set[str]:
    """Variables that a config file itself sets, not a base of it."""
    if not filename or not filename.endswith('.py'):
        return set()
    with open(filename, encoding='utf-8') as file:
        body = ast.parse(file.read()).body
    return {
        target.id
        for node in body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Merge the `--cfg-options` of a command line.

    Args:
        cfg: Changed in place.
        options: Dotted names and values. `data_root` goes through
            :func:`override_data_root`, the others through
            :meth:`mmengine.config.Config.merge_from_dict`.

    Raises:
        KeyError: Nothing would read what is set.
    """
    options = dict(options)
    if 'data_root' in options:
        override_data_root(cfg, options.pop('data_root'))
    for name in options:
        _check_is_read(cfg, name)
    cfg.merge_from_dict(options)


def _check_is_read(cfg: Config, name: str) -> None:
    """See that an option is part of something that a run reads."""
    first, *keys = name.split('.')
    read = {*inspect.signature(Runner).parameters, *READ_BY_RUNNER}
    read -= {'cfg', 'launcher'}
    own = (cfg.get('model') or {}).get('data_preprocessor')
    if first == 'launcher':
        hint = 'It is a flag: --launcher'
    elif first == 'data_preprocessor' and own:
        hint = f'The model has its own: is "model.{name}" meant?'
    elif first in READ_INSIDE and {*keys[:1]} - READ_INSIDE[first]:
        hint = _nearest(keys[0], READ_INSIDE[first], f'{first}.')
    elif first in read:
        return
    elif first in cfg:
        raise KeyError(
            f'--cfg-options {name}: "{first}" is a variable of {cfg.filename},'
            ' which was copied where it is used as the file was read. Set '
            'those; tools/analysis_tools/print_config.py shows them'
        )
    else:
        hint = _nearest(first, read)
    raise KeyError(f'--cfg-options {name}: nothing reads it. {hint}')


def _nearest(name: str, read: set[str], prefix: str = '') -> str:
    """What is meant by a name that nothing reads."""
    near = get_close_matches(name, read, n=1)
    if near:
        return f'Is "{prefix}{near[0]}" meant?'
    if prefix:
        return f'{prefix[:-1]} has {", ".join(sorted(read))}'
    return (
        "Its first part has to be one of the Runner's, such as model, "
        'train_dataloader, optim_wrapper or default_hooks'
    )


def set_pretrained(
    cfg: Config, checkpoint: str, sha256: str | None = None
) -> None:
    """Let a model start from another pre-training.

    Args:
        cfg: Changed in place: every init_cfg of the type
            `mmdensecl.PretrainedBackbone` in `cfg.model`; of a pre-training
            the init_cfg of its backbone, whose key encoder starts from the
            same.
        checkpoint: What they load. 'none' takes them out, which leaves the
            host's own random initialisation.
        sha256: Of the checkpoint, see `PretrainedBackbone`. Defaults to None:
            the config's where it names the same checkpoint, and none where
            that is of another file.

    Raises:
        KeyError: The model has no such init_cfg.
    """
    found = False
    for node, _ in dicts(cfg.get('model')):
        entries = initialisers(node.get('init_cfg'))
        ours = [x for x in entries if type_name(x) == 'PretrainedBackbone']
        if not ours:
            continue
        found = True
        if checkpoint == 'none':
            others = [x for x in entries if x not in ours]
            node.pop('init_cfg')
            if others:
                node['init_cfg'] = others
            _warn_of_frozen(node)
        for entry in ours:
            _start_from(entry, checkpoint, sha256)
    model = cfg.get('model') or {}
    if not found and str(model.get('type')).startswith('mmdensecl.'):
        found = True
        if checkpoint != 'none':
            entry = dict(type='mmdensecl.PretrainedBackbone')
            _start_from(entry, checkpoint, sha256)
            model['backbone']['init_cfg'] = entry
    if found and checkpoint == 'none':
        print_log(
            '--pretrained none: the backbone starts from random weights',
            logger='current',
        )
    if not found:
        raise KeyError(
            f'--pretrained {checkpoint}: the model of {cfg.filename} has no '
            'place for it. Add to its backbone (and to the shared_head of a '
            "C4 detector) init_cfg=dict(type='mmdensecl.PretrainedBackbone', "
            "checkpoint='')"
        )


def _warn_of_frozen(backbone: dict) -> None:
    """Say which parts are to stay random."""
    frozen = backbone.get('frozen_stages', -1)
    if frozen >= 0:
        print_log(
            f'Random weights with frozen_stages={frozen}: the stem and '
            f'{frozen} stages stay random and are never trained, nor are the '
            'statistics of their batch norms. Unless that is meant, set '
            'frozen_stages=-1',
            logger='current',
            level=logging.WARNING,
        )


def _start_from(entry: dict, checkpoint: str, sha256: str | None) -> None:
    """Set the file of an init_cfg; another file's sha256 goes."""
    if entry.get('checkpoint') != checkpoint:
        entry.pop('sha256', None)
    entry['checkpoint'] = checkpoint
    if sha256 is not None:
        entry['sha256'] = sha256


def check_weight_sources(cfg: Config, pretrained: str | None = None) -> None:
    """Refuse a config that would overwrite what PretrainedBackbone loads.

    mmengine loads `load_from`, and a `Pretrained` of an outer part of the
    model, afterwards and without a word of it.

    Args:
        cfg: Of a run that initialises its model.
        pretrained: What :func:`set_pretrained` will be called with.

    Raises:
        ValueError: Two files are to give the same weights.
    """
    for node, outer in dicts(cfg.get('model')):
        for entry in initialisers(node.get('init_cfg')):
            if type_name(entry) != 'PretrainedBackbone':
                continue
            ours = (
                f'--pretrained {pretrained}'
                if pretrained
                else 'PretrainedBackbone with the checkpoint '
                f'{entry.get("checkpoint")!r}'
            )
            others = [
                f'init_cfg={dict(x)}'
                for part in outer
                for x in initialisers(part.get('init_cfg'))
                if type_name(x) in ('Pretrained', 'PretrainedInit')
            ] + [
                f'pretrained={part["pretrained"]!r}'
                for part in outer
                if part.get('pretrained')
            ]
            if others:
                raise ValueError(
                    f'{ours} would be overwritten by {others[0]} of an outer '
                    f'part of the model of {cfg.filename}. Take that out, or '
                    "the inner part's init_cfg"
                )
            # With resume, load_from names the checkpoint to resume from.
            if cfg.get('load_from') and not cfg.get('resume'):
                raise ValueError(
                    f'{ours} would be overwritten by load_from='
                    f'{cfg.load_from!r} of {cfg.filename}. Take load_from '
                    'out, or the init_cfg if load_from is to give the weights'
                )


def dicts(node: Any, outer: tuple[dict, ...] = ()) -> Iterator[tuple]:
    """Every dictionary of a part of a config, and those that it is in.

    Args:
        node: The part.
        outer: What it is in.

    Yields:
        Each before those inside it, which may change meanwhile.
    """
    if isinstance(node, (list, tuple)):
        for x in node:
            yield from dicts(x, outer)
    elif isinstance(node, dict):
        yield node, outer
        for x in list(node.values()):
            yield from dicts(x, (*outer, node))


def initialisers(init_cfg: Any) -> list[dict]:
    """Of an `init_cfg`, which may be one, a list or None."""
    entries = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    return [x for x in entries if isinstance(x, dict)]


def type_name(entry: dict) -> str:
    """Of an initialiser, without its scope."""
    name = entry.get('type')
    return str(getattr(name, '__name__', name)).split('.')[-1]


def check_pre_training(cfg: Config) -> None:
    """Refuse what a pre-training cannot do, before it starts.

    Args:
        cfg: Of a run of a method without labels and predictions.

    Raises:
        ConfigError: With what to write instead.
    """
    if cfg.get('val_dataloader'):
        raise ConfigError(
            'A pre-training has no predictions, so val_dataloader, val_cfg '
            'and val_evaluator cannot be used. To follow the features, add '
            "dict(type='mmdensecl.KNNHook', data_root=...) to custom_hooks "
            '(docs/evaluation.md), or test a checkpoint afterwards'
        )
    channels = (cfg.get('model') or {}).get('backbone', {}).get('in_channels')
    if channels not in (None, 3) and any(
        type_name(node) == 'DecodeRGB'
        for node, _ in dicts(cfg.get('train_dataloader'))
        if 'type' in node
    ):
        raise ConfigError(
            f'model.backbone.in_channels={channels}, but the pipeline decodes '
            'every image, also a grey one, to the 3 channels of RGB. Leave '
            'in_channels out, or decode in another way'
        )


def check_data_exists(cfg: Config, parts: Sequence[str]) -> None:
    """Stop before a host ends in a traceback for want of its data.

    Our own datasets say it themselves.

    Args:
        cfg: A config.
        parts: Where it has the datasets that will be read, such as
            'train_dataloader'.

    Raises:
        ConfigError: A local folder does not exist.
    """
    for part in parts:
        for node, _ in dicts(cfg.get(part)):
            root = node.get('data_root')
            ours = str(node.get('type')).startswith('mmdensecl.')
            if not ours and root and '://' not in root and not osp.isdir(root):
                raise ConfigError(
                    f'The data folder "{root}" of {part} does not exist '
                    f'(working directory: "{os.getcwd()}"). Put the data '
                    'there, or name its folder by --data-root PATH'
                )


def complete_config(cfg: Config) -> None:
    """Bring together what a child config set and what its base had.

    Args:
        cfg: Changed in place.

    Raises:
        ConfigError: Two settings contradict each other.
    """
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        drop_worker_options(cfg.get(name))
    loop = cfg.get('train_cfg') or {}
    if 'type' in loop and 'by_epoch' in loop:
        if not loop['by_epoch']:
            raise ConfigError(
                f'{cfg.filename}: train_cfg has by_epoch=False, and type='
                f'{loop["type"]!r} from its base. For a loop by iterations '
                'write train_cfg = dict(_delete_=True, by_epoch=False, '
                'max_iters=...)'
            )
        del loop['by_epoch']  # of a loop by epochs, which it is
