_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
# SyncBN in the backbone and in all that is new, a box head of four
# convolutions, nothing frozen.

norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    backbone=dict(
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        init_cfg=dict(
            _delete_=True, type='mmdensecl.PretrainedBackbone', checkpoint=None
        ),
    ),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
