# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Test loops that fit a probe to features of a frozen backbone."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dist import (
    all_gather,
    broadcast,
    broadcast_object_list,
    is_main_process,
)
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from mmdensecl.registry import LOOPS

from .probes import (
    LOW_SHOTS,
    SVM_COSTS,
    import_sklearn,
    knn_accuracy,
    low_shot_map,
    svm_map,
)


def is_probe(cfg: Config) -> bool:
    """Whether testing a config means to fit a probe to a backbone."""
    loop = LOOPS.get((cfg.get('test_cfg') or {}).get('type', 'TestLoop'))
    return loop is not None and issubclass(loop, ProbeLoop)


class ProbeLoop(BaseLoop):
    """Fits a probe to features of a frozen backbone.

    The images of two datasets go through the last output of the model's
    backbone, in eval mode and without gradients, shared by all ranks; rank 0
    fits. The result does not depend on the number of ranks.

    ``Runner.test`` does not initialise a model, so this loop does, through
    its ``init_weights``: that is where
    ``init_cfg=dict(type='mmdensecl.PretrainedBackbone', ...)`` is read.

    Args:
        runner: The runner.
        dataloader: Of the test set; in order, nothing dropped.
        evaluator: Not used; mmengine passes its ``test_evaluator``.
        train_dataloader: The same for the training set.
        pool: Kernel and stride of the average pooling of the map, whose cells
            are then features of their own; None takes the mean over the map.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Any,
        train_dataloader: DataLoader | dict,
        pool: Sequence[int] | None = None,
    ) -> None:
        super().__init__(runner, dataloader)
        if isinstance(train_dataloader, dict):
            train_dataloader = runner.build_dataloader(
                train_dataloader, seed=runner.seed
            )
        self.train_dataloader: Any = train_dataloader
        _check_order('test_dataloader', self.dataloader)
        _check_order('test_cfg.train_dataloader', self.train_dataloader)
        self.pool = pool
        model = runner.model
        self.model = model.module if is_model_wrapper(model) else model
        self.model.init_weights()
        for tensor in self.model.state_dict().values():
            broadcast(tensor)  # what a seed may not have made equal

    def run(self) -> dict[str, float]:
        """Extract, fit and report the metrics, on every rank."""
        self.runner.call_hook('before_test')
        self.runner.call_hook('before_test_epoch')
        self.runner.model.eval()
        train = self.extract('training', self.train_dataloader)
        test = self.extract('test', self.dataloader)
        metrics: list = [None]
        if is_main_process():
            self.runner.logger.info(
                f'{type(self).__name__}: fitting to {len(train[0])} training '
                f'images, {train[0].size(1)} features each'
            )
            metrics = [self.fit(*train, *test)]
        broadcast_object_list(metrics)
        self.runner.call_hook('after_test_epoch', metrics=metrics[0])
        self.runner.call_hook('after_test')
        return metrics[0]

    @torch.no_grad()
    def extract(self, name: str, dataloader: Any) -> tuple:
        """Features and targets of a dataset, in its order.

        Returns:
            On the CPU of rank 0, shapes (N, D) and (N, ...); elsewhere empty.
        """
        features, targets = [], []
        steps, dataset = len(dataloader), dataloader.dataset
        for step, batch in enumerate(dataloader, 1):
            batch = self.model.data_preprocessor(batch, False)
            maps = self.model.backbone(batch['inputs'])
            maps = maps[-1] if isinstance(maps, tuple | list) else maps
            if self.pool is None:
                maps = maps.mean((2, 3), keepdim=True)
            else:
                kernel, stride = self.pool
                maps = F.avg_pool2d(maps, kernel, stride)
            target = torch.stack(
                [self.target(x, dataset) for x in batch['data_samples']]
            ).to(maps.device)
            # Rank r has the images r, r + ranks, r + 2 ranks...
            maps, target = (
                torch.stack(all_gather(x), dim=1).flatten(0, 1)
                for x in (maps.flatten(1).float(), target)
            )
            if is_main_process():
                features.append(maps.cpu())
                targets.append(target.cpu())
            if step == steps or step % max(1, steps // 10) == 0:
                self.runner.logger.info(
                    f'Features of the {name} set: [{step}/{steps}]'
                )
        if not is_main_process():
            return torch.empty(0), torch.empty(0)
        # The sampler repeats images to give every rank as many.
        count = len(dataset)
        return torch.cat(features)[:count], torch.cat(targets)[:count]

    def target(self, sample: Any, dataset: Any) -> Tensor:
        """Class number of an image, a scalar."""
        return sample.gt_label[0]

    @abstractmethod
    def fit(
        self,
        train_features: Tensor,
        train_targets: Tensor,
        test_features: Tensor,
        test_targets: Tensor,
    ) -> dict[str, float]:
        """Fit to the training set and measure on the test set, in percent."""


def _check_order(name: str, loader: Any) -> None:
    sampler = loader.sampler
    in_order = isinstance(sampler, SequentialSampler) or (
        getattr(sampler, 'shuffle', True) is False
        and getattr(sampler, 'round_up', False)
    )
    if loader.drop_last or not in_order:
        raise ValueError(
            f'{name} must give every image once and in order: '
            "sampler=dict(type='DefaultSampler', shuffle=False), "
            'drop_last=False'
        )


@LOOPS.register_module()
class KNNLoop(ProbeLoop):
    """Accuracy of a weighted kNN vote, for data with one label an image.

    Args:
        ks: Numbers of neighbours, see :func:`.probes.knn_accuracy`.
        temperature: Temperature of their weights.
        **kwargs: Arguments of :class:`ProbeLoop`.
    """

    def __init__(
        self,
        *args: Any,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.ks, self.temperature = ks, temperature

    def fit(self, *parts: Tensor) -> dict[str, float]:
        """``knn_{k}/top1`` and ``top5``, see :meth:`ProbeLoop.fit`."""
        train, labels, test, targets = parts
        test = test.to(next(self.model.parameters()).device)
        accuracies = knn_accuracy(
            train, labels, test, targets, self.ks, self.temperature
        )
        return {
            f'knn_{k}/{name}': value
            for k, values in accuracies.items()
            for name, value in zip(('top1', 'top5'), values, strict=True)
        }


@LOOPS.register_module()
class SVMLoop(ProbeLoop):
    """Mean AP of linear SVMs, for data with several labels an image.

    Labels are mmpretrain's ``gt_label`` and, for VOC, ``gt_label_difficult``,
    which the pipeline must pack (``PackInputs(meta_keys=...)``).

    Args:
        costs: What to choose from, see :func:`.probes.svm_map`.
        n_jobs: Processes that fit, -1 for one on each core.
        **kwargs: Arguments of :class:`ProbeLoop`.
    """

    def __init__(
        self,
        *args: Any,
        costs: Sequence[float] = SVM_COSTS,
        n_jobs: int = -1,
        **kwargs: Any,
    ) -> None:
        import_sklearn('svm')  # before the features, not after
        super().__init__(*args, **kwargs)
        self.options: dict[str, Any] = dict(costs=costs, n_jobs=n_jobs)

    def target(self, sample: Any, dataset: Any) -> Tensor:
        """1, 0, or -1 where only difficult, for each class, shape (C, )."""
        labels = sample.gt_label.long()  # maybe on a GPU
        target = labels.new_zeros(len(dataset.metainfo['classes']))
        target[list(sample.get('gt_label_difficult', []))] = -1
        target[labels] = 1
        return target

    def fit(self, *parts: Tensor) -> dict[str, float]:
        """``svm/mAP`` and each class's AP, see :meth:`ProbeLoop.fit`."""
        arrays: Any = [x.numpy() for x in parts]
        mean, each = svm_map(*arrays, **self.options)
        classes = self.dataloader.dataset.metainfo['classes']
        names = [f'svm/{x}' for x in classes]
        return {'svm/mAP': mean, **dict(zip(names, each, strict=True))}


@LOOPS.register_module()
class LowShotLoop(SVMLoop):
    """Mean AP of linear SVMs that see few images of each class.

    Args:
        shots: Images of each class, see :func:`.probes.low_shot_map`.
        num_samples: Independent draws.
        **kwargs: Arguments of :class:`SVMLoop`.
    """

    def __init__(
        self,
        *args: Any,
        shots: Sequence[int] = LOW_SHOTS,
        num_samples: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.options.update(shots=shots, num_samples=num_samples)

    def fit(self, *parts: Tensor) -> dict[str, float]:
        """``low_shot/k{k}_mAP`` and ``_std``, see :meth:`ProbeLoop.fit`."""
        arrays: Any = [x.numpy() for x in parts]
        results = low_shot_map(*arrays, **self.options)
        metrics = {}
        for k, (mean, std) in results.items():
            metrics[f'low_shot/k{k}_mAP'] = mean
            metrics[f'low_shot/k{k}_std'] = std
        return metrics
