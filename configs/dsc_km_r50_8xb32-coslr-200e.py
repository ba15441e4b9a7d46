_base_ = ['./densecl_r50_8xb32-coslr-200e.py', './_base_/models/dsc_km.py']

# DSC-KM, our interpretation of the paper: docs/method.md.
model = {{_base_.dsc_km}}
