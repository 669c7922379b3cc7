"""The documentation cannot drift: its commands exist, its examples run, its links lead somewhere.

A comment on a line of its own, before a code block of `docs/*.md`, says what the block is:

    <!-- run -->            run it: Python in a process of its own; of a console block every line that is a command
    <!-- run: exit 3 -->    the same, and every command must end with this exit code
    <!-- file: NAME -->     write the block to the file NAME, for the blocks after it
    <!-- needs: NAME -->    compile it only, because NAME is not among the dependencies of the tests

Blocks of one page run in their order, in one folder that holds the digits of `fixtures/` and what the tutorial made.
In a console block with lines that begin with `$ `, those are the commands and all others what they print, which is
compared without its numbers; in one without, every line is a command. A `compress` and a
`zoo train` get a short time limit.
Every Python block must say what it is. A console block that does not is not run, but its commands must parse.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from onnxneutrino.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
GENERATED = "reference.md"  # from the code; a test of its own holds it to that
CONSOLE = ("", "console", "sh", "bash")
TIME_LIMIT = "8s"
COMMAND = re.compile(rf"(?:^|\s)onnxneutrino ((?:{'|'.join(main.commands)})\b(?!.*\[OPTIONS\]).*)")
SHELL = {"&&", "||", "|", ";", ">", "2>"}
UNITS = {"k", "M", "B", "kB", "MB", "ms", "s", "min", "±", "to"}


@dataclass(frozen=True)
class Block:
    """One code block: `mark` is what its comment says, `language` empty for an indented one."""

    page: str
    line: int
    mark: str
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command with the lines that it prints."""
        lines = [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]
        if not any(line.startswith("$ ") for line in lines):
            return [(line, []) for line in lines]
        found: list[tuple[str, list[str]]] = []
        for line in lines:
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
        return found


def blocks(path: Path) -> Iterator[Block]:
    """All code blocks of a page, fenced and indented."""
    lines = path.read_text(encoding="utf-8").splitlines()
    mark, at = "", 0
    while at < len(lines):
        line, start = lines[at], at + 1
        comment = re.fullmatch(r"<!-- (run|run: exit \d|file: \S+|needs: .+) -->", line)
        at += 1
        if comment:
            mark = comment[1]
        elif line.startswith("```"):
            end = lines.index("```", at)
            yield Block(path.name, start, mark, line[3:], "\n".join(lines[at:end]) + "\n")
            mark, at = "", end + 1
        elif line.startswith("    ") and not lines[at - 2].strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield Block(path.name, start, mark, "", "\n".join(own[4:] for own in lines[start - 1 : at]) + "\n")
            mark = ""
        elif line.strip():
            assert not mark, f"{path.name}:{start}: the comment '{mark}' stands before no code block"


BLOCKS = [block for page in PAGES for block in blocks(page)]
MARKED = [block for block in BLOCKS if block.language == "python" and block.page != GENERATED]
RUNNING = sorted({block.page for block in BLOCKS if block.mark.startswith("run")} - {"tutorial.md"})


def arguments(text: str) -> list[str]:
    """The words of a command behind `onnxneutrino`, up to what belongs to the shell."""
    words = shlex.split(text, comments=True)
    return words[: next((at for at, word in enumerate(words) if word in SHELL), len(words))]


def resolved(words: list[str]) -> tuple[str, click.Command, list[str]]:
    """The command, below groups too, with its name and what is given to it."""
    command: click.Command = main
    at = 0
    while isinstance(command, click.Group) and at < len(words) and words[at] in command.commands:
        command, at = command.commands[words[at]], at + 1
    return " ".join(words[:at]), command, words[at:]


def command_names(group: click.Group, before: str = "") -> Iterator[str]:
    """All commands, those of groups by both their words."""
    for name, own in group.commands.items():
        yield from command_names(own, f"{name} ") if isinstance(own, click.Group) else [before + name]


