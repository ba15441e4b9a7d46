# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What the benchmark adds to a run; mmdensecl/registry.py knows this file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import nn

from mmdensecl.registry import HOOKS


@HOOKS.register_module()
class FreezeHook(Hook):
    """Keep parts of a model as they are, weights and batch statistics.

    For any backbone, also one without ``frozen_stages``. With several
    processes the config needs ``find_unused_parameters=True``.

    Args:
        parts: Names of submodules, such as ``['backbone']``.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        self.parts = parts

    def _modules(self, runner: Any) -> Iterator[nn.Module]:
        model = runner.model
        model = model.module if is_model_wrapper(model) else model
        return map(model.get_submodule, self.parts)

    def before_train(self, runner: Any) -> None:
        """No gradients."""
        for module in self._modules(runner):
            module.requires_grad_(False)

    def before_train_iter(self, runner: Any, **_: Any) -> None:
        """The loop has put the whole model into train mode."""
        for module in self._modules(runner):
            module.eval()


@HOOKS.register_module()
class PredictedClassesHook(Hook):
    """Write to predicted.json which classes the last evaluation predicted.

    A model that says the same everywhere has learnt nothing, whatever its
    score.
    """

    def before_val_epoch(self, runner: Any) -> None:
        """Begin anew."""
        self.seen: set[int] = set()

    def after_val_iter(self, runner: Any, outputs: Any = (), **_: Any) -> None:
        """Collect the labels of pixels, objects or images."""
        for sample in outputs:
            for key in ('pred_sem_seg', 'pred_instances', 'pred_label'):
                found = sample.get(key, ())
                found = getattr(found, 'labels', getattr(found, 'data', found))
                if len(found):
                    self.seen.update(found.unique().tolist())

    def after_val_epoch(self, runner: Any, **_: Any) -> None:
        """Write those of all processes."""
        self._write(runner, runner.val_dataloader)

    before_test_epoch = before_val_epoch
    after_test_iter = after_val_iter

    def after_test_epoch(self, runner: Any, **_: Any) -> None:
        """The same of a test."""
        self._write(runner, runner.test_dataloader)

    def _write(self, runner: Any, loader: Any) -> None:
        seen = sorted(set().union(*all_gather_object(self.seen)))
        names = dict(enumerate(loader.dataset.metainfo.get('classes') or ()))
        if is_main_process():
            path = Path(runner.work_dir, 'predicted.json')
            predicted = [names.get(i, str(i)) for i in seen]
            text = json.dumps(dict(of=len(names), predicted=predicted))
            path.write_text(text, encoding='utf-8')
