"""Every recipe: its command lines are those of the real `kalm`, its scripts and files are sound."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet

from jobs.cli import app

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "jobs" / "recipes"
BIN = Path(sys.executable).parent
SCRIPTS = sorted(RECIPES.glob("*.sh"))
CONTAINERFILE = (RECIPES / "Containerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What stands in a recipe for the arguments its user gives.
GIVEN = "corpus.jsonl --to passages.lance --model kalm-demo"
COMMAND = re.compile(
    r"(?:^| )(?:kalm (?P<kalm>[a-z]\S* .+)|recipes/[a-z-]+\.sh (?P<script>.+)"
    r"|kalm-preencode (?P<image>[a-z]+ .+))"
)


def joined_lines(text):
    """Return lines without comment marks, those that end in a backslash joined with the next."""
    lines = [re.sub(r"^# ?", "", line).rstrip() for line in text.splitlines()]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def command_lines():
    """Yield the name of a recipe and what follows `kalm` in it."""
    for file in sorted(RECIPES.iterdir()):
        text = file.read_text()
        if file.suffix == ".yaml":
            _, job = yaml.safe_load_all(text)
            text = job["spec"]["entrypoint"]
        for line in joined_lines(text):
            if found := COMMAND.search(line):
                arguments = found["kalm"] or found["image"] or f"encode {found['script']}"
                arguments = arguments.replace('"$@"', GIVEN).rstrip("&; ")
                yield file.name, re.split(r"[`;&]", arguments)[0].strip()


COMMANDS = list(command_lines())


def parse(arguments):
    """Parse what follows `kalm` as the command would, and run nothing."""
    name, *rest = shlex.split(arguments.replace("$workers", "8"))
    group = typer.main.get_command(app)
    group.commands[name].make_context(name, rest)


@pytest.mark.parametrize(("recipe", "arguments"), COMMANDS)
def test_a_command_line_is_one_that_kalm_takes(recipe, arguments):
    parse(arguments)


def test_every_recipe_has_one():
    with_one = {recipe for recipe, _ in COMMANDS}
    assert {file.name for file in RECIPES.iterdir() if file.suffix != ".md"} - with_one == set()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("encode a --to t --model m --worker 8", "No such option"),
        ("encode a --to t --model m --workers all", "valid integer"),
        ("encode a --to t", "Missing"),
    ],
)
def test_a_command_line_that_rots_is_found(arguments, problem):
    with pytest.raises(Exception, match=problem):
        parse(arguments)


def test_the_table_names_every_recipe():
    table = (RECIPES / "README.md").read_text()
    for file in RECIPES.iterdir():
        assert f"]({file.name})" in table or file.name == "README.md", file.name


def test_the_scripts_are_sound():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)
    subprocess.run([BIN / "shellcheck", *SCRIPTS], check=True)


def test_the_container_file_is_sound():
    subprocess.run([BIN / "hadolint", RECIPES / "Containerfile"], check=True)
    python = re.search(r"^ARG PYTHON=(\S+)", CONTAINERFILE, re.M)[1]
    assert python in SpecifierSet(PROJECT["project"]["requires-python"])
    extras = re.search(r"\.\[(.+?)\]", CONTAINERFILE)[1].split(",")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.M)


def test_the_container_gets_all_that_is_installed():
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", CONTAINERFILE, re.M)
        for source in line.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    included = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name.removesuffix("*") for name in included}
    licences = set(PROJECT["project"]["license-files"])
    needed = {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *licences}
    assert copied == packages | needed
