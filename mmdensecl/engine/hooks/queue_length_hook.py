# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Fit the queues to the dataset."""

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmdensecl.datasets.draws import num_distinct_images
from mmdensecl.registry import HOOKS

from ..loader import batch_size_of

MAX_QUEUE_LEN = 65536


def fit_queue_len(num_images: int, global_batch: int) -> int:
    """Length of queue for a dataset.

    The published 65,536 where it is at most half of the dataset, otherwise
    half of it: a queue that reaches further back holds other views of the
    query's own image as negatives, and on a few hundred images the loss
    only rises. Whole batches, so that every key stays equally long.

    Args:
        num_images: Images that differ.
        global_batch: Images in a step, over all ranks.

    Returns:
        The length, at least one batch.
    """
    batches = min(MAX_QUEUE_LEN, num_images // 2) // global_batch
    return global_batch * max(1, batches)


@HOOKS.register_module()
class QueueLengthHook(Hook):
    """Fit the queues to the dataset, or say that they do not fit.

    With `queue_len='auto'` it sets the length by :func:`fit_queue_len`
    before weights are loaded. A length set by hand stays as it is.

    Raises:
        ValueError: The dataset has fewer distinct images than a batch of all
            ranks.
    """

    was_auto = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Let the queues of a checkpoint and of the model agree.

        A resumed run with 'auto' takes the checkpoint's length: the dataset
        or the number of processes may have changed since. A run that only
        starts from the weights (`load_from`) keeps its own fresh queues.
        """
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        state = checkpoint.get('state_dict', checkpoint)
        saved = state.get('queue.keys')
        if (
            saved is None
            or not hasattr(model, 'set_queue_len')
            or len(saved) == len(model.queue)
        ):
            return
        if not runner.cfg.get('resume', False):
            for name in [k for k in state if 'queue.' in k]:
                del state[name]
            runner.logger.info(
                f'The checkpoint has queues of {len(saved)} keys, this run '
                f'of {len(model.queue)}: the queues start afresh.'
            )
        elif self.was_auto:
            model.set_queue_len(len(saved))
            runner.logger.info(
                f"queue_len='auto' -> {len(saved)}, as in the checkpoint."
            )

    def before_run(self, runner) -> None:
        """Set the length."""
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        if not hasattr(model, 'set_queue_len') or runner.train_loop is None:
            return
        loader = runner.train_dataloader
        size = batch_size_of(loader)
        batch = size * get_world_size()
        images = num_distinct_images(loader.dataset)
        if images < batch:
            raise ValueError(
                f'The dataset has {images} distinct images, fewer than one '
                f'batch of {size} on each of {get_world_size()} '
                'processes. Add images or lower '
                'train_dataloader.batch_size'
            )
        self.was_auto = model.auto_queue_len
        if self.was_auto:
            length = fit_queue_len(images, batch)
            model.set_queue_len(length)
            why = (
                'the published length'
                if length == MAX_QUEUE_LEN
                else 'half of the dataset'
            )
            runner.logger.info(
                f"queue_len='auto' -> {length}: {why}, in whole batches of "
                f'{batch}, for {images} images. A longer queue would hold '
                "the query's own image as a negative."
            )
        elif len(model.queue) > images:
            runner.logger.warning(
                f'queue_len={len(model.queue)} is larger than the dataset of '
                f"{images} images: the queue holds every image's other "
                'views as negatives, and the loss may only rise. Use '
                'model.queue_len=auto, here '
                f'{fit_queue_len(images, batch)}.'
            )
