"""From raw arrays to the model's input: augment, scale, normalize, lay out, reshape.

`(raw · scale - mean) / std` is one multiply-add, `raw · (scale / std) + (-mean / std)`, done last:
cropping, flipping and transposing move the raw values, which are single bytes for images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from onnxneutrino.config import DataConfig
from onnxneutrino.data_checks import check_dtype, fitted_shape, shape_text
from onnxneutrino.data_values import Inputs, InputSpec
from onnxneutrino.errors import DataError

CROP_PADDING = 4


@dataclass(frozen=True, eq=False)
class Preprocess:
    """What becomes of raw examples `(N, H, W[, C])`, or of `(N, ...)` that are no images.

    Attributes:
        name: the model's input.
        shape: one example as the input takes it.
        dtype: element type of the input.
        image: `(H, W, C)` of a raw example, or None where it is no image.
        channels_first: the input is NCHW.
        gain: factor that broadcasts over a laid-out example, `(C, 1, 1)` for NCHW, `(W·C,)` for NHWC (an
            inner axis of three elements would be slow), `(D,)` or `(1,)` for what is no image; None for no
            arithmetic (integer inputs).
        offset: as `gain`.
        augment: `crop4`, `hflip`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    image: tuple[int, int, int] | None
    channels_first: bool
    gain: NDArray[Any] | None
    offset: NDArray[Any] | None
    augment: tuple[str, ...]

    def __call__(self, raw: NDArray[Any], generator: np.random.Generator | None) -> Inputs:
        """Return the model's input for raw examples; augmented where a generator is given."""
        if self.image is not None:
            height, width, channels = self.image
            raw = raw.reshape(len(raw), *self.image)
            if generator is not None and self.augment:
                raw = augmented(raw, self.augment, generator)
            if self.channels_first:
                raw = np.ascontiguousarray(raw.transpose(0, 3, 1, 2))
            else:
                raw = raw.reshape(len(raw), height, width * channels)
        values = raw
        if self.gain is not None and self.offset is not None:
            values = np.multiply(raw, self.gain, dtype=self.gain.dtype)
            values += self.offset
        return {self.name: values.reshape(len(raw), *self.shape).astype(self.dtype, copy=False)}


def preprocess(
    config: DataConfig, spec: InputSpec, shape: tuple[int, ...], dtype: np.dtype[Any], where: str
) -> Preprocess:
    """Plan the preprocessing of examples of `shape` and `dtype` for the input `spec`.

    Args:
        config: scale, mean, std, layout and augmentation.
        spec: the model's input.
        shape: one raw example: `(H, W)`, `(H, W, C)`, or anything else for what is no image.
        dtype: type of the raw values.
        where: file and array, for messages.

    Raises:
        DataError: shape or type do not fit the input, mean or std do not fit the channels, scaling for an
            integer input, augmentation of what is no image.
    """
    check_dtype(dtype, spec, where)
    image = (shape[0], shape[1], shape[2] if len(shape) == 3 else 1) if len(shape) in (2, 3) else None
    if image is None and config.augment:
        raise DataError(
            f"{where}: augment needs arrays of shape NxHxW[xC], got examples of {shape_text(shape)}; remove augment"
        )
    channels = image[2] if image else (shape[0] if len(shape) == 1 else 1)
    for key, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (0, 1, channels):
            raise DataError(f"{where}: {key} has {len(values)} values for {channels} channels; give 1 or {channels}")
    gain, offset = _multiply_add(config, spec, image, where)
    return Preprocess(
        name=spec.name,
        shape=_target_shape(config.layout, spec, shape, image, where),
        dtype=spec.dtype,
        image=image,
        channels_first=config.layout == "NCHW",
        gain=gain,
        offset=offset,
        augment=config.augment,
    )


def augmented(images: NDArray[Any], names: tuple[str, ...], generator: np.random.Generator) -> NDArray[Any]:
    """Crop and flip raw images `(N, H, W, C)` at random; borders are raw zeros (black).

    `crop4`: 4 pixels of border on each side, then a window of the old size anywhere in it (He et al. 2016,
    section 4.2). `hflip`: mirrored left to right with probability one half.
    """
    count, height, width, channels = images.shape
    if "crop4" in names:
        border = 2 * CROP_PADDING
        padded = np.zeros((count, height + border, width + border, channels), images.dtype)
        padded[:, CROP_PADDING:-CROP_PADDING, CROP_PADDING:-CROP_PADDING] = images
        top, left = generator.integers(0, border + 1, (2, count))
        # Windows of whole rows are contiguous in memory, which makes the copy several times faster.
        rows = padded.reshape(count, height + border, -1)
        windows = sliding_window_view(rows, (height, width * channels), axis=(1, 2))
        images = windows[np.arange(count), top, left * channels].reshape(count, height, width, channels)
    if "hflip" in names:
        mirrored = generator.random(count) < 0.5
        images = images.copy()
        images[mirrored] = images[mirrored][:, :, ::-1]
    return images


def _multiply_add(
    config: DataConfig, spec: InputSpec, image: tuple[int, int, int] | None, where: str
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    if spec.dtype.kind != "f":
        if config.scale != 1.0 or any(config.mean) or any(value != 1.0 for value in config.std):
            raise DataError(
                f"{where}: the input '{spec.name}' takes {spec.dtype}, raw values; remove scale, mean and std"
            )
        return None, None
    precision = np.float64 if spec.dtype == np.float64 else np.float32
    mean, std = np.broadcast_arrays(np.array(config.mean or (0.0,)), np.array(config.std or (1.0,)))
    with np.errstate(over="ignore"):
        gain, offset = (config.scale / std).astype(precision), (-mean / std).astype(precision)
    if not (np.isfinite(gain).all() and np.isfinite(offset).all()):
        raise DataError(f"{where}: scale, mean and std give values beyond {np.dtype(precision)}; check them")
    if image is None:
        return gain, offset
    _, width, channels = image
    gain, offset = np.broadcast_to(gain, (channels,)), np.broadcast_to(offset, (channels,))
    if config.layout == "NCHW":
        return gain[:, None, None], offset[:, None, None]
    return np.tile(gain, width), np.tile(offset, width)


def _target_shape(
    layout: str,
    spec: InputSpec,
    shape: tuple[int, ...],
    image: tuple[int, int, int] | None,
    where: str,
) -> tuple[int, ...]:
    if image is None:
        laid_out = other = shape
    else:
        height, width, channels = image
        laid_out, other = (height, width, channels), (channels, height, width)
        if layout == "NCHW":
            laid_out, other = other, laid_out
    fitted = fitted_shape(laid_out, spec.example)
    if fitted is not None:
        return fitted
    hint = "resize or reshape the arrays"
    if image is not None and image[0] in (1, 3, 4) and image[2] > 4 and fitted_shape(image, spec.example):
        hint = "the arrays seem to be NxCxHxW, store them as NxHxWxC"
    elif image is not None and fitted_shape(other, spec.example):
        hint = f'layout = "{"NHWC" if layout == "NCHW" else "NCHW"}" would fit'
    laid = f", {shape_text(laid_out)} as {layout}" if image is not None else ""
    raise DataError(
        f"{where}: examples of shape {shape_text(shape)}{laid}, do not fit the input '{spec.name}' of shape "
        f"{shape_text(spec.example)}; {hint}"
    )
