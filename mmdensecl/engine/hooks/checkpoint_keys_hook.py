# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Check that a checkpoint fills the model."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor

from mmdensecl.registry import HOOKS
from mmdensecl.transfer.pretrained_backbone import LOADED, mismatch

from ..config import initialisers, type_name

# The parts of a model that pre-training is about; res5 of a C4 detector is
# its shared head.
BACKBONES = frozenset(('backbone', 'shared_head'))


@HOOKS.register_module()
class CheckpointKeysHook(Hook):
    """Stop a run that did not get the weights it was promised.

    mmengine loads with `strict=False` and only warns, or casts without a word.
    Here a tensor that is missing, or has another shape or kind (whole numbers,
    bool, complex or text in place of a weight),

    * when testing, validating or resuming: stops the run;
    * when `load_from` starts a training: stops it if it belongs to the
      backbone or is of another kind, or if nothing fits at all. New heads are
      named in a warning.

    Blocks that only the checkpoint has, in a stage of the backbone that the
    model has too, always stop it: they are of a deeper network.

    What is missing is taken from the loading itself, so that models which
    rename or copy tensors while loading are checked by the outcome.

    When a resumed checkpoint replaces what `PretrainedBackbone` has loaded,
    and its run began from another file, a warning says so.
    """

    # After the hooks that change the checkpoint, such as EMAHook.
    priority = 'LOWEST'

    def before_train(self, runner) -> None:
        """Refuse a model that did not let PretrainedBackbone load.

        Some backbones, such as mmdet's Swin, read the address in
        `init_cfg` by themselves, whatever its type, and load what fits.
        """
        for name, module in runner.model.named_modules():
            # The initialiser puts another type instead when it is done.
            if any(
                type_name(x) == 'PretrainedBackbone'
                for x in initialisers(getattr(module, 'init_cfg', None))
            ):
                raise ValueError(
                    f'PretrainedBackbone was not run for "{name}": '
                    f'{type(module).__name__} has an initialisation of its '
                    'own, which takes only its own format and keeps silent '
                    'about what does not fit. Use a backbone whose '
                    "init_weights is mmengine's, such as ResNet."
                )

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Watch the loading that follows."""
        if _resumes(runner):
            _compare_origins(runner, checkpoint)
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        state = checkpoint.get('state_dict', checkpoint)
        given = {re.sub(r'^module\.', '', k): v for k, v in state.items()}
        own = model.state_dict()
        unfit = {
            name: f'{name}: {wrong}'
            for name, x in own.items()
            if isinstance(x, Tensor)
            and name in given
            and (wrong := mismatch(given[name], x))
        }

        def check(module: nn.Module, keys: Any) -> None:
            handle.remove()
            missing, unused = (
                [
                    name
                    for name in names
                    if not name.endswith(
                        ('num_batches_tracked', '_extra_state')
                    )
                ]
                for names in (keys.missing_keys, keys.unexpected_keys)
            )
            random = {name: f'missing: {name}' for name in missing} | unfit
            deeper = [
                f'not in the model: {name}'
                for name in unused
                if any(x.startswith(_stage(name)) for x in own)
            ]
            if random or deeper:
                self._report(runner, random, deeper, own, given)

        handle = model.register_load_state_dict_post_hook(check)

    @staticmethod
    def _report(
        runner,
        random: Mapping[str, str],
        deeper: Sequence[str],
        own: dict,
        given: dict,
    ) -> None:
        """Raise or warn about tensors that were not loaded.

        Args:
            runner: The runner.
            random: Names of tensors of the model, and what is wrong with each.
            deeper: What is wrong with those of the file.
            own: State dict of the model.
            given: State dict of the file.
        """
        lines = [*random.values()]
        what = (
            f'{len(lines)} of {len(own)} tensors of the model were not '
            'loaded from the checkpoint'
        )
        if deeper:
            what += f', {len(deeper)} of its backbone are not in the model'
        if not _trains(runner) or _resumes(runner):
            doing = 'resume' if _trains(runner) else 'test'
            raise ValueError(
                f'{what}:\n{_some([*deeper, *lines])}\nTo {doing}, it must '
                'hold the whole model and no deeper one: use the config that '
                'it was trained with.'
            )
        counted = [x for x in own if not x.endswith('num_batches_tracked')]
        if len(lines) >= len(counted):
            raise ValueError(
                f'load_from loaded nothing. The model has names such as '
                f'{counted[:2]}, the checkpoint {[*given][:2]}. '
                'load_from takes checkpoints of this very model; a '
                'pre-trained backbone, in any format, enters by '
                "init_cfg=dict(type='mmdensecl.PretrainedBackbone', "
                'checkpoint=...).'
            )
        # Torch casts what has the shape only: it would not start afresh.
        wrong = [*deeper] + [
            line
            for name, line in random.items()
            if not BACKBONES.isdisjoint(name.split('.'))
            or getattr(given.get(name), 'shape', None) == own[name].shape
        ]
        if wrong:
            raise ValueError(
                f'{what}. In the backbone, or of another kind:\n'
                f'{_some(wrong)}\nIf this file is only to give the backbone, '
                'and is of its depth, let it enter '
                "by init_cfg=dict(type='mmdensecl.PretrainedBackbone', "
                'checkpoint=...) instead of load_from; that reads any format.'
            )
        runner.logger.warning(
            f'{what} and start as initialised:\n{_some(lines)}'
        )


def _trains(runner) -> bool:
    return isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict))


def _resumes(runner) -> bool:
    return _trains(runner) and bool(runner.cfg.get('resume', False))


def _stage(name: str) -> str:
    """'backbone.layer1.' for a tensor of it, no module's for the others."""
    parts = name.split('.')
    depth = next((i for i, x in enumerate(parts) if x in BACKBONES), None)
    return f'{name}.' if depth is None else '.'.join(parts[: depth + 2]) + '.'


def _compare_origins(runner, checkpoint: dict) -> None:
    """Warn if a resumed run began from other weights than this one."""
    hub = runner.message_hub
    new = hub.get_info(LOADED, {})
    info = checkpoint.get('message_hub', {}).get('runtime_info', {})
    old = info.get(LOADED, {})
    if old.keys() == new.keys():
        return
    # mmengine would keep this entry where the checkpoint has none, and the
    # next checkpoint would name a file that its weights are not from.
    hub.update_info(LOADED, old)
    files = [
        ', '.join(
            f'"{path}" (sha256 {sha256[:8]})' for sha256, path in x.items()
        )
        for x in (new, old)
    ]
    runner.logger.warning(
        f'This run was initialised from {files[0] or "no file"}, but the '
        'checkpoint that it resumes, whose weights replace these, began from '
        f'{files[1] or "no known file"}. For a run from the former, take '
        'another work_dir.'
    )


def add_checkpoint_check(cfg: Config) -> None:
    """Add a :class:`CheckpointKeysHook` to the hooks of a run.

    Args:
        cfg: Changed in place; one that has the hook stays as it is.
    """
    hooks = list(cfg.get('custom_hooks') or [])
    name = f'mmdensecl.{CheckpointKeysHook.__name__}'
    if all(hook.get('type') != name for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=name)]


def _some(lines: Sequence[str], most: int = 20) -> str:
    more = len(lines) - most
    tail = [f'... and {more} more'] if more > 0 else []
    return '\n'.join([*lines[:most], *tail])
