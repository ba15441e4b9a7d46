_base_ = 'mmdet::_base_/models/mask-rcnn_r50-caffe-c4.py'
# mmdet's caffe C4 detector, as a torchvision ResNet with SyncBN, RGB and
# nothing frozen. The norm after res5 is MoCo's (detection/train_net.py of
# facebookresearch/moco).

custom_imports = dict(imports=['mmdensecl.transfer.mmdet'])

norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        style='pytorch',
        init_cfg=dict(
            _delete_=True, type='mmdensecl.PretrainedBackbone', checkpoint=None
        ),
    ),
    roi_head=dict(
        shared_head=dict(
            _delete_=True,
            type='mmdensecl.ResLayerExtraNorm',
            depth=50,
            stage=3,
            stride=2,
            norm_cfg=norm_cfg,
            style='pytorch',
            init_cfg=dict(
                type='mmdensecl.PretrainedBackbone',
                checkpoint=None,
                # The extra norm is in no pre-trained ResNet.
                allow_random=['norm.*'],
            ),
        )
    ),
    # As in detectron2 and in mmdet's own Faster R-CNN C4, anchors may leave
    # the picture; mmdet's Mask R-CNN C4 drops these.
    train_cfg=dict(rpn=dict(allowed_border=-1)),
)
