# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Checkpoints as each project writes them, made from one small ResNet.

Each function takes the backbone's state dict and returns what the project
gives to torch.save; names are those of reference checkpoints.
"""

import torch

OTHER = 100.0  # what momentum copies differ by


def under(prefix, state, shift=0.0):
    return {f'{prefix}{k}': v + shift for k, v in state.items()}


def some(*names):
    return {name: torch.rand(2) for name in names}


def neck(*prefixes):
    return {
        f'{prefix}.{i}.{kind}': torch.rand(2)
        for prefix in prefixes
        for i in (0, 2)
        for kind in ('weight', 'bias')
    }


def mmdensecl(state):
    return dict(
        meta=dict(epoch=200),
        message_hub=dict(log_scalars=dict()),
        optimizer=dict(
            state={0: dict(momentum_buffer=torch.rand(2))},
            param_groups=[dict(lr=0.1, params=[0])],
        ),
        state_dict={
            **under('backbone.', state),
            **neck('neck.mlp', 'neck.mlp2'),
            **under('encoder_k.backbone.', state, OTHER),
            **neck('encoder_k.neck.mlp', 'encoder_k.neck.mlp2'),
            **some('queue.keys', 'queue.enqueued', 'dense_queue.keys'),
            **some('batch_shuffle._extra_state'),
        },
    )


def authors_training(state):
    return dict(
        state_dict={
            **some('queue', 'queue_ptr', 'queue2', 'queue2_ptr'),
            **under('encoder_q.0.', state),
            **neck('encoder_q.1.mlp', 'encoder_q.1.mlp2'),
            **under('encoder_k.0.', state, OTHER),
            **neck('encoder_k.1.mlp', 'encoder_k.1.mlp2'),
            **under('backbone.', state),
        }
    )


def mmselfsup(state):
    return dict(
        meta=dict(),
        state_dict={
            **some('queue', 'queue2'),
            **under('backbone.', state),
            **neck('neck.mlp', 'neck.mlp2'),
            **some('encoder_k.steps'),
            **under('encoder_k.module.0.', state, OTHER),
            **neck('encoder_k.module.1.mlp'),
        },
    )


def facebook_v1(state):
    return dict(
        epoch=200,
        arch='resnet50',
        state_dict={
            'module.queue': torch.rand(2, 4),
            **under('module.encoder_q.', state),
            'module.encoder_q.fc.weight': torch.rand(2),
            'module.encoder_q.fc.bias': torch.rand(2),
            **under('module.encoder_k.', state, OTHER),
        },
    )


def facebook_v2(state):
    return dict(
        epoch=200,
        state_dict={
            **under('module.encoder_q.', state),
            **neck('module.encoder_q.fc'),
            **under('module.encoder_k.', state, OTHER),
        },
    )


def mmdet_c4(state):
    stages = {k: v for k, v in state.items() if not k.startswith('layer4.')}
    last = {k: v for k, v in state.items() if k.startswith('layer4.')}
    return dict(
        state_dict={
            **under('backbone.', stages),
            **some('rpn_head.conv.weight'),
            **under('roi_head.shared_head.', last),
            **some('roi_head.shared_head.norm.weight'),
        }
    )


def mmengine_ema(state):
    """EMAHook: ``state_dict`` is the average, ``ema_state_dict`` is not."""
    return dict(
        state_dict=under('backbone.', state),
        ema_state_dict={
            'steps': torch.tensor(7),
            **under('module.backbone.', state, OTHER),
        },
    )


def timm_ema(state):
    return dict(
        state_dict=torchvision({k: v + OTHER for k, v in state.items()}),
        state_dict_ema=torchvision(state),
    )


def model_ema(state):
    return dict(
        model=under('backbone.', state, OTHER),
        model_ema=under('module.backbone.', state),
    )


def backbone_and(*others):
    """An OpenMMLab model, whose other parts have these names."""
    return lambda state: dict(
        state_dict={**under('backbone.', state), **some(*others)}
    )


def compiled_inside(state):
    return {
        k.replace('layer1.', 'layer1._orig_mod.'): v
        for k, v in under('backbone._orig_mod.', state).items()
    }


def authors_released(state):
    return dict(state_dict=dict(state), author='DenseCL')


def in_place(prefix):
    return lambda state: dict(state_dict=under(prefix, state))


def torchvision(state):
    return {**state, **some('fc.weight', 'fc.bias')}


mmdet = backbone_and('neck.fpn_convs.0.conv.weight', 'rpn_head.conv.weight')
mmseg = backbone_and('decode_head.conv_seg.weight')
MOCO = 'checkpoint of facebookresearch/moco'
MMLAB = 'OpenMMLab model'
# Name: function, source, prefix, what is left out.
FORMATS = dict(
    mmdensecl=(
        mmdensecl,
        'mmdensecl training checkpoint',
        'backbone.',
        'neck encoder_k queue dense_queue batch_shuffle',
    ),
    authors_training=(
        authors_training,
        "DenseCL authors' training checkpoint",
        'encoder_q.0.',
        'queue queue_ptr queue2 queue2_ptr encoder_q.1 encoder_k backbone',
    ),
    authors_released=(
        authors_released,
        "DenseCL authors' released weights",
        '',
        '',
    ),
    mmselfsup=(
        mmselfsup,
        'mmselfsup or mmpretrain checkpoint with a momentum encoder',
        'backbone.',
        'queue queue2 neck encoder_k',
    ),
    moco_v1=(facebook_v1, MOCO, 'encoder_q.', 'queue encoder_q.fc encoder_k'),
    moco_v2=(facebook_v2, MOCO, 'encoder_q.', 'encoder_q.fc encoder_k'),
    torchvision=(torchvision, 'torchvision or timm classifier', '', 'fc'),
    mmpretrain=(backbone_and('head.fc.weight'), MMLAB, 'backbone.', 'head'),
    mmdet=(mmdet, 'mmdet model', 'backbone.', 'neck rpn_head'),
    mmdet_c4=(mmdet_c4, 'mmdet model', 'backbone.', 'rpn_head roi_head'),
    mmseg=(mmseg, 'mmseg model', 'backbone.', 'decode_head'),
    mmengine_ema=(mmengine_ema, MMLAB, 'backbone.', 'ema_state_dict'),
    averaged_model=(
        lambda x: {'n_averaged': torch.tensor(3), **under('module.', x)},
        'bare backbone',
        '',
        'n_averaged',
    ),
    timm_ema=(
        timm_ema,
        'torchvision or timm classifier, averaged (EMA) weights',
        'state_dict_ema.',
        None,
    ),
    model_ema=(
        model_ema,
        'OpenMMLab model, averaged (EMA) weights',
        'model_ema.backbone.',
        'backbone',
    ),
    in_model=(
        lambda x: dict(model=under('module.', x), epoch=3),
        'bare backbone',
        '',
        '',
    ),
    ddp=(in_place('module.backbone.'), MMLAB, 'backbone.', ''),
    compiled=(in_place('_orig_mod.module.backbone.'), MMLAB, 'backbone.', ''),
    compiled_inside=(compiled_inside, MMLAB, 'backbone.', ''),
    unknown_place=(
        in_place('student.trunk.'),
        'unknown checkpoint with a backbone under "student.trunk."',
        'student.trunk.',
        '',
    ),
)
