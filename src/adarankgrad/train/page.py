"""Pieces of a self-contained HTML page: every text escaped, images inline, no network.

Functions return HTML; arguments are plain text unless they are named ``..._html``.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

_CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# Clicking a column's title sorts by it, clicking again turns the order round. Rows without a
# number in the column come last.
_SORT_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value;
    const order = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const numbers = Number(a) - Number(b);
      return (down ? -1 : 1) * (isNaN(numbers) ? a.localeCompare(b) : numbers);
    };
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
  }));
}
"""


class SortCell(NamedTuple):
    """A cell of `sortable_table`.

    Attributes:
        text: What is shown.
        value: What is sorted by; None comes last.
        note: Small, in a second line.
    """

    text: str
    value: float | str | None
    note: str = ""


def page(title: str, subtitle: str, body_html: Iterable[str], *, is_sortable: bool = False) -> str:
    """Return a whole page.

    Args:
        title: Heading and title of the window.
        subtitle: One or two sentences below the heading.
        body_html: The sections, already HTML.
        is_sortable: Whether it holds a `sortable_table`, which needs a script.
    """
    content = "\n".join(body_html)
    policy, script = _CONTENT_POLICY, ""
    if is_sortable:
        digest = base64.b64encode(hashlib.sha256(_SORT_SCRIPT.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        script = f"<script>{_SORT_SCRIPT}</script>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        f"{content}\n</main>\n{script}</body>\n</html>\n"
    )


def section(title: str, *parts_html: str, is_half: bool = False) -> str:
    """Return a titled section; two halves stand side by side where the window is wide."""
    kind = ' class="half"' if is_half else ""
    return f"<section{kind}><h2>{escape(title)}</h2>\n{''.join(parts_html)}</section>"


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return headline numbers as tiles.

    Args:
        entries: What it is, the number, and what to compare it with.
    """
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b><span>{escape(note)}</span></dd></div>"
        for name, value, note in entries
    )
    return f'<dl class="tiles">{cells}</dl>'


def image(name: str, light_png: bytes, dark_png: bytes, alt: str) -> str:
    """Return a figure that follows the reader's light or dark setting."""
    return (
        f'<figure class="{escape(name)}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark_png)}">'
        f'<img src="{_data_uri(light_png)}" alt="{escape(alt)}"></picture></figure>'
    )


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, numeric_from: int = 1) -> str:
    """Return a table that scrolls sideways inside its own box on narrow screens.

    Args:
        headers: Column titles.
        rows: Cell texts.
        numeric_from: Index of the first column aligned to the right.
    """
    head = "".join(_cell("th", text, i, numeric_from) for i, text in enumerate(headers))
    body = "".join(
        "<tr>" + "".join(_cell("td", text, i, numeric_from) for i, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def sortable_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[SortCell]],
    *,
    sorted_by: int,
    is_falling: bool = False,
) -> str:
    """Return a table whose column titles sort it; the first column is text, the others numbers.

    Args:
        headers: Column titles.
        rows: Cells.
        sorted_by: Index of a column of numbers by which rows are in order at first.
        is_falling: The highest number comes first.
    """
    order = "descending" if is_falling else "ascending"
    head = "".join(
        f'<th{_kind(i, 1)} aria-sort="{order if i == sorted_by else "none"}">'
        f"<button>{escape(text)}</button></th>"
        for i, text in enumerate(headers)
    )
    rows = list(rows)
    known = [row for row in rows if row[sorted_by].value is not None]
    unknown = [row for row in rows if row[sorted_by].value is None]
    known.sort(key=lambda row: row[sorted_by].value or 0, reverse=is_falling)
    body = "".join(
        f"<tr>{''.join(_sort_cell(i, cell) for i, cell in enumerate(row))}</tr>"
        for row in [*known, *unknown]
    )
    return (
        '<div class="scroll" tabindex="0"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Return a two-column list of names and values, values wrapping anywhere."""
    body = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows
    )
    return f'<dl class="facts">{body}</dl>'


def remarks(rows: Iterable[tuple[str, str]]) -> str:
    """Return names with a text below each, which may be long."""
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    return f'<dl class="remarks">{body}</dl>'


def code_block(text: str, *, wraps: bool = True) -> str:
    """Return preformatted text; a command wraps, a text table scrolls sideways."""
    kind = "wraps" if wraps else "scroll"
    return f'<pre class="{kind}" tabindex="0">{escape(text)}</pre>'


