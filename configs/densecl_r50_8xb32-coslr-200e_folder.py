_base_ = './densecl_r50_8xb32-coslr-200e.py'

# Your own images, nested as they are, no labels needed:
#   --cfg-options data_root=/path/to/images
data_root = 'data/my_images'

# A queue that fits the number of images; the log says which and why.
# One process trains as several would: batch norm sees groups of 32 images, at
# least two, and keys are shuffled between them.
model = dict(queue_len='auto', virtual_ranks='auto')

# On fewer than 8 x 32 images a step add --auto-scale-lr.
train_dataloader = dict(dataset=dict(data_root=data_root))
