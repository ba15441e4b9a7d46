# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Run a function, such as training, in several processes over gloo."""

import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from mmengine.model import MMDistributedDataParallel

from mmdensecl.registry import MODELS

TIME_LIMIT = 120


def _main(worker, rank, world_size, folder, args):
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            'gloo',
            init_method=f'file://{folder}/store',
            rank=rank,
            world_size=world_size,
        )
        torch.manual_seed(0)
        np.random.seed(rank)  # where mmengine draws a common seed
        torch.save(worker(rank, world_size, *args), f'{folder}/{rank}.pth')
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        with open(f'{folder}/{rank}.txt', 'w') as file:
            traceback.print_exc(file=file)
        # The others may wait for this rank forever: do not wait for them.
        os._exit(1)


def run_ranks(worker, world_size, folder, *args):
    """Call ``worker(rank, world_size, *args)`` in each of the processes.

    Args:
        worker (Callable): A function of a test module.
        world_size (int): Number of processes.
        folder (Path): Where results may be left.
        *args: Passed on; pickled.

    Returns:
        list: What each rank returned: tensors and containers of them.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    # Forks of the server of conftest.py.
    context = multiprocessing.get_context('forkserver')
    processes = [
        context.Process(
            target=_main,
            args=(worker, rank, world_size, str(folder), args),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIME_LIMIT
    while any(p.is_alive() for p in processes):
        failed = any(p.exitcode for p in processes)
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    reports = [path.read_text() for path in sorted(folder.glob('*.txt'))]
    if reports:
        raise AssertionError('\n'.join(reports))
    if any(p.exitcode for p in processes):
        raise AssertionError(
            f'Exit codes {[p.exitcode for p in processes]}; after '
            f'{TIME_LIMIT} s ranks {hung} still ran'
        )
    return [torch.load(folder / f'{rank}.pth') for rank in range(world_size)]


METHODS = ['MoCoV2', 'DenseCL', 'DSC_KM', 'DSC_PM']
METHODS += [f'DenseCL_{x}' for x in ('cells', 'mutual', 'weighted')]


def method_cfgs(tiny_cfg, **own):
    """A tiny config of each of `METHODS`."""
    own['momentum'] = 0.1
    dsc = dict(own, type='mmdensecl.DSC', num_samples=5)
    mutual = dict(type='mmdensecl.MutualNearestNeighbor')
    weighted = dict(type='mmdensecl.BackboneSimilarity', weight_power=2.0)
    kmeans = dict(type='mmdensecl.KMeansCategoryHead', num_clusters=6)
    prototypes = dict(
        type='mmdensecl.PrototypeCategoryHead', num_prototypes=6, feat_dim=4
    )
    cells = dict(dense_negatives='cells', cells_per_image=2)
    return dict(
        MoCoV2=tiny_cfg('MoCoV2', **own),
        DenseCL=tiny_cfg(**own),
        DenseCL_cells=tiny_cfg(**cells, **own),
        # The ranks have different numbers of cells with a positive.
        DenseCL_mutual=tiny_cfg(
            num_grid=3, loss_lambda=0.3, correspondence=mutual, **own
        ),
        DenseCL_weighted=tiny_cfg(correspondence=weighted, **own),
        DSC_KM=tiny_cfg(category=kmeans, **dsc),
        DSC_PM=tiny_cfg(category=prototypes, **dsc),
    )


def build(cfg, **changes):
    """A model in float64, the same in every process."""
    torch.manual_seed(0)
    np.random.seed(0)  # what shared seeds are drawn from
    model = MODELS.build({**cfg, **changes})
    with torch.no_grad():  # Not equal, so that mistaking them shows.
        for x in model.encoder_k.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model.double().train()


def train(model, view_pairs, distributed=True):
    """Losses, gradients and state of each step."""
    wrapper = model
    if distributed:
        wrapper = MMDistributedDataParallel(
            module=model, device_ids=None, broadcast_buffers=False
        )
    trained = {n: x for n, x in model.named_parameters() if x.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    steps = []
    for views in view_pairs:
        outputs = wrapper(views, None, mode='loss')
        optimizer.zero_grad()
        losses = {n: x for n, x in outputs.items() if 'loss' in n}
        sum(losses.values()).backward()
        optimizer.step()
        steps.append(
            dict(
                losses={n: x.detach() for n, x in losses.items()},
                gradients={n: x.grad.clone() for n, x in trained.items()},
                state={
                    n: x.clone()
                    for n, x in model.state_dict().items()
                    if x.numel()
                },
                categories={
                    n: x.item()
                    for n, x in outputs.items()
                    if n in ('category_used', 'category_entropy')
                },
            )
        )
    return steps


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
