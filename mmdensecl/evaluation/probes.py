# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Probes of frozen features: kNN, linear SVM, low-shot SVM.

Functions of arrays. The loops that extract the features are in
:mod:`mmdensecl.engine.probe_loop`, the protocols in docs/probes.md.
"""
import warnings
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What the SVM benchmark tries for each class: three costs of the command line
# in mmselfsup's eval_svm_full.sh, sixteen that svm_helper.py always adds.
SVM_COSTS = (1.0, 10.0, 100.0) + tuple(0.5**n for n in range(4, 20))
LOW_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
_FOLDS = 3


def nearest(bank: Tensor,
            queries: Tensor,
            k: int,
            block: int = 16384) -> Tuple[Tensor, Tensor]:
    """The ``k`` rows of a bank that are most similar to each query.

    Block by block, so that neither the N x M similarities nor, on a GPU, the
    whole bank are ever in memory.

    Args:
        bank (Tensor): Shape (N, C), on any device.
        queries (Tensor): Shape (M, C); the work is done on their device.
        k (int): How many, at most N.
        block (int): Rows of the bank, and of the queries, that are compared
            at a time. Defaults to 16384.

    Returns:
        Tuple[Tensor, Tensor]: Cosine similarities, the highest first, and the
        rows that have them, each of shape (M, k).
    """
    queries = F.normalize(queries)
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty_like(similarity, dtype=torch.long)
    for start in range(0, len(bank), block):
        part = F.normalize(bank[start:start + block].to(queries.device))
        kept = []
        for some, old, old_index in zip(
                queries.split(block), similarity.split(block),
                index.split(block)):
            new, new_index = (some @ part.T).topk(min(k, len(part)))
            both = torch.cat([old, new], dim=1)
            both_index = torch.cat([old_index, new_index + start], dim=1)
            both, order = both.topk(min(k, both.size(1)))
            kept.append((both, both_index.gather(1, order)))
        similarity, index = map(torch.cat, zip(*kept))
    return similarity, index


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    topk: Sequence[int] = (1, 5)
) -> Dict[int, List[float]]:
    """Accuracy of the weighted kNN vote on L2-normalised features.

    Each of the k neighbours gives exp(similarity / temperature) to its class,
    as in `Unsupervised Feature Learning via Non-Parametric Instance
    Discrimination <https://arxiv.org/abs/1805.01978>`_, section 3.4. The
    values of k are those of mmselfsup's test_knn.py.

    Args:
        train_features (Tensor): Shape (N, C), on any device.
        train_labels (Tensor): Class numbers, shape (N, ).
        test_features (Tensor): Shape (M, C); the work is done on its device.
        test_labels (Tensor): Class numbers, shape (M, ).
        ks (Sequence[int]): Numbers of neighbours. Defaults to
            (10, 20, 100, 200).
        temperature (float): Of the weights. Defaults to 0.07.
        topk (Sequence[int]): A picture is right when its class is among this
            many that got the highest, non-zero, votes. Defaults to (1, 5).

    Returns:
        Dict[int, List[float]]: For each k the accuracies, in percent.

    Raises:
        ValueError: More neighbours are asked for than there are.
    """
    if max(ks) > len(train_features):
        raise ValueError(
            f'k={max(ks)} neighbours were asked for, but the training set has '
            f'{len(train_features)} pictures. Choose smaller ones, '
            'test_cfg.ks="[10,20]" for example')
    device = test_features.device
    similarity, index = nearest(train_features, test_features, max(ks))
    neighbours = train_labels.to(device)[index]
    weights = (similarity / temperature).exp()
    targets = test_labels.to(device).unsqueeze(1)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    accuracies = {}
    for k in ks:
        votes = weights.new_zeros(len(targets), num_classes)
        votes.scatter_add_(1, neighbours[:, :k], weights[:, :k])
        votes, classes = votes.topk(min(max(topk), num_classes))
        right = (classes == targets) & (votes > 0)
        accuracies[k] = [
            100 * right[:, :n].any(1).double().mean().item() for n in topk
        ]
    return accuracies


def import_sklearn(name: str) -> ModuleType:
    """A module of scikit-learn, which only the SVM probes need.

    Args:
        name (str): Below ``sklearn``.

    Returns:
        ModuleType: The module.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        return import_module(f'sklearn.{name}')
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The SVM probes need scikit-learn: pip install scikit-learn',
            name=error.name) from error


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area below the interpolated precision-recall curve.

    The measure of VOC since 2010, which the SVM benchmark takes for VOC07
    too: the precision at a recall is the highest at that recall or above.

    Args:
        labels (np.ndarray): Whether each picture is positive, shape (N, ).
        scores (np.ndarray): Shape (N, ).

    Returns:
        float: Between 0 and 1.
    """
    precision, recall, _ = import_sklearn('metrics').precision_recall_curve(
        labels, scores)
    highest = np.maximum.accumulate(precision)  # recall falls along the array
    return float(np.sum((recall[:-1] - recall[1:]) * highest[:-1]))


def svm_map(train_features: np.ndarray,
            train_targets: np.ndarray,
            test_features: np.ndarray,
            test_targets: np.ndarray,
            costs: Sequence[float] = SVM_COSTS,
            n_jobs: int = 1) -> Tuple[float, List[float]]:
    """mAP of one linear SVM for each class, as in the VOC07 SVM benchmark.

    The protocol of `Scaling and Benchmarking Self-Supervised Visual
    Representation Learning <https://arxiv.org/abs/1905.01235>`_ with the
    settings of its code, facebookresearch/fair_self_supervision_benchmark,
    tools/svm: float64 features divided by their L2 norm + 1e-5; LinearSVC
    with squared hinge, L2 penalty, dual form, weights 2 for positives and 1
    for negatives, tolerance 1e-4, at most 2000 iterations; for each class the
    cost that has the best average precision in 3-fold cross-validation.
    Pictures in which a class is only seen as a difficult object are negatives
    of that class in training, and are left out in testing.

    Args:
        train_features (np.ndarray): Shape (N, D).
        train_targets (np.ndarray): 1 where the picture has an object of the
            class, 0 where not, -1 where only difficult ones, shape (N, C).
        test_features (np.ndarray): Shape (M, D).
        test_targets (np.ndarray): Shape (M, C).
        costs (Sequence[float]): What to choose from. Defaults to SVM_COSTS.
        n_jobs (int): Processes that share the classes, -1 for one on each
            core. Defaults to 1.

    Returns:
        Tuple[float, List[float]]: The mean over classes and the average
        precision of each, in percent.

    Raises:
        ValueError: A class has fewer pictures than the protocol needs.
    """
    _check_counts(train_targets == 1, _FOLDS, 'training', 'with an object')
    _check_counts(train_targets != 1, _FOLDS, 'training', 'without an object')
    _check_counts(test_targets == 1, 1, 'test', 'with an object')
    train_features = _unit_rows(train_features)
    test_features = _unit_rows(test_features)
    precisions = _parallel(_class_precision, n_jobs,
                           [(train_features, train_targets[:, c],
                             test_features, test_targets[:, c], costs)
                            for c in range(train_targets.shape[1])])
    precisions = [100 * value for value in precisions]
    return float(np.mean(precisions)), precisions


def low_shot_map(train_features: np.ndarray,
                 train_targets: np.ndarray,
                 test_features: np.ndarray,
                 test_targets: np.ndarray,
                 shots: Sequence[int] = LOW_SHOTS,
                 num_samples: int = 5,
                 costs: Sequence[float] = SVM_COSTS,
                 n_jobs: int = 1) -> Dict[int, Tuple[float, float]]:
    """mAP of SVMs that see k pictures of each class.

    The low-shot protocol of the same paper and code as :func:`svm_map`: for
    each sample and class k random positives and k * (classes - 1) random
    negatives, none of them difficult; the same SVM, without cross-validation.
    As there, one cost is reported for each k: the one with the best mean
    *test* mAP over the samples, so the numbers compare models and are no
    estimate for unseen data. The samples are ours (fixed seeds); the
    authors' lists of pictures are not used.

    Args:
        train_features (np.ndarray): As for :func:`svm_map`.
        train_targets (np.ndarray): As for :func:`svm_map`.
        test_features (np.ndarray): As for :func:`svm_map`.
        test_targets (np.ndarray): As for :func:`svm_map`.
        shots (Sequence[int]): Values of k. Defaults to LOW_SHOTS.
        num_samples (int): Independent draws for each k. Defaults to 5.
        costs (Sequence[float]): What to choose from. Defaults to SVM_COSTS.
        n_jobs (int): Processes that share the fits, -1 for one on each core.
            Defaults to 1.

    Returns:
        Dict[int, Tuple[float, float]]: For each k the mean mAP over the
        samples and its standard deviation, in percent.

    Raises:
        ValueError: A class has fewer pictures than the protocol needs.
    """
    num_classes = train_targets.shape[1]
    _check_counts(train_targets == 1, max(shots), 'training', 'with an object')
    _check_counts(train_targets == 0,
                  max(shots) * (num_classes - 1), 'training',
                  'without an object')
    _check_counts(test_targets == 1, 1, 'test', 'with an object')
    train_features = _unit_rows(train_features)
    test_features = _unit_rows(test_features)
    jobs = []
    for k in shots:
        for sample in range(num_samples):
            generator = np.random.default_rng([sample, k])
            for c in range(num_classes):
                rows = np.concatenate([
                    generator.choice(
                        np.flatnonzero(train_targets[:, c] == value),
                        count,
                        replace=False)
                    for value, count in ((1, k), (0, k * (num_classes - 1)))
                ])
                jobs.append((train_features, train_targets[:, c], rows,
                             test_features, test_targets[:, c], costs))
    precisions = 100 * np.reshape(
        _parallel(_sample_precisions, n_jobs, jobs),
        (len(shots), num_samples, num_classes, len(costs)))
    results = {}
    for k, maps in zip(shots, precisions.mean(axis=2)):
        best = maps.mean(axis=0).argmax()
        results[k] = (float(maps[:, best].mean()), float(maps[:, best].std()))
    return results


def _class_precision(train: np.ndarray, targets: np.ndarray, test: np.ndarray,
                     test_targets: np.ndarray,
                     costs: Sequence[float]) -> float:
    """Test AP of a class with the cost that cross-validation prefers."""
    labels = np.where(targets == 1, 1, -1)
    with _large_costs():
        scores = [
            import_sklearn('model_selection').cross_val_score(
                _svm(cost),
                train,
                labels,
                cv=_FOLDS,
                scoring='average_precision').mean() for cost in costs
        ]
        fitted = _svm(costs[int(np.argmax(scores))]).fit(train, labels)
    return _test_precision(fitted, test, test_targets)


def _sample_precisions(train: np.ndarray, targets: np.ndarray,
                       rows: np.ndarray, test: np.ndarray,
                       test_targets: np.ndarray,
                       costs: Sequence[float]) -> List[float]:
    """Test AP of a class for each cost, trained on some rows."""
    labels = np.where(targets[rows] == 1, 1, -1)
    with _large_costs():
        return [
            _test_precision(
                _svm(cost).fit(train[rows], labels), test, test_targets)
            for cost in costs
        ]


def _svm(cost: float):
    return import_sklearn('svm').LinearSVC(
        C=cost,
        class_weight={
            1: 2,
            -1: 1
        },
        penalty='l2',
        loss='squared_hinge',
        dual=True,
        tol=1e-4,
        max_iter=2000,
        random_state=0)


def _test_precision(svm, features: np.ndarray, targets: np.ndarray) -> float:
    seen = targets != -1
    return average_precision(targets[seen] == 1,
                             svm.decision_function(features[seen]))


@contextmanager
def _large_costs() -> Iterator[None]:
    """Silence: large costs stop at the iteration limit, as in the source."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore',
                              import_sklearn('exceptions').ConvergenceWarning)
        yield


def _unit_rows(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / (norm + 1e-5)


def _check_counts(found: np.ndarray, needed: int, split: str,
                  what: str) -> None:
    counts = found.sum(axis=0)
    if counts.min() < needed:
        c = int(counts.argmin())
        raise ValueError(
            f'Class {c} has {counts[c]} {split} pictures {what} of it, and '
            f'this protocol needs {needed}. Is it the right data set?')


def _parallel(function: Callable, n_jobs: int, jobs: Sequence[tuple]) -> list:
    from joblib import Parallel, delayed  # which scikit-learn requires
    return Parallel(n_jobs)(delayed(function)(*job) for job in jobs)
