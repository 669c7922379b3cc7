"""Where a network is cut for training, and what each part of it learns.

Behind an operator that has no right gradient, the network is given the original's tensors; before it, the network
learns them (squared error, no labels). So each block between two cuts is trained by gradients within it alone, and
what cannot be differentiated only runs. Cuts between layers turn the whole of a network into such blocks (block
reconstruction: Li et al. 2021, "BRECQ", without its quantization).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from onnx import ModelProto

from onnxneutrino.differentiable import carries_gradient, differentiated, has_gradient
from onnxneutrino.walk import consumers, reads


@dataclass(frozen=True)
class Cut:
    """Tensors at which a network is cut.

    Attributes:
        fed: readers of these are given the original's values.
        learned: learned from the original's by squared error.
        faults: operators at which gradients end, by the tensor that they read.
        ends: outputs that a gradient still reaches.
    """

    fed: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Layers that are trained together.

    Attributes:
        layers: names of the layers.
        learns: the tensors whose error reaches them.
        reconstructed: they learn the original's tensors within the graph; otherwise the loss at the outputs.
        ended_by: operators without gradient right behind `learns`.
    """

    layers: tuple[str, ...]
    learns: tuple[str, ...]
    reconstructed: bool
    ended_by: tuple[str, ...] = ()


def cut_at_faults(
    model: ModelProto, trainable: Sequence[str], outputs: Sequence[str], faulty: Collection[str] = ()
) -> Cut:
    """The fewest cuts that leave only operators with right gradients between trainable initializers and a loss.

    Args:
        model: training copy.
        trainable: names of its initializers that are trained.
        outputs: tensors that the loss reads.
        faulty: operators that count as having no gradient whatever is known of them.
    """
    reached = _reached(model, trainable)
    fed: dict[str, None] = {}
    before: dict[str, str] = {}
    for node in differentiated(model, trainable, outputs):
        if node.op_type in faulty or not has_gradient(node):
            fed.update(dict.fromkeys(name for name in node.output if name))
            before.update({name: node.op_type for name in reads(node) if name in reached})
    reached = _reached(model, trainable, fed)
    stored = {tensor.name for tensor in model.graph.initializer}
    learned = [name for name in before if name in reached and name not in stored and name not in fed]
    ends = [name for name in outputs if name in reached and name not in fed]
    read = _needed(model, [*ends, *learned], fed)
    return Cut(tuple(name for name in fed if name in read), tuple(learned), before, tuple(ends))


def cut_between_layers(
    model: ModelProto, cut: Cut, trainable: Sequence[str], outputs: Sequence[str], inputs: Iterable[str]
) -> Cut:
    """Cut also at those of `inputs` (the tensors that layers read) through which everything passes.

    Args:
        model: training copy.
        cut: the cuts that have to be.
        trainable: names of its initializers that are trained.
        outputs: tensors that the loss reads.
        inputs: candidates, in the order of the graph.
    """
    narrow = bottlenecks(model, outputs)
    fed, learned = dict.fromkeys(cut.fed), dict.fromkeys(cut.learned)
    for name in inputs:
        if name in narrow and name not in fed and name in _reached(model, trainable, fed):
            fed[name] = None
            learned[name] = None
    return Cut(tuple(fed), tuple(learned), cut.faults, cut.ends)


def bottlenecks(model: ModelProto, outputs: Sequence[str]) -> set[str]:
    """Tensors through which every way from an input to `outputs` passes.

    Nodes stand in an order in which they can run. After one of them, if a single tensor is still waited for, every
    way leads through it. What is read for its shape alone is no way.
    """
    needed = _needed(model, outputs)
    stored = {tensor.name for tensor in model.graph.initializer}
    left = {
        name: sum(user is None or (carries_gradient(user) and not needed.isdisjoint(user.output)) for user in users)
        for name, users in consumers(model.graph).items()
    }
    for name in outputs:
        left[name] = left.get(name, 0) + 1
    alive = {value.name for value in model.graph.input if value.name not in stored}
    waiting = {name: left.get(name, 0) for name in alive if left.get(name, 0)}
    found: set[str] = set()
    for node in model.graph.node:
        read = [name for name in reads(node) if name in alive]
        if needed.isdisjoint(node.output) or not carries_gradient(node) or not read:
            continue
        for name in read:
            waiting[name] = waiting.get(name, 0) - 1
            if waiting[name] <= 0:
                waiting.pop(name)
        for name in node.output:
            if name:
                alive.add(name)
                if left.get(name, 0):
                    waiting[name] = left[name]
        if len(waiting) == 1:
            found.update(waiting)
    return found


def blocks(
    model: ModelProto,
    cut: Cut,
    layers: Mapping[str, Sequence[str]],
) -> list[Block]:
    """What each layer learns, layers that learn the same together, in the order of the graph.

    Args:
        model: training copy.
        cut: where it is cut.
        layers: names of the initializers of each layer.
    """
    targets = [*cut.learned, *cut.ends]
    upstream = {target: _needed(model, [target], cut.fed) for target in targets}
    grouped: dict[tuple[str, ...], list[str]] = {}
    for layer, names in layers.items():
        learns = tuple(target for target in targets if not upstream[target].isdisjoint(names))
        grouped.setdefault(learns, []).append(layer)
    return [
        Block(
            tuple(members),
            learns,
            not set(learns) & set(cut.ends),
            tuple(sorted({cut.faults[name] for name in learns if name in cut.faults})),
        )
        for learns, members in grouped.items()
        if learns
    ]


def _reached(model: ModelProto, trainable: Iterable[str], fed: Collection[str] = ()) -> set[str]:
    """Tensors that depend on trainable initializers in a way that has derivatives."""
    reached = set(trainable)
    for node in model.graph.node:
        if carries_gradient(node) and not reached.isdisjoint(reads(node)):
            reached.update(name for name in node.output if name and name not in fed)
    return reached


def _needed(model: ModelProto, outputs: Iterable[str], fed: Collection[str] = ()) -> set[str]:
    """Tensors that `outputs` depend on; those of `fed` are given, so that nothing is needed for them."""
    seeds = set(outputs)
    needed = set(seeds)
    for node in reversed(model.graph.node):
        if any(name in needed and (name not in fed or name in seeds) for name in node.output):
            needed.update(reads(node))
    return needed
