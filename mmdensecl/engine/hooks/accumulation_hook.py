# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Accumulated gradients and the key encoder."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmdensecl.registry import HOOKS

from .checkpoint_hook import follows_update


@HOOKS.register_module()
class AccumulationHook(Hook):
    """Move the key encoder once a step of the optimiser.

    With `optim_wrapper.accumulative_counts` a step takes several forward
    passes. Moved in each of them, the key encoder would follow the query
    encoder that many times faster than in one large batch. The queue takes the
    keys of each pass, so a step sees those of its earlier passes as negatives.
    """

    def before_train(self, runner) -> None:
        """Say so."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        self.encoder = getattr(model, 'encoder_k', None)
        if self.encoder is not None:
            self.momentum = self.encoder.momentum
            runner.logger.info(
                'Gradients are accumulated over several iterations: the key '
                'encoder moves once a step of the optimiser, and the queue '
                'takes the keys of each iteration.'
            )

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Let it move in the first iteration of a step only."""
        if self.encoder is not None:
            first = follows_update(runner)
            self.encoder.momentum = self.momentum if first else 0.0
