# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""MoCo-v2 and DenseCL written from the papers' equations, one number at a
time: slow, plain, and sharing no code with the package.

Equation numbers are those of DenseCL, arXiv 2011.09157.
"""

from copy import deepcopy

import torch
import torch.nn as nn


class TinyBackbone(nn.Module):
    """Two convs with batch norm; 8 x 8 pixels become a 4 x 4 map."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return (self.bn2(self.conv2(x)),)


def unit(vector):
    """A vector divided by its length."""
    return vector / dot(vector, vector) ** 0.5


def dot(a, b):
    return (a * b).sum()


def project(vector, weights, branch):
    """Layer, ReLU, layer (section 3.2), for one vector of channels.

    A 1x1 conv is this at every cell.
    """

    def layer(number, x):
        rows = weights[f'{branch}.{number}.weight'].flatten(1)
        biases = weights[f'{branch}.{number}.bias']
        pairs = zip(rows, biases, strict=True)
        return torch.stack([dot(row, x) + bias for row, bias in pairs])

    return layer(2, torch.clamp(layer(0, vector), min=0))


def mean(vectors):
    vectors = list(vectors)
    return sum(vectors) / len(vectors)


def cells_of(feature_map, num_grid=None):
    """Cells of one map (C, H, W), row by row, each a vector of C channels.

    With ``num_grid`` = S, cell (i, j) is the mean over rows floor(iH/S) to
    ceil((i+1)H/S) and the columns likewise, adaptive average pooling.
    """
    _, height, width = feature_map.shape
    rows = columns = num_grid
    if num_grid is None:
        rows, columns = height, width
    cells = []
    for i in range(rows):
        top, bottom = i * height // rows, -(-(i + 1) * height // rows)
        for j in range(columns):
            left, right = j * width // columns, -(-(j + 1) * width // columns)
            cells.append(
                mean(
                    feature_map[:, y, x]
                    for y in range(top, bottom)
                    for x in range(left, right)
                )
            )
    return cells


def match(query_cells, key_cells):
    """For each query cell the key cell of largest cosine (eq. 4)."""
    picks = []
    for query in query_cells:
        cosines = [float(dot(unit(query), unit(key))) for key in key_cells]
        picks.append(cosines.index(max(cosines)))
    return picks


def cross_entropy(query, positive, negatives, temperature):
    """-log of the positive's share of the exponentials (eq. 1)."""
    own = torch.exp(dot(query, positive) / temperature)
    others = sum(
        torch.exp(dot(query, negative) / temperature) for negative in negatives
    )
    return -torch.log(own / (own + others))


class LoopQueue:
    """Rows, and the one that goes next."""

    def __init__(self, rows):
        self.rows = [row.clone() for row in rows]
        self.pointer = 0

    def enqueue(self, keys):
        for key in keys:
            self.rows[self.pointer] = key.clone()
            self.pointer += 1
            if self.pointer == len(self.rows):
                self.pointer = 0


def named_parameters(backbone, neck):
    return {
        **{f'backbone.{name}': x for name, x in backbone.named_parameters()},
        **{f'neck.{name}': x for name, x in neck.items()},
    }


class LoopMoCoV2:
    """MoCo-v2 (arXiv 2003.04297).

    Args:
        backbone, neck: Modules of the query encoder; copied. Of the neck only
            the weights are used.
        key_backbone, key_neck: The same of the key encoder.
        queue: Keys at the start, (K, D).
        momentum: The paper's m, 0.999 and the like.
    """

    def __init__(
        self,
        backbone,
        neck,
        key_backbone,
        key_neck,
        queue,
        momentum,
        temperature=0.2,
    ):
        self.backbone = deepcopy(backbone)
        self.key_backbone = deepcopy(key_backbone)
        self.neck = {
            name: x.detach().clone().requires_grad_()
            for name, x in neck.named_parameters()
        }
        self.key_neck = {
            name: x.detach().clone() for name, x in key_neck.named_parameters()
        }
        self.queue = LoopQueue(queue)
        self.momentum = momentum
        self.temperature = temperature

    def query_parameters(self):
        return named_parameters(self.backbone, self.neck)

    def key_parameters(self):
        return named_parameters(self.key_backbone, self.key_neck)

    def move_key_encoder(self):
        """theta_k = m theta_k + (1 - m) theta_q (MoCo, eq. 2)."""
        m, query = self.momentum, self.query_parameters()
        with torch.no_grad():
            for name, x in self.key_parameters().items():
                x.copy_(m * x + (1 - m) * query[name])

    def encode(self, backbone, neck, images):
        """Normalised global vectors, one for each picture, and the maps."""
        maps = backbone(images)[0]
        vectors = [
            unit(project(mean(cells_of(feature_map)), neck, 'mlp'))
            for feature_map in maps
        ]
        return vectors, maps

    def step(self, query_images, key_images):
        """Losses of one step; the queue moves on afterwards."""
        queries, _ = self.encode(self.backbone, self.neck, query_images)
        self.move_key_encoder()
        with torch.no_grad():
            keys, _ = self.encode(self.key_backbone, self.key_neck, key_images)
        loss = mean(
            cross_entropy(query, key, self.queue.rows, self.temperature)
            for query, key in zip(queries, keys, strict=True)
        )
        self.queue.enqueue(keys)
        return dict(loss_global=loss)


class LoopDenseCL(LoopMoCoV2):
    """DenseCL (arXiv 2011.09157)."""

    def __init__(
        self,
        *args,
        dense_queue,
        loss_lambda,
        num_grid,
        draws=None,
        weight_power=0.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.dense_queue = LoopQueue(dense_queue)
        self.loss_lambda = loss_lambda
        self.num_grid = num_grid
        # Of each step the cells of each image that become negatives; None
        # for the published mean.
        self.draws = draws
        self.weight_power = weight_power

    def step(self, query_images, key_images):
        queries, query_maps = self.encode(
            self.backbone, self.neck, query_images
        )
        self.move_key_encoder()
        with torch.no_grad():
            keys, key_maps = self.encode(
                self.key_backbone, self.key_neck, key_images
            )
        global_losses, dense_losses, weights, negatives = [], [], [], []
        drawn = self.draws.pop(0) if self.draws else None
        for n in range(len(queries)):
            global_losses.append(
                cross_entropy(
                    queries[n], keys[n], self.queue.rows, self.temperature
                )
            )
            query_cells = cells_of(query_maps[n], self.num_grid)
            key_cells = cells_of(key_maps[n], self.num_grid)
            picks = match([x.detach() for x in query_cells], key_cells)
            with torch.no_grad():
                key_grid = [
                    project(x, self.key_neck, 'mlp2') for x in key_cells
                ]
            if drawn is None:
                negatives.append(unit(mean(key_grid)))
            else:
                negatives += [unit(key_grid[i]) for i in drawn[n]]
            for cell, pick in zip(query_cells, picks, strict=True):
                cosine = dot(unit(cell), unit(key_cells[pick])).detach()
                weights.append(cosine.clamp(min=0) ** self.weight_power)
                dense_losses.append(
                    cross_entropy(
                        unit(project(cell, self.neck, 'mlp2')),
                        unit(key_grid[pick]),
                        self.dense_queue.rows,
                        self.temperature,
                    )
                )
        self.queue.enqueue(keys)
        self.dense_queue.enqueue(negatives)
        weight = self.loss_lambda  # eq. 3
        return dict(
            loss_global=(1 - weight) * mean(global_losses),
            loss_dense=weight
            * sum(w * x for w, x in zip(weights, dense_losses, strict=True))
            / sum(weights),
        )
