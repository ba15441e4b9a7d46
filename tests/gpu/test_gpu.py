# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What only a GPU can show: ``pytest -m gpu tests/gpu``."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from PIL import Image

from mmdensecl.datasets import SampleTwoCropParams
from mmdensecl.engine import BFloat16OptimWrapper
from mmdensecl.models import info_nce, info_nce_reference
from mmdensecl.models.data_preprocessors import render_views
from mmdensecl.registry import MODELS

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
]


def error(out, expected):
    """Relative to the norm of what is expected, a NaN is never small."""
    expected = expected.to(out)
    return float((out - expected).norm() / expected.norm())


def views(batch=16, size=64):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, 3, size, size, generator=generator)
        for _ in range(2)
    ]


def losses_of(model, wrapper=None, steps=3):
    """The losses of a few steps of training, on the model's device."""
    np.random.seed(0)  # which the batch shuffle draws its own from
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.05
    )
    if wrapper is not None:
        wrapper = wrapper(optimizer=optimizer)
    device = next(model.parameters()).device
    losses = []
    for _ in range(steps):
        inputs = [x.to(device) for x in views()]
        if wrapper is None:
            loss, _ = model.parse_losses(model.loss(inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            with wrapper.optim_context(model):
                loss, _ = model.parse_losses(model.loss(inputs))
            wrapper.update_params(loss)
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    """Convolutions in full float32, as on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture
def twins(tiny_cfg):
    """Function that builds one model on a CPU and its copy on the GPU."""

    def build(name='DenseCL', shared=None, **options):
        torch.manual_seed(0)
        cfg = tiny_cfg(name, queue_len=64, **(shared or {}))
        # Kernels of GPUs in half precision want multiples of 8 channels.
        cfg['backbone'].update(stem_channels=16, base_channels=16)
        cfg['neck'].update(in_channels=128)
        on_cpu = MODELS.build({**cfg, 'channels_last': False})
        on_cpu.init_weights()
        on_gpu = MODELS.build({**cfg, **options})
        on_gpu.load_state_dict(on_cpu.state_dict())
        return on_cpu.train(), on_gpu.cuda().train()

    return build


class TestInfoNCE:
    """On features of any scale, against the papers' formula in float64."""

    @pytest.mark.parametrize('rows, keys', [(1568, 65536), (77, 1001)])
    @pytest.mark.parametrize(
        'dtype, limit',
        [
            (torch.float64, 1e-12),
            (torch.float32, 1e-5),
            (torch.bfloat16, 2e-2),
        ],
    )
    def test_against_float64(self, rows, keys, dtype, limit):
        query, key, queue = (
            F.normalize(torch.randn(n, 128, device='cuda'), dim=1)
            for n in (rows, rows, keys)
        )
        exact = query.double().requires_grad_()
        expected = info_nce_reference(exact, key.double(), queue.double())
        expected.loss.sum().backward()
        float_type = torch.promote_types(dtype, torch.float32)
        query = query.to(float_type).requires_grad_()
        with torch.autocast(
            'cuda', torch.bfloat16, enabled=dtype == torch.bfloat16
        ):
            out = info_nce(query, key.to(float_type), queue.to(float_type))
        out.loss.sum().backward()
        assert out.loss.dtype == float_type
        assert error(out.loss, expected.loss) < limit
        assert error(query.grad, exact.grad) < limit
        assert error(out.hardest_negative, expected.hardest_negative) < limit

    def test_memory_does_not_grow_with_the_queue(self):
        """The logits of 4,096 rows would be 4 GiB."""
        query = torch.randn(4096, 128, device='cuda', requires_grad=True)
        key, queue = (
            torch.randn(n, 128, device='cuda') for n in (4096, 2**18)
        )
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        info_nce(query, key, queue).loss.sum().backward()
        assert torch.cuda.max_memory_allocated() - before < 2**29


@pytest.mark.parametrize('name', ['DenseCL', 'MoCoV2'])
class TestStep:
    """Losses of three steps as on a CPU in float32."""

    def test_float32(self, twins, name):
        on_cpu, on_gpu = twins(name)
        assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=5e-3)

    def test_channels_last(self, twins, name):
        on_cpu, on_gpu = twins(name, channels_last=True)
        weight = on_gpu.backbone.conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=5e-3)

    def test_bfloat16(self, twins, name):
        on_cpu, on_gpu = twins(name)
        losses = losses_of(on_gpu, BFloat16OptimWrapper)
        assert losses == pytest.approx(losses_of(on_cpu), rel=5e-2)

    def test_float16_with_a_scaler(self, twins, name):
        """No step is skipped: the scale stays, and the weights move."""
        wrappers = []

        def wrapper(optimizer):
            wrappers.append(
                AmpOptimWrapper(
                    loss_scale=dict(init_scale=256.0), optimizer=optimizer
                )
            )
            return wrappers[0]

        on_cpu, on_gpu = twins(name)
        before = on_gpu.backbone.conv1.weight.detach().clone()
        losses = losses_of(on_gpu, wrapper)
        assert losses == pytest.approx(losses_of(on_cpu), rel=5e-2)
        assert wrappers[0].loss_scaler.get_scale() == 256
        assert not torch.equal(on_gpu.backbone.conv1.weight, before)

    def test_nccl_with_one_rank(self, twins, name, tmp_path):
        """The collectives of a step run, and change nothing."""
        alone, in_group = (x.cuda() for x in twins(name))
        expected = losses_of(alone)
        dist.init_process_group(
            'nccl', f'file://{tmp_path}/store', rank=0, world_size=1
        )
        try:
            ddp = torch.nn.parallel.DistributedDataParallel(
                in_group, [0], broadcast_buffers=False
            )
            losses = losses_of(ddp.module)
        finally:
            dist.destroy_process_group()
        assert losses == pytest.approx(expected, rel=1e-3)

    def test_virtual_ranks(self, twins, name):
        on_cpu, on_gpu = twins(name, shared=dict(virtual_ranks=4))
        losses = losses_of(on_gpu)
        assert losses == pytest.approx(losses_of(on_cpu), rel=5e-3)
        assert losses != pytest.approx(losses_of(twins(name)[1]), rel=1e-4)


