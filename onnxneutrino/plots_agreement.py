"""Original against compressed network on classes: where they say the same, and where they do not."""

from __future__ import annotations

from onnxneutrino.formats import format_exact
from onnxneutrino.plots import COLOURS, FONT, Figure, cells, draw
from onnxneutrino.report import Agreement

MOST_CLASSES, COUNTED_CLASSES = 32, 12
DIAGONAL, FAINTEST, STRONGEST = 0.28, 0.12, 0.5  # opacities; text is still read on the strongest


def confusion_map(agreement: Agreement, key: str) -> str:
    """Draw how often one class became another, the diagonal pale; empty beyond 32 classes or without pairs."""
    classes = agreement.classes or 0
    pairs = [own for own in agreement.confusions if max(own.original, own.compressed) < classes and own.count > 0]
    if not 1 < classes <= MOST_CLASSES or not pairs:
        return ""
    most = max((own.count for own in pairs if own.original != own.compressed), default=1)
    numbered = classes <= COUNTED_CLASSES
    side = 420 if classes <= COUNTED_CLASSES else 480

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        squares = []
        for own in pairs:
            same = own.original == own.compressed
            strength = FAINTEST + (STRONGEST - FAINTEST) * own.count / most
            squares.append((own.compressed, own.original, *(("kept", DIAGONAL) if same else ("vermillion", strength))))
            if numbered:
                colour = COLOURS["muted" if same else "ink"]
                middle = own.compressed, own.original
                axes.text(*middle, format_exact(own.count), ha="center", va="center", color=colour, fontsize=FONT - 2)
        cells(axes, squares)
        every = 1 if classes <= 16 else 2
        axes.set_xticks(range(0, classes, every))
        axes.set_yticks(range(0, classes, every))
        axes.tick_params(labelsize=FONT - 1.5)
        axes.set_xlim(-0.5, classes - 0.5)
        axes.set_ylim(classes - 0.5, -0.5)
        axes.set_xticks([edge - 0.5 for edge in range(1, classes)], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(1, classes)], minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(True, which="minor", linewidth=0.6)
        axes.set_aspect("equal")
        for spine in axes.spines.values():
            spine.set_visible(True)
        axes.set_xlabel("class of the compressed network")
        axes.set_ylabel("class of the original")

    return draw(side, side, paint, "Classes of the original against those of the compressed network", key)
