"""Training copy: DepthToSpace and SpaceToDepth become Reshape, Transpose, Reshape, which have gradients.

With block size `b`, for DepthToSpace of `[N, C b b, H, W]` to `[N, C, H b, W b]`:

    DCR    [N, b, b, C, H, W] -> [N, C, H, b, W, b]
    CRD    [N, C, b, b, H, W] -> [N, C, H, b, W, b]

SpaceToDepth is DCR read backwards.
"""

from __future__ import annotations

from onnx import ModelProto

from onnxneutrino.rewrite import Kept, Writer, rewritten


def run(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """Rewrite every DepthToSpace and SpaceToDepth whose shape is known."""
    return rewritten(model, {"DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth})


def _depth_to_space(writer: Writer) -> None:
    n, channels, height, width, b = _sizes(writer)
    c = channels // (b * b)
    if writer.attribute("mode", "DCR") == "CRD":
        apart, order = [n, c, b, b, height, width], [0, 1, 4, 2, 5, 3]
    else:
        apart, order = [n, b, b, c, height, width], [0, 3, 4, 1, 5, 2]
    _moved(writer, apart, order, [n, c, height * b, width * b])


def _space_to_depth(writer: Writer) -> None:
    n, c, height, width, b = _sizes(writer)
    apart = [n, c, height // b, b, width // b, b]
    _moved(writer, apart, [0, 3, 5, 1, 2, 4], [n, c * b * b, height // b, width // b])


def _sizes(writer: Writer) -> tuple[int, int, int, int, int]:
    shape = writer.shape(writer.node.input[0])
    if len(shape) != 4:
        raise Kept(f"its input has {len(shape)} axes instead of 4")
    n, channels, height, width = shape
    return n, channels, height, width, int(writer.attribute("blocksize", 1))


def _moved(writer: Writer, apart: list[int], order: list[int], together: list[int]) -> None:
    split = writer.reshape(writer.node.input[0], apart)
    turned = writer.add("Transpose", [split], perm=order)
    writer.reshape(turned, together, writer.node.output[0])
