# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Processes and cores of a machine, with or without GPUs."""

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.logging import print_log

from .config import dicts


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


def prepare_cpu_launch(cfg: Config) -> None:
    """Let torchrun's processes train on a machine without a GPU.

    mmengine's launchers pick a GPU for each process and pass its number on.
    Without GPUs the process group is started here, with gloo, the model is
    wrapped without a device number, and its SyncBN, which PyTorch has for
    GPUs only, becomes BN. With GPUs, or without a launcher, nothing happens;
    mmengine itself turns SyncBN into BN for a single process.

    Args:
        cfg: The run's config, changed in place.

    Raises:
        RuntimeError: Another launcher is to start processes without GPUs.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or torch.cuda.is_available():
        return
    if launcher != 'pytorch':
        raise RuntimeError(
            f'--launcher {launcher} starts one process for each GPU, and '
            'there is none here. On CPUs use tools/dist_train.sh CONFIG '
            'PROCESSES'
        )
    options = {**cfg.get('env_cfg', {}).get('dist_cfg', {}), 'backend': 'gloo'}
    if 'timeout' in options:  # in seconds, as mmengine takes it
        options['timeout'] = timedelta(seconds=options['timeout'])
    if not is_distributed():
        dist.init_process_group(**options)
    defaults = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {
        **defaults,
        **cfg.get('model_wrapper_cfg', {}),
        'device_ids': None,
    }
    sync = [
        node
        for node, _ in dicts(cfg.get('model'))
        if node.get('type') in ('SyncBN', 'MMSyncBN')
    ]
    for node in sync:
        node['type'] = 'BN'
    if sync:
        print_log(
            f'No GPU: {len(sync)} norm settings of the model go from '
            'SyncBN to BN, so each process normalises by its own share of '
            'the batch',
            logger='current',
            level=logging.WARNING,
        )


def leave_ranks() -> None:
    """Leave the process group, where there is one.

    Else gloo's threads may abort a process that exits before another.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
