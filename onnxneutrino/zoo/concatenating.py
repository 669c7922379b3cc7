"""Networks that put maps side by side: DenseNet and GoogLeNet.

DenseNet: Huang et al. 2017, "Densely Connected Convolutional Networks", section 4.2, without dropout. GoogLeNet:
Szegedy et al. 2015, "Going Deeper with Convolutions", table 1, with BatchNormalization in place of local response
normalization and without the auxiliary classifiers; for images of up to 64 pixels the three Conv before the first
module, which make the map eight times smaller, are one that keeps it.
"""

from __future__ import annotations

from onnxneutrino.zoo.builder import Builder, Tensor, scaled

# 1x1; 3x3 and 5x5, each with the 1x1 before it; 1x1 behind the pool.
INCEPTION = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
POOL_AFTER = (1, 6)  # modules 3b and 4e


def densenet40(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Depth 40, growth 12: three blocks of twelve Conv of 3x3."""
    x = net.conv(x, scaled(16, width), 3)
    return _densenet(net, x, classes, scaled(12, width), 12, bottleneck=False)


def densenetbc100(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Depth 100, growth 12, with bottlenecks and transitions that halve the channels."""
    x = net.conv(x, scaled(24, width), 3)
    return _densenet(net, x, classes, scaled(12, width), 16, bottleneck=True)


def _densenet(net: Builder, x: Tensor, classes: int, growth: int, layers: int, bottleneck: bool) -> Tensor:
    for block in range(3):
        if block:
            channels = x.channels // 2 if bottleneck else x.channels
            x = net.average_pool(net.conv(net.relu(net.norm(x)), channels, 1), 2, 2)
        for _ in range(layers):
            y = net.relu(net.norm(x))
            if bottleneck:
                y = net.relu(net.norm(net.conv(y, 4 * growth, 1)))
            x = net.concat([x, net.conv(y, growth, 3)])
    return net.dense(net.global_average(net.relu(net.norm(x))), classes)


def googlenet(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Nine modules of four branches."""
    if x.small:
        x = net.conv_norm_relu(x, scaled(192, width), 3)
    else:
        x = net.max_pool(net.conv_norm_relu(x, scaled(64, width), 7, 2), 3, 2, 1)
        x = net.conv_norm_relu(net.conv_norm_relu(x, scaled(64, width), 1), scaled(192, width), 3)
        x = net.max_pool(x, 3, 2, 1)
    for number, filters in enumerate(INCEPTION):
        x = _inception(net, x, [scaled(count, width) for count in filters])
        if number in POOL_AFTER:
            x = net.max_pool(x, 3, 2, 1)
    return net.dense(net.global_average(x), classes)


def _inception(net: Builder, x: Tensor, filters: list[int]) -> Tensor:
    plain, before3, three, before5, five, behind = filters
    return net.concat(
        [
            net.conv_norm_relu(x, plain, 1),
            net.conv_norm_relu(net.conv_norm_relu(x, before3, 1), three, 3),
            net.conv_norm_relu(net.conv_norm_relu(x, before5, 1), five, 5),
            net.conv_norm_relu(net.max_pool(x, 3, 1, 1), behind, 1),
        ]
    )
