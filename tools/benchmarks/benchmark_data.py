# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Images a second of the two-view augmentation, ours beside others'."""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import baselines
import cv2
import measure
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import init_default_scope
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F2

from mmdensecl.datasets.transforms import render
from mmdensecl.datasets.transforms.loading import decode_rgb
from mmdensecl.registry import MODELS

OURS = 'densecl_r50_8xb32-coslr-200e.py'
OURS_ON_DEVICE = 'densecl_r50_8xb32-coslr-200e_fast.py'
PEER = 'mmpretrain'
SIZE = 224
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
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--profile',
        action='store_true',
        help='instead, each operation with each library',
    )
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


def our_pipeline(name: str) -> Callable[[Path], Any]:
    """The transforms of a config of ours."""
    cfg = baselines.config(str(baselines.CONFIGS / name))
    pipeline = Compose(cfg.train_dataloader.dataset.pipeline)
    return lambda path: pipeline(
        dict(img_bytes=path.read_bytes(), img_path=str(path), sample_idx=0)
    )


def peer_pipeline() -> Callable[[Path], Any]:
    """The transforms of mmpretrain's published DenseCL."""
    cfg = baselines.config('mmpretrain DenseCL')
    pipeline = Compose(cfg.train_dataloader.dataset.pipeline)
    return lambda path: pipeline(dict(img_path=str(path)))


def pil_blur(image: Image.Image) -> Image.Image:
    """The authors' GaussianBlur."""
    return image.filter(
        ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0))
    )


