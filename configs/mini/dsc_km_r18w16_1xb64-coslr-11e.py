_base_ = [
    './densecl_r18w16_1xb64-coslr-11e.py',
    '../_base_/models/dsc_km.py',
]
model = {{_base_.dsc_km}}
