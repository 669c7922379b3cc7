"""Networks of depthwise Conv: MobileNet v1 and v2, ShuffleNet v2.

MobileNet: Howard et al. 2017, table 1. MobileNet v2: Sandler et al. 2018, table 2. ShuffleNet v2: Ma et al. 2018,
table 5, 1x. For images of up to 64 pixels the first strides, which halve the map three to five times less often, are
left out, as is the pool behind the first Conv of ShuffleNet; all widths are those of the papers.
"""

from __future__ import annotations

from onnxneutrino.zoo.builder import Builder, Tensor, scaled

# Filters and stride of each depthwise block.
MOBILE_V1 = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
# Expansion, filters, blocks and stride of the first one.
# fmt: off
MOBILE_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# fmt: on
SHUFFLE_V2 = ((116, 4), (232, 8), (464, 4))  # filters and blocks


def mobilenetv1(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Thirteen blocks of a depthwise Conv and one of 1x1."""
    x = net.conv_norm_relu(x, scaled(32, width), 3, 1 if x.small else 2)
    for filters, stride in MOBILE_V1:
        x = net.conv_norm_relu(x, x.channels, 3, stride, group=x.channels)
        x = net.conv_norm_relu(x, scaled(filters, width), 1)
    return net.dense(net.global_average(x), classes)


def mobilenetv2(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Inverted residuals with linear bottlenecks."""
    small = x.small
    x = net.relu6(net.norm(net.conv(x, scaled(32, width), 3, 1 if small else 2)))
    for stage, (expansion, filters, blocks, first) in enumerate(MOBILE_V2):
        for block in range(blocks):
            stride = 1 if block or (small and stage == 1) else first
            x = _inverted(net, x, expansion, scaled(filters, width), stride)
    x = net.relu6(net.norm(net.conv(x, scaled(1280, width), 1)))
    return net.dense(net.global_average(x), classes)


def _inverted(net: Builder, x: Tensor, expansion: int, filters: int, stride: int) -> Tensor:
    """Wider by 1x1, depthwise, narrower by 1x1; beside a shortcut where the shape stays."""
    y = x
    if expansion > 1:
        y = net.relu6(net.norm(net.conv(y, expansion * x.channels, 1)))
    y = net.relu6(net.norm(net.conv(y, y.channels, 3, stride, group=y.channels)))
    y = net.norm(net.conv(y, filters, 1))
    return net.add(y, x) if y.shape == x.shape else y


def shufflenetv2(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Half of the channels pass a block unchanged; then all are shuffled."""
    if x.small:
        x = net.conv_norm_relu(x, scaled(24, width), 3)
    else:
        x = net.max_pool(net.conv_norm_relu(x, scaled(24, width), 3, 2), 3, 2, 1)
    for filters, blocks in SHUFFLE_V2:
        half = scaled(filters // 2, width)
        x = net.shuffle(net.concat([_halving(net, x, half), _branch(net, x, half, 2)]), 2)
        for _ in range(blocks - 1):
            kept, changed = net.channels(x, 0, half), net.channels(x, half, 2 * half)
            x = net.shuffle(net.concat([kept, _branch(net, changed, half, 1)]), 2)
    x = net.conv_norm_relu(x, scaled(1024, width), 1)
    return net.dense(net.global_average(x), classes)


def _branch(net: Builder, x: Tensor, filters: int, stride: int) -> Tensor:
    """1x1, depthwise, 1x1."""
    x = net.conv_norm_relu(x, filters, 1)
    x = net.norm(net.conv(x, filters, 3, stride, group=filters))
    return net.conv_norm_relu(x, filters, 1)


def _halving(net: Builder, x: Tensor, filters: int) -> Tensor:
    """The other branch of a block that halves the map: depthwise, 1x1."""
    x = net.norm(net.conv(x, x.channels, 3, 2, group=x.channels))
    return net.conv_norm_relu(x, filters, 1)