def fold(title: str, *parts_html: str, is_open: bool = False) -> str:
    """Return a part that opens, or closes where it ``is_open`` at first, on a click."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{escape(title)}</summary>{''.join(parts_html)}</details>"


def link(target: str, text: str) -> str:
    """Return a paragraph with a link to a neighbouring file."""
    return f'<p><a href="{escape(target)}">{escape(text)}</a></p>'


def _cell(tag: str, text: str, column: int, numeric_from: int) -> str:
    return f"<{tag}{_kind(column, numeric_from)}>{escape(text)}</{tag}>"


def _sort_cell(column: int, cell: SortCell) -> str:
    value = escape("" if cell.value is None else str(cell.value))
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    return f'<td{_kind(column, 1)} data-value="{value}">{escape(cell.text)}{note}</td>'


def _kind(column: int, numeric_from: int) -> str:
    return ' class="number"' if column >= numeric_from else ""


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


STYLE = """
:root { --paper: #f4f6f9; --card: #ffffff; --ink: #1b1f27; --muted: #5b6472; --line: #dfe4ec;
  --accent: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f1116; --card: #171a21; --ink: #e8ebf0; --muted: #a2abba; --line: #2b303b;
    --accent: #7fb0ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 56px; display: grid; gap: 18px;
  grid-template-columns: minmax(0, 1fr); }
header h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); line-height: 1.2; margin: 0 0 .4rem;
  letter-spacing: -.01em; }
header p { margin: 0; color: var(--muted); max-width: 72ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 18px 20px 20px; min-width: 0; }
section p { margin: 0 0 .8rem; max-width: 76ch; color: var(--muted); }
section p:last-child { margin-bottom: 0; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
.tiles { margin: 0; display: flex; flex-wrap: wrap; gap: 12px; }
.tiles > div { flex: 1 1 220px; background: var(--card); border: 1px solid var(--line);
  border-radius: 14px; padding: 12px 16px 14px; }
.tiles dt { color: var(--muted); font-size: .84rem; }
.tiles dd { margin: 0; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--muted); font-size: .84rem; line-height: 1.35; display: block; }
figure { margin: 0; }
img { display: block; width: 100%; max-width: 720px; height: auto; margin: 0 auto; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; background:
  linear-gradient(to left, var(--card) 40%, transparent) right / 48px 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / 20px 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
th.number, td.number { text-align: right; }
th:first-child, td:first-child, .sortable :is(th, td):first-child { padding-left: 0;
  position: sticky; left: 0; background: var(--card); }
th button { all: unset; cursor: pointer; }
.sortable th { white-space: normal; line-height: 1.3; }
.sortable :is(th, td) { vertical-align: bottom; padding-left: .5rem; padding-right: .5rem; }
.sortable td { vertical-align: top; }
.sortable td:first-child { white-space: normal; min-width: 7.5rem; }
td small { display: block; white-space: normal; color: var(--muted); font-size: .8rem;
  line-height: 1.3; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
.facts { margin: 0; display: grid; gap: 0 36px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.facts > div { display: flex; gap: 14px; justify-content: space-between; padding: .3rem 0;
  border-bottom: 1px solid var(--line); font-size: .9rem; min-width: 0; }
.facts dt { color: var(--muted); flex: none; }
.facts dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
.remarks { margin: 0; font-size: .9rem; }
.remarks dt { font-weight: 600; }
.remarks dd { margin: 0 0 .7rem; color: var(--muted); overflow-wrap: anywhere; }
pre { margin: 0 0 .8rem; padding: .8rem 1rem; background: var(--paper); border-radius: 10px;
  font: .82rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre:last-child { margin-bottom: 0; }
pre.wraps { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
details > *:not(summary) { margin-top: .7rem; }
a { color: var(--accent); }
@media (min-width: 900px) {
  main { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  main > * { grid-column: 1 / -1; }
  main > .half { grid-column: auto; }
}
@media (max-width: 520px) {
  main { padding: 18px 12px 36px; gap: 12px; }
  section { padding: 14px 14px 16px; }
  .tiles { gap: 10px; }
  .tiles > div { flex-basis: 40%; padding: 10px 12px 12px; }
  figure { margin: 0 -10px; }
  table { font-size: .82rem; }
  th, td { padding: .34rem .45rem; }
  th:first-child, td:first-child { white-space: normal; min-width: 6.4rem;
    max-width: 8.2rem; }
  .tiles b { font-size: 1.22rem; }
}
@media print { body { background: none; } section, .tiles > div { break-inside: avoid; } }
"""
