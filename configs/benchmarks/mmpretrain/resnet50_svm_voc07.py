_base_ = ['_base_/resnet50_features.py', '_base_/voc07_resize224.py']
# One linear SVM for each class of VOC 2007, trainval -> test, mAP.
test_cfg = dict(type='mmdensecl.SVMLoop')
