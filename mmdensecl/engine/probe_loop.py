# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from abc import abstractmethod
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dist import (all_gather, broadcast, broadcast_object_list,
                           is_main_process)
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from mmdensecl.registry import LOOPS
from mmdensecl.evaluation.probes import (LOW_SHOTS, SVM_COSTS, import_sklearn,
                                       knn_accuracy, low_shot_map, svm_map)


def is_probe(cfg: Config) -> bool:
    """Whether testing a config means to fit a probe to a backbone.

    Args:
        cfg (Config): Of a run.
    """
    loop = LOOPS.get((cfg.get('test_cfg') or {}).get('type', 'TestLoop'))
    return loop is not None and issubclass(loop, ProbeLoop)


class ProbeLoop(BaseLoop):
    """A test loop that fits a probe to features of a frozen backbone.

    It passes the pictures of two data sets through the last output of the
    model's backbone, in eval mode and without gradients, shared by all ranks,
    and fits on rank 0. The result does not depend on the number of ranks.

    ``Runner.test`` does not initialise a model, so this loop does, through
    its ``init_weights``: that is where
    ``init_cfg=dict(type='mmdensecl.PretrainedBackbone', ...)`` is read.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader | dict): Of the test set; in order, nothing
            dropped.
        evaluator (Any): Not used; mmengine passes its ``test_evaluator``.
        train_dataloader (DataLoader | dict): The same for the training set.
        pool (Sequence[int], optional): Kernel and stride of the average
            pooling of the map, whose cells are then features of their own.
            Defaults to None, the mean over the map.
    """

    def __init__(self,
                 runner: Runner,
                 dataloader: Union[DataLoader, Dict],
                 evaluator: Any,
                 train_dataloader: Union[DataLoader, Dict],
                 pool: Optional[Sequence[int]] = None) -> None:
        super().__init__(runner, dataloader)
        if isinstance(train_dataloader, dict):
            train_dataloader = runner.build_dataloader(
                train_dataloader, seed=runner.seed)
        self.train_dataloader = train_dataloader
        for name, loader in (('test_dataloader', self.dataloader),
                             ('test_cfg.train_dataloader', train_dataloader)):
            _check_order(name, loader)
        self.pool = pool
        model = runner.model
        self.model = model.module if is_model_wrapper(model) else model
        self.model.init_weights()
        for tensor in self.model.state_dict().values():
            broadcast(tensor)  # what a seed may not have made equal

    def run(self) -> Dict[str, float]:
        """Extract, fit and report.

        Returns:
            Dict[str, float]: The metrics, on every rank.
        """
        self.runner.call_hook('before_test')
        self.runner.call_hook('before_test_epoch')
        self.runner.model.eval()
        train = self.extract('training', self.train_dataloader)
        test = self.extract('test', self.dataloader)
        metrics = [None]
        if is_main_process():
            self.runner.logger.info(
                f'{type(self).__name__}: fitting to {len(train[0])} training '
                f'pictures, {train[0].size(1)} features each')
            metrics = [self.fit(*train, *test)]
        broadcast_object_list(metrics)
        self.runner.call_hook('after_test_epoch', metrics=metrics[0])
        self.runner.call_hook('after_test')
        return metrics[0]

    @torch.no_grad()
    def extract(self, name: str,
                dataloader: DataLoader) -> Tuple[Tensor, Tensor]:
        """Features and targets of a data set, in its order.

        Args:
            name (str): Of the data set, for the log.
            dataloader (DataLoader): Its pictures.

        Returns:
            Tuple[Tensor, Tensor]: On the CPU of rank 0, shapes (N, D) and
            (N, ...); elsewhere empty.
        """
        features, targets = [], []
        steps = len(dataloader)
        for step, batch in enumerate(dataloader, 1):
            batch = self.model.data_preprocessor(batch, False)
            maps = self.model.backbone(batch['inputs'])
            maps = maps[-1] if isinstance(maps, (tuple, list)) else maps
            maps = maps.mean((2, 3), keepdim=True) if self.pool is None \
                else F.avg_pool2d(maps, *self.pool)
            target = torch.stack([
                self.target(sample, dataloader.dataset)
                for sample in batch['data_samples']
            ])
            for kept, tensor in ((features, maps.flatten(1).float()),
                                 (targets, target.to(maps.device))):
                # Rank r has the pictures r, r + ranks, r + 2 ranks...
                whole = torch.stack(all_gather(tensor), dim=1).flatten(0, 1)
                if is_main_process():
                    kept.append(whole.cpu())
            if step == steps or step % max(1, steps // 10) == 0:
                self.runner.logger.info(
                    f'Features of the {name} set: [{step}/{steps}]')
        if not is_main_process():
            return torch.empty(0), torch.empty(0)
        # The sampler repeats pictures to give every rank as many.
        count = len(dataloader.dataset)
        return torch.cat(features)[:count], torch.cat(targets)[:count]

    def target(self, sample: Any, dataset: Any) -> Tensor:
        """Class number of a picture.

        Args:
            sample (DataSample): What the pipeline packed.
            dataset (Dataset): Where it comes from.

        Returns:
            Tensor: A scalar.
        """
        return sample.gt_label[0]

    @abstractmethod
    def fit(self, train_features: Tensor, train_targets: Tensor,
            test_features: Tensor, test_targets: Tensor) -> Dict[str, float]:
        """Fit to the training set and measure on the test set.

        Args:
            train_features (Tensor): Shape (N, D).
            train_targets (Tensor): Shape (N, ...).
            test_features (Tensor): Shape (M, D).
            test_targets (Tensor): Shape (M, ...).

        Returns:
            Dict[str, float]: The metrics, in percent.
        """


def _check_order(name: str, loader: DataLoader) -> None:
    sampler = loader.sampler
    in_order = isinstance(
        sampler,
        SequentialSampler) or (getattr(sampler, 'shuffle', True) is False
                               and getattr(sampler, 'round_up', False))
    if loader.drop_last or not in_order:
        raise ValueError(f'{name} must give every picture once and in order: '
                         "sampler=dict(type='DefaultSampler', shuffle=False), "
                         'drop_last=False')


@LOOPS.register_module()
class KNNLoop(ProbeLoop):
    """Accuracy of a weighted kNN vote, for data with one label a picture.

    See :func:`mmdensecl.evaluation.probes.knn_accuracy`.

    Args:
        ks (Sequence[int]): Numbers of neighbours. Defaults to
            (10, 20, 100, 200).
        temperature (float): Of the weights. Defaults to 0.07.
        **kwargs: Arguments of :class:`ProbeLoop`.
    """

    def __init__(self,
                 *args: Any,
                 ks: Sequence[int] = (10, 20, 100, 200),
                 temperature: float = 0.07,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ks, self.temperature = ks, temperature

    def fit(self, train_features: Tensor, train_targets: Tensor,
            test_features: Tensor, test_targets: Tensor) -> Dict[str, float]:
        """``knn_{k}/top1`` and ``top5``, see :meth:`ProbeLoop.fit`."""
        device = next(self.model.parameters()).device
        accuracies = knn_accuracy(
            train_features,
            train_targets,
            test_features.to(device),
            test_targets,
            ks=self.ks,
            temperature=self.temperature)
        return {
            f'knn_{k}/{name}': value
            for k, values in accuracies.items()
            for name, value in zip(('top1', 'top5'), values)
        }


@LOOPS.register_module()
class SVMLoop(ProbeLoop):
    """mAP of linear SVMs, for data with several labels a picture.

    Labels are mmpretrain's ``gt_label`` and, for VOC, ``gt_label_difficult``,
    which the pipeline must pack (``PackInputs(meta_keys=...)``). See
    :func:`mmdensecl.evaluation.probes.svm_map`.

    Args:
        costs (Sequence[float]): What to choose from. Defaults to SVM_COSTS.
        n_jobs (int): Processes that fit, -1 for one on each core. Defaults to
            -1.
        **kwargs: Arguments of :class:`ProbeLoop`.
    """

    def __init__(self,
                 *args: Any,
                 costs: Sequence[float] = SVM_COSTS,
                 n_jobs: int = -1,
                 **kwargs: Any) -> None:
        import_sklearn('svm')  # before the features, not after
        super().__init__(*args, **kwargs)
        self.costs, self.n_jobs = costs, n_jobs

    def target(self, sample: Any, dataset: Any) -> Tensor:
        """1, 0, or -1 where only difficult, for each class of the data set.

        Args:
            sample (DataSample): What the pipeline packed.
            dataset (Dataset): Where it comes from.

        Returns:
            Tensor: Shape (C, ).
        """
        labels = sample.gt_label.long()  # maybe on a GPU
        target = labels.new_zeros(len(dataset.metainfo['classes']))
        target[list(sample.get('gt_label_difficult', []))] = -1
        target[labels] = 1
        return target

    def fit(self, train_features: Tensor, train_targets: Tensor,
            test_features: Tensor, test_targets: Tensor) -> Dict[str, float]:
        """``svm/mAP`` and each class's AP, see :meth:`ProbeLoop.fit`."""
        mean, precisions = svm_map(
            train_features.numpy(),
            train_targets.numpy(),
            test_features.numpy(),
            test_targets.numpy(),
            costs=self.costs,
            n_jobs=self.n_jobs)
        classes = self.dataloader.dataset.metainfo['classes']
        return {
            'svm/mAP': mean,
            **{
                f'svm/{c}': x
                for c, x in zip(classes, precisions)
            }
        }


@LOOPS.register_module()
class LowShotLoop(SVMLoop):
    """mAP of linear SVMs that see few pictures of each class.

    See :func:`mmdensecl.evaluation.probes.low_shot_map`.

    Args:
        shots (Sequence[int]): Pictures of each class. Defaults to LOW_SHOTS.
        num_samples (int): Independent draws. Defaults to 5.
        **kwargs: Arguments of :class:`SVMLoop`.
    """

    def __init__(self,
                 *args: Any,
                 shots: Sequence[int] = LOW_SHOTS,
                 num_samples: int = 5,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shots, self.num_samples = shots, num_samples

    def fit(self, train_features: Tensor, train_targets: Tensor,
            test_features: Tensor, test_targets: Tensor) -> Dict[str, float]:
        """``low_shot/k{k}_mAP`` and ``_std``, see :meth:`ProbeLoop.fit`."""
        results = low_shot_map(
            train_features.numpy(),
            train_targets.numpy(),
            test_features.numpy(),
            test_targets.numpy(),
            shots=self.shots,
            num_samples=self.num_samples,
            costs=self.costs,
            n_jobs=self.n_jobs)
        metrics = {}
        for k, (mean, std) in results.items():
            metrics[f'low_shot/k{k}_mAP'] = mean
            metrics[f'low_shot/k{k}_std'] = std
        return metrics
