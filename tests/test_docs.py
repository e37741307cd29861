"""The documentation says what the code does: tables, keys, commands, files and links.

`python tests/test_docs.py` prints the tables that are made from the code, to be put into the pages.
"""

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import click
import pytest
import typer
from datasets import Dataset
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import anyrank
from anyrank import config, trackers
from anyrank.cli import app
from anyrank.config import Baseline, Recipe, Tracker
from anyrank.device import PROFILES
from anyrank.job import CHOICES, load_recipe
from anyrank.local import LOCALS
from anyrank.methods import METHODS, describe, overview
from anyrank.problems import PROBLEMS
from anyrank.problems.chat import FORMS, TEMPLATES, conversation, format_of
from anyrank.problems.classification import REGRESSION
from anyrank.problems.images import IMAGES
from anyrank.problems.language import LANGUAGE
from anyrank.problems.words import WORDS
from test_layers import ROWS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCE = Path(anyrank.__file__).parent
LISTED = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
FILES = [ROOT / name for name in subprocess.check_output(LISTED, cwd=ROOT, text=True).splitlines()]
PAGES = sorted(path for path in FILES if path.suffix == ".md" and path.exists())
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
PROBLEM_PAGE = DOCS / "problems/README.md"


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def marked(page: Path, marker: str) -> str:
    """What stands between `<!-- marker -->` and `<!-- /marker -->`."""
    return read(page).split(f"<!-- {marker} -->\n")[1].split(f"<!-- /{marker} -->")[0]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def under(page: Path, heading: str) -> str:
    """What stands under a heading of the second level."""
    return read(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row that begins with code; `\\|` is no border."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def table(*lines: list[str]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body]) + "\n"


# Tables that are made from the code


def methods_table() -> str:
    head, *body = overview()
    return table(head, *([f"[`{name}`]({name}.md)", *rest] for name, *rest in body))


def devices_table() -> str:
    head = ["profile", "forward, GFLOP/s", "backward, GFLOP/s", "memory, GB", "up, MB/s", "down, MB/s"]
    body = []
    for name, profile in PROFILES.items():
        sizes = [profile.forward_flops / 1e9, profile.backward_flops / 1e9, profile.memory_bytes / 1e9]
        speeds = [profile.up_bps / 1e6, profile.down_bps / 1e6]
        body.append([f"`{name}`", *(f"{size:.0f}" for size in sizes), *(f"{speed:g}" for speed in speeds)])
    return table(head, *body)


def test_the_claims_table_is_made_from_the_claims():
    assert marked(DOCS / "methods/README.md", "methods") == methods_table()


def test_the_device_table_is_made_from_the_profiles():
    assert marked(DOCS / "recipes.md", "devices") == devices_table()


def test_the_layers_are_those_that_are_tested():
    assert fenced(marked(DOCS / "design.md", "layers"), "") == ["\n".join(ROWS) + "\n"]


# Methods


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_with_its_hyperparameters(name):
    page = read(DOCS / f"methods/{name}.md")
    assert page.startswith(f"# {name}\n")
    found = {row[0].strip("`"): row[1].strip("`") for row in rows(page)}
    arguments = describe(name)["arguments"]
    assert found == {f"method.{argument}": json.dumps(default) for argument, default in arguments.items()}
    for heading in ("Equations", "Hyperparameters", "Readings and deviations", "Cost and bytes", "Traps", "Run it"):
        assert f"\n## {heading}\n" in page
    assert f"method.name={name}" in page or load_recipe().method["name"] == name


@pytest.mark.parametrize("name", LOCALS)
def test_every_way_of_training_has_a_page_with_its_hyperparameters_and_a_recipe(name):
    page = read(DOCS / f"local/{name}.md")
    assert page.startswith(f"# {name}\n")
    found = {row[0].strip("`"): row[1].strip("`") for row in rows(page)}
    parameters = inspect.signature(LOCALS[name]).parameters.values()
    assert found == {
        f"local.{each.name}": "required" if each.default is each.empty else json.dumps(each.default)
        for each in parameters
    }
    assert f"[`{name}`]({name}.md)" in read(DOCS / "local/README.md")
    if name not in ("lora", "mole"):  # the default; and one that needs adapters from runs before it
        assert load_recipe(ROOT / f"recipes/local/{name}.toml").local["name"] == name


def test_every_page_is_of_a_method():
    assert {page.stem for page in (DOCS / "methods").glob("*.md")} == {*METHODS, "README"}


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_lists_every_method(name):
    assert f"| [`{name}`](docs/methods/{name}.md) |" in read(ROOT / "README.md")


# Recipes


def written(default: Any) -> str:
    return "`none`" if default is None else f"`{json.dumps(default)}`"


def keys(fields: dict[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the recipe with its default, tables walked; `NAME` is a key that the user chooses."""
    for name, field in fields.items():
        inside = get_args(field.annotation)[1] if get_origin(field.annotation) is dict else None
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation.model_fields, f"{prefix}{name}.")
        elif isinstance(inside, type) and issubclass(inside, BaseModel):
            yield from keys(inside.model_fields, f"{prefix}{name}.NAME.")
        elif dataclasses.is_dataclass(inside):
            yield from ((f"{prefix}{name}.NAME.{own.name}", "required") for own in dataclasses.fields(inside))
        else:
            yield prefix + name, "required" if field.is_required() else written(field.default)


def arguments(chosen: str, name: str) -> Iterator[tuple[str, str, str]]:
    """Every argument that a function of a table of choice accepts: name, key, default."""
    for field, info in config._schema(chosen, CHOICES[chosen][name]).model_fields.items():
        if field != "name":
            yield (
                f"`{name}`",
                f"`{chosen}.{field}`",
                "required" if info.is_required() else written(info.default),
            )


def test_every_recipe_key_is_documented_with_its_default():
    found = [row for row in rows(read(DOCS / "recipes.md")) if len(row) == 4]
    assert {row[0].strip("`"): row[2] for row in found} == dict(keys(Recipe.model_fields))


def test_every_argument_of_a_choice_is_documented_with_its_default():
    found = [row for row in rows(read(DOCS / "recipes.md")) if len(row) == 5 and row[1]]
    here = ("topology", "partition", "ranks")  # problems, methods and ways of training have pages of their own
    wanted = [each for table in here for name in CHOICES[table] for each in arguments(table, name)]
    assert sorted((row[0], row[1], row[3]) for row in found) == sorted(wanted)


def test_every_choice_and_baseline_is_documented():
    page = read(DOCS / "recipes.md")
    chosen = [name for table in ("problem", "topology", "partition", "ranks") for name in CHOICES[table]]
    for name in [*get_args(Baseline), *chosen]:
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem in METHODS], ids=named)
def test_a_recipe_of_a_method_loads_and_names_its_method_and_paper(path):
    method = load_recipe(path).method["name"]
    assert method == path.stem
    paper = describe(method)["paper"]
    number = re.search(r"\d{4}\.\d{5}", paper)
    assert (number[0] if number else paper.rpartition(", ")[2]) in read(path).partition("\n\n")[0]


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_loads_and_is_listed(path):
    """Those of a method beside them, those of a problem on its page."""
    assert load_recipe(path).problem["name"] in PROBLEMS
    of_a_method = path.stem in METHODS
    assert (f"({path.name})" if of_a_method else f"/recipes/{path.name})") in read(
        ROOT / "recipes/README.md" if of_a_method else PROBLEM_PAGE
    )


def test_every_method_has_a_recipe():
    assert {path.stem for path in RECIPES} >= set(METHODS) - {"local_only"}


# Problems


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_a_section_with_its_arguments_and_is_listed(name):
    text = under(PROBLEM_PAGE, name)
    page = re.search(r"\]\((\w+\.md)\)", text) if "a page of its" in text.replace("\n", " ") else None
    found = rows(read(DOCS / "problems" / page[1]) if page else text)
    keyed = [(f"`{name}`", row[0], row[2]) for row in found if row[0].startswith("`problem.")]
    assert sorted(keyed) == sorted(arguments("problem", name))
    assert f"| [`{name}`](#{name}) |" in read(PROBLEM_PAGE)


def test_every_page_is_of_a_problem():
    linked = re.findall(r"\]\((\w+\.md)\)", read(PROBLEM_PAGE))
    assert {page.name for page in (DOCS / "problems").glob("*.md")} == {*linked, "README.md"}


@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - {"image_classification"}))
def test_the_recipe_of_a_problem_is_one(name):
    """And it is short."""
    (text,) = fenced(under(PROBLEM_PAGE, name), "toml")
    assert config.resolve(tomllib.loads(text), {}, CHOICES).problem["name"] == name
    assert len(text.splitlines()) <= 10


def test_the_forms_of_conversations_are_those_that_are_read():
    (lines,) = fenced(under(PROBLEM_PAGE, "instruction"), "json")
    for line in lines.splitlines():
        row = json.loads(line)
        form = FORMS[format_of(Dataset.from_list([row]), {}, where="here")]
        talk = conversation(row, form, {}, where="here")
        assert talk is not None, line
        assert talk.messages[-1]["role"] == "assistant"
    named_forms = {row[0].strip("`") for row in rows(under(PROBLEM_PAGE, "instruction"))}
    columns = {name for form in FORMS.values() for name in form.columns({})}
    assert columns <= set(re.findall(r"`(\w+)`", under(PROBLEM_PAGE, "instruction")))
    assert named_forms >= set(TEMPLATES)


def test_the_metrics_of_the_problems_are_listed_with_the_first_in_front():
    listed = {row[0]: re.findall(r"`(\w+)`", row[3]) for row in rows_of_links(PROBLEM_PAGE)}
    objectives = {
        "regression": REGRESSION,
        "token_classification": WORDS,
        "image_classification": IMAGES,
        "language": LANGUAGE,
        "instruction": LANGUAGE,
    }
    for name, objective in objectives.items():
        assert listed[name][: len(objective.metrics)] == [metric.name for metric in objective.metrics]
    written = "".join(read(path) for path in [*(SOURCE / "problems").glob("*.py"), SOURCE / "problem.py"])
    assert set(re.findall(r'Metric\(\s*"(\w+)"', written)) <= {name for names in listed.values() for name in names}


def rows_of_links(page: Path) -> list[list[str]]:
    """The cells of every table row that begins with a link on code, whose text stands for it."""
    lines = [line for line in read(page).splitlines() if line.startswith("| [`")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [[re.sub(r"\[`(\w+)`\].*", r"\1", first), *rest] for first, *rest in cells]


# The README


def test_the_recipe_in_the_readme_is_one():
    (text,) = fenced(read(ROOT / "README.md"), "toml")
    assert config.resolve(tomllib.loads(text), {}, CHOICES).method == {"name": "rbla"}


def test_the_python_in_the_readme_uses_public_names():
    (text,) = fenced(read(ROOT / "README.md"), "python")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "anyrank"}
    assert used
    assert used <= set(anyrank.__all__)


def test_the_file_tree_names_every_module_and_no_other():
    (tree,) = fenced(read(ROOT / "README.md").partition("\n## Files\n")[2], "")
    listed = [path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]
    modules = [path for path in listed if path.parent.name not in ("methods", "local")]  # pages of their own list these
    packages = [path.parent for path in SOURCE.rglob("*/__init__.py")]
    wanted = {path.name for path in modules} | {f"{path.name}/" for path in packages}
    assert {name for name in wanted if not re.search(rf"(?<![\w/]){re.escape(name)}", tree)} == set()
    there = {path.name for path in SOURCE.rglob("*")}
    assert set(re.findall(r"\b\w+\.(?:py|toml|html)\b", tree)) <= there


# Commands

COMMANDS = typer.main.get_command(app)
assert isinstance(COMMANDS, click.Group)


def parameters(command: click.Command) -> list[click.Parameter]:
    """Of a command, or of all commands of a group."""
    return [param for each in getattr(command, "commands", {"": command}).values() for param in each.params]


def options(command: click.Command) -> set[str]:
    own = [
        param
        for param in (command.params if command is COMMANDS else parameters(command))
        if isinstance(param, click.Option)
    ]
    return {text for param in own for text in (*param.opts, *param.secondary_opts)}


def section(command: str) -> str:
    return under(DOCS / "commands.md", f"`anyrank {command}`")


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_every_command_option_and_argument_is_documented(name):
    command, text = COMMANDS.commands[name], section(name)
    assert set(re.findall(r"(?<![\w-])--?[a-z]+(?:-[a-z]+)*", text)) - {"--help"} == options(command) - {"--help"}
    for param in parameters(command):
        if isinstance(param, click.Argument):
            assert f"`{(param.metavar or param.name or '').strip('[]').upper()}`" in text
    assert f"`anyrank {name} " in read(ROOT / "README.md")


def test_the_options_of_all_commands_and_the_exit_codes_are_documented():
    page = read(DOCS / "commands.md")
    for option in options(COMMANDS):
        assert f"`{option}`" in page
    assert set(re.findall(r"^## `anyrank (\w+)`$", page, flags=re.MULTILINE)) == set(COMMANDS.commands)
    assert re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE) == ["0", "1", "2", "130"]


# The run folder


def test_every_field_of_a_round_and_of_run_json_is_documented():
    page = read(DOCS / "run-folder.md")
    fields = set(re.findall(r"`(\w+)`", "\n".join(row[0] for row in rows(page))))
    assert fields >= literal_keys("engine.py", "_play") | literal_keys("engine.py", "account") | literal_keys(
        "engine.py", "_evaluate"
    )
    assert fields >= literal_keys("api.py", "description")


def test_every_field_of_what_lies_beside_an_adapter_is_documented():
    text = read(DOCS / "run-folder.md").partition("\n### `anyrank.json`\n")[2].partition("\n##")[0]
    assert set(re.findall(r"`(\w+)`", "\n".join(row[0] for row in rows(text)))) == literal_keys("results.py", "_save")


def literal_keys(file: str, function: str) -> set[str]:
    """The keys of the outermost dictionary written in a function."""
    nodes = [node for node in ast.walk(ast.parse(read(SOURCE / file))) if isinstance(node, ast.FunctionDef)]
    (body,) = [node for node in nodes if node.name == function]
    first = next(node for node in ast.walk(body) if isinstance(node, ast.Dict) and len(node.keys) > 3)
    return {key.value for key in first.keys if isinstance(key, ast.Constant)}


# Extras and trackers


def test_every_extra_is_named():
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    pages = "".join(read(page) for page in PAGES if "log" not in page.name)
    for name in extras:
        assert f"anyrank[{name}]" in pages or f"`{name}`" in read(ROOT / "README.md"), name


def test_every_tracker_has_an_extra_and_is_documented():
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    for name in get_args(Tracker):
        assert f"| `{name}` | `anyrank[{name}]` |" in read(DOCS / "trackers.md")
        assert f"`{name}`" in read(DOCS / "recipes.md")
        assert {requirement(each) for each in extras[name]} >= {alias(each) for each in trackers._NEEDED[name]}


def requirement(text: str) -> str:
    return re.split(r"[<>=]", text)[0]


def alias(module: str) -> str:
    """What the package is called that a module is imported from."""
    return {"mlflow": "mlflow-skinny"}.get(module, module)


# Links, and what must not stand in public files


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


# Spelt so that the patterns do not find themselves.
FORBIDDEN = [r"(?<![\w.])/(?:work|root|tmp)/", r"py[p]i\.org", r"python[h]osted", r"npm[j]s\.", r"deb[i]an\.org"]


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_machine_and_no_registry_is_named(pattern):
    found = []
    for path in FILES:
        if path.is_file():
            text = path.read_bytes().decode(encoding="utf-8", errors="replace")
            found += [f"{named(path)}: {line}" for line in text.splitlines() if re.search(pattern, line)]
    assert found == []


if __name__ == "__main__":
    print(methods_table(), devices_table(), sep="\n")