def test_compile(twins):
    on_cpu, on_gpu = twins(compile_encoders=True)
    assert losses_of(on_gpu) == pytest.approx(losses_of(on_cpu), rel=5e-3)


def test_device_views_are_those_of_the_cpu():
    """And nothing waits for the GPU."""
    rng, draw = Random(2), SampleTwoCropParams()
    noise = np.random.default_rng(0)
    images, drawn = [], []
    for _ in range(8):
        coarse = noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((120, 90), Image.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        drawn.append(draw.draw(120, 90, rng))
    expected = render_views(images, drawn, 48)
    on_gpu = [image.cuda() for image in images]
    torch.cuda.set_sync_debug_mode('error')
    try:
        out = render_views(on_gpu, drawn, 48)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert (out.cpu() - expected).abs().mean() < 0.05


def test_resume(tiny_cfg, tmp_path, monkeypatch):
    """From the first of two epochs on: the same weights.

    Bit for bit only on a CPU: the backward pass of max pooling adds in any
    order on a GPU, so that torch refuses it with deterministic algorithms.
    """
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    images = tmp_path / 'images'
    images.mkdir()
    noise = np.random.default_rng(0)
    for i in range(16):
        pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f'{i}.png')

    def train(name, **changes):
        cfg = Config.fromfile(ROOT / 'configs/densecl_r50_8xb32-coslr-200e.py')
        cfg.model = tiny_cfg(queue_len=16)
        cfg.train_cfg.max_epochs = 2
        cfg.env_cfg.cudnn_benchmark = False
        loader = cfg.train_dataloader
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(images)
        loader.dataset.pipeline[1].size = 64
        cfg.work_dir = str(tmp_path / name)
        cfg.experiment_name = name
        cfg.merge_from_dict(changes)
        runner = Runner.from_cfg(cfg)
        runner.train()
        state = runner.model.state_dict()
        return {k: v for k, v in state.items() if torch.is_tensor(v)}

    whole = train('whole')
    checkpoint = str(tmp_path / 'whole/epoch_1.pth')
    resumed = train('resumed', resume=True, load_from=checkpoint)
    for name, x in whole.items():
        if x.dtype == torch.float32:
            assert error(resumed[name], x) < 1e-3, name
    half = torch.load(checkpoint, weights_only=False)['state_dict']
    keys = whole['queue.keys']  # of the second epoch
    assert error(half['queue.keys'].to(keys), keys) > 1e-1
