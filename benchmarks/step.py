"""Measure a training step: the runtime's own training graph, the rewritten one, and PyTorch where it is installed.

Each model is measured as it is and as an untrained factorized candidate, on random normal inputs. Ways to step take
turns (A, B, C, A, B, C ...), so that what else the machine does meets all of them; the least time and the median are
given. A second table has the gradient of depthwise Convs alone. PyTorch steps the same network with the same
loss, clipping, AdamW and threads.

    python benchmarks/step.py MODEL.onnx ... [--ratio 10] [--turns 15] [--threads 2] [--json FILE] [--output FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper
from threadpoolctl import threadpool_limits

from onnxneutrino import finetune, metrics, prepare
from onnxneutrino.conductor import make_task, with_training
from onnxneutrino.config import load_config
from onnxneutrino.data import deciding
from onnxneutrino.finetune import Example, Trainer
from onnxneutrino.gradient_graph import faster_gradients
from onnxneutrino.graph import arrays, attribute_values, load
from onnxneutrino.losses import Loss, loss_inputs, rows, teacher_loss
from onnxneutrino.marking import mark
from onnxneutrino.runtime import Runner
from onnxneutrino.task import Network, Task, build, trainable_names
from onnxneutrino.teaching import Lessons, examples
from onnxneutrino.training_copy import training_copy
from onnxneutrino.workbench import Workbench

SAMPLES = 3
WARM_UPS = 3
RATE = 1e-5
PACKAGES = ("onnxneutrino", "onnxruntime-training-cpu", "onnx", "numpy", "torch")
# Channels, height and width, kernel, strides; batch 64.
DEPTHWISE = (
    (256, (4, 4), (3, 3), (1, 1)),
    (128, (8, 8), (3, 3), (1, 1)),
    (64, (8, 8), (3, 1), (1, 1)),
    (64, (16, 16), (3, 3), (1, 1)),
    (64, (16, 16), (1, 3), (1, 1)),
    (64, (16, 16), (3, 3), (2, 2)),
    (64, (32, 32), (3, 3), (1, 1)),
    (64, (32, 32), (3, 1), (1, 1)),
)
Way = Callable[[], object]


def in_turn(ways: Mapping[str, Way], turns: int) -> dict[str, dict[str, float]]:
    """Least and median wall time of each way in ms, measured in turn."""
    for way in ways.values():
        for _ in range(WARM_UPS):
            way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name].append(1000.0 * (time.perf_counter() - start))
    return {name: {"least_ms": min(times), "median_ms": median(times)} for name, times in found.items()}


def task_of(path: Path, threads: int, seed: int) -> Task:
    """The model ready for training on random inputs."""
    given = {"data": "random", "metric": "agreement", "validation": 0.0, "threads": threads, "seed": seed}
    config = load_config(None, given)
    opened = prepare.open_model(load(path).model, path.name, config)
    metric = metrics.resolve(config.metric, config.metric_base)
    dataset = prepare.open_dataset(opened, metric, config)
    marked = mark(opened, prepare.first_examples(dataset.test, SAMPLES), config)
    batch = prepare.evaluation_batch(opened) if marked.freed else 1
    judges = deciding(dataset, config.seed)
    task = make_task(marked, config, metric, dataset, judges, np.zeros((len(dataset.test), 1)), batch)
    return with_training(task, config, [])


def torch_step(copy: ModelProto, names: Sequence[str], loss: Loss, example: Example, threads: int) -> Way:
    """A step of PyTorch on the same network.

    Raises:
        NotImplementedError: an operator or a loss that is not converted.
    """
    import torch

    if loss.reconstructed or loss.fed or len(loss.outputs) != 1:
        raise NotImplementedError("one loss on one output only")
    torch.set_num_threads(threads)
    values = {name: torch.from_numpy(np.array(array)) for name, array in arrays(copy).items()}
    parameters = [values[name].requires_grad_() for name in names if name in values]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=1e-6, weight_decay=0.0)
    fed = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in example.inputs.items()}
    given = loss_inputs(loss, example.teacher, example.labels)
    targets = {name: torch.from_numpy(array) for name, array in given.items()}

    def value(y: Any) -> Any:
        if loss.kind == "values":
            return ((y - targets["onnxneutrino/target0"]) ** 2).mean()
        logits = y.reshape(rows(example.teacher[0]).shape)
        cooled = torch.log_softmax(logits / loss.temperature, -1)
        soft, hard = targets["onnxneutrino/soft"] * cooled, targets["onnxneutrino/hard"] * torch.log_softmax(logits, -1)
        return -(soft.sum() + hard.sum()) / len(logits)

    def step() -> float:
        optimizer.zero_grad()
        found = dict(values) | fed
        for node in copy.graph.node:
            found[node.output[0]] = torch_node(node, [found[name] if name else None for name in node.input])
        error = value(found[loss.outputs[0]])
        error.backward()
        torch.nn.utils.clip_grad_norm_(parameters, finetune.MAX_GRADIENT_NORM)
        optimizer.step()
        return float(error.detach()) - teacher_loss(loss, example.teacher, given)

    return step


def torch_node(node: NodeProto, inputs: list[Any]) -> Any:
    """The value of one node in PyTorch.

    Raises:
        NotImplementedError: an operator that stands in none of the networks measured so far.
    """
    import torch
    from torch.nn import functional

    known = attribute_values(node)
    pads = known.get("pads", [0, 0, 0, 0])
    around = [pads[1], pads[3], pads[0], pads[2]] if len(pads) == 4 else []
    match node.op_type:
        case "Conv":
            x, w, *bias = inputs
            even = pads[:2] == pads[2:]
            return functional.conv2d(
                x if even else functional.pad(x, around),
                w,
                bias[0] if bias else None,
                known.get("strides", 1),
                pads[:2] if even else 0,
                known.get("dilations", 1),
                known.get("group", 1),
            )
        case "MaxPool" if not any(pads):
            return functional.max_pool2d(inputs[0], known["kernel_shape"], known.get("strides", 1))
        case "AveragePool" if not any(pads):
            return functional.avg_pool2d(inputs[0], known["kernel_shape"], known.get("strides", 1))
        case "GlobalAveragePool":
            return inputs[0].mean((2, 3), keepdim=True)
        case "Relu":
            return torch.relu(inputs[0])
        case "Gemm":
            x, w, *bias = inputs
            x, w = (x.T if known.get("transA") else x), (w.T if known.get("transB") else w)
            made = known.get("alpha", 1.0) * (x @ w)
            return made + known.get("beta", 1.0) * bias[0] if bias else made
        case "MatMul":
            return inputs[0] @ inputs[1]
        case "Add":
            return inputs[0] + inputs[1]
        case "Mul":
            return inputs[0] * inputs[1]
        case "Flatten":
            return inputs[0].flatten(known.get("axis", 1))
        case "Reshape":
            sizes = [inputs[0].shape[i] if size == 0 else size for i, size in enumerate(inputs[1].tolist())]
            return inputs[0].reshape(sizes)
        case "Transpose":
            return inputs[0].permute(known["perm"])
        case "Identity":
            return inputs[0]
        case "Concat":
            return torch.cat(inputs, known["axis"])
        case "Gather":
            return inputs[0].index_select(known.get("axis", 0), inputs[1])
        case "Pad" if known.get("mode", b"constant") == b"constant":
            sizes = inputs[1].tolist()
            half = len(sizes) // 2
            return functional.pad(
                inputs[0], [size for i in reversed(range(half)) for size in (sizes[i], sizes[half + i])]
            )
        case "Slice":
            places = [slice(None)] * inputs[0].ndim
            starts, ends, axes = (entry.tolist() for entry in inputs[1:4])
            steps = inputs[4].tolist() if len(inputs) > 4 else [1] * len(axes)
            for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
                places[axis] = slice(*bounds)
            return inputs[0][tuple(places)]
    raise NotImplementedError(f"{node.op_type} has no counterpart here")


def measure(task: Task, network: Network, turns: int) -> dict[str, Any]:
    """Milliseconds of a step in each way, and of a forward run."""
    if task.training is None:
        return {"note": "nothing to train"}
    graph = build(task, network, batched=True)
    copy = training_copy(graph, task.batch, task.types)
    loss, names = task.training.loss, list(trainable_names(task, network, graph))
    teacher = Runner(task.batched, loss.tensors, threads=task.threads)
    example = next(examples(task.train, task.batch, task.seed, Lessons(teacher, None), False))
    result: dict[str, Any] = {"batch": task.batch}
    with ExitStack() as stack:
        with mock.patch.object(finetune, "faster_gradients", lambda model: model):
            stock = stack.enter_context(Trainer(copy, names, loss, task.threads, directions={}))
        rewritten = stack.enter_context(Trainer(copy, names, loss, task.threads, directions={}))
        forward = Runner(copy, threads=task.threads)
        ways: dict[str, Way] = {
            "stock": lambda: stock.step(example, RATE),
            "rewritten": lambda: rewritten.step(example, RATE),
            "forward": lambda: forward(example.inputs),
        }
        if importlib.util.find_spec("torch") is not None:
            try:
                ways["torch"] = torch_step(copy, names, loss, example, task.threads)
                result["losses"] = {name: ways[name]() for name in ("stock", "rewritten", "torch")}
            except (NotImplementedError, RuntimeError) as error:
                ways.pop("torch", None)
                result["note"] = f"PyTorch: {str(error).splitlines()[0]}"
        result.update(in_turn(ways, turns))
    return result


def depthwise(case: tuple[Any, ...], turns: int, threads: int, seed: int) -> dict[str, Any]:
    """Milliseconds of dX and dW of one depthwise Conv at batch 64."""
    channels, size, kernel, strides = case
    pads = [length // 2 for length in kernel]
    out = [(s + 2 * p - k) // t + 1 for s, k, p, t in zip(size, kernel, pads, strides, strict=True)]
    shapes = {"x": [64, channels, *size], "w": [channels, 1, *kernel], "dy": [64, channels, *out]}
    generator = np.random.default_rng(seed)
    values = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    settings = {"strides": strides, "pads": pads * 2, "group": channels, "kernel_shape": kernel}
    node = helper.make_node("ConvGrad", ["dy", "x", "w"], ["dx", "dw"], domain="com.microsoft", **settings)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("dx", "dw")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "depthwise", inputs, outputs), opset_imports=opsets, ir_version=8
    )
    stock, rewritten = (Runner(each, threads=threads) for each in (model, faster_gradients(model)))
    ways: dict[str, Way] = {"stock": lambda: stock(values), "rewritten": lambda: rewritten(values)}
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
        dy, x, w = (torch.from_numpy(values[name]) for name in ("dy", "x", "w"))
        ways["torch"] = lambda: torch.ops.aten.convolution_backward(
            dy, x, w, None, strides, pads, [1, 1], False, [0, 0], channels, [True, True, False]
        )
    name = f"{channels} of {size[0]}x{size[1]}, {kernel[0]}x{kernel[1]}, stride {strides[0]}x{strides[1]}"
    return {"case": name, **in_turn(ways, turns)}


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def tables(result: Mapping[str, Any]) -> str:
    """Both tables as Markdown: least ms / median ms."""
    lines = [
        "| model | network | forward | stock step | rewritten step | PyTorch step |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in result["steps"]:
        cells = _cells(row, ("forward", "stock", "rewritten", "torch"))
        lines.append(f"| {row['model']} | {row['network']} | {' | '.join(cells)} |")
    lines += ["", "| depthwise Conv, dX and dW | stock | rewritten | PyTorch |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['case']} | {' | '.join(_cells(row, ('stock', 'rewritten', 'torch')))} |" for row in result["depthwise"]
    ]
    notes = [f"{row['model']}, {row['network']}: {row['note']}" for row in result["steps"] if "note" in row]
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = f"{result['machine']}, {result['threads']} threads, seed {result['seed']}, {result['turns']} turns"
    return "\n".join([*lines, "", f"Least / median ms. {machine}; {packages}.", *notes, ""])


def _cells(row: Mapping[str, Any], ways: Sequence[str]) -> list[str]:
    return [f"{row[way]['least_ms']:.2f} / {row[way]['median_ms']:.2f}" if way in row else "" for way in ways]


def main() -> None:
    """Measure and print the tables; write them, and the JSON, where asked."""
    parser = argparse.ArgumentParser(description="Milliseconds of a training step in each way.")
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--ratio", type=float, default=10.0, help="how many times fewer parameters the candidate has")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--output", type=Path, help="the tables as Markdown")
    own = parser.parse_args()
    steps = []
    with threadpool_limits(limits=1, user_api="blas"):
        for path in own.models:
            task = task_of(path, own.threads, own.seed)
            bench = Workbench(task, 60.0, images=256)
            candidate = bench.propose(None, bench.full_cost / own.ratio, "candidate").network
            for name, network in (("original", Network()), (f"params / {own.ratio:g}", candidate)):
                steps.append({"model": path.stem, "network": name, **measure(task, network, own.turns)})
        result = {
            "machine": f"{platform.system()} {platform.machine()}",
            "threads": own.threads,
            "seed": own.seed,
            "turns": own.turns,
            "versions": versions(),
            "steps": steps,
            "depthwise": [depthwise(case, own.turns, own.threads, own.seed) for case in DEPTHWISE],
        }
    print(tables(result))
    if own.output is not None:
        own.output.write_text(tables(result), encoding="utf-8")
    if own.json is not None:
        own.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
