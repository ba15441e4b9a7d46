# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""DenseCL of mmpretrain and of lightly-train, for ablation.py --peers.

Each lives in an environment that uv makes (lightly-train is AGPL, so no
dependency of ours) and is set to network, views and recipe of a config of
ours. What still differs:

* Initial weights of the heads: Kaiming's (ours), torch's default (the peers).
* mmpretrain: a wrapper of ours casts to bfloat16 on a CPU; its own refuses to.
* lightly-train: the learning rate rises during a tenth of the training, then
  follows the cosine step by step to a thousandth; in the others it starts at
  once and follows it epoch by epoch to zero. Biases and batch norm have no
  weight decay. Crops are resized by area averages, and mirrored before their
  colours are changed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
from mmengine.config import Config

from mmdensecl.engine.bfloat16 import native_bfloat16

HERE = Path(__file__).resolve().parent
# Beside torch and torchvision, which are those of this environment.
PACKAGES = {
    'mmpretrain': [
        'mmpretrain==1.2.0',
        'mmengine==0.10.7',
        'mmcv-lite==2.1.0',
        'numpy==1.26.4',  # its jitter of the hue overflows with numpy 2
        'setuptools==80.9.0',  # mmengine imports pkg_resources
    ],
    'lightly-train': [
        'lightly-train==0.18.0',
        'lightly==1.5.26',  # with 1.6.0 it stops at the first step
        'pytorch-lightning==2.6.6',
        'albumentations==2.0.8',
        'numpy==2.4.6',
    ],
}
# In the work dir of a peer.
WEIGHTS = {
    'mmpretrain': 'epoch_{epochs}.pth',
    'lightly-train': 'exported_models/exported_last.pt',
}
# No telemetry, no look-ups of newer versions, no downloads.
OFFLINE = dict(
    LIGHTLY_TRAIN_EVENTS_DISABLED='1',
    LIGHTLY_DID_VERSION_CHECK='True',
    NO_ALBUMENTATIONS_UPDATE='1',
    HF_HUB_OFFLINE='1',
    PYTHONPATH='',
)


def install(peer: str, envs: Path) -> str:
    """Make or complete the environment of a peer; its interpreter."""
    uv = shutil.which('uv') or shutil.which(HERE.parents[1] / '.uv/bin/uv')
    if uv is None:
        sys.exit('The peers are installed by uv: run "pip install uv"')
    python = (envs / f'peers-{peer}' / 'bin/python').absolute()
    if not python.exists():
        env = str(python.parents[1])
        subprocess.run([uv, 'venv', '-p', sys.executable, env], check=True)
    packages = [
        f'{x.__name__}=={x.__version__.partition("+")[0]}'
        for x in (torch, torchvision)
    ] + PACKAGES[peer]
    command = [uv, 'pip', 'install', '-p', str(python), *packages]
    subprocess.run(command, check=True)
    return str(python)


def read_settings(config: Path, data_root: str, seed: int) -> dict[str, Any]:
    """What a config of DenseCL sets for all, as peer_train.py takes it."""
    cfg = Config.fromfile(config)
    model, loader = cfg.model, cfg.train_dataloader
    network = model.type, model.backbone.type, model.backbone.depth
    if network != ('mmdensecl.DenseCL', 'ResNet', 18):
        raise ValueError(
            f'Expected DenseCL of a ResNet-18, got {network}: {config}'
        )
    sgd = cfg.optim_wrapper.optimizer.to_dict()
    return dict(
        data_root=str(Path(data_root).resolve()),
        seed=seed,
        epochs=cfg.train_cfg.max_epochs,
        log_interval=cfg.default_hooks.logger.interval,
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        size=next(x.size for x in loader.dataset.pipeline if 'size' in x),
        model=model.to_dict(),
        sgd={k: v for k, v in sgd.items() if k != 'type'},
        precision='bfloat16' if native_bfloat16()[0] else 'float32',
    )


def command(
    peer: str, python: str, settings: dict[str, Any], work_dir: Path
) -> list[str]:
    """Make the command line that trains a peer, from the start."""
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    file = work_dir.with_name(f'{work_dir.name}.json')
    file.write_text(json.dumps(settings), 'utf-8')
    script = HERE / 'peer_train.py'
    return [python, str(script), peer, str(file), str(work_dir)]
