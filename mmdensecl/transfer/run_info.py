# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a checkpoint says of the run that wrote it, as plain values."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

VIEWS = ('TwoViews', 'SampleTwoCropParams', 'DrawViews')
# Entry of a published file: of its `meta`, or of a safetensors header.
ENTRY = 'mmdensecl'


def is_published(tree: Mapping[str, Any]) -> bool:
    """Whether a file is one of ``publish_backbone.py``, a backbone alone."""
    return ENTRY in _mapping(tree.get('meta'))


def read_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the run that a checkpoint of mmengine is from.

    The config in it is Python text of an untrusted file: it is read as
    literals and never run. Its values are as untrusted.

    Args:
        tree: The content of the file.

    Returns:
        Of these what is known: ``method``, ``config`` (its name), ``epochs``,
        ``iters``, ``seed``, ``dataset_size``, ``view_size``, ``mean``,
        ``std``, ``backbone`` (its config), ``mmengine_version``;
        ``position_r2`` and ``match_acc`` as the log had them last, means over
        ten iterations.
    """
    meta = _mapping(tree.get('meta'))
    if is_published(tree):
        return dict(_mapping(_mapping(meta[ENTRY]).get('run')))
    hub = _mapping(tree.get('message_hub'))
    layout = _mapping(_mapping(hub.get('runtime_info')).get('loader_layout'))
    cfg = literals(meta.get('cfg'))
    model = _mapping(cfg.get('model'))
    method = model.get('type')
    name = meta.get('experiment_name')
    run = dict(
        method=str(method).rpartition('.')[2] if method else None,
        config=name and re.sub(r'_\d{8}_\d{6}$', '', str(name)),
        epochs=meta.get('epoch'),
        iters=meta.get('iter'),
        seed=meta.get('seed'),
        dataset_size=layout.get('images', layout.get('pictures')),
        view_size=_view_size(cfg),
        backbone=model.get('backbone'),
        mmengine_version=meta.get('mmengine_version'),
        **normalisation(model),
    )
    scalars = _mapping(hub.get('log_scalars'))
    for key in ('position_r2', 'match_acc'):
        history: Any = scalars.get(f'train/{key}')
        if hasattr(history, 'mean'):
            run[key] = float(history.mean(10))
    return {k: v for k, v in run.items() if v is not None}


def decode_run(header: Mapping[str, str] | None) -> dict[str, Any]:
    """The tree for :func:`read_run` of a safetensors header."""
    try:
        entry = json.loads((header or {})[ENTRY])
    except (KeyError, ValueError, RecursionError):
        return {}
    return dict(meta={ENTRY: entry})


def are_rgb(values: Any) -> bool:
    """Whether these are three numbers, such as means of colours."""
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(x, int | float) for x in values)
    )


def _mapping(value: Any) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def normalisation(model: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and std of our own models; others may be BGR."""
    if not str(model.get('type')).startswith('mmdensecl.'):
        return {}
    preprocessor = _mapping(model.get('data_preprocessor'))
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    return dict(mean=mean, std=std) if are_rgb(mean) and are_rgb(std) else {}


def _view_size(cfg: Mapping[str, Any]) -> Any:
    preprocessor = _mapping(
        _mapping(cfg.get('model')).get('data_preprocessor')
    )
    sizes = [
        x.get('size', preprocessor.get('size', 224))
        for x in _dicts(cfg.get('train_dataloader'))
        if str(x.get('type')).endswith(VIEWS)
    ]
    return sizes[0] if sizes else None


def _dicts(node: Any) -> Iterator[Mapping]:
    if isinstance(node, Mapping):
        yield node
    values = node.values() if isinstance(node, Mapping) else node
    if isinstance(node, Mapping | list | tuple):
        for value in values:
            yield from _dicts(value)


def literals(text: Any) -> dict[str, Any]:
    """Literals that a Python text assigns to names; {} if it is none."""
    try:
        return {
            ast.unparse(line.targets[0]): _literal(line.value)
            for line in ast.parse(text).body
            if isinstance(line, ast.Assign)
        }
    except (TypeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return {}


def _literal(node: ast.expr) -> Any:
    """Value of literals and of ``dict(...)`` of them; None for the rest."""
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict':
            return None
        return {x.arg: _literal(x.value) for x in node.keywords if x.arg}
    if isinstance(node, ast.Dict):
        return {
            k.value: _literal(v)
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant)
        }
    if isinstance(node, ast.List | ast.Tuple):
        values = [_literal(x) for x in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # the latter for what cannot be hashed
        return None
