_base_ = './mocov2_r50_8xb32-coslr-200e.py'

# The published recipe in bfloat16; what is compared stays float32.
optim_wrapper = dict(type='mmdensecl.BFloat16OptimWrapper')
