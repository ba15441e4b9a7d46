# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmdensecl.engine import (BFloat16OptimWrapper, bfloat16,
                              use_mixed_precision)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def model():
    return torch.nn.Linear(4, 3)


class TestBFloat16OptimWrapper:

    def test_a_step(self, model):
        """The forward pass is in bfloat16, weights and updates are not."""
        wrapper = BFloat16OptimWrapper(sgd(model))
        before = model.weight.detach().clone()
        with wrapper.optim_context(model):
            out = model(torch.ones(2, 4))
        assert out.dtype == torch.bfloat16
        wrapper.update_params(out.float().sum())
        torch.testing.assert_close(model.weight, before - 0.2)
        assert model.weight.grad is None  # freed, not filled with zeros

    def test_ends_with_the_context(self, model):
        wrapper = BFloat16OptimWrapper(sgd(model))
        with wrapper.optim_context(model):
            pass
        assert model(torch.ones(2, 4)).dtype == torch.float32

    def test_checkpoints_are_those_of_float32(self, model):
        wrapper = BFloat16OptimWrapper(sgd(model))
        wrapper.update_params(model(torch.ones(2, 4)).sum())
        other = OptimWrapper(sgd(model))
        other.load_state_dict(wrapper.state_dict())
        buffer = other.optimizer.state[model.weight]['momentum_buffer']
        assert buffer.tolist() == [[2.] * 4] * 3

    def test_gpu_without_it(self, model, monkeypatch):
        monkeypatch.setattr(bfloat16, 'has_bfloat16', lambda: False)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'V100')
        with pytest.raises(RuntimeError, match='V100 has no bfloat16.*Amp'):
            BFloat16OptimWrapper(sgd(model))


class TestUseMixedPrecision:

    @staticmethod
    def changed(**wrapper):
        cfg = Config(dict(optim_wrapper=dict(optimizer=dict(), **wrapper)))
        use_mixed_precision(cfg)
        return cfg.optim_wrapper

    def test_where_there_is_bfloat16(self, monkeypatch):
        monkeypatch.setattr(bfloat16, 'has_bfloat16', lambda: True)
        wrapper = self.changed(type='OptimWrapper', clip_grad=dict(max_norm=1))
        assert wrapper.type == 'mmdensecl.BFloat16OptimWrapper'
        assert wrapper.clip_grad.max_norm == 1
        assert self.changed().type == 'mmdensecl.BFloat16OptimWrapper'

    def test_where_there_is_none(self, monkeypatch):
        monkeypatch.setattr(bfloat16, 'has_bfloat16', lambda: False)
        wrapper = self.changed(type='OptimWrapper')
        assert wrapper.type == 'AmpOptimWrapper'
        assert wrapper.loss_scale == 'dynamic'

    def test_leaves_mixed_precision_alone(self):
        wrapper = self.changed(type='AmpOptimWrapper', loss_scale=8.)
        assert (wrapper.type, wrapper.loss_scale) == ('AmpOptimWrapper', 8.)

    def test_unknown_wrapper(self):
        with pytest.raises(ValueError, match='cannot replace .*type=Apex'):
            self.changed(type='ApexOptimWrapper')

    @pytest.mark.parametrize('gpu, native, expected', [
        ('cpu', False, True),
        ('cuda', True, True),
        ('cuda', False, False),
    ])
    def test_has_bfloat16(self, monkeypatch, gpu, native, expected):
        monkeypatch.setattr(bfloat16, 'get_device', lambda: gpu)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                            lambda including_emulation: native)
        assert bfloat16.has_bfloat16() == expected
