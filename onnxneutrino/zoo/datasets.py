"""The data sets of the zoo: where their official files are, their checksums, and how they become an `.npz` file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxneutrino.zoo.archives import Bytes, read_cifar, read_mnist
from onnxneutrino.zoo.download import File

PIXEL = 1 / 255


@dataclass(frozen=True)
class DataSource:
    """A data set.

    Attributes:
        name: as it stands in the name of a recipe.
        base: address of the folder with its files; empty for images of the user's own.
        files: what is downloaded from there.
        image: `(C, H, W)`; None where the images tell.
        classes: how many; None where the images tell.
        mean: of the training images, per channel, pixels from 0 to 1.
        std: their standard deviation.
        augment: of training images.
        read: from a folder that holds the files to images `(N, H, W[, C])` and labels `(N,)` by split.
    """

    name: str
    base: str
    files: tuple[File, ...]
    image: tuple[int, int, int] | None
    classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...]
    read: Callable[[Path], Mapping[str, tuple[Bytes, Bytes]]] | None

    @property
    def archive(self) -> str:
        """Name of the `.npz` file."""
        return f"{self.name}.npz"

    def splits(self, folder: Path) -> list[tuple[Bytes, NDArray[np.int64]]]:
        """Images and labels for training, and those for the test, from the files in the folder.

        Raises:
            DataError: a file is damaged.
        """
        assert self.read is not None
        read = self.read(folder)
        return [(images, labels.astype(np.int64)) for images, labels in (read["train"], read["test"])]


def _mnist(folder: Path) -> dict[str, tuple[Bytes, Bytes]]:
    parts = {"train": "train", "test": "t10k"}
    return {
        split: read_mnist(folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
        for split, part in parts.items()
    }


def _cifar10(folder: Path) -> dict[str, tuple[Bytes, Bytes]]:
    train = [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)]
    splits = {"train": train, "test": ["cifar-10-batches-bin/test_batch.bin"]}
    return read_cifar(folder / "cifar-10-binary.tar.gz", splits, 1, 10)


def _cifar100(folder: Path) -> dict[str, tuple[Bytes, Bytes]]:
    splits = {split: [f"cifar-100-binary/{split}.bin"] for split in ("train", "test")}
    return read_cifar(folder / "cifar-100-binary.tar.gz", splits, 2, 100)


# Address and MD5 of CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html. Those of MNIST, whose own page
# (yann.lecun.com/exdb/mnist) no longer serves the files reliably: torchvision/datasets/mnist.py of pytorch/vision.
# Mean and standard deviation are those of all pixels of the training images.
DATA_SOURCES = (
    DataSource(
        name="mnist",
        base="https://ossci-datasets.s3.amazonaws.com/mnist/",
        files=(
            File("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873", 9_912_422),
            File("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432", 28_881),
            File("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3", 1_648_877),
            File("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c", 4_542),
        ),
        image=(1, 28, 28),
        classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        augment=(),
        read=_mnist,
    ),
    DataSource(
        name="cifar10",
        base="https://www.cs.toronto.edu/~kriz/",
        files=(File("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171),),
        image=(3, 32, 32),
        classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.247, 0.2435, 0.2616),
        augment=("crop4", "hflip"),
        read=_cifar10,
    ),
    DataSource(
        name="cifar100",
        base="https://www.cs.toronto.edu/~kriz/",
        files=(File("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733),),
        image=(3, 32, 32),
        classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augment=("crop4", "hflip"),
        read=_cifar100,
    ),
    DataSource(
        name="images",
        base="",
        files=(),
        image=None,
        classes=None,
        mean=(0.5,),
        std=(0.25,),
        augment=("crop4", "hflip"),
        read=None,
    ),
)
