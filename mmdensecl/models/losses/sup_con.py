# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from torch import Tensor


def sup_con(query: Tensor, points: Tensor, query_labels: Tensor,
            point_labels: Tensor, temperature: float) -> Tensor:
    r"""Supervised contrast: points of the query's label are its positives.

    .. math::
        L_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{\exp(q_i \cdot z_p / \tau)}
            {\sum_a \exp(q_i \cdot z_a / \tau)}

    (Khosla et al. 2020, eq. 2, :math:`L_{out}`.) Here the anchors are not
    among the points, so the sum in the denominator leaves none out.

    Args:
        query (Tensor): Normalised anchors, (M, D).
        points (Tensor): Normalised points to compare with, (G, D).
        query_labels (Tensor): Label of each anchor, which at least one of the
            points must have, (M, ).
        point_labels (Tensor): Label of each point, (G, ).
        temperature (float): :math:`\tau`.

    Returns:
        Tensor: Loss of each anchor, (M, ).
    """
    logits = query @ points.t() / temperature
    same = query_labels[:, None] == point_labels
    # The mean of the log-softmax over the positives, without its M x G terms.
    positive = (logits * same).sum(dim=1) / same.sum(dim=1)
    return logits.logsumexp(dim=1) - positive
