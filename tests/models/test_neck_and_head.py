# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import math

import pytest
import torch

from mmdensecl.models import ContrastiveHead, DenseCLNeck
from mmdensecl.models.modules import l2_normalize


class TestDenseCLNeck:
    """Values are compared with loops in test_against_loops.py."""

    def test_layers(self):
        """The authors' names, and no batch norm."""
        neck = DenseCLNeck(6, 5, 4)
        shapes = {k: tuple(x.shape) for k, x in neck.state_dict().items()}
        assert shapes == {
            'mlp.0.weight': (5, 6),
            'mlp.0.bias': (5,),
            'mlp.2.weight': (4, 5),
            'mlp.2.bias': (4,),
            'mlp2.0.weight': (5, 6, 1, 1),
            'mlp2.0.bias': (5,),
            'mlp2.2.weight': (4, 5, 1, 1),
            'mlp2.2.bias': (4,),
        }

    def test_init(self):
        """Linear: Kaiming normal over fan-in; convs: PyTorch's uniform."""
        neck = DenseCLNeck(400, 900, 300)
        conv = neck.mlp2[0].weight.clone()
        neck.init_weights()
        for layer, fan_in in ((neck.mlp[0], 400), (neck.mlp[2], 900)):
            assert (layer.bias == 0).all()
            std = math.sqrt(2 / fan_in)
            assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
            # A normal has 4.6% beyond two standard deviations.
            far = (layer.weight.abs() > 2 * std).float().mean()
            assert far.item() == pytest.approx(0.0455, abs=0.005)
        assert torch.equal(neck.mlp2[0].weight, conv)
        assert conv.abs().max() <= 1 / math.sqrt(400)

    @pytest.mark.parametrize('num_grid, told', [(4, 0), (5, 1)])
    def test_a_grid_larger_than_the_map(self, num_grid, told, recwarn):
        neck = DenseCLNeck(6, 5, 4, num_grid)
        neck((torch.rand(2, 6, 4, 8),))
        assert len(recwarn) == told
        assert not told or '4 x 8 cells of the map' in str(recwarn[0].message)


def test_a_zero_vector_has_a_gradient():
    x = torch.zeros(1, 3, requires_grad=True)
    l2_normalize(x).sum().backward()
    assert torch.isfinite(x.grad).all()


class TestContrastiveHead:
    def setup_method(self):
        # Losses of rows: log(1 + 2 exp((0 - s) / t)) for s = 1, 0, -1.
        self.query = torch.eye(4)[[0, 0, 0]]
        self.key = torch.stack(
            [torch.eye(4)[0], torch.eye(4)[1], -torch.eye(4)[0]]
        )
        self.queue = torch.eye(4)[2:]
        self.rows = [math.log1p(2 * math.exp(-s / 0.2)) for s in (1, 0, -1)]

    def test_mean_over_valid_rows(self):
        valid = torch.tensor([True, False, True])
        loss, monitors = ContrastiveHead().loss(
            self.query, self.key, self.queue, valid
        )
        assert loss.item() == pytest.approx((self.rows[0] + self.rows[2]) / 2)
        assert monitors['acc'] == 50

    def test_rows_weigh_the_same_however_many_positives(self):
        """Of losses a, b and c: the mean of (a + b) / 2 and of c."""
        a, b, c = self.rows
        key = torch.stack([self.key[:2], self.key[[0, 2]], self.key[:2]])
        valid = torch.tensor([[True, True], [False, True], [False, False]])
        query = self.query.requires_grad_()
        loss, monitors = ContrastiveHead().loss(query, key, self.queue, valid)
        assert loss.item() == pytest.approx(((a + b) / 2 + c) / 2)
        assert monitors['acc'] == 25
        loss.backward()
        assert (query.grad[2] == 0).all()
        loss, _ = ContrastiveHead().loss(query, key, self.queue)
        assert loss.item() == pytest.approx((3 * a + 2 * b + c) / 6)
