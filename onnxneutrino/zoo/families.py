"""The families of networks, by name: one explicit tuple."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import ModelProto

from onnxneutrino.zoo import concatenating, mobile, plain, resnet
from onnxneutrino.zoo.builder import INPUT, Builder, Tensor


@dataclass(frozen=True)
class Family:
    """A network for any number of classes.

    Attributes:
        name: as it stands in the name of a recipe.
        layers: from builder, image, classes and width (1 for the paper's) to the logits.
    """

    name: str
    layers: Callable[[Builder, Tensor, int, float], Tensor]

    def build(
        self, name: str, image: tuple[int, int, int], classes: int, *, seed: int | None = 0, width: float = 1.0
    ) -> ModelProto:
        """The graph for images `(C, H, W)`, called `name`; without values of the weights where the seed is None."""
        net = Builder(seed)
        return net.model(name, image, self.layers(net, Tensor(INPUT, image), classes, width))


FAMILIES = (
    Family("mlp", plain.mlp),
    Family("lenet5", plain.lenet5),
    Family("vgglight", plain.vgg_light),
    Family("vgg11", plain.vgg11),
    Family("vgg16", plain.vgg16),
    Family("resnet20", resnet.resnet20),
    Family("resnet56", resnet.resnet56),
    Family("resnet18", resnet.resnet18),
    Family("mobilenetv1", mobile.mobilenetv1),
    Family("mobilenetv2", mobile.mobilenetv2),
    Family("shufflenetv2", mobile.shufflenetv2),
    Family("densenet40", concatenating.densenet40),
    Family("densenetbc100", concatenating.densenetbc100),
    Family("googlenet", concatenating.googlenet),
)
