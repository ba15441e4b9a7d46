# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Probes of frozen features: kNN, linear SVM, low-shot SVM.

Functions of arrays; :mod:`.probe_loop` extracts the features. The protocols
are in docs/evaluation.md.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What the SVM benchmark tries for each class: three costs of the command line
# in mmselfsup's eval_svm_full.sh, sixteen that svm_helper.py always adds.
SVM_COSTS = (1.0, 10.0, 100.0) + tuple(0.5**n for n in range(4, 20))
LOW_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
FOLDS = 3


def nearest(
    bank: Tensor, queries: Tensor, k: int, block: int = 16384
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of a bank (N, C) most similar to each query (M, C).

    Works on the device of the queries, blockwise, so that neither the N x M
    similarities nor, on a GPU, the whole bank are ever in memory.

    Returns:
        Cosine similarities, the highest first, and the rows that have them,
        each (M, k).
    """
    queries = F.normalize(queries)
    found = []
    for some in queries.split(block):
        best = some.new_empty(len(some), 0)
        index = torch.empty_like(best, dtype=torch.long)
        for start in range(0, len(bank), block):
            part = F.normalize(bank[start : start + block].to(some.device))
            new, new_index = (some @ part.T).topk(min(k, len(part)))
            best = torch.cat([best, new], dim=1)
            index = torch.cat([index, new_index + start], dim=1)
            best, order = best.topk(min(k, best.size(1)))
            index = index.gather(1, order)
        found.append((best, index))
    similarity, index = (torch.cat(x) for x in zip(*found, strict=True))
    return similarity, index


def knn_votes(
    similarity: Tensor, labels: Tensor, num_classes: int, temperature: float
) -> Tensor:
    """Weighted votes (M, num_classes) of neighbours (M, k).

    Each gives exp(similarity / temperature) to its class, as in `Unsupervised
    Feature Learning via Non-Parametric Instance Discrimination
    <https://arxiv.org/abs/1805.01978>`_, section 3.4.
    """
    votes = similarity.new_zeros(len(similarity), num_classes)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp())


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    topk: Sequence[int] = (1, 5),
) -> dict[int, list[float]]:
    """Accuracy of the weighted kNN vote on L2-normalised features.

    The values of k are those of mmselfsup's test_knn.py.

    Args:
        train_features: Shape (N, C), on any device.
        train_labels: Class numbers, shape (N, ).
        test_features: Shape (M, C); the work is done on its device.
        test_labels: Class numbers, shape (M, ).
        ks: Numbers of neighbours.
        temperature: Of :func:`knn_votes`.
        topk: An image is right when its class is among this many that got the
            highest, non-zero, votes.

    Returns:
        For each k the accuracies, in percent.

    Raises:
        ValueError: More neighbours are asked for than there are.
    """
    if max(ks) > len(train_features):
        raise ValueError(
            f'k={max(ks)} neighbours were asked for, but the training set has '
            f'{len(train_features)} images. Choose smaller ones, '
            'test_cfg.ks="[10,20]" for example'
        )
    device = test_features.device
    similarity, index = nearest(train_features, test_features, max(ks))
    labels = train_labels.to(device)[index]
    targets = test_labels.to(device).unsqueeze(1)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    accuracies = {}
    for k in ks:
        votes, classes = knn_votes(
            similarity[:, :k], labels[:, :k], num_classes, temperature
        ).topk(min(max(topk), num_classes))
        right = ((classes == targets) & (votes > 0)).double()
        accuracies[k] = [100 * right[:, :n].sum(1).mean().item() for n in topk]
    return accuracies


def import_sklearn(name: str) -> ModuleType:
    """A module of scikit-learn, which only the SVM probes need."""
    try:
        return import_module(f'sklearn.{name}')
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The SVM probes need scikit-learn: pip install scikit-learn',
            name=error.name,
        ) from error


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area below the interpolated precision-recall curve, 0 to 1.

    The measure of VOC since 2010, which the SVM benchmark takes for VOC07
    too: the precision at a recall is the highest at that recall or above.
    """
    precision, recall, _ = import_sklearn('metrics').precision_recall_curve(
        labels, scores
    )
    highest = np.maximum.accumulate(precision)  # recall falls along the array
    return float(np.sum((recall[:-1] - recall[1:]) * highest[:-1]))


def svm_map(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    costs: Sequence[float] = SVM_COSTS,
    n_jobs: int = 1,
) -> tuple[float, list[float]]:
    """Mean AP of one linear SVM for each class: the VOC07 SVM benchmark.

    The protocol of `Scaling and Benchmarking Self-Supervised Visual
    Representation Learning <https://arxiv.org/abs/1905.01235>`_ with the
    settings of its code, facebookresearch/fair_self_supervision_benchmark,
    tools/svm: float64 features divided by their L2 norm + 1e-5; LinearSVC
    with squared hinge, L2 penalty, dual form, weights 2 for positives and 1
    for negatives, tolerance 1e-4, at most 2000 iterations; for each class the
    cost that has the best average precision in 3-fold cross-validation.
    Images in which a class is only seen as a difficult object are negatives
    of that class in training, and are left out in testing.

    Args:
        train_features: Shape (N, D).
        train_targets: 1 where the image has an object of the class, 0 where
            not, -1 where only difficult ones, shape (N, C).
        test_features: Shape (M, D).
        test_targets: Shape (M, C).
        costs: What to choose from.
        n_jobs: Processes that share the classes, -1 for one on each core.

    Returns:
        The mean over classes and the AP of each, in percent.

    Raises:
        ValueError: A class has fewer images than the protocol needs.
    """
    _check_counts(train_targets == 1, FOLDS, 'training', 'with an object')
    _check_counts(train_targets != 1, FOLDS, 'training', 'without an object')
    _check_counts(test_targets == 1, 1, 'test', 'with an object')
    train, test = _unit_rows(train_features), _unit_rows(test_features)
    targets = zip(train_targets.T, test_targets.T, strict=True)
    jobs = [(train, test, *pair, costs) for pair in targets]
    precisions = [100 * x for x in _parallel(_class_precision, n_jobs, jobs)]
    return float(np.mean(precisions)), precisions


def low_shot_map(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    test_targets: np.ndarray,
    shots: Sequence[int] = LOW_SHOTS,
    num_samples: int = 5,
    costs: Sequence[float] = SVM_COSTS,
    n_jobs: int = 1,
) -> dict[int, tuple[float, float]]:
    """Mean AP of SVMs that see k images of each class.

    The low-shot protocol of the same paper and code as :func:`svm_map`: for
    each sample and class k random positives and k * (classes - 1) random
    negatives, none of them difficult; the same SVM, without cross-validation.
    As there, one cost is reported for each k: the one with the best mean
    *test* mAP over the samples, so the numbers compare models and are no
    estimate for unseen data. The samples are ours (fixed seeds); the
    authors' lists of images are not used.

    The arguments are those of :func:`svm_map`, the values of k, and the
    number of draws for each.

    Returns:
        For each k the mean mAP over the samples and its standard deviation,
        in percent.

    Raises:
        ValueError: A class has fewer images than the protocol needs.
    """
    classes, most = train_targets.shape[1], max(shots)
    positive, negative = train_targets == 1, train_targets == 0
    _check_counts(positive, most, 'training', 'with an object')
    _check_counts(
        negative, most * (classes - 1), 'training', 'without an object'
    )
    _check_counts(test_targets == 1, 1, 'test', 'with an object')
    train, test = _unit_rows(train_features), _unit_rows(test_features)
    jobs = []
    for k in shots:
        for sample in range(num_samples):
            rng = np.random.default_rng([sample, k])
            for c in range(classes):
                rows = [
                    rng.choice(np.flatnonzero(x[:, c]), count, replace=False)
                    for x, count in (
                        (positive, k),
                        (negative, k * (classes - 1)),
                    )
                ]
                targets = train_targets[:, c], test_targets[:, c]
                jobs.append(
                    (train, test, *targets, costs, np.concatenate(rows))
                )
    found = _parallel(_sample_precisions, n_jobs, jobs)
    shape = len(shots), num_samples, classes, len(costs)
    maps = 100 * np.reshape(found, shape).mean(axis=2)
    best = [x[:, x.mean(axis=0).argmax()] for x in maps]
    return {
        k: (float(x.mean()), float(x.std()))
        for k, x in zip(shots, best, strict=True)
    }


def _class_precision(train, test, targets, test_targets, costs) -> float:
    """Test AP of a class with the cost that cross-validation prefers."""
    validate = import_sklearn('model_selection').cross_val_score
    labels = np.where(targets == 1, 1, -1)
    options = dict(cv=FOLDS, scoring='average_precision')
    with warnings.catch_warnings():
        _ignore_iteration_limit()
        scores = [
            validate(_svm(cost), train, labels, **options).mean()
            for cost in costs
        ]
    best = costs[int(np.argmax(scores))]
    return _sample_precisions(train, test, targets, test_targets, [best])[0]


def _sample_precisions(
    train, test, targets, test_targets, costs, rows=slice(None)
) -> list[float]:
    """Test AP of a class for each cost, trained on some rows."""
    labels, seen = np.where(targets[rows] == 1, 1, -1), test_targets != -1
    with warnings.catch_warnings():
        _ignore_iteration_limit()
        svms = [_svm(cost).fit(train[rows], labels) for cost in costs]
    return [
        average_precision(
            test_targets[seen] == 1, svm.decision_function(test[seen])
        )
        for svm in svms
    ]


def _svm(cost: float):
    return import_sklearn('svm').LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        penalty='l2',
        loss='squared_hinge',
        dual=True,
        tol=1e-4,
        max_iter=2000,
        random_state=0,
    )


def _ignore_iteration_limit() -> None:
    """Large costs stop at it, as in the source."""
    kind = import_sklearn('exceptions').ConvergenceWarning
    warnings.simplefilter('ignore', kind)


def _unit_rows(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    return features / (np.linalg.norm(features, axis=1, keepdims=True) + 1e-5)


def _check_counts(found: np.ndarray, needed: int, split: str, what: str):
    counts = found.sum(axis=0)
    c = int(counts.argmin())
    if counts[c] < needed:
        raise ValueError(
            f'Class {c} has {counts[c]} {split} images {what} of it, and this '
            f'protocol needs {needed}. Is it the right dataset?'
        )


def _parallel(function: Callable, n_jobs: int, jobs: Sequence[tuple]) -> list:
    from joblib import Parallel, delayed  # which scikit-learn requires

    return Parallel(n_jobs)(delayed(function)(*job) for job in jobs)
