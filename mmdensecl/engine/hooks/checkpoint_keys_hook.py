# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import re
from typing import Any, Sequence

import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor

from mmdensecl.registry import HOOKS

# The parts of a model that pre-training is about; res5 of a C4 detector is
# its shared head.
BACKBONES = frozenset(('backbone', 'shared_head'))


@HOOKS.register_module()
class CheckpointKeysHook(Hook):
    """Stop a run that did not get the weights it was promised.

    mmengine loads with ``strict=False`` and only warns. Here a tensor that is
    missing, or has another shape,

    * when testing, validating or resuming: stops the run;
    * when ``load_from`` starts a training: stops it if it belongs to the
      backbone, or if nothing fits at all. New heads are named in a warning.

    What is missing is learnt from the loading itself, so that models which
    rename or copy tensors while loading are judged by the outcome.
    """

    # After the hooks that change the checkpoint, such as EMAHook.
    priority = 'LOWEST'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Watch the loading that follows."""
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        state = checkpoint.get('state_dict', checkpoint)
        given = {re.sub(r'^module\.', '', k): v for k, v in state.items()}
        own = model.state_dict()
        shapes = [
            name for name, x in own.items()
            if isinstance(x, Tensor) and isinstance(given.get(name), Tensor)
            and given[name].shape != x.shape
        ]

        def judge(module: nn.Module, keys: Any) -> None:
            handle.remove()
            missing = [
                name for name in keys.missing_keys
                if not name.endswith(('num_batches_tracked', '_extra_state'))
            ]
            lines = [f'missing: {name}' for name in missing] + [
                f'{name}: got {tuple(given[name].shape)}, expected '
                f'{tuple(own[name].shape)}' for name in shapes
            ]
            if lines:
                self._judge(runner, [*missing, *shapes], lines, own, given)

        handle = model.register_load_state_dict_post_hook(judge)

    @staticmethod
    def _judge(runner, names: Sequence[str], lines: Sequence[str], own: dict,
               given: dict) -> None:
        """Raise or warn about tensors that were not loaded."""
        is_training = isinstance(runner.optim_wrapper,
                                 (OptimWrapper, OptimWrapperDict))
        what = (f'{len(names)} of {len(own)} tensors of the model were not '
                'loaded from the checkpoint')
        if not is_training or runner.cfg.get('resume', False):
            doing = 'resume' if is_training else 'test'
            raise ValueError(
                f'{what}:\n{_some(lines)}\nTo {doing}, it must hold the whole '
                'model: use the config that it was trained with.')
        counted = [x for x in own if not x.endswith('num_batches_tracked')]
        if len(names) >= len(counted):
            raise ValueError(
                f'load_from loaded nothing. The model has names such as '
                f'{counted[:2]}, the checkpoint {[*given][:2]}. '
                'load_from takes checkpoints of this very model; a '
                'pre-trained backbone, in any format, enters by '
                "init_cfg=dict(type='mmdensecl.PretrainedBackbone', "
                'checkpoint=...).')
        random = [
            line for name, line in zip(names, lines)
            if not BACKBONES.isdisjoint(name.split('.'))
        ]
        if random:
            raise ValueError(
                f'{what}, {len(random)} of the backbone among them:\n'
                f'{_some(random)}\nIf this file is only to give the backbone, '
                'let it enter by init_cfg=dict('
                "type='mmdensecl.PretrainedBackbone', checkpoint=...) instead "
                'of load_from; that reads any format.')
        runner.logger.warning(f'{what} and start as initialised:\n'
                              f'{_some(lines)}')


def add_checkpoint_check(cfg: Config) -> None:
    """Add a :class:`CheckpointKeysHook` to the hooks of a run.

    Args:
        cfg (Config): Changed in place; one that has the hook stays as it is.
    """
    hooks = list(cfg.get('custom_hooks') or [])
    name = f'mmdensecl.{CheckpointKeysHook.__name__}'
    if all(hook.get('type') != name for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type=name)]


def _some(lines: Sequence[str], most: int = 20) -> str:
    more = len(lines) - most
    tail = [f'... and {more} more'] if more > 0 else []
    return '\n'.join([*lines[:most], *tail])
