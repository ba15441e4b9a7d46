# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Every shipped config parses, builds and trains a step, number for number."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmdensecl.engine import CheckpointKeysHook, set_pretrained
from mmdensecl.models import DSC, DenseCL, NearestNeighbors
from mmdensecl.registry import MODELS, TASK_UTILS
from mmdensecl.testing import shrink, write_pictures

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
EVERYTHING = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts
)
# Those of pre-training.
SHIPPED = [
    name
    for name in EVERYTHING
    if not name.startswith(('benchmarks/', 'demo/linear'))
]
# What decides how long, on what and how fast a run learns.
RECIPE = ('train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg')
# The tests of the others.
COVERED_BY = {
    'test_benchmark_configs.py': ['benchmarks/mmdet', 'benchmarks/mmseg'],
    'test_mini_configs.py': ['benchmarks/mini', 'benchmarks/suites', 'demo'],
    'test_mmpretrain_benchmarks.py': ['benchmarks/mmpretrain'],
}


def load(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    write_pictures(folder, 4)
    return folder


def test_none_is_left_out():
    """A config of a new folder needs a test, here or elsewhere."""
    elsewhere = set(EVERYTHING) - set(SHIPPED)
    folders = {str(Path(name).parent) for name in elsewhere}
    assert folders == set(sum(COVERED_BY.values(), []))
    assert all(Path(__file__).with_name(x).is_file() for x in COVERED_BY)


@pytest.mark.parametrize('name', SHIPPED)
def test_trains_a_step(name, pictures, tmp_path):
    cfg = shrink(load(name), pictures)
    if name.startswith('ablations/'):  # of a config that trains at full depth
        cfg.model.backbone.depth, cfg.model.neck.in_channels = 18, 512
    if cfg.model.get('compile_encoders'):  # traced; test_fast_options compiles
        cfg.model.compile_encoders = dict(backend='eager')
    cfg.work_dir = str(tmp_path)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1)
    cfg.default_hooks.checkpoint.update(save_last=False, interval=-1)
    cfg.train_dataloader.dataset.indices = 2
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model
    model.queue.flush()
    assert int(model.queue.enqueued) == 2
    scalars = runner.message_hub.log_scalars
    assert scalars['train/loss'].current() > 0
    # What a run shows, and that it is finite.
    expected = 'global_pos_sim global_neg_sim global_acc feat_std queue_fill'
    if isinstance(model, DenseCL):
        expected += ' dense_pos_sim dense_neg_sim dense_acc position_r2'
        expected += ' match_coverage match_acc'
    if isinstance(model, DSC):
        expected += ' category_used category_entropy category_agreement'
    for key in expected.split():
        value = scalars[f'train/{key}'].current()
        assert value == value and abs(value) <= 100, key


@pytest.mark.parametrize(
    'name', [name for name in SHIPPED if 'ablations' not in name]
)
def test_starts_from_weights(name, pictures, tmp_path):
    """`--pretrained FILE`: both encoders are equal to the file."""
    cfg = shrink(load(name), pictures)
    backbone = cfg.model.backbone
    if backbone.depth > 18:  # ResNet-50 and -101 take seconds to draw
        backbone.depth = 18
        cfg.model.neck.in_channels = 512
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.manual_seed(7)
        state = MODELS.build(backbone).state_dict()
    torch.save(state, tmp_path / 'weights.pth')
    set_pretrained(cfg, str(tmp_path / 'weights.pth'))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    model.init_weights()
    for encoder in (model.backbone, model.encoder_k.backbone):
        for key, x in encoder.state_dict().items():
            assert torch.equal(x, state[key]), key
    # No part waits for weights of its own.
    CheckpointKeysHook().before_train(SimpleNamespace(model=model))


