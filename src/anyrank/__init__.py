"""anyrank: federated LoRA fine-tuning in which every client trains at the rank its device can afford.

    from pathlib import Path

    import anyrank

    recipe = anyrank.load_recipe(overrides={"method.name": "rbla", "rounds": 6})
    folder = anyrank.run(recipe, Path("runs/rbla"))
    print(folder.records()[-1]["score"])

Importing this package loads nothing heavy; the names below are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anyrank.errors import AnyrankError, ConfigError, RecordError, RoundFailed, ShapeError, UpdateRejected

if TYPE_CHECKING:
    from anyrank.adapter import Adapter, LowRank
    from anyrank.answers import generate, merge, score
    from anyrank.api import Observer, check, load_recipe, resume, run
    from anyrank.federation import Claims, Device, Local, Method, Plan, Profile, Spec, State, Task, Update
    from anyrank.methods import METHODS
    from anyrank.problem import Answers, Metric, Objective, Problem
    from anyrank.record import RunFolder
    from anyrank.report import render as render_report
    from anyrank.results import export

__all__ = [
    "METHODS",
    "Adapter",
    "Answers",
    "AnyrankError",
    "Claims",
    "ConfigError",
    "Device",
    "Local",
    "LowRank",
    "Method",
    "Metric",
    "Objective",
    "Observer",
    "Plan",
    "Problem",
    "Profile",
    "RecordError",
    "RoundFailed",
    "RunFolder",
    "ShapeError",
    "Spec",
    "State",
    "Task",
    "Update",
    "UpdateRejected",
    "check",
    "export",
    "generate",
    "load_recipe",
    "merge",
    "render_report",
    "resume",
    "run",
    "score",
]

_HOME = {
    **dict.fromkeys(["Adapter", "LowRank"], "adapter"),
    **dict.fromkeys(["Claims", "Device", "Local", "Method", "Plan"], "federation"),
    **dict.fromkeys(["Profile", "Spec", "State", "Task", "Update"], "federation"),
    **dict.fromkeys(["Answers", "Metric", "Objective", "Problem"], "problem"),
    **dict.fromkeys(["Observer", "check", "load_recipe", "resume", "run"], "api"),
    "export": "results",
    **dict.fromkeys(["generate", "merge", "score"], "answers"),
    "METHODS": "methods",
    "RunFolder": "record",
    "render_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'anyrank' has no attribute {name!r}")
    module = import_module(f"anyrank.{_HOME[name]}")
    return module.render if name == "render_report" else getattr(module, name)