def shown_commands() -> list[tuple[str, str]]:
    """Every command in a console block, and those of the Dockerfile and the workflow; with where it stands."""
    found = [
        (block.name, match[1])
        for block in BLOCKS
        if block.language in CONSOLE
        for line in block.text.replace("\\\n", " ").splitlines()
        if (match := COMMAND.search(line))
    ]
    for path in (ROOT / "Dockerfile", DOCS / "examples" / "compare.yml"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, value in re.findall(r'^  ([A-Z]+): "?([^"#\n]*?)"?(?: #.*)?$', text, re.MULTILINE):
            text = text.replace(f"${name}", value)
        found += [(path.name, match[1]) for line in text.splitlines() if (match := COMMAND.search(line))]
    return found


@pytest.mark.parametrize(("place", "text"), shown_commands())
def test_a_command_that_is_shown_parses(place: str, text: str) -> None:
    name, command, rest = resolved(arguments(text))
    try:
        # Below the group's own context: a command keeps the help option that it is first asked for.
        root = click.Context(main, info_name="onnxneutrino", **main.context_settings)
        command.make_context(name, rest, parent=root)
    except click.UsageError as error:
        pytest.fail(f"{place}: {text}: {error.format_message()}")


def test_the_commands_are_found() -> None:
    places = [place for place, _ in shown_commands()]
    assert {place.split(":")[0] for place in places} >= {"README.md", "tutorial.md", "Dockerfile", "compare.yml"}
    assert set(command_names(main)) == {resolved(arguments(text))[0] for _, text in shown_commands()}


def test_every_python_block_says_what_it_is() -> None:
    assert {block.page for block in MARKED} >= {"tutorial.md", "howto-loaders.md", "howto-pytorch.md"}
    assert not [block.name for block in MARKED if not block.mark]


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.name)
def test_a_python_block_compiles(block: Block) -> None:
    compile(block.text, block.name, "exec")


def without_numbers(line: str) -> list[str]:
    """The words of a line that are the same in every run."""
    words = re.sub(r"[():,;]|\.(?=\s|$)", " ", line).split()
    return [word for word in words if not re.search(r"\d", word) and word not in UNITS]


def run_command(text: str, printed: list[str], code: int, place: str) -> None:
    """Run one line of a console block in the working directory."""
    words = shlex.split(text, comments=True)
    if words[0] != "onnxneutrino":
        assert subprocess.run(words, check=False).returncode == code, place
        return
    options = words[1:]
    if (options[0] == "compress" and "--replay" not in options) or options[:2] == ["zoo", "train"]:
        options += ["--time-limit", TIME_LIMIT]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == code, f"{place}: {text}\n{result.output}"
    got = [without_numbers(line) for line in result.output.splitlines()]
    for line in printed:
        assert without_numbers(line) in got, f"{place}: {text} did not print '{line.strip()}' but\n{result.output}"


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what the page says is run."""
    monkeypatch.chdir(folder)
    # A command that a page hands over finds the Python that runs the tests.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for block in BLOCKS:
        if block.page != page:
            continue
        if block.mark.startswith("file: "):
            (folder / block.mark[len("file: ") :]).write_text(block.text, encoding="utf-8")
        elif block.mark == "run" and block.language == "python":
            script = [sys.executable, "-W", "error", "-c", block.text]
            ran = subprocess.run(script, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, f"{block.name}\n{ran.stderr}"
        elif block.mark.startswith("run"):
            for text, printed in block.commands():
                run_command(text, printed, int(block.mark[len("run: exit ") :] or 0), block.name)


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits, where the tutorial was followed."""
    folder = tmp_path_factory.mktemp("tutorial")
    for path in (ROOT / "fixtures").glob("digits.*"):
        shutil.copy(path, folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_page("tutorial.md", folder, monkeypatch)
    return folder


def test_the_tutorial_runs(tutorial: Path) -> None:
    assert (tutorial / "out.report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (tutorial / "again.onnx").read_bytes() == (tutorial / "out.onnx").read_bytes()
    assert (tutorial / "out.onnx").stat().st_size < (tutorial / "digits.onnx").stat().st_size


@pytest.mark.parametrize("page", RUNNING)
def test_a_page_runs(page: str, tutorial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    shutil.copytree(tutorial, folder)
    run_page(page, folder, monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    own = [link for link in links if not link.startswith(("http://", "https://"))]
    assert not [link for link in own if not (path.parent / link).exists()]


def test_the_index_has_every_page() -> None:
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in DOCS.glob("*.md") if f"]({path.name})" not in text and path.name != "README.md"]
    assert not missing


def test_the_dockerfile_copies_what_there_is_and_is_not_root() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"pyproject.toml", "onnxneutrino", "passes"} <= set(sources)
    assert all((ROOT / name).exists() for name in sources)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] not in ("root", "0")
