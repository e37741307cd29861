"""Run folders as one HTML page that needs nothing but itself.

    runs      folders -> plain values, checked
    compare   several runs side by side
    charts    numbers -> SVG
    text      numbers, names and settings -> text
    markup    pieces of HTML
    figures   which charts are shown of the runs
    tables    which tables are shown of the runs
    page      the top of the page, and everything in order
    page.html the frame: style, and a few lines of script that only make tooltips quicker

The same folders make the same bytes: no dates, no machine's paths but what the runs themselves recorded.
"""

from anyrank.report.page import render

__all__ = ["render"]
