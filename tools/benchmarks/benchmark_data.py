# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Images a second of the two-view augmentation, ours beside others'."""

import argparse
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import baselines
import cv2
import measure
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import v2

from mmdensecl.cli import SMALLEST_CROP
from mmdensecl.datasets.transforms.loading import decode_rgb
from mmdensecl.engine.config import dicts
from mmdensecl.registry import MODELS

OURS = 'densecl_r50_8xb32-coslr-200e.py'
OURS_ON_DEVICE = 'densecl_r50_8xb32-coslr-200e_fast.py'
PEER = 'mmpretrain'
Run = Callable[[], Any]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = measure.make_parser(
        'Images a second of one core: from a file to two augmented views'
    )
    parser.set_defaults(threads=1)
    parser.add_argument(
        '--images',
        type=Path,
        help='folder of JPEGs, by default drawn ones of 500 x 400 pixels',
    )
    parser.add_argument(
        '--num-images', type=int, default=48, help='images of a round'
    )
    parser.add_argument(
        '--size', type=int, default=224, help='of a view in pixels'
    )
    parser.add_argument('--seed', type=int, default=0)
    args = measure.parse(parser)
    if args.num_images < 1:
        parser.error(f'--num-images must be at least 1, got {args.num_images}')
    return args


def draw_jpegs(folder: Path, count: int, seed: int) -> None:
    """Write images whose spectra fall off as those of photographs do.

    The amplitude of a photograph is about inverse to the frequency (Field,
    JOSA A 1987), and its channels have most of their structure in common.
    """
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = ((400, 500), (500, 400))[i % 2]
        frequency = np.hypot(
            np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
        )
        frequency[0, 0] = np.inf  # the mean is set below
        noise = np.fft.rfft2(rng.standard_normal((4, height, width)))
        common, *own = np.fft.irfft2(noise / frequency, (height, width))
        image = np.stack([common + 0.3 * x for x in own], axis=2)
        image = 115 + 55 * image / image.std()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
            folder / f'{i:05d}.jpg', quality=80
        )


def list_jpegs(folder: Path, count: int) -> list[Path]:
    """The first images of a folder, in the order of names."""
    found = sorted(
        x for x in folder.rglob('*') if x.suffix.lower() in ('.jpg', '.jpeg')
    )
    if not found:
        raise FileNotFoundError(
            f'No .jpg or .jpeg below "{folder}". Point --images at a folder '
            'of JPEGs, or leave it out.'
        )
    return found[:count]


def pipeline_of(cfg: Config, size: int) -> Compose:
    """The transforms of a config, with views of another size."""
    pipeline = cfg.train_dataloader.dataset.pipeline
    for node, _ in dicts(pipeline):
        for key in ('size', 'scale'):  # ours, mmpretrain's
            if node.get(key) == 224:
                node[key] = size
    return Compose(pipeline)


def our_pipeline(
    name: str, size: int, min_side: int | None = None
) -> Callable[[Path], Any]:
    """The transforms of a config of ours."""
    cfg = baselines.config(str(baselines.CONFIGS / name))
    cfg.train_dataloader.dataset.pipeline[0].min_side = min_side
    pipeline = pipeline_of(cfg, size)
    return lambda path: pipeline(
        dict(img_bytes=path.read_bytes(), img_path=str(path), sample_idx=0)
    )


def peer_pipeline(size: int) -> Callable[[Path], Any]:
    """The transforms of mmpretrain's published DenseCL."""
    pipeline = pipeline_of(baselines.config('mmpretrain DenseCL'), size)
    return lambda path: pipeline(dict(img_path=str(path)))


def pil_blur(image: Image.Image) -> Image.Image:
    """The authors' GaussianBlur."""
    return image.filter(
        ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0))
    )


