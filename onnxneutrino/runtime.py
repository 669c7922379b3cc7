"""ONNX Runtime inference: outputs, tensor types seen while running, latency.

The only module, with `finetune`, that knows ONNX Runtime.
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from onnxneutrino import clock, weights
from onnxneutrino.errors import ModelError
from onnxneutrino.graph import RUNTIME_IR, TensorType, capped_ir, data_bytes, element_dtype, expose, opset
from onnxneutrino.opset_down import RUNTIME_OPSET, brought_down
from onnxneutrino.walk import all_nodes, graphs, reads, subgraphs

FATAL_ONLY = 4  # every other error is raised as an exception as well
WARM_UPS = 3
LEAST_TURNS = 5
MOST_TURNS = 200
LOOP_SECONDS = 5


class Runner:
    """An inference session: `runner(inputs) -> outputs`, in the order of `names`."""

    def __init__(
        self, model: ModelProto | Path, outputs: Sequence[str] | None = None, threads: int = 0, spinning: bool = False
    ) -> None:
        """Build the session.

        Args:
            model: a model, or the path of one (external data is then found beside it).
            outputs: tensors to return, internal ones too; None for the graph's outputs.
            threads: threads within an operator; 0 leaves it to the runtime.
            spinning: idle threads wait in a loop, as a stock session's do: for measuring latency.

        Raises:
            ModelError: the runtime cannot load the model.
        """
        options = session_options(threads, spinning)
        # A stock session keeps the memory of its largest run; here many stand at once.
        options.enable_cpu_mem_arena = spinning
        given = _read(model) if isinstance(model, Path) else model
        faulty = [] if given is None else _faulty_optimizers(given)
        with tempfile.TemporaryDirectory(prefix="onnxneutrino-") as folder:
            if given is not None and data_bytes(given) >= weights.LARGE_MODEL_BYTES:
                weights.let_go()  # of what other sessions have read
                # Weights packed for the processor are a second copy of them.
                options.add_session_config_entry("session.disable_prepacking", "1")
                if not isinstance(model, Path):
                    model = weights.spilled(model, Path(folder))
            made = _file(model, given, outputs) if isinstance(model, Path) else _made(model, outputs)
            self._mapped = [] if isinstance(made, str) else _shared(made, options)  # the session borrows it
            source = made if isinstance(made, str) else _serialized(made, Path(folder))
            try:
                self._session = ort.InferenceSession(
                    source, options, providers=["CPUExecutionProvider"], disabled_optimizers=faulty
                )
            except Exception as error:
                text = first_line(error)
                raise ModelError(f"ONNX Runtime {ort.__version__} cannot load the model: {text}") from error
        self.names = [output.name for output in self._session.get_outputs()]
        self.inputs = [entry.name for entry in self._session.get_inputs()]

    def __call__(
        self, inputs: Mapping[str, NDArray[np.generic]], options: ort.RunOptions | None = None
    ) -> list[NDArray[np.generic]]:
        """Run once; `options` can end the run from outside.

        Raises:
            ModelError: the runtime refuses the inputs or fails in a node.
        """
        try:
            return list(self._session.run(self.names, {name: inputs[name] for name in self.inputs}, options))
        except KeyError as error:
            raise ModelError(f"no value for the model's input {error}") from error
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}") from error


def session_options(threads: int, spinning: bool = False) -> ort.SessionOptions:
    """Options of a session, for inference or training.

    Idle threads sleep unless `spinning`: teacher, student and NumPy take turns on the same cores, and one that
    spins takes time from another that works (a training step with its teacher, cifar10_vgg at 12.5 times fewer
    params, two cores: 150 ms against 230 to 270).
    """
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return options


def _read(path: Path) -> ModelProto | None:
    """The graph of a file, its external data left where it is; None for no model at all: the runtime says that."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception:
        return None


def _faulty_optimizers(model: ModelProto) -> list[str]:
    """Optimizers of the runtime (1.19.2) that would abort the process or make a graph that it then refuses.

    ConvActivationFusion asks which explicit input of its reader a Conv feeds, and goes past their end where the
    reader is an If or Loop whose body reads the Conv's output. SkipLayerNormFusion joins an Add and a
    LayerNormalization over several axes to a node that takes one axis only. GemmTransposeFusion transposes whatever
    the Transpose behind a Gemm says, and Pad_Fusion gives a pool pads as large as its window, which it refuses.
    """
    faulty = set()
    for graph in graphs(model.graph):
        convs = {name for node in graph.node if node.op_type == "Conv" for name in node.output}
        if any(any(subgraphs(node)) and not convs.isdisjoint(reads(node)) for node in graph.node):
            faulty.add("ConvActivationFusion")
        if any(node.op_type == "LayerNormalization" and _axis(node) != -1 for node in graph.node):
            faulty.add("SkipLayerNormFusion")
        made = {name: node.op_type for node in graph.node for name in node.output}
        for node in graph.node:
            before = {made.get(name) for name in node.input}
            if node.op_type == "Transpose" and "Gemm" in before:
                faulty.add("GemmTransposeFusion")
            if node.op_type in ("AveragePool", "MaxPool") and "Pad" in before:
                faulty.add("Pad_Fusion")
    return sorted(faulty)


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)