def torchvision_chain(
    library: ModuleType, blur: Callable, tensors: bool
) -> Callable[[Path], Any]:
    """The authors' augmentation, on tensors or on PIL's images."""
    to_tensor = library.PILToTensor()
    view = library.Compose(
        [
            library.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
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


def on_all(pipeline: Callable, items: list[Any]) -> Run:
    """One round of a pipeline."""

    def run() -> None:
        for item in items:
            pipeline(item)

    return run


def device_part(paths: list[Path], device: str) -> Run:
    """One round of what the model's device does for DeviceViews."""
    cfg = baselines.config(str(baselines.CONFIGS / OURS_ON_DEVICE))
    preprocessor = MODELS.build(cfg.model.data_preprocessor).to(device)
    pipeline = our_pipeline(OURS_ON_DEVICE)
    packed = [pipeline(path) for path in paths]
    size = cfg.train_dataloader.batch_size
    batches = [
        pseudo_collate(packed[i : i + size])
        for i in range(0, len(packed), size)
    ]
    return on_all(lambda batch: preprocessor(batch, True), batches)


def compare(args: argparse.Namespace, paths: list[Path]) -> None:
    """Print whole pipelines, from the file to the tensors."""
    pipelines = {
        'mmdensecl': our_pipeline(OURS),
        "mmdensecl, a worker's part of DeviceViews": our_pipeline(
            OURS_ON_DEVICE
        ),
        PEER: peer_pipeline(),
        "torchvision on PIL, the authors'": torchvision_chain(
            transforms, pil_blur, tensors=False
        ),
        'torchvision v2 on tensors': torchvision_chain(
            v2, v2.GaussianBlur(13, (0.1, 2.0)), tensors=True
        ),
        'decoding alone': lambda path: decode_rgb(path.read_bytes()),
    }
    runs = {name: on_all(run, paths) for name, run in pipelines.items()}
    runs[f"mmdensecl, DeviceViews' own part, {args.device}"] = device_part(
        paths, args.device
    )
    seconds = measure.take_turns(runs, args.rounds, args.device)
    report = measure.Report(
        f'Two views of {SIZE} pixels from each of {len(paths)} JPEGs', args
    )
    for name, times in seconds.items():
        report.add(
            name,
            images_a_second=len(paths) / median(times),
            ms_an_image=1000 * median(times) / len(paths),
            speed_ratio=measure.ratio(seconds[PEER], times),
        )
    report.show()


def read_with_opencv(data: bytes) -> np.ndarray:
    """Decode a JPEG."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert image is not None
    return image[..., ::-1]


def read_with_torchvision(data: bytes) -> torch.Tensor:
    """Decode a JPEG."""
    # Of a bytearray, as torch warns of memory that it must not write to.
    return decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
    )


class Inputs(NamedTuple):
    """One image in all the forms that the libraries take."""

    data: bytes
    photo: Image.Image
    box: tuple[int, int, int, int]  # left, top, right, bottom
    view: Image.Image
    array: np.ndarray  # the same view, (SIZE, SIZE, 3)
    tensor: torch.Tensor  # the same view, (3, SIZE, SIZE)


def make_inputs(path: Path) -> Inputs:
    """Read an image; its crop has the mean area of those drawn, 0.6."""
    data = path.read_bytes()
    photo = decode_rgb(data)
    width, height = photo.size
    box = (width // 10, height // 8, width * 9 // 10, height * 7 // 8)
    view = photo.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return Inputs(
        data,
        photo,
        box,
        view,
        np.array(view),
        F.pil_to_tensor(view).contiguous(),
    )


def crop_array(x: Inputs) -> np.ndarray:
    """The crop as an array."""
    left, top, right, bottom = x.box
    return np.asarray(x.photo)[top:bottom, left:right]


# Each takes Inputs. The first of each is the reference; `mmdensecl` is what
# render_view does, in the libraries that won here.
OPERATIONS: dict[str, dict[str, Callable[[Inputs], Any]]] = {
    'decode': {
        'PIL': lambda x: decode_rgb(x.data),
        'OpenCV': lambda x: read_with_opencv(x.data),
        'torchvision': lambda x: read_with_torchvision(x.data),
    },
    'crop, resize': {
        'PIL': lambda x: x.photo.crop(x.box).resize(
            (SIZE, SIZE), Image.Resampling.BILINEAR
        ),
        'mmdensecl (torchvision v2)': lambda x: render.crop_and_resize(
            x.photo, x.box, SIZE
        ),
        'OpenCV, INTER_AREA': lambda x: cv2.resize(
            crop_array(x), (SIZE, SIZE), interpolation=cv2.INTER_AREA
        ),
    },
    'brightness': {
        'PIL': lambda x: F.adjust_brightness(x.view, 1.3),
        'mmdensecl (OpenCV)': lambda x: render.adjust_brightness(x.array, 1.3),
        'torchvision v2': lambda x: F2.adjust_brightness(x.tensor, 1.3),
    },
    'contrast': {
        'PIL': lambda x: F.adjust_contrast(x.view, 1.3),
        'mmdensecl (OpenCV)': lambda x: render.adjust_contrast(x.array, 1.3),
        'torchvision v2': lambda x: F2.adjust_contrast(x.tensor, 1.3),
    },
    'saturation': {
        'PIL': lambda x: F.adjust_saturation(x.view, 1.3),
        'mmdensecl (OpenCV)': lambda x: render.adjust_saturation(x.array, 1.3),
        'torchvision v2': lambda x: F2.adjust_saturation(x.tensor, 1.3),
    },
    'hue': {
        'PIL': lambda x: F.adjust_hue(x.view, 0.07),
        'mmdensecl (OpenCV)': lambda x: render.adjust_hue(x.array, 0.07),
        'torchvision v2': lambda x: F2.adjust_hue(x.tensor, 0.07),
    },
    'gray': {
        'PIL': lambda x: F.rgb_to_grayscale(x.view, 3),
        'mmdensecl (OpenCV)': lambda x: cv2.cvtColor(
            x.array, cv2.COLOR_RGB2GRAY
        ),
        'torchvision v2': lambda x: F2.rgb_to_grayscale(x.tensor, 3),
    },
    'blur, sigma 1.5': {
        'PIL': lambda x: x.view.filter(ImageFilter.GaussianBlur(1.5)),
        'mmdensecl (OpenCV)': lambda x: render.blur(x.array, 1.5),
        'OpenCV, GaussianBlur': lambda x: cv2.GaussianBlur(
            x.array, (0, 0), 1.5, borderType=cv2.BORDER_REPLICATE
        ),
        'torchvision v2': lambda x: F2.gaussian_blur(
            x.tensor, [13, 13], [1.5]
        ),
    },
    'flip': {
        'PIL': lambda x: F.hflip(x.view),
        'mmdensecl (OpenCV)': lambda x: cv2.flip(x.array, 1),
        'torchvision v2': lambda x: F2.horizontal_flip(x.tensor),
    },
    'to a tensor': {
        'PIL': lambda x: F.pil_to_tensor(x.view).contiguous(),
        'mmdensecl (OpenCV)': lambda x: render.to_tensor(x.array),
        'numpy': lambda x: torch.from_numpy(
            np.ascontiguousarray(x.array.transpose(2, 0, 1))
        ),
    },
}


def levels(result: Any) -> np.ndarray:
    """What an operation returned, as (height, width, channels)."""
    if isinstance(result, torch.Tensor):
        result = result.permute(1, 2, 0).numpy()
    return np.atleast_3d(np.asarray(result)).astype(int)


def profile(args: argparse.Namespace, paths: list[Path]) -> None:
    """Print each operation alone, and how far it is from PIL's."""
    inputs = [make_inputs(path) for path in paths]
    report = measure.Report(
        f'Operations of one view of {SIZE} pixels, means of {len(paths)} '
        'JPEGs; differences to the first row of each in grey levels',
        args,
    )
    for operation, ways in OPERATIONS.items():
        runs = {name: on_all(run, inputs) for name, run in ways.items()}
        seconds = measure.take_turns(runs, args.rounds, args.device)
        reference, *_ = ways
        for name, times in seconds.items():
            apart = [
                np.abs(levels(ways[name](x)) - levels(ways[reference](x)))
                for x in inputs
            ]
            report.add(
                operation,
                library=name,
                microseconds=round(1e6 * median(times) / len(inputs)),
                speed_ratio=measure.ratio(seconds[reference], times),
                mean_difference=float(np.mean([x.mean() for x in apart])),
                largest=int(max(x.max() for x in apart)),
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
        (profile if args.profile else compare)(args, paths)


if __name__ == '__main__':
    main()
