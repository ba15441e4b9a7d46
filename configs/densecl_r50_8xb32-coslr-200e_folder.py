_base_ = './densecl_r50_8xb32-coslr-200e.py'

# Your own pictures, nested as they are, no labels needed:
#   --cfg-options data_root=/path/to/pictures
data_root = 'data/my_pictures'

# A queue that fits the number of pictures; the log says which and why.
model = dict(queue_len='auto')

# On fewer than 8 x 32 pictures a step add --auto-scale-lr.
train_dataloader = dict(dataset=dict(data_root=data_root))
