"""ResNet: He et al. 2016, "Deep Residual Learning for Image Recognition".

The networks for CIFAR of section 4.2 have shortcuts without parameters (option A: every other pixel, zeros for new
channels); ResNet-18 of table 1 has a Conv of 1x1 where the shape changes (option B), and begins with a Conv of 3x3 and
no pool for images of up to 64 pixels.
"""

from __future__ import annotations

from onnxneutrino.zoo.builder import Builder, Tensor, scaled


def resnet20(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Three stages of three blocks."""
    x = net.conv_norm_relu(x, scaled(16, width), 3)
    return _resnet(net, x, classes, width, (16, 32, 64), 3, projected=False)


def resnet56(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Three stages of nine blocks."""
    x = net.conv_norm_relu(x, scaled(16, width), 3)
    return _resnet(net, x, classes, width, (16, 32, 64), 9, projected=False)


def resnet18(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Four stages of two blocks."""
    if x.small:
        x = net.conv_norm_relu(x, scaled(64, width), 3)
    else:
        x = net.max_pool(net.conv_norm_relu(x, scaled(64, width), 7, 2), 3, 2, 1)
    return _resnet(net, x, classes, width, (64, 128, 256, 512), 2, projected=True)


def _resnet(
    net: Builder, x: Tensor, classes: int, width: float, stages: tuple[int, ...], blocks: int, projected: bool
) -> Tensor:
    for stage, filters in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            x = _block(net, x, scaled(filters, width), stride, projected)
    return net.dense(net.global_average(x), classes)


def _block(net: Builder, x: Tensor, filters: int, stride: int, projected: bool) -> Tensor:
    """Two Conv of 3x3 beside a shortcut."""
    y = net.norm(net.conv(net.conv_norm_relu(x, filters, 3, stride), filters, 3))
    if stride > 1 or filters != x.channels:
        x = net.norm(net.conv(x, filters, 1, stride)) if projected else net.subsampled(x, stride, filters)
    return net.relu(net.add(y, x))
