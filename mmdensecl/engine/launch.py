# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dist import is_distributed


def prepare_cpu_launch(cfg: Config) -> None:
    """Let a launcher's processes train on a machine without a GPU.

    mmengine's launchers pick a GPU for each process and pass its number on.
    Without GPUs the process group is started here, with gloo, and the
    model is wrapped without a device number. With GPUs, or without a
    launcher, nothing happens.

    Args:
        cfg (Config): The run's config, changed in place.
    """
    if cfg.get('launcher', 'none') != 'pytorch' or torch.cuda.is_available():
        return
    if not is_distributed():
        dist.init_process_group(backend='gloo')
    cfg.env_cfg.dist_cfg = dict(backend='gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
