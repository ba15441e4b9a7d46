# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Diagnose a contrastive run while it trains."""

import torch
from mmengine.hooks import Hook

from mmdensecl.registry import HOOKS

from .runtime_info_hook import buffer_logs, flush_logs, go_on


@HOOKS.register_module()
class ContrastMonitorHook(Hook):
    """Say in plain words when a run goes wrong.

    It stops a run before weights that are not finite can overwrite a good
    checkpoint (:class:`BufferedRuntimeInfoHook`, which it installs, does so
    for losses), and warns, once each, of collapse, of a leak between the
    views, of a dense branch that tells positions instead of images, and of
    categories of which few are in use.

    Args:
        interval: Iterations over which values are averaged before they are
            checked.
        min_std: `feat_std` below which features have collapsed (1 is
            isotropic).
        max_early_acc: Accuracy in percent, above which a full queue is
            suspiciously easy to beat.
        early: Share of the run that counts as early.
        max_position: `position_r2` in percent, above which the dense branch
            knows the position of a cell and little else.
        min_category_entropy: `category_entropy` in percent, below which nearly
            all cells are of one category.
    """

    # Before CheckpointHook (VERY_LOW), so that nothing bad is saved.
    priority = 'NORMAL'

    def __init__(
        self,
        interval: int = 50,
        min_std: float = 0.02,
        max_early_acc: float = 99.0,
        early: float = 0.1,
        max_position: float = 90.0,
        min_category_entropy: float = 10.0,
    ) -> None:
        self.interval = interval
        self.min_std = min_std
        self.max_early_acc = max_early_acc
        self.early = early
        self.max_position = max_position
        self.min_category_entropy = min_category_entropy
        self.warned: set[str] = set()
        self.full_at: int | None = None

    def before_run(self, runner) -> None:
        """See that losses are checked, whatever loop or script trains."""
        buffer_logs(runner)

    def before_train(self, runner) -> None:
        """Take a resumed run to be past its early part."""
        if runner.iter:
            self.full_at = 0

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        """Check the averages, when they are logged if possible."""
        window = min(self.interval, len(runner.train_dataloader))
        if self.every_n_inner_iters(batch_idx, window):
            flush_logs(runner)
            self._diagnose(runner, window)

    def after_train_epoch(self, runner) -> None:
        """Check the weights, before CheckpointHook makes room for them."""
        self._check_weights(runner, runner.model.state_dict())

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """The last net, for checkpoints in the middle of an epoch."""
        self._check_weights(runner, checkpoint['state_dict'])

    def _check_weights(self, runner, state_dict: dict) -> None:
        bad = [
            name
            for name, x in state_dict.items()
            if torch.is_tensor(x) and not torch.isfinite(x).all()
        ]
        if bad:
            raise FloatingPointError(
                f'{len(bad)} tensors of the model are not finite, "{bad[0]}" '
                f'first, at iteration {runner.iter + 1}; nothing was saved. '
                f'{go_on(runner)}'
            )

    def _diagnose(self, runner, window: int) -> None:
        # Every rank sees much the same; the logger of rank 0 speaks.
        scalars = runner.message_hub.log_scalars

        def mean(name: str, default: float) -> float:
            buffer = scalars.get(f'train/{name}')
            return default if buffer is None else buffer.mean(window)

        spread = mean('feat_std', 1.0)
        if spread < self.min_std:
            self._warn(
                runner,
                'feat_std',
                f'The features have collapsed: feat_std is {spread:.4f}, '
                f'below {self.min_std:g}, so all images look the same to '
                'the model. Lower the learning rate, look at the images '
                'with tools/analysis_tools/browse_dataset.py, or lengthen the '
                'queue.',
            )
        if mean('queue_fill', 0.0) < 100:
            return
        entropy = mean('category_entropy', 100.0)
        if entropy < self.min_category_entropy:
            self._warn(
                runner,
                'category_entropy',
                'The categories have collapsed: nearly all cells are of one, '
                f'category_entropy is {entropy:.1f}% (100 is an even spread), '
                'so the category loss teaches little. Lower category_weight, '
                'or start it later with mmdensecl.LambdaWarmupHook.',
            )
        position = mean('position_r2', 0.0)
        if position > self.max_position:
            self._warn(
                runner,
                'position_r2',
                'The dense branch tells where a cell lies, not what it shows: '
                f'the position alone explains {position:.1f}% of its variance '
                '(position_r2), so the dense loss may teach the backbone '
                'little. Zero padding reveals the position: see the questions '
                'in docs/pretraining.md.',
            )
            # The same fault makes all positives easy to tell.
            self.warned.add('dense_acc')
        # In a short run the queue may only just be full after that share.
        if self.full_at is None:
            self.full_at = runner.iter
        if runner.iter >= max(
            self.early * runner.max_iters, self.full_at + 2 * window
        ):
            return
        for name in ('global_acc', 'dense_acc'):
            if mean(name, 0.0) > self.max_early_acc:
                self._warn(
                    runner,
                    name,
                    f'{name} is {mean(name, 0.0):.1f}% this early: either the '
                    'images are trivially easy to tell apart, or something '
                    'tells the key of an image from the others (batch norm '
                    'without shuffling, two views alike, duplicates in the '
                    'queue).',
                )

    def _warn(self, runner, topic: str, message: str) -> None:
        if topic not in self.warned:
            self.warned.add(topic)
            runner.logger.warning(message)
