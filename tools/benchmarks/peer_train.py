# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Train a peer's DenseCL; peers.py runs this in the peer's environment.

    python peer_train.py {mmpretrain,lightly-train} SETTINGS WORK_DIR

``SETTINGS`` is a JSON file. What is not in it, the views' probabilities for
instance, has the published value in both packages already.
"""

import itertools
import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def train_mmpretrain(settings: dict[str, Any], work_dir: Path) -> None:
    """Its shipped DenseCL config, at the size of ours, on a folder."""
    from mmengine.device import get_device
    from mmengine.hub import get_config
    from mmengine.optim import OptimWrapper
    from mmengine.registry import OPTIM_WRAPPERS
    from mmengine.runner import Runner

    @OPTIM_WRAPPERS.register_module()
    class BFloat16(OptimWrapper):
        """mmengine's ``AmpOptimWrapper`` refuses a CPU."""

        @contextmanager
        def optim_context(self, model):
            with (
                super().optim_context(model),
                torch.autocast(get_device(), torch.bfloat16),
            ):
                yield

    cfg = get_config(
        'mmpretrain::densecl/densecl_resnet50_8xb32-coslr-200e_in1k.py'
    )
    cfg.train_pipeline[1].transforms[0][0].scale = settings['size']
    dataset = dict(
        _delete_=True,
        type='CustomDataset',
        data_root=settings['data_root'],
        with_label=False,
        pipeline=cfg.train_pipeline,
    )
    model = settings['model']
    wrapper = dict(bfloat16='BFloat16', float32='OptimWrapper')
    cfg.merge_from_dict(
        dict(
            model=dict(
                queue_len=model['queue_len'],
                momentum=model['momentum'],
                loss_lambda=model['loss_lambda'],
                backbone=model['backbone'],
                neck=dict(
                    in_channels=model['neck']['in_channels'],
                    hid_channels=model['neck']['hid_channels'],
                    out_channels=model['neck']['out_channels'],
                ),
                head=dict(temperature=model['head']['loss']['temperature']),
            ),
            train_dataloader=dict(
                batch_size=settings['batch_size'],
                num_workers=settings['num_workers'],
                dataset=dataset,
            ),
            optim_wrapper=dict(
                type=wrapper[settings['precision']],
                optimizer=settings['sgd'],
            ),
            train_cfg=dict(max_epochs=settings['epochs']),
            default_hooks=dict(
                logger=dict(interval=settings['log_interval']),
                checkpoint=dict(interval=1, max_keep_ckpts=1),
            ),
            log_processor=dict(window_size=settings['log_interval']),
            randomness=dict(seed=settings['seed']),
            work_dir=str(work_dir),
        )
    )
    cfg.param_scheduler[0].update(
        T_max=settings['epochs'], end=settings['epochs']
    )
    Runner.from_cfg(cfg).train()


STEPS: list[float] = []  # when each began


def mark_step(*_) -> None:
    """A hook of lightly-train's network, which it takes no callback beside.

    Keys are encoded without gradients and do not count.
    """
    if torch.is_grad_enabled():
        STEPS.append(time.perf_counter())


def train_lightly(settings: dict[str, Any], work_dir: Path) -> None:
    """Its ``method="densecl"`` on a torchvision ResNet of our size."""
    import lightly_train
    from torch import nn
    from torchvision.models import resnet18
    from torchvision.models.resnet import BasicBlock

    model = settings['model']
    backbone = model['backbone']
    width = backbone['base_channels']
    net = resnet18()
    net.inplanes = backbone['stem_channels']
    net.conv1 = nn.Conv2d(3, net.inplanes, 7, 2, 3, bias=False)
    net.bn1 = nn.BatchNorm2d(net.inplanes)
    for i, stride in enumerate(backbone['strides']):
        layer = net._make_layer(BasicBlock, width << i, 2, stride)
        setattr(net, f'layer{i + 1}', layer)
    net.fc = nn.Linear(8 * width, 1)  # not trained; tells the width
    for module in net.modules():
        if isinstance(module, nn.Conv2d):  # as the config of ours
            nn.init.kaiming_normal_(module.weight, nonlinearity='relu')
    net.conv1.register_forward_pre_hook(mark_step)
    precision = {'bfloat16': 'bf16-mixed', 'float32': '32-true'}
    lightly_train.pretrain(
        out=work_dir,
        data=settings['data_root'],
        model=net,
        method='densecl',
        method_args=dict(
            hidden_dim=model['neck']['hid_channels'],
            output_dim=model['neck']['out_channels'],
            lambda_=model['loss_lambda'],
            temperature=model['head']['loss']['temperature'],
            memory_bank_size=model['queue_len'],
            momentum_start=1 - model['momentum'],
            momentum_end=1 - model['momentum'],
            # The learning rate is taken as it is.
            reference_batch_size=settings['batch_size'],
        ),
        optim='sgd',
        optim_args=settings['sgd'],
        epochs=settings['epochs'],
        batch_size=settings['batch_size'],
        num_workers=settings['num_workers'],
        devices=1,
        # Left to 'auto', a CPU would stay in float32 and only a warning tell.
        accelerator='gpu' if torch.cuda.is_available() else 'cpu',
        precision=precision[settings['precision']],
        seed=settings['seed'],
        transform_args=dict(image_size=[settings['size']] * 2),
        loader_args=dict(persistent_workers=settings['num_workers'] > 0),
    )
    # As mmengine logs it: seconds a step, over log_interval steps.
    every = settings['log_interval']
    marks = STEPS[::every]
    lines = [
        json.dumps(dict(time=(b - a) / every))
        for a, b in itertools.pairwise(marks)
    ]
    (work_dir / 'scalars.json').write_text('\n'.join(lines), 'utf-8')


TRAIN = {'mmpretrain': train_mmpretrain, 'lightly-train': train_lightly}

if __name__ == '__main__':
    peer, file, work_dir = sys.argv[1:]
    TRAIN[peer](json.loads(Path(file).read_text('utf-8')), Path(work_dir))