def test_published_recipe():
    """configs/densecl_r50_8xb32-coslr-200e.py against the authors' config."""
    cfg = load('densecl_r50_8xb32-coslr-200e.py')
    model = cfg.model
    assert model.type == 'mmdensecl.DenseCL'
    assert (model.queue_len, model.feat_dim) == (65536, 128)
    assert model.momentum == pytest.approx(1 - 0.999)
    assert model.loss_lambda == 0.5
    assert model.head.loss.temperature == 0.2
    assert model.correspondence.type == 'mmdensecl.BackboneSimilarity'
    backbone = model.backbone
    assert (backbone.type, backbone.depth) == ('ResNet', 50)
    assert backbone.norm_cfg.type == 'BN'
    assert not backbone.zero_init_residual
    assert backbone.init_cfg[0].mode == 'fan_in'
    sizes = dict(in_channels=2048, hid_channels=2048, out_channels=128)
    neck = dict(sizes, type='mmdensecl.DenseCLNeck', num_grid=None)
    assert dict(model.neck) == neck
    # Augmentation.
    assert dict(cfg.train_dataloader.dataset.pipeline[1]) == dict(
        type='mmdensecl.TwoViews',
        size=224,
        crop_scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_prob=0.8,
        gray_prob=0.2,
        blur_sigma=(0.1, 2.0),
        blur_prob=0.5,
        flip_prob=0.5,
    )
    mean, std = (model.data_preprocessor[k] for k in ('mean', 'std'))
    assert mean == pytest.approx([255 * x for x in (0.485, 0.456, 0.406)])
    assert std == pytest.approx([255 * x for x in (0.229, 0.224, 0.225)])
    # PIL decodes RGB, and nothing may swap the channels.
    assert not model.data_preprocessor.get('bgr_to_rgb', False)
    # Schedule; weight decay on everything, norms and biases too.
    sgd = dict(type='SGD', lr=0.03, momentum=0.9, weight_decay=1e-4)
    assert dict(cfg.optim_wrapper.optimizer) == sgd
    assert 'paramwise_cfg' not in cfg.optim_wrapper
    assert dict(cfg.param_scheduler) == dict(
        type='CosineAnnealingLR', eta_min=0.0, by_epoch=True
    )  # and as long as the run
    assert cfg.train_cfg.max_epochs == 200
    assert cfg.train_dataloader.batch_size == 32
    assert cfg.train_dataloader.drop_last
    assert cfg.auto_scale_lr.base_batch_size == 8 * 32
    assert cfg.env_cfg.cudnn_benchmark
    # lambda warm-up is off.
    types = [hook.type for hook in cfg.custom_hooks]
    assert 'mmdensecl.LambdaWarmupHook' not in types


@pytest.mark.parametrize('algorithm', ['densecl', 'mocov2'])
@pytest.mark.parametrize(
    'name, base_lr, epochs',
    [
        ('8xb32-coslr-200e', 0.03, 200),
        ('1xb256-coslr-200e', 0.03, 200),
        ('8xb32-coslr-800e_coco', 0.3, 800),
        ('8xb32-coslr-1600e_coco', 0.3, 1600),
    ],
)
def test_published_learning_rates(algorithm, name, base_lr, epochs, tmp_path):
    """A cosine over the whole run, as the Runner builds it."""
    cfg = load(f'{algorithm}_r50_{name}.py')
    runner = Runner(
        model=torch.nn.Linear(1, 1),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            dataset=[0], sampler=torch.utils.data.SequentialSampler([0])
        ),
        train_cfg=dict(by_epoch=True, max_epochs=cfg.train_cfg.max_epochs),
        optim_wrapper=cfg.optim_wrapper,
        param_scheduler=cfg.param_scheduler,
        experiment_name=f'{algorithm}_{name}',
    )
    assert runner.train_loop.max_epochs == epochs  # builds it, as train does
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    (scheduler,) = runner.build_param_scheduler(runner.param_schedulers)
    for epoch in range(epochs):
        expected = base_lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        assert scheduler.get_last_value()[0] == pytest.approx(expected)
        runner.optim_wrapper.step()
        scheduler.step()


@pytest.mark.parametrize('algorithm', ['densecl', 'mocov2'])
def test_other_recipes(algorithm):
    base = load(f'{algorithm}_r50_8xb32-coslr-200e.py')
    for epochs in (800, 1600):
        cfg = load(f'{algorithm}_r50_8xb32-coslr-{epochs}e_coco.py')
        assert cfg.optim_wrapper.optimizer.lr == 0.3
        assert cfg.param_scheduler == base.param_scheduler
        assert cfg.train_cfg.max_epochs == epochs
        dataset = cfg.train_dataloader.dataset
        assert dataset.data_root == 'data/coco/train2017'
        assert cfg.model == base.model
    deep = load(f'{algorithm}_r101_8xb32-coslr-200e.py')
    assert deep.model.backbone.depth == 101
    deep.model.backbone.depth = 50
    assert deep.model == base.model
    assert deep.train_cfg == base.train_cfg


@pytest.mark.parametrize('algorithm', ['densecl', 'mocov2'])
def test_one_gpu_recipe_is_the_published_one(algorithm):
    """As many images a step, in as many groups as there were GPUs."""
    base = load(f'{algorithm}_r50_8xb32-coslr-200e.py')
    cfg = load(f'{algorithm}_r50_1xb256-coslr-200e.py')
    assert cfg.model.pop('virtual_ranks') == 8
    assert cfg.train_dataloader.batch_size == 8 * 32
    for loader in (cfg.train_dataloader, base.train_dataloader):
        loader.pop('batch_size')
        loader.pop('num_workers')
    assert cfg.to_dict() == base.to_dict()


