# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Views rendered on the device of the model."""

import torch
from mmpretrain.models import SelfSupDataPreprocessor

from mmdensecl.registry import MODELS

from .view_rendering import render_views


@MODELS.register_module()
class DeviceViews(SelfSupDataPreprocessor):
    """Render two views of each source on the model's device, and normalise.

    The workers only decode and draw (:class:`mmdensecl.SampleTwoCropParams`,
    :class:`mmdensecl.PackImage`); what is drawn for a seed is the same
    wherever it is rendered.

    Args:
        size: Side of a view in pixels.
        **kwargs: Arguments of mmpretrain's ``SelfSupDataPreprocessor``, such
            as ``mean`` and ``std``.
    """

    def __init__(self, size: int = 224, **kwargs) -> None:
        super().__init__(**kwargs)
        self.size = size

    def forward(self, data: dict, training: bool = False) -> dict:
        """Render a batch.

        Args:
            data: ``inputs``, N uint8 sources (3, H, W); ``data_samples``,
                which carry ``aug_params``.
            training: Makes no difference.

        Returns:
            ``inputs``, first and second views, (N, 3, size, size) each,
            float32; ``data_samples`` as they came.
        """
        samples = data['data_samples']
        if not all('aug_params' in sample for sample in samples):
            raise ValueError(
                'mmdensecl.DeviceViews renders what the pipeline has drawn, '
                'but the samples carry no aug_params. End the pipeline with '
                'mmdensecl.SampleTwoCropParams and mmdensecl.PackImage.'
            )
        sources = list(self.cast_data(data['inputs']))
        first, second = zip(
            *(sample.aug_params for sample in samples), strict=True
        )
        # A training step prepares its data under autocast, too.
        with torch.autocast(self.device.type, enabled=False):
            images = render_views(sources * 2, first + second, self.size)
        # Nothing in the samples is on a device, and to move them would copy
        # them, a tenth of a millisecond each.
        outputs = super().forward(
            dict(inputs=list(images.chunk(2)), data_samples=None), training
        )
        return dict(outputs, data_samples=samples)
