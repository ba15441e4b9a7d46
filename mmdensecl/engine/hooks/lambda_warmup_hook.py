# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Start without the dense loss."""

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmdensecl.registry import HOOKS


@HOOKS.register_module()
class LambdaWarmupHook(Hook):
    """Train with the global loss alone at first.

    The dense matches mean little while the backbone is random, and the
    categories of :class:`mmdensecl.models.DSC` do not either. Off in the
    published recipes; the authors suggest 10,000 iterations when a run does
    not take off (openselfsup/hooks/densecl_warmup_hook.py).

    Args:
        start_iters: Iterations with `loss_lambda = 0`, and `category_weight =
            0` where there is one.

    Raises:
        ValueError: `start_iters` is negative.
    """

    def __init__(self, start_iters: int = 10000) -> None:
        if start_iters < 0:
            raise ValueError(
                f'start_iters must not be negative, got {start_iters}'
            )
        self.start_iters = start_iters

    def before_train(self, runner) -> None:
        """Note the weights to arrive at."""
        model = runner.model
        self.model = model.module if is_model_wrapper(model) else model
        if not hasattr(self.model, 'loss_lambda'):
            raise TypeError(
                f'{type(self.model).__name__} has no loss_lambda to warm up; '
                'LambdaWarmupHook goes with mmdensecl.DenseCL'
            )
        self.weights = {
            name: getattr(self.model, name)
            for name in ('loss_lambda', 'category_weight')
            if hasattr(self.model, name)
        }

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Set the weights of this step."""
        warm = runner.iter >= self.start_iters
        for name, weight in self.weights.items():
            setattr(self.model, name, weight if warm else 0.0)
