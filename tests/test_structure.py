"""The shape of the code: imports go downwards, passes stand alone, the packaging equals the tree."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PASSES = ROOT / "onnxneutrino", ROOT / "passes"
BELOW = {"passes": PASSES, "zoo": PACKAGE / "zoo"}  # packages below the package
LONGEST = 400

# Every module of the package, lowest first. A module may import only modules of earlier lines; `passes.*` is
# any single pass, `passes` the tuples in passes/__init__.py, `` the package's own __init__.py.
TIERS = (
    ("interrupts",),
    ("errors", "heap", "json_values", "events", "html_style", "html_elements"),
    ("quantities", "prefetch", "schedules", "data_function"),
    ("config_checks",),
    ("plan", "config", "walk", "clock", "ladder", "recovery"),
    ("memory",),
    ("differentiable", "conv_geometry"),
    ("weights", "sharing"),
    ("factors", "shapes", "report"),
    ("opset_down", "soundness"),
    ("storage", "spool"),
    ("graph", "moments", "formats"),
    ("affine", "channels", "rewrite", "resampling", "cost", "factor_fit", "data_values", "runtime"),
    ("factor_shared", "reductions", "factor_channel", "data_checks", "verdict", "blocked_layout", "phases"),
    ("factor_spatial", "factor_tucker", "factor_cp", "factor_interpolative"),
    ("data_images", "data_loader", "gradient_graph"),
    ("detection", "own_metric"),
    ("metrics",),
    ("console",),
    ("progress", "plots"),
    ("plots_search", "plots_layers", "plots_curves", "plots_agreement"),
    ("html_result", "html_search", "html_layers", "html_agreement", "html_run"),
    ("html_report",),
    ("forms", "allocate", "losses", "data_npz", "data_folder"),
    ("candidates", "anneal", "budgets", "data", "bench", "external"),
    ("spend", "hooks", "directions"),
    ("coordinates",),
    ("passes.*",),
    ("passes",),
    ("chain_graph",),
    ("chain_latency",),
    ("calibrate", "channel_removal", "layer_options", "refit", "search", "finetune", "normalize"),
    ("blocks", "proposals", "target_search", "range_test"),
    ("segments",),
    ("training_copy", "prepare", "agreement", "probe", "teaching", "gradcheck", "own_loss"),
    ("selfcheck", "curvature"),
    ("large", "groups"),
    ("training_plan",),
    ("task",),
    ("narrowing",),
    ("records",),
    ("journal",),
    ("kept_training",),
    ("weightings", "looks"),
    ("tuning",),
    ("sensitivity", "figures"),
    ("workbench",),
    ("summary",),
    ("marking",),
    ("choice", "run_directory"),
    ("conductor", "replay"),
    ("delivery",),
    ("inspection",),
    ("",),
    ("zoo",),
    ("zoo.builder", "zoo.download", "zoo.archives"),
    ("zoo.plain", "zoo.resnet", "zoo.mobile", "zoo.concatenating", "zoo.datasets"),
    ("zoo.families",),
    ("zoo.recipes",),
    ("zoo.fetch",),
    ("zoo.train",),
    ("cli_options", "cli_output"),
    ("cli_zoo",),
    ("cli",),
    ("__main__",),
)
RANK = {module: rank for rank, tier in enumerate(TIERS) for module in tier}
KNOWS_RUNTIME = {"runtime", "finetune"}
BINARIES = (".onnx", ".npz", ".npy", ".png", ".jpg", ".data")


def modules() -> dict[str, Path]:
    """Files of the package by module name below `onnxneutrino.`."""
    found = {"" if path.stem == "__init__" else path.stem: path for path in PACKAGE.glob("*.py")}
    for name, folder in BELOW.items():
        for path in folder.glob("*.py"):
            found[name if path.stem == "__init__" else f"{name}.{path.stem}"] = path
    return found


MODULES = modules()


def rank(module: str) -> int | None:
    return RANK.get("passes.*" if module.startswith("passes.") else module)


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, at any depth, those under TYPE_CHECKING too."""
    folder = next((f"onnxneutrino.{name}" for name, own in BELOW.items() if path.parent == own), "onnxneutrino")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = folder.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            start = ".".join(filter(None, (base, node.module)))
            yield from (f"{start}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their names below `onnxneutrino.`."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "onnxneutrino":
            below = [".".join(parts[1:end]) for end in range(len(parts), 0, -1)]
            module = next(module for module in below if module in MODULES)
            # A name of the package itself, or a module that is not there.
            found.add(parts[1] if not module and len(parts) > 2 else module)
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downwards(module: str) -> None:
    own = rank(module)
    assert own is not None, f"{MODULES[module].name} is in no line of TIERS; give it one in tests/test_structure.py"
    for imported in own_imports(MODULES[module]) - {module}:
        other = rank(imported)
        assert other is not None, f"{imported} is in no line of TIERS"
        assert other < own, f"{module or '__init__'} imports {imported or '__init__'}, which does not lie below it"


def test_nothing_is_listed_twice() -> None:
    listed = [module for tier in TIERS for module in tier]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_onnxruntime_is_known_to_two_modules_only(module: str) -> None:
    uses = any(name.split(".")[0] == "onnxruntime" for name in imports(MODULES[module]))
    assert not uses or module in KNOWS_RUNTIME, f"{module} imports onnxruntime; only {KNOWS_RUNTIME} may"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("passes.")))
def test_a_pass_imports_no_other_pass(module: str) -> None:
    others = {name for name in own_imports(MODULES[module]) if name.startswith("passes")}
    assert not others


def test_only_main_imports_the_command_line() -> None:
    assert {module for module, path in MODULES.items() if "cli" in own_imports(path)} <= {"__main__"}


def test_every_pass_stands_in_the_tuples_of_its_package() -> None:
    tree = ast.parse((PASSES / "__init__.py").read_text(encoding="utf-8"))
    # What the assignments of the package mention, by name or as text; an import alone lists nothing.
    named = set()
    for statement in tree.body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    named.add(node.id)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    named.add(node.value)
    passes = {path.stem for path in PASSES.glob("*.py")} - {"__init__"}
    assert passes <= named, f"not listed in passes/__init__.py: {', '.join(sorted(passes - named))}"


def test_packages_in_pyproject_equal_the_tree() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent for path in PACKAGE.rglob("__init__.py")}
    tree = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    tree |= {".".join(("onnxneutrino", *path.parent.relative_to(ROOT).parts)) for path in PASSES.rglob("__init__.py")}
    assert set(settings["packages"]) == tree
    assert settings["package-dir"] == {"onnxneutrino.passes": "passes"}


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for top in (PACKAGE, PASSES) for path in top.rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_is_too_long(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{MODULES[module].name} has {lines} lines; one idea per file, {LONGEST} at most"


def test_every_fixture_names_its_source() -> None:
    folder = ROOT / "fixtures"
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (".py", ".md")]
    binaries = [path for path in folder.rglob("*") if path.suffix in BINARIES]
    unnamed = [path.name for path in binaries if not any(path.name in text for text in texts)]
    assert not unnamed, f"no script or README in fixtures/ says where these come from: {', '.join(unnamed)}"
