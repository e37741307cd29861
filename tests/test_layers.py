"""Who may import whom: a module imports only from the rows below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import anyrank

ROWS = [
    "cli",
    "flower",
    "own_data",
    "display",
    "api report",
    "answers",
    "results probe hub trackers",
    "job card",
    "record baselines compute problems",
    "engine",
    "transport topology",
    "client",
    "fused prefix",
    "train methods memory spool messages",
    "hf allocate local wire config",
    "device clock pretrained data problem footprint",
    "federation",
    "lowrank",
    "adapter seeding paths plain",
    "errors",
]
LEVEL = {module: level for level, row in enumerate(reversed(ROWS)) for module in row.split()}
SOURCE = Path(anyrank.__file__).parent
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def module_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """First parts of everything imported, in functions too; `anyrank.x` counts as `x`, others as `package:`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "anyrank":
            names = [f"anyrank.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            first, _, rest = name.partition(".")
            found.add(rest.partition(".")[0] if first == "anyrank" else f"{first}:")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_below(path):
    module = module_of(path)
    for other in imports(path):
        if other in LEVEL and other != module:
            assert LEVEL[other] < LEVEL[module], f"{module} imports {other}"


def test_every_module_has_its_row():
    assert {module_of(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize(("package", "allowed"), [("peft:", {"hf"}), ("transformers:", {"hf", "job", "data"})])
def test_the_boundary_to_other_libraries_is_narrow(package, allowed):
    assert {module_of(path) for path in FILES if package in imports(path)} <= allowed


def test_method_names_occur_in_no_other_code():
    names = set(anyrank.METHODS) - {"local_only", "anyrank", "legend"}  # of a baseline, the package, an HTML element
    for path in FILES:
        if module_of(path) not in ("methods", "baselines"):
            strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not names & {s for s in strings if isinstance(s, str)}, path


def test_signatures_that_state_shapes_are_checked_while_tests_run(pytestconfig):
    """In the modules named in pyproject.toml; in all of them tests would take twice as long."""
    stating = {path for path in FILES if "jaxtyping:" in imports(path)}
    names = [".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in stating]
    assert pytestconfig.getoption("--jaxtyping-packages").split(",") == [*sorted(names), "beartype.beartype"]


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, anyrank; print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_public_names_are_there_and_no_others():
    assert sorted(anyrank.__all__) == list(anyrank.__all__) or len(set(anyrank.__all__)) == len(anyrank.__all__)
    for name in anyrank.__all__:
        assert getattr(anyrank, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        anyrank.nonsense  # noqa: B018