def _shared(model: ModelProto, options: ort.SessionOptions) -> list[ort.OrtValue]:
    """Let the session read the light tensors from the one map of their file, in place of a map for each session.

    The optimizer of the runtime still reads the file where it computes with a tensor.
    """
    values = []
    for tensor in weights.light_tensors(model):
        array = weights.array(tensor)
        if array.flags.aligned:
            values.append(ort.OrtValue.ortvalue_from_numpy(array))
            options.add_initializer(tensor.name, values[-1])
    return values


def _serialized(model: ModelProto, folder: Path) -> bytes | str:
    """The model in memory, or the path of one that refers to files: the optimizer asks for the model's path then."""
    data = bytes(model.SerializeToString())
    if not any(weights.light_tensors(model)):
        return data
    path = folder / "model.onnx"
    path.write_bytes(data)
    return os.fspath(path)


def _made(model: ModelProto, outputs: Sequence[str] | None) -> ModelProto:
    """The model as the runtime can load it: of an opset and IR version that it knows, with these outputs."""
    wanted = model if outputs is None else expose(model, outputs)
    return capped_ir(brought_down(wanted))


def _file(path: Path, model: ModelProto | None, outputs: Sequence[str] | None) -> str | ModelProto:
    """The path itself, which lets the runtime read external data in place; for what it cannot load, the model."""
    if model is None:
        return os.fspath(path)
    if outputs is None and model.ir_version <= RUNTIME_IR and (opset(model) or 0) <= RUNTIME_OPSET:
        return os.fspath(path)
    weights.attach(model, path.parent)
    return _made(model, outputs)


def first_line(error: BaseException) -> str:
    """The first line of an error, without ONNX Runtime's source positions."""
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line.split(" : ", 3)[-1] if line.startswith("[ONNXRuntimeError]") else line


def runtime_conflict() -> str | None:
    """One line when a second package that installs the module `onnxruntime` is there, else None."""
    rivals = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-training", "onnxruntime-openvino", "onnxruntime-directml")
    found = [name for name in rivals if _installed(name)]
    if not found:
        return None
    return (
        f"{', '.join(found)} is installed beside onnxruntime-training-cpu and overwrites its files; "
        f"run: pip uninstall -y {' '.join(found)} onnxruntime-training-cpu && "
        "pip install onnxruntime-training-cpu==1.19.2"
    )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def zero_inputs(model: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.generic]]:
    """Zeros of the model's input types in these shapes."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    return {name: np.zeros(shape, element_dtype(types[name])) for name, shape in shapes.items()}


def random_inputs(
    model: ModelProto, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> dict[str, NDArray[np.generic]]:
    """Standard normal values for float inputs of these shapes, zeros and ones for the others."""
    generator = np.random.default_rng(seed)
    return {
        name: (
            generator.standard_normal(array.shape).astype(array.dtype)
            if array.dtype.kind == "f"
            else generator.integers(0, 2, array.shape).astype(array.dtype)
        )
        for name, array in zero_inputs(model, shapes).items()
    }


def observed_types(
    model: ModelProto, known: Mapping[str, TensorType], input_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorType]:
    """Types of all tensors of the main graph: `known` ones, the others seen by running once on zeros."""
    made = [name for node in model.graph.node for name in node.output if name and name not in known]
    types = dict(known)
    if made:
        runner = Runner(model, made)
        for name, array in zip(made, runner(zero_inputs(model, input_shapes)), strict=True):
            if isinstance(array, np.ndarray):
                types[name] = TensorType(tuple(array.shape), array.dtype)
    return types


def check_ends(model: ModelProto, input_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Run a model with a Loop once on zeros, for some seconds at most: nothing else tells whether it ends.

    Raises:
        ModelError: it does not end.
    """
    loops = [node.name for node in all_nodes(model.graph) if node.op_type == "Loop"]
    if not loops:
        return
    runner, options = Runner(model), ort.RunOptions()
    watch = threading.Timer(LOOP_SECONDS, setattr, (options, "terminate", True))
    watch.start()
    try:
        runner(zero_inputs(model, input_shapes), options)
    except ModelError as error:
        if not options.terminate:
            raise
        raise ModelError(
            f"a Loop ({', '.join(loops)}) does not end within {LOOP_SECONDS} s on zeros; bound its trip count"
        ) from error
    finally:
        watch.cancel()


def latencies(
    runners: Sequence[Runner], inputs: Sequence[Mapping[str, NDArray[np.generic]]], seconds: float = 2.0
) -> tuple[list[float], int]:
    """Median wall time of one run in ms for each runner, measured in turn (A, B, A, B ...), and the repeats.

    Every runner warms up three times; then turns are taken for about `seconds`, at least 5 and at most 200.
    """
    for runner, own in zip(runners, inputs, strict=True):
        for _ in range(WARM_UPS):
            runner(own)
    times: list[list[float]] = [[] for _ in runners]
    end = time.perf_counter() + seconds
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.perf_counter() > end:
            break
        for series, runner, own in zip(times, runners, inputs, strict=True):
            start = time.perf_counter()
            runner(own)
            series.append((time.perf_counter() - start) * 1000.0)
    return [clock.noted(median(series)) for series in times], len(times[0])
