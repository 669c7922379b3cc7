"""Networks without branches: a perceptron, LeNet-5 and VGG.

LeNet-5: LeCun et al. 1998, "Gradient-based learning applied to document recognition", with Relu, maximum pooling and
every map of the second layer connected with all of the first. VGG: Simonyan and Zisserman 2015, "Very Deep
Convolutional Networks", configurations A and D of table 1 with BatchNormalization; for small images the three dense
layers are a mean over the map and one.
"""

from __future__ import annotations

from onnxneutrino.zoo.builder import Builder, Tensor, scaled

POOL = 0  # stands between the filters of a VGG
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, *(256, 256, 256, POOL), *(512, 512, 512, POOL) * 2)
# Large maps are where the time goes: few filters there let two cores see the images often enough in half an hour.
VGG_LIGHT = (32, POOL, 64, POOL, 128, 128, POOL, 256, 256)
MNIST_SIZE = 28


def mlp(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Two hidden layers of 512 units."""
    x = net.flatten(x)
    for _ in range(2):
        x = net.relu(net.dense(x, scaled(512, width)))
    return net.dense(x, classes)


def lenet5(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Two Conv of 5x5 and three dense layers; images of up to 28 pixels get the border of the paper's 32."""
    border = 2 if max(x.shape[1:]) <= MNIST_SIZE else 0
    for filters, pad in ((6, border), (16, 0)):
        x = net.max_pool(net.relu(net.conv(x, scaled(filters, width), 5, pad=pad, bias=True)), 2, 2)
    x = net.flatten(x)
    for units in (120, 84):
        x = net.relu(net.dense(x, scaled(units, width)))
    return net.dense(x, classes)


def vgg11(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Configuration A."""
    return _vgg(net, x, classes, width, VGG11)


def vgg16(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Configuration D."""
    return _vgg(net, x, classes, width, VGG16)


def vgg_light(net: Builder, x: Tensor, classes: int, width: float) -> Tensor:
    """Six Conv that two cores train in half an hour."""
    return _vgg(net, x, classes, width, VGG_LIGHT)


def _vgg(net: Builder, x: Tensor, classes: int, width: float, layers: tuple[int, ...]) -> Tensor:
    """Conv of 3x3 and pools that halve the map; one that has come to a pixel stays."""
    for filters in layers:
        if filters != POOL:
            x = net.conv_norm_relu(x, scaled(filters, width), 3)
        elif min(x.shape[1:]) > 1:
            x = net.max_pool(x, 2, 2)
    return net.dense(net.global_average(x), classes)