@pytest.mark.parametrize(
    'name',
    ['densecl_r50_8xb32-coslr-200e', 'mini/densecl_r18w16_1xb64-coslr-11e'],
)
def test_mocov2_is_densecl_without_the_dense_branch(name):
    dense = load(f'{name}.py')
    moco = load(f'{name}.py'.replace('densecl', 'mocov2'))
    for key in (*RECIPE, 'custom_hooks', 'default_hooks'):
        assert dense[key] == moco[key]
    shared = ('backbone', 'head', 'queue_len', 'momentum', 'data_preprocessor')
    for key in shared:
        assert dense.model[key] == moco.model[key]
    assert 'loss_lambda' not in moco.model


@pytest.mark.parametrize(
    'twin',
    [
        'densecl_r50_8xb32-coslr-200e.py',
        'densecl_r50_8xb32-coslr-800e_coco.py',
        'mini/densecl_r18w16_1xb64-coslr-11e.py',
    ],
)
@pytest.mark.parametrize(
    'variant, head',
    [('km', 'KMeansCategoryHead'), ('pm', 'PrototypeCategoryHead')],
)
def test_dsc_is_densecl_with_neighbours_and_categories(twin, variant, head):
    base = load(twin)
    cfg = load(twin.replace('densecl', f'dsc_{variant}'))
    assert cfg.model.type == 'mmdensecl.DSC'
    assert cfg.model.category.type == f'mmdensecl.{head}'
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        rule = TASK_UTILS.build(cfg.model.correspondence)
    assert type(rule) is NearestNeighbors and rule.k == 4
    # Another rule needs no _delete_, and `--key model.correspondence.type`
    # of a sweep no other setting.
    cfg.merge_from_dict(
        {'model.correspondence.type': 'mmdensecl.GeometricMatch'}
    )
    assert cfg.model.correspondence == dict(type='mmdensecl.GeometricMatch')
    cfg.model.type = base.model.type
    cfg.model.correspondence = base.model.correspondence
    for key in ('category', 'category_weight', 'num_samples'):
        cfg.model.pop(key)
    cfg.pop(f'dsc_{variant}')
    assert cfg.to_dict() == base.to_dict()


COCO = 'densecl_r50_8xb32-coslr-800e_coco'
# The setting that an ablation changes, by the end of its name.
ABLATIONS = {
    f'lambda{str(x).replace(".", "p")}': ('model.loss_lambda', x)
    for x in (0, 0.1, 0.3, 0.7, 0.9, 1)
}
ABLATIONS |= {f'grid{x}': ('model.neck.num_grid', x) for x in (1, 3, 5, 7, 9)}
ABLATIONS |= {f'queue{x}': ('model.queue_len', x) for x in (4096, 16384)}
ABLATIONS |= {
    f'tau{str(x).replace(".", "p")}': ('model.head.loss.temperature', x)
    for x in (0.07, 0.1, 0.4)
}
ABLATIONS |= {
    f'match-{name}': ('model.correspondence', dict(type=f'mmdensecl.{rule}'))
    for name, rule in dict(
        projection='ProjectionSimilarity',
        random='RandomMatch',
        geometric='GeometricMatch',
        mutual='MutualNearestNeighbor',
    ).items()
}


@pytest.mark.parametrize('end', ABLATIONS)
def test_ablations_change_one_thing_each(end):
    place, value = ABLATIONS[end]
    base, cfg = load(f'{COCO}.py'), load(f'ablations/{COCO}_{end}.py')
    *parents, key = place.split('.')
    nodes = base, cfg
    for name in parents:
        nodes = [node[name] for node in nodes]
    assert nodes[1].pop(key) == value
    nodes[0].pop(key, None)
    assert cfg.model == base.model


def test_ablation_by_warm_up():
    base = load(f'{COCO}.py')
    warm = load(f'ablations/{COCO}_lambda-warmup10k.py')
    assert warm.custom_hooks[-1].start_iters == 10000
    assert warm.custom_hooks[:-1] == base.custom_hooks
    assert warm.model == base.model


MINI = 'r18w16_1xb64-coslr-11e'


@pytest.mark.parametrize(
    'name', [name for name in SHIPPED if name.startswith('mini/ablations/')]
)
def test_mini_ablations_cost_the_same(name):
    """Data, network, schedule and seed are those of their base."""
    algorithm = Path(name).name.split('_')[0]
    base = load(f'mini/{algorithm}_{MINI}.py')
    cfg = load(name)
    for key in (*RECIPE, 'randomness'):
        assert cfg[key] == base[key]
    assert cfg.model.neck == base.model.neck
    assert cfg.model.backbone.base_channels == 16
    assert (cfg.model, cfg.custom_hooks) != (base.model, base.custom_hooks)
