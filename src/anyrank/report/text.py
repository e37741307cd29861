"""Numbers, names and settings as text."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from anyrank.report.charts import Number, percent_tick

__all__ = [
    "NONE",
    "SPACE",
    "amount",
    "byte_unit",
    "capitalised",
    "clock",
    "counted",
    "dashed",
    "decimals",
    "literal",
    "megabytes",
    "percent",
    "plain",
    "score",
    "score_tick",
    "shortened",
    "spread",
    "time_unit",
    "toml",
]

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
SHARES = frozenset({
    "accuracy", "balanced_accuracy", "exact_match", "f1", "f1_macro", "f1_micro", "macro_f1", "micro_f1", "precision",
    "recall", "rouge1", "rouge2", "rougeL", "rougeLsum", "token_accuracy",
})  # fmt: skip
"""Metrics that lie between 0 and 1 by definition, and are written in percent."""


def percent(share: Number | None) -> str:
    """A share (0 to 1) in percent."""
    return NONE if share is None else f"{share * 100:.1f}{SPACE}%"


def score(metric: str, value: Number | None) -> str:
    """A value of a metric: a share in percent, anything else with three or four digits that count."""
    if value is None or metric in SHARES:
        return percent(value)
    return f"{value:.3g}" if abs(value) >= 1e6 else f"{value:,.{_digits(value)}f}"


def spread(metric: str, mean: Number, std: Number) -> str:
    """A standard deviation in the unit and with the digits of its mean."""
    return f"±{SPACE}{std * 100:.1f}" if metric in SHARES else f"±{SPACE}{std:,.{_digits(mean)}f}"


def _digits(value: Number) -> int:
    """How many digits behind the point a value needs: fewer, the larger it is."""
    return max(0, 4 - len(str(int(abs(value)))))


def score_tick(metric: str) -> Callable[[Number], str]:
    """How an axis shows a metric."""
    return percent_tick if metric in SHARES else "{:,g}".format


def capitalised(metric: str) -> str:
    """A metric's name where a line begins with it."""
    return (metric[:1].upper() + metric[1:]).replace("_", " ")


def decimals(value: Number | None, digits: int) -> str:
    """A number with so many digits behind the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def megabytes(size: Number) -> str:
    """Bytes in megabytes, without the unit."""
    millions = size / 1e6
    return f"{millions:,.1f}" if millions >= 0.1 or not millions else f"{millions:.3f}"


def amount(value: Number) -> str:
    """Three digits that count, written without an exponent."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def clock(seconds: Number) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun in the right number."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def time_unit(seconds: Number) -> tuple[Number, str]:
    """A unit in which a time is a handy number, as seconds and as an axis label."""
    units = [(86400, "days"), (3600, "hours"), (60, "minutes")]
    return next(
        ((float(size), f"simulated time, {name}") for size, name in units if seconds >= 3 * size),
        (1.0, "simulated time, seconds"),
    )


def byte_unit(size: Number) -> tuple[Number, str]:
    """A unit in which a size is a handy number, as bytes and by name."""
    units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")]
    return next((unit for unit in units if size >= unit[0]), (1.0, "B"))


def dashed(band: str) -> str:
    """A band of ranks with the dash that belongs between numbers."""
    return band.replace("-", "–")


def shortened(name: str) -> str:
    """A name that has room beside a chart."""
    return name if len(name) <= 12 else name[:11] + "…"


def plain(value: Any) -> str:
    """A setting as it reads in a table: text without quotes."""
    return value if isinstance(value, str) else literal(value)


def literal(value: Any) -> str:
    """A setting as it is written in a recipe."""
    return NONE if value is None else json.dumps(value, ensure_ascii=False)


def toml(table: Mapping[str, Any], path: str = "") -> str:
    """A recipe as TOML; what is not set is left out."""
    own = {key: value for key, value in table.items() if not isinstance(value, Mapping) and value is not None}
    lines = [f"[{path}]"] if path and (own or not table) else []
    lines += [f"{_key(key)} = {literal(value)}" for key, value in own.items()]
    tables = [
        toml(value, f"{path}.{_key(key)}".lstrip(".")) for key, value in table.items() if isinstance(value, Mapping)
    ]
    return "\n\n".join(part for part in ["\n".join(lines), *tables] if part)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