def torchvision_chain(
    library: ModuleType, blur: Callable, tensors: bool, size: int
) -> Callable[[Path], Any]:
    """The authors' augmentation, on tensors or on PIL's images."""
    to_tensor = library.PILToTensor()
    view = library.Compose(
        [
            library.RandomResizedCrop(size, scale=(0.2, 1.0)),
            library.RandomApply(
                [library.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8
            ),
            library.RandomGrayscale(p=0.2),
            library.RandomApply([blur], p=0.5),
            library.RandomHorizontalFlip(),
        ]
    )

    def run(path: Path) -> list[torch.Tensor]:
        image = decode_rgb(path.read_bytes())
        if tensors:
            image = to_tensor(image)
            return [view(image), view(image)]
        return [to_tensor(view(image)), to_tensor(view(image))]

    return run


def albumentations_chain(size: int) -> Callable[[Path], Any] | None:
    """The operations of lightly-train's DenseCL, if the library is there.

    It takes albumentations' with these values (version 0.18 of lightly-train).
    """
    try:
        import albumentations as A
    except ImportError:
        return None
    view = A.Compose(
        [
            A.RandomResizedCrop(
                (size, size),
                scale=(0.2, 1.0),
                interpolation=cv2.INTER_AREA,
            ),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            A.ToGray(p=0.2),
            A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
            A.Normalize(),  # ours is the model's
        ]
    )

    def run(path: Path) -> list[torch.Tensor]:
        image = np.asarray(decode_rgb(path.read_bytes()))
        views = view(image=image)['image'], view(image=image)['image']
        return [torch.from_numpy(x).permute(2, 0, 1) for x in views]

    return run


def on_all(pipeline: Callable, items: list[Any]) -> Run:
    """One round of a pipeline."""

    def run() -> None:
        for item in items:
            pipeline(item)

    return run


def device_part(paths: list[Path], device: str, size: int) -> Run:
    """One round of what the model's device does for DeviceViews."""
    cfg = baselines.config(str(baselines.CONFIGS / OURS_ON_DEVICE))
    preprocessor = MODELS.build(cfg.model.data_preprocessor).to(device)
    pipeline = our_pipeline(OURS_ON_DEVICE, size)
    packed = [pipeline(path) for path in paths]
    size = cfg.train_dataloader.batch_size
    batches = [
        pseudo_collate(packed[i : i + size])
        for i in range(0, len(packed), size)
    ]
    return on_all(lambda batch: preprocessor(batch, True), batches)


def compare(args: argparse.Namespace, paths: list[Path]) -> None:
    """Print whole pipelines, from the file to the tensors."""
    size = args.size
    pipelines = {
        'mmdensecl': our_pipeline(OURS, size),
        'mmdensecl, decoded at a fraction': our_pipeline(
            OURS, size, math.ceil(size / SMALLEST_CROP)
        ),
        "mmdensecl, a worker's part of DeviceViews": our_pipeline(
            OURS_ON_DEVICE, size
        ),
        PEER: peer_pipeline(size),
        "torchvision on PIL: the authors', solo-learn": torchvision_chain(
            transforms, pil_blur, False, size
        ),
        'torchvision v2 on tensors': torchvision_chain(
            v2, v2.GaussianBlur(13, (0.1, 2.0)), True, size
        ),
        'decoding alone': lambda path: decode_rgb(path.read_bytes()),
    }
    if chain := albumentations_chain(size):
        pipelines['albumentations: lightly-train'] = chain
    else:
        print('albumentations is not installed, so it takes no part.')
    runs = {name: on_all(run, paths) for name, run in pipelines.items()}
    runs[f"mmdensecl, DeviceViews' own part, {args.device}"] = device_part(
        paths, args.device, size
    )
    seconds = measure.take_turns(runs, args.rounds, args.device)
    report = measure.Report(
        f'Two views of {size} pixels from each of {len(paths)} JPEGs', args
    )
    for name, times in seconds.items():
        report.add(
            name,
            images_a_second=len(paths) / median(times),
            ms_an_image=1000 * median(times) / len(paths),
            speed_ratio=measure.ratio(seconds[PEER], times),
        )
    report.show()


def main() -> None:
    """Time each part of reading an image, and the whole."""
    args = parse_args()
    cv2.setNumThreads(0)
    init_default_scope('mmpretrain')
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        images = args.images
        if images is None:
            images = Path(folder)
            draw_jpegs(images, args.num_images, args.seed)
        paths = list_jpegs(images, args.num_images)
        compare(args, paths)


if __name__ == '__main__':
    main()
