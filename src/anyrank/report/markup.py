"""Pieces of HTML: sections, figures, legends and tables. What is not `Markup` is escaped here."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from anyrank.report import charts
from anyrank.report.charts import Number
from anyrank.report.compare import Tones
from anyrank.report.runs import Run

__all__ = [
    "Cell",
    "Markup",
    "boxes",
    "details",
    "figure",
    "grouped",
    "legend",
    "listed",
    "pairs",
    "run_label",
    "section",
    "table",
]


class Markup(str):
    """Text that is HTML already. Every other text is escaped where it enters the page."""


Cell = str | Number | None


def section(title: str, *parts: str, intro: str = "", legend: str = "") -> str:
    """A part of the page under its heading; nothing if it has no content."""
    filled = [part for part in parts if part]
    if not filled:
        return ""
    body = "".join(filled)
    if body.startswith("<figure"):
        body = f"<div class='grid'>{body}</div>"
    return f"<section><h2>{escape(title)}</h2>{_paragraph(intro)}{legend}{body}</section>"


def figure(title: str, note: str, svg: str) -> str:
    """A chart under its title and a note on what it shows."""
    return f"<figure><figcaption><strong>{escape(title)}</strong> {escape(note)}</figcaption>{svg}</figure>"


def details(title: str, body: str, *, shown: bool = False) -> str:
    """Something that is shown when asked for."""
    return f"<details{' open' * shown}><summary>{escape(title)}</summary>{body}</details>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def pairs(values: Mapping[str, str]) -> str:
    """Names and what they stand for."""
    pairs = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in values.items())
    return f"<dl class='facts'>{pairs}</dl>"


def listed(sentences: Sequence[str]) -> str:
    """Sentences one below the other; nothing if there are none."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul class='sentences'>{items}</ul>" if items else ""


def boxes(names: Sequence[str], strengths: Sequence[Number]) -> str:
    """The legend of one colour in several strengths."""
    items = "".join(
        f"<li><i class='box' style='opacity:{strength:.2f}'></i>{escape(name)}</li>"
        for name, strength in zip(names, strengths, strict=True)
    )
    return f"<ul class='legend'>{items}</ul>"


def run_label(run: Run, tones: Tones) -> Markup:
    """A run's name after the line that it is drawn with."""
    return Markup(f"<span class='run'>{charts.swatch(tones[run.name])}<span>{escape(run.name)}</span></span>")


def legend(runs: Sequence[Run], tones: Tones) -> str:
    """Which line is which run; a single one needs none."""
    if len(runs) < 2:
        return ""
    return f"<ul class='legend'>{''.join(f'<li>{run_label(run, tones)}</li>' for run in runs)}</ul>"


def table(
    labels: Sequence[str], rows: Sequence[Sequence[Cell]], *, name: str, groups: Sequence[tuple[str, int]] = ()
) -> str:
    """A table whose first column names the row. It scrolls by itself where the page is too narrow for it."""
    upper = "".join(
        f"<th colspan='{span}' scope='colgroup'><span>{escape(group)}</span></th>"
        if group
        else f"<td colspan='{span}'></td>"
        for group, span in groups
    )
    head = f"<tr class='groups'>{upper}</tr>" if groups else ""
    words = [any(_is_words(row[place]) for row in rows) for place in range(len(labels))]
    kinds = [" class='words'" if wordy else "" for wordy in words]
    titles = zip(labels, kinds, strict=True)
    head += "<tr>" + "".join(f"<th scope='col'{kind}>{escape(label)}</th>" for label, kind in titles) + "</tr>"
    body = "".join(f"<tr>{_row(row, kinds)}</tr>" for row in rows)
    caption = f"<caption>{escape(name)}</caption>"
    return (
        f"<div class='scroll' role='region' aria-label='{escape(name)}' tabindex='0'>"
        f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _is_words(cell: Cell) -> bool:
    """Whether a cell is to be read rather than compared by its digits."""
    return isinstance(cell, str) and re.match(r"[^\d–\[]*[^\W\d]", cell) is not None


def _row(cells: Sequence[Cell], kinds: Sequence[str]) -> str:
    first, *others = [f"{kind}>{_cell(cell)}" for cell, kind in zip(cells, kinds, strict=True)]
    return f"<th scope='row'{first}</th>" + "".join(f"<td{other}</td>" for other in others)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Markup):
        return cell
    return "" if cell is None else escape(str(cell))


def grouped(titles: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Neighbours in a table's head that share a group, as (group, how many)."""
    return [(group, len(list(members))) for group, members in groupby(title[0] for title in titles)]
