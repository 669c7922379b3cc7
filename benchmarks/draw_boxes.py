"""Draw what two detectors find, side by side on the same images: the original left, the other right.

    python benchmarks/draw_boxes.py ORIGINAL.onnx OTHER.onnx --data benchmarks/corpus_loaders.py:yolox --folder drawn

The loader's `detections` decodes the outputs (docs/howto-detectors.md); images are its test images, N×C×H×W with values
from 0 to 255, blue first unless `--rgb`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from onnxneutrino import prepare
from onnxneutrino.config import Config, DataConfig
from onnxneutrino.data import open_data
from onnxneutrino.graph import load
from onnxneutrino.runtime import Runner

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")


def drawn(pixels: NDArray[np.uint8], boxes: NDArray[Any], least: float) -> Image.Image:
    """An image `(H, W, 3)` with the boxes `[x1, y1, x2, y2, score, class]` of at least this score."""
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for *corners, score, label in boxes[boxes[:, 4] >= least].tolist():
        colour = COLOURS[int(label) % len(COLOURS)]
        draw.rectangle(corners, outline=colour, width=2)
        draw.text((corners[0] + 3, corners[1] + 1), f"{int(label)} {score:.2f}", fill=colour)
    return picture


def main() -> None:
    """Write one PNG for each image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--data", required=True, help="file.py:function")
    parser.add_argument("--folder", type=Path, required=True, help="where the pictures go")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--score", type=float, default=0.3, help="least score of a box that is drawn")
    parser.add_argument("--rgb", action="store_true", help="the images have red first")
    options = parser.parse_args()
    config = Config(data=DataConfig(path=options.data, base=Path()))
    models = [load(path).model for path in (options.original, options.other)]
    specs = prepare.input_specs(prepare.open_model(models[0], options.original.name, config))
    dataset = open_data(config.data, specs, seed=0, classes=None)
    if dataset.detections is None:
        parser.error(f"{options.data} returns no function 'detections'")
    runs = [Runner(model, threads=1) for model in models]
    options.folder.mkdir(parents=True, exist_ok=True)
    for number, inputs in enumerate(prepare.first_examples(dataset.test, options.images)):
        planes = next(iter(inputs.values()))[0].transpose(1, 2, 0)
        pixels = np.ascontiguousarray(planes if options.rgb else planes[..., ::-1]).astype(np.uint8)
        found = [dataset.detections(list(run(inputs)))[0] for run in runs]
        both = [np.asarray(drawn(pixels, boxes, options.score)) for boxes in found]
        Image.fromarray(np.hstack(both)).save(options.folder / f"{number:03}.png")


if __name__ == "__main__":
    main()
