# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Rank 0 measures; the others neither wait for it nor disturb it."""
import logging
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.model import MMDistributedDataParallel
from PIL import Image
from ranks import run_ranks

from mmdensecl.evaluation import KNNHook
from mmdensecl.registry import MODELS


def measure(rank, world_size, cfg, folder):
    torch.manual_seed(rank)  # its own statistics, as of batch norms
    model = MODELS.build(cfg)
    seen = []
    runner = SimpleNamespace(
        model=MMDistributedDataParallel(model),
        iter=0,
        epoch=0,
        train_dataloader=SimpleNamespace(worker_init_fn=None),
        logger=logging.getLogger('knn'),
        visualizer=SimpleNamespace(
            add_scalars=lambda values, step: seen.append(values['knn_top1'])))
    hook = KNNHook(folder, k=1, size=32, num_workers=0)
    hook.before_train(runner)
    hook.after_train_epoch(runner)
    total = torch.ones(())
    torch.distributed.all_reduce(total)  # the next step's exchange
    return torch.tensor([*seen, total])


def test_two_ranks(tiny_cfg, tmp_path):
    labelled = tmp_path / 'labelled'
    for name, value in (('blue', (20, 30, 200)), ('red', (200, 30, 20))):
        (labelled / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.full((36, 36, 3), np.add(value, 3 * i), np.uint8)
            Image.fromarray(pixels).save(labelled / name / f'{i}.png')
    (tmp_path / 'results').mkdir()
    first, second = run_ranks(measure, 2, tmp_path / 'results', tiny_cfg(),
                              str(labelled))
    assert first.tolist() == [100, 100, 2]
    assert second.tolist() == [2]
