# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Save what the model will see: views of pictures beside their source."""

import argparse
from pathlib import Path

import matplotlib
from mmengine.registry import init_default_scope
from mmengine.utils import track_iter_progress

from mmdensecl.datasets.transforms.loading import decode_rgb
from mmdensecl.datasets.unlabeled import UnreadableImageError
from mmdensecl.engine.command_line import add_config_options, load_config
from mmdensecl.registry import DATASETS
from mmdensecl.visualization.views import view_images

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

COLORS = ('tab:blue', 'tab:orange')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file path')
    parser.add_argument(
        '--output-dir',
        type=Path,
        default='browse_dataset',
        help='folder for the pictures, browse_dataset by default',
    )
    parser.add_argument(
        '--show-number', type=int, default=8, help='pictures to show'
    )
    parser.add_argument(
        '--draws', type=int, default=3, help='pairs of views of each'
    )
    add_config_options(parser)
    return parser.parse_args()


def draw(dataset, idx: int, draws: int, size: int) -> plt.Figure:
    """One picture with its crops, and the two views of each draw."""
    info = dataset.get_data_info(idx)
    source = decode_rgb(dataset.read(info))
    figure, axes = plt.subplots(
        2, draws + 1, figsize=(2.6 * (draws + 1), 5.6), layout='constrained'
    )
    axes[0, 0].imshow(source)
    axes[0, 0].set_title(
        f'{info["img_path"]}\n{source.width} x {source.height} px'
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for column in range(draws):
        dataset.set_epoch(column)
        data = dataset.prepare_data(idx)
        sample = data['data_samples']
        for row, (view, box) in enumerate(
            zip(view_images(data, size), sample.views, strict=True)
        ):
            left, top, width, height, flip = box
            axes[row, column + 1].imshow(view.permute(1, 2, 0).numpy())
            axes[row, column + 1].set_title(
                f'epoch {column + 1}, {("query", "key")[row]}'
                + (', mirrored' if flip else ''),
                color=COLORS[row],
            )
            if column == 0:  # the first pair's crops; all would be a thicket
                axes[0, 0].add_patch(
                    Rectangle(
                        (left, top),
                        width,
                        height,
                        fill=False,
                        linewidth=2,
                        edgecolor=COLORS[row],
                    )
                )
    return figure


def main() -> None:
    """Write the images with their boxes."""
    args = parse_args()
    cfg = load_config(args)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    # Of mmdensecl.DeviceViews; the pipeline has its own size elsewhere.
    size = cfg.model.data_preprocessor.get('size', 224)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for idx in track_iter_progress(
        list(range(min(args.show_number, len(dataset))))
    ):
        try:
            figure = draw(dataset, idx, args.draws, size)
        except (UnreadableImageError, OSError) as error:
            name = dataset.get_data_info(idx)['img_path']
            print(f'\nleft out: {name!r}: {error}')
            continue
        figure.savefig(args.output_dir / f'{idx:06d}.png', dpi=100)
        plt.close(figure)
    print(f'\nWrote {args.output_dir}')


if __name__ == '__main__':
    main()
