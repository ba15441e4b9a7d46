# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Ablations: one pre-training for each value of a setting."""
import ast
import hashlib
import os
import re
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import (Any, Callable, Dict, List, Mapping, Optional, Sequence,
                    Tuple, Union)

from mmengine.config import Config
from mmengine.registry import Registry

from mmdensecl.engine import dicts, merge_options, override_data_root
from mmdensecl.registry import DATASETS, MODELS
from .data import fingerprint
from .plan import (PRETRAIN, Checkpoint, Pretraining, check_options,
                   code_fingerprint, config_sha256, share_batch,
                   stack_versions)
from .suite import check_name

# The authors' advice for a run that does not take off.
WARMUP_ITERS = 10000
# Of 800 epochs of the 118,287 pictures of COCO train2017, in batches of 256.
WARMUP_SHARE = WARMUP_ITERS / (800 * (118287 // 256))
# Settings that --pretrain-options must leave alone.
PRETRAIN_FLAGS = {
    'data_root':
    'use --pretrain-data',
    'load_from':
    'runs resume; start from weights by model.backbone.init_cfg',
    'resume':
    'runs resume, or start anew with --redo',
    'work_dir':
    'use --work-dir',
    'train_dataloader.batch_size':
    'processes share auto_scale_lr.base_batch_size, see --gpus',
}
# Numbers further apart than this stand on a logarithmic axis.
WIDE = 10
MAPPINGS = (dict, Config)


@dataclass(frozen=True)
class Ablation:
    """A setting of the pre-training, and the values that it takes.

    Args:
        name (str): Becomes a folder and, with a value, the name of a row.
        title (str): For the reader.
        key (str): Of the config, dotted.
        values (Sequence): As a user writes them.
        label (str): Of the plot's axis, with its unit.
        axis (str): ``'linear'``, ``'log'`` or ``'category'``.
        choices (Mapping[str, Any]): What the config takes for a value that is
            a name. Defaults to none: the value itself.
        adjust (Callable, optional): Changes what else belongs to a value, in
            place: takes the config, the value and the iterations of the
            training. Defaults to None.
        note (str): What the reader must know. Defaults to ''.
    """
    name: str
    title: str
    key: str
    values: Sequence[Any]
    label: str
    axis: str
    choices: Mapping[str, Any] = field(default_factory=dict)
    adjust: Optional[Callable[[Config, Any, int], None]] = None
    note: str = ''

    @property
    def rows(self) -> Dict[str, Any]:
        """The value of each row, by the row's name."""
        found: Dict[str, Any] = {}
        for value in self.values:
            text = re.sub(r'[^A-Za-z0-9._+-]+', '-', str(value)).strip('-')
            row = check_name('row', f'{self.name.split(".")[-1]}_{text}')
            if row in found:
                raise ValueError(f'The values {found[row]!r} and {value!r} '
                                 f'would both be the row "{row}"')
            found[row] = value
        return found

    @property
    def sweep(self) -> Dict[str, Any]:
        """What :func:`mmdensecl.benchmark.state.write_suite` keeps of it."""
        as_text = self.axis == 'category'
        return dict(
            key=self.key,
            label=self.label,
            axis=self.axis,
            values={
                row: str(value) if as_text else value
                for row, value in self.rows.items()
            })


def warm_up_dense_only(cfg: Config, value: float, iters: int) -> None:
    """Let the model without a global loss begin with one.

    The matches of a random backbone would never improve by themselves.

    Args:
        cfg (Config): Changed in place, unless it has a warm-up already.
        value (float): Lambda; nothing happens below 1.
        iters (int): Of the training.
    """
    hooks = cfg.get('custom_hooks', [])
    kind = 'mmdensecl.LambdaWarmupHook'
    if value < 1 or any(hook['type'] == kind for hook in hooks):
        return
    start = min(WARMUP_ITERS, round(WARMUP_SHARE * iters))
    cfg.custom_hooks = [*hooks, dict(type=kind, start_iters=start)]


ABLATIONS = {
    ablation.name: ablation
    for ablation in (
        Ablation(
            'lambda',
            'weight of the dense loss',
            key='model.loss_lambda',
            values=(0, 0.1, 0.3, 0.5, 0.7, 0.9, 1),
            label='weight of the dense loss, lambda',
            axis='linear',
            adjust=warm_up_dense_only,
            note='The dense-only model (lambda 1) needs a warm-up: it begins '
            'with the global loss alone, for 10,000 iterations or the same '
            'share of a shorter training (LambdaWarmupHook).'),
        Ablation(
            'matching',
            'matching rule',
            key='model.correspondence',
            values=('backbone', 'projection', 'random', 'geometric', 'mutual'),
            label='matching rule',
            axis='category',
            choices={
                name: dict(type=f'mmdensecl.{rule}', _delete_=True)
                for name, rule in dict(
                    backbone='BackboneSimilarity',
                    projection='ProjectionSimilarity',
                    random='RandomMatch',
                    geometric='GeometricMatch',
                    mutual='MutualNearestNeighbor').items()
            }),
        Ablation(
            'grid',
            'size of the dense grid',
            key='model.neck.num_grid',
            values=(1, 3, 5, 7, 9),
            label='size of the dense grid, S (cells a side)',
            axis='linear'),
        Ablation(
            'queue',
            'length of the queues',
            key='model.queue_len',
            values=(4096, 16384, 65536),
            label='length of the queues (keys)',
            axis='log',
            note='A queue longer than the data set holds other views of the '
            "query's own picture as negatives."),
        Ablation(
            'temperature',
            'temperature',
            key='model.head.loss.temperature',
            values=(0.07, 0.1, 0.2, 0.4),
            label='temperature (no unit)',
            axis='log'),
    )
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _literal(text: str) -> Any:
    """A value as Python would read it; what it would not is a text.

    1.0 becomes 1, so that a value has one row however it is written.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def find_ablation(name: Optional[str] = None,
                  key: Optional[str] = None,
                  values: Optional[Sequence[str]] = None) -> Ablation:
    """The ablation that a command line asks for.

    Args:
        name (str, optional): One of ``ABLATIONS``. Defaults to None.
        key (str, optional): Of the config, in the place of a name. Defaults
            to None.
        values (Sequence[str], optional): As they were typed. Defaults to
            None, those of the name.

    Returns:
        Ablation: With these values.

    Raises:
        ValueError: It is not known, or has fewer than two values, or one
            that it cannot take.
    """
    if (name is None) == (key is None):
        raise ValueError(f'Name one ablation ({", ".join(ABLATIONS)}) or a '
                         'setting of the config with --key')
    found = [_literal(text) for text in values or ()]
    if name is None:
        axis = 'category'
        if all(map(_is_number, found)):
            low, high = min(found, default=0), max(found, default=0)
            axis = 'log' if 0 < low * WIDE <= high else 'linear'
        ablation = Ablation(
            check_name('sweep', key), key, key, found, label=key, axis=axis)
    elif name not in ABLATIONS:
        raise ValueError(f'There is no ablation "{name}", only '
                         f'{", ".join(ABLATIONS)}; or name a setting of the '
                         'config with --key')
    else:
        ablation = ABLATIONS[name]
        ablation = replace(ablation, values=found or ablation.values)
    if len(ablation.values) < 2:
        raise ValueError('A sweep compares at least two --values, got '
                         f'{len(ablation.values)}')
    for value in ablation.values:
        if ablation.choices and str(value) not in ablation.choices:
            raise ValueError(f'{ablation.title}: {value!r} is none of '
                             f'{", ".join(ablation.choices)}')
        if ablation.axis != 'category' and not _is_number(value):
            raise ValueError(f'{ablation.title}: {value!r} is no number')
        if ablation.axis == 'log' and value <= 0:
            raise ValueError(
                f'{ablation.title} must be above 0, got {value!r}')
    ablation.rows  # raises where two of them are one
    return ablation


def set_value(cfg: Config, ablation: Ablation, value: Any) -> None:
    """Set what an ablation is about, and see that the config has it.

    Args:
        cfg (Config): Changed in place.
        ablation (Ablation): It.
        value (Any): One of its values.

    Raises:
        ValueError: The config has no such setting.
    """
    *parents, last = ablation.key.split('.')
    node = cfg
    for part in parents:
        if isinstance(node, (list, tuple)) and part.isdecimal():
            node = node[int(part)] if int(part) < len(node) else None
        else:
            node = node.get(part) if isinstance(node, MAPPINGS) else None
    # An argument with a default need not stand in a config.
    known = isinstance(node, MAPPINGS) and (last in node or 'type' in node)
    if not known and not (isinstance(node, list) and last.isdecimal()
                          and int(last) < len(node)):
        raise ValueError(f'"{cfg.filename}" has no setting "{ablation.key}"')
    cfg.merge_from_dict(
        {ablation.key: ablation.choices.get(str(value), value)})


def _build(registry: Registry, cfg: Config, part: dict) -> Any:
    """As the run will build it, with the config's default scope."""
    with registry.switch_scope_and_registry(
            cfg.get('default_scope')) as chosen:
        return chosen.build(part)


def _describe_data(cfg: Config, known: Dict[str, dict]) -> Tuple[dict, int]:
    """What identifies the pictures of a pre-training, and how many it has."""
    digest = hashlib.sha256()
    files = size = 0
    for node, _ in dicts(cfg.train_dataloader.dataset):
        root = node.get('data_root')
        if not root:
            continue
        if not (os.path.exists(root) or has_magic(root) or '{' in root):
            raise FileNotFoundError(
                f'The pictures of the pre-training, "{root}", do not exist: '
                'name the folder that takes the place of the data_root of '
                f'"{cfg.filename}" with --pretrain-data')
        if os.path.isdir(root):
            if root not in known:
                known[root] = fingerprint(root)
            digest.update(known[root]['fingerprint'].encode())
            files += known[root]['files']
            size += known[root]['bytes']
        elif os.path.isfile(root):
            files, size = files + 1, size + os.path.getsize(root)
        if node.get('ann_file'):  # perhaps of another folder
            digest.update(Path(root, node['ann_file']).read_bytes())
    pictures = len(_build(DATASETS, cfg, cfg.train_dataloader.dataset))
    digest.update(f'{files} {size} {pictures}'.encode())
    return dict(
        fingerprint=digest.hexdigest(), files=files, bytes=size), pictures


def plan_pretraining(ablation: Ablation,
                     config: Union[str, Path],
                     work_dir: Union[str, Path],
                     data_root: Optional[Union[str, Path]] = None,
                     processes: int = 1,
                     device: str = 'cpu',
                     options: Mapping[str, Any] = {}) -> List[Pretraining]:
    """The trainings of an ablation, one for each value.

    Each model is built once, so that a value that it cannot take is refused
    before hours of training.

    Args:
        ablation (Ablation): What differs.
        config (str | Path): Of the pre-training, all else.
        work_dir (str | Path): Folder of the ablation.
        data_root (str | Path, optional): Takes the place of the config's
            ``data_root``. Defaults to None, the config's.
        processes (int): Of each training; they share the batch of the recipe.
            Defaults to 1.
        device (str): Kind of device. Defaults to 'cpu'.
        options (Mapping[str, Any]): Other settings, as ``--cfg-options``.
            Defaults to {}.

    Returns:
        List[Pretraining]: In the order of the values.

    Raises:
        FileNotFoundError: The config or the pictures are missing.
        ValueError: A setting or a value does not fit the config.
    """
    own = {ablation.key: 'it is what the sweep is about'}
    check_options(options, {**PRETRAIN_FLAGS, **own}, '--pretrain-options')
    code, stack = code_fingerprint(), stack_versions()
    known: Dict[str, dict] = {}
    runs = []
    for row, value in ablation.rows.items():
        cfg = Config.fromfile(config)
        _check_recipe(cfg)
        root = data_root or cfg.get('data_root')
        if root:
            root = os.path.abspath(root)
            override_data_root(cfg, root)
        merge_options(cfg, options)
        set_value(cfg, ablation, value)
        share_batch(cfg, processes)
        data, pictures = _describe_data(cfg, known)
        settings = dict(
            data=data,
            code=code,
            stack=stack,
            processes=processes,
            device=device)
        if ablation.adjust:
            ablation.adjust(cfg, value, _iterations(cfg, pictures))
        try:
            _build(MODELS, cfg, cfg.model)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f'The model of "{config}" cannot be built with '
                             f'{ablation.key}={value}: {error}') from error
        settings['config_sha256'] = config_sha256(cfg, root or '<data>')
        seed = (cfg.get('randomness') or {}).get('seed')
        runs.append(
            Pretraining(PRETRAIN, PRETRAIN.name, row, seed,
                        Path(work_dir, PRETRAIN.name, row), cfg, None,
                        settings))
    return runs


def _check_recipe(cfg: Config) -> None:
    """Refuse a config that cannot be pre-trained by a sweep."""
    for key in ('train_dataloader.dataset', 'auto_scale_lr.base_batch_size',
                'train_cfg', 'model'):
        node: Any = cfg
        for part in key.split('.'):
            node = (node or {}).get(part)
        if not node:
            raise ValueError(f'"{cfg.filename}" is no pre-training config of '
                             f'this repository: it lacks {key}')
    if cfg.get('load_from'):
        # --resume would ignore it.
        raise ValueError(f'"{cfg.filename}" has load_from='
                         f'{cfg.load_from!r}: {PRETRAIN_FLAGS["load_from"]}')


def _iterations(cfg: Config, pictures: int) -> int:
    """Of the whole training."""
    if 'max_iters' in cfg.train_cfg:
        return cfg.train_cfg.max_iters
    return cfg.train_cfg.max_epochs * (
        pictures // cfg.auto_scale_lr.base_batch_size)


def weights_of(run: Pretraining, finished: bool) -> Checkpoint:
    """What a pre-training gives to the downstream runs.

    Args:
        run (Pretraining): It.
        finished (bool): Whether it has come to its end.

    Returns:
        Checkpoint: Read where it is finished, else a promise of it, without
        a hash.
    """
    if finished:
        return Checkpoint.read(run.last_checkpoint)
    backbone = run.config.model.get('backbone') or {}
    arch = None
    if str(backbone.get('type')).split('.')[-1] == 'ResNet':
        arch = f'ResNet-{backbone.depth}'
    return Checkpoint(run.last_checkpoint, '', 'not pre-trained yet', arch)
