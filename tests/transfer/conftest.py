# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import pytest
import torch
import torchvision


def randomise(module):
    """Distinct values everywhere, statistics and counters included."""
    generator = torch.Generator().manual_seed(3)
    for _name, x in module.state_dict().items():
        if x.is_floating_point():
            # Variances must be positive; small, so that features stay finite.
            x.copy_(torch.rand(x.shape, generator=generator) * 0.1 + 0.01)
        else:
            x.fill_(7)
    return module


@pytest.fixture(scope='session')
def resnet18():
    """A torchvision ResNet-18 with values that no initialisation draws."""
    return randomise(torchvision.models.resnet18()).eval()


@pytest.fixture(scope='session')
def backbone18(resnet18):
    """Its state dict, without the classifier."""
    return {
        k: v
        for k, v in resnet18.state_dict().items()
        if not k.startswith('fc.')
    }


@pytest.fixture(scope='session')
def file18(resnet18, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'resnet18.pth'
    torch.save(resnet18.state_dict(), path)
    return str(path)


@pytest.fixture(scope='session')
def backbone50():
    model = randomise(torchvision.models.resnet50())
    return {
        k: v for k, v in model.state_dict().items() if not k.startswith('fc.')
    }


@pytest.fixture(scope='session')
def file50(backbone50, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'resnet50.pth'
    torch.save(dict(state_dict=backbone50, author='DenseCL'), path)
    return str(path)
