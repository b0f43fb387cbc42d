"""README and CONTRIBUTING: their commands, their code, their links."""

import ast
import importlib
import inspect
import re
import shlex
import shutil
import subprocess

import pytest
from click.testing import CliRunner
from source_tree import ROOT

from fastcm.cli import cli
from fastcm.config import shipped_configs

DOCUMENTS = [name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(*languages: str) -> list[str]:
    return [body for text in TEXTS.values() for language, body in FENCE.findall(text) if language in languages]


def shell_lines() -> list[list[str]]:
    """The words of each command, with continued lines joined and comments left out."""
    lines = [line for body in blocks("bash", "sh") for line in body.replace("\\\n", " ").splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


FASTCM_COMMANDS = [" ".join(words[1:]) for words in shell_lines() if words[0] == "fastcm"]


def test_readme_shows_the_first_commands():
    commands = [" ".join(words) for words in shell_lines()]
    assert {"make demo", "make test"} <= set(commands)
    assert FASTCM_COMMANDS


@pytest.mark.parametrize("command", FASTCM_COMMANDS)
def test_fastcm_command_is_accepted(command):
    verb, *arguments = shlex.split(command)
    if verb == "train":
        done = CliRunner().invoke(cli, ["train", *arguments, "--dry-run"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    else:
        group = cli.make_context("fastcm", [verb, *arguments])
        cli.commands[verb].make_context(verb, arguments, parent=group)  # parses and checks, runs nothing


def test_other_commands_are_known_programs():
    known = {"fastcm", "make", "git", "cd", "pip", "python", "python3", ".venv/bin/python", ".venv/bin/pip", ".venv/bin/ruff"}
    assert {words[0] for words in shell_lines() if "=" not in words[0]} <= known


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_targets_exist():
    named = {target for text in TEXTS.values() for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)}
    for target in named | {"demo", "test"}:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "fastcm train digits" in done.stdout or target != "demo"


def missing_names(code: str) -> list[str]:
    """Names of fastcm that a piece of code uses and that do not exist, and keywords that its functions do not take."""
    missing = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fastcm":
            missing += [alias.name for alias in node.names if not exists(f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("fastcm."):
            missing += [] if exists(name) else [name]
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)).startswith("fastcm.") and exists(name):
            known = inspect.signature(find(name)).parameters
            missing += [f"{name}({keyword.arg}=)" for keyword in node.keywords if keyword.arg not in known]
    return missing


def find(name: str) -> object:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (AttributeError, ModuleNotFoundError):
        return importlib.import_module(name)


def exists(name: str) -> bool:
    try:
        find(name)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("code", blocks("python"))
def test_python_example_uses_what_exists(code):
    assert missing_names(code) == []


def test_a_wrong_name_in_an_example_is_noticed():
    assert missing_names("import fastcm\nfastcm.lod('x')") == ["fastcm.lod"]
    assert missing_names("import fastcm\nfastcm.sample(m, nmu=3)") == ["fastcm.sample(nmu=)"]
    assert missing_names("from fastcm.sampling import sample_hein") == ["sample_hein"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_exist(name):
    targets = [target.partition("#")[0] for target in LINK.findall(TEXTS[name]) if "://" not in target]
    assert [target for target in targets if target and not (ROOT / target).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_and_modules_that_are_named_exist(name):
    places = re.findall(r"`((?:fastcm|kernels|configs|tests|benchmarks|\.ci)/[\w./-]*)`", TEXTS[name])
    assert [place for place in places if not (ROOT / place).exists()] == []
    modules = re.findall(r"`(fastcm(?:\.\w+)+)`", TEXTS[name])
    assert [module for module in modules if not exists(module)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_placeholder_is_left(name):
    assert re.findall(r"^\W*[A-Z]+(?:_[A-Z]+)+\W*$|\b(?:TODO|TBD|FIXME|XXX)\b", TEXTS[name], re.MULTILINE) == []


def test_readme_names_every_configuration():
    assert [name for name in shipped_configs() if f"`{name}`" not in TEXTS["README.md"]] == []


def test_contributing_fits_on_a_screen():
    assert len(TEXTS["CONTRIBUTING.md"].splitlines()) <= 45
