"""Write a VGG-19 for 32×32 inputs with random weights as an ONNX file: about 20 million parameters.

Sixteen 3×3 Conv layers, 64-64-M-128-128-M-256×4-M-512×4-M-512×4-M, each with BatchNormalization and Relu, then
Flatten and one Gemm (configuration E of Simonyan and Zisserman, Very deep convolutional networks, 2015, with
the head that is usual for CIFAR). Conv weights have He's variance `2 / (I·kh·kw)`; the statistics of the
BatchNormalization are random too, so that folding it changes every weight.

    python benchmarks/vgg19.py vgg19.onnx [--seed 0] [--classes 10]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

WIDTHS: tuple[tuple[int, ...], ...] = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)
OPSET = 17
IR_VERSION = 8


def vgg19(seed: int = 0, classes: int = 10) -> ModelProto:
    """Make the model: input `image` `(batch, 3, 32, 32)`, output `logits` `(batch, classes)`, symbolic batch.

    Args:
        seed: of the weights.
        classes: outputs of the last layer.
    """
    generator = np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.float32]] = {}
    nodes: list[NodeProto] = []
    source, channels, number = "image", 3, 0
    for block, widths in enumerate(WIDTHS):
        for width in widths:
            name = f"conv{number}"
            arrays[f"{name}.weight"] = _he(generator, (width, channels, 3, 3))
            nodes.append(
                helper.make_node("Conv", [source, f"{name}.weight"], [name], name, kernel_shape=[3, 3], pads=[1] * 4)
            )
            nodes.append(_batch_normalization(generator, number, width, arrays))
            source, channels, number = f"relu{number}", width, number + 1
            nodes.append(helper.make_node("Relu", [f"norm{number - 1}"], [source], source))
        pool = f"pool{block}"
        nodes.append(helper.make_node("MaxPool", [source], [pool], pool, kernel_shape=[2, 2], strides=[2, 2]))
        source = pool
    arrays["head.weight"] = _he(generator, (classes, channels))
    arrays["head.bias"] = np.zeros(classes, np.float32)
    nodes.append(helper.make_node("Flatten", [source], ["features"], "flatten", axis=1))
    nodes.append(helper.make_node("Gemm", ["features", "head.weight", "head.bias"], ["logits"], "head", transB=1))
    graph = helper.make_graph(
        nodes,
        "vgg19",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return model


def _he(generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Normal values of variance `2 / fan-in`."""
    scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return np.asarray(generator.standard_normal(shape, np.float32) * scale, np.float32)


def _batch_normalization(
    generator: np.random.Generator, number: int, width: int, arrays: dict[str, NDArray[np.float32]]
) -> NodeProto:
    """The node after Conv `number`, its four arrays added to `arrays`; scale and variance stay near one."""
    name = f"norm{number}"
    names = [f"{name}.{part}" for part in ("scale", "bias", "mean", "variance")]
    values = (
        generator.uniform(0.8, 1.2, width),
        0.1 * generator.standard_normal(width),
        0.1 * generator.standard_normal(width),
        generator.uniform(0.8, 1.2, width),
    )
    arrays.update({key: value.astype(np.float32) for key, value in zip(names, values, strict=True)})
    return helper.make_node("BatchNormalization", [f"conv{number}", *names], [name], name)


def main() -> None:
    """Write the file and print its number of parameters."""
    parser = argparse.ArgumentParser(description="Write a VGG-19 for 32x32 inputs with random weights.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classes", type=int, default=10)
    arguments = parser.parse_args()
    model = vgg19(arguments.seed, arguments.classes)
    onnx.save(model, arguments.output)
    print(f"{arguments.output}: {sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)} parameters")


if __name__ == "__main__":
    main()
