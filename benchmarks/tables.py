"""Put the tables that are made from the result files into README.md, between the marks of each benchmark.

python benchmarks/tables.py
"""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import measure

__all__ = ["current"]

README = Path(__file__).with_name("README.md")


def current(page: str) -> str:
    """The page with every table as the result files have it now."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", lambda mark: mark[1] + _made(mark[2]) + mark[3], page, flags=re.DOTALL
    )


def _made(name: str) -> str:
    """What was measured by one benchmark, on a CPU and on a GPU."""
    files = [measure.RESULTS / f"{name}{suffix}.json" for suffix in ("", "-cuda")]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return "\n".join(f"{_origin(each)}\n\n{import_module(name).table(each['results'])}" for each in found)


def _origin(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    on = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB, {machine['gpu'] or 'no GPU'}"
    used = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"Measured on {result['date']} at commit `{(result['commit'] or 'unknown')[:9]}`: {on}; {used}."


if __name__ == "__main__":
    README.write_text(current(README.read_text(encoding="utf-8")), encoding="utf-8")
