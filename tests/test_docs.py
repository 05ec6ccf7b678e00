"""The pages and the examples: Python blocks run, scripts run, links resolve, commands and options exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from tests.models import build, ids
from tsld_fx.cli import analyze, commands, evaluate, export  # noqa: F401  (registers them)
from tsld_fx.cli.main import app
from tsld_fx.comparison import read_runs
from tsld_fx.settings import RunSettings

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NEEDS_GPU = {"cuda.md"}  # checked by tests/gpu
EXAMPLES = {
    "train_and_convert.py": ["--steps", "1"],
    "use_our_passes.py": [],
    "read_checkpoint.py": [],
    "evaluation_data.py": [],
    "tvm_program.py": [],
    "export_onnx.py": [],
}
CLI = typer.main.get_command(app)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match.group(1)) for match in found]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every `tsld-fx ...` line in a shell block: where it stands, and its arguments."""
    for page in PAGES:
        for line, text in blocks(page, "(?:bash|sh|console)"):
            for offset, one in enumerate(text.replace("\\\n", " ").splitlines(), line + 1):
                words = shlex.split(one.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words and words[0].rpartition("/")[2] == "tsld-fx":
                    yield f"{name_of(page)}:{offset}", words[1:]


def options(command: str) -> set[str]:
    """The long and short options of a command, --help included."""
    found = CLI.commands[command] if command else CLI
    return {name for p in found.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python") and p.name not in NEEDS_GPU], ids=name_of)
def test_python_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    if page.name == "README.md":
        the_readers_own(module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, str(page), "exec"), module.__dict__)
    for name, value in list(vars(module).items()):
        if name.startswith("test_"):
            value()


def the_readers_own(module: types.ModuleType) -> None:
    """What README's code stands on: a model in path/to/model, a data set and a prompt."""
    build("llama").save_pretrained("path/to/model")
    vars(module).update(blocks=[{"input_ids": ids(1)[0], "labels": ids(1)[0]}] * 8, input_ids=ids(1, 4))


@pytest.mark.parametrize("script", EXAMPLES)
def test_example_runs(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), *EXAMPLES[script]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not list(tmp_path.iterdir())


def test_every_example_is_tested() -> None:
    assert {script.name for script in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), f"{name_of(page)}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{name_of(page)}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_command_line_is_valid() -> None:
    lines = list(command_lines())
    assert len(lines) > 15
    for where, words in lines:
        words = [word for word in words if word not in ("--verbose", "--traceback")]
        assert words and words[0] in CLI.commands, f"{where}: no command {words[:1]}"
        try:
            CLI.commands[words[0]].make_context(words[0], words[1:])
        except Exception as error:
            pytest.fail(f"{where}: tsld-fx {shlex.join(words)}: {error}")


def test_every_option_on_the_command_line_page_exists() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    described = set()
    for section in sections:
        title, _, body = section.partition("\n")
        command = title.removeprefix("tsld-fx ") if title.startswith("tsld-fx ") else ""
        known = options(command) | options("")
        for line in body.splitlines():
            if "torchrun" in line:
                continue
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line):
                allowed = known if command else known.union(*(options(c) for c in CLI.commands))
                assert option in allowed, f"docs/command-line.md, {title}: {option}"
        if command:
            described.add(command)
    assert described == set(CLI.commands)


def test_yaml_blocks_are_valid_settings() -> None:
    found = [yaml.safe_load(text) for _, text in blocks(ROOT / "docs" / "command-line.md", "yaml")]
    for settings in found:
        if "runs" in settings:
            assert len(read_runs(settings)) > 1
        else:
            assert RunSettings.from_dict(settings).model == "demo"
    assert len(found) == 2
