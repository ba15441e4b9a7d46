_base_ = '../densecl_r50_8xb32-coslr-800e_coco.py'

model = dict(queue_len=4096)
