# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Run a function in several real processes that talk over gloo."""
import multiprocessing
import os
import time
import traceback

import numpy as np
import torch

TIME_LIMIT = 120


def _main(worker, rank, world_size, folder, args):
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            'gloo',
            init_method=f'file://{folder}/store',
            rank=rank,
            world_size=world_size)
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
        folder (Path): Empty, for their results.
        *args: Passed on; pickled.

    Returns:
        list: What each rank returned: tensors and containers of them.
    """
    # Forks of the server of conftest.py.
    context = multiprocessing.get_context('forkserver')
    processes = [
        context.Process(
            target=_main,
            args=(worker, rank, world_size, str(folder), args),
            daemon=True) for rank in range(world_size)
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
            f'{TIME_LIMIT} s ranks {hung} still ran')
    return [torch.load(folder / f'{rank}.pth') for rank in range(world_size)]
