"""The page's style sheet, one column at narrow widths and as many as fit at wide ones; and its script, which sorts."""

from __future__ import annotations

import base64
import hashlib

CSS = """
:root { color-scheme: light; --ink: #1b1f24; --faint: #57606a; --line: #d8dee4; --soft: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1rem; color: var(--ink); background: #fff;
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: .4rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 78ch; }
.about { margin: .5rem 0; }
.about p { margin: .15rem 0; overflow-wrap: anywhere; }
.about p:has(> b) { display: grid; grid-template-columns: 4.6rem 1fr; }
.about b { font-weight: 500; color: var(--faint); }
.scroll + .grid { margin-top: 1rem; }
.faint, figcaption { color: var(--faint); font-size: .87rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 165px), 1fr)); gap: .7rem;
  margin: .8rem 0; }
.tile { background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.65rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1rem; }
.grid > * { min-width: 0; }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 640px; height: auto; }
.scroll { overflow: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
.short { max-height: 24rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
.words { text-align: left; }
td.words { white-space: normal; min-width: 11rem; }
.figures thead th:first-child { left: 0; z-index: 2; }
.figures td { white-space: normal; min-width: 7rem; max-width: 18rem; overflow-wrap: anywhere; }
.figures tbody th { position: sticky; left: 0; background: #fff; min-width: 8.5rem; overflow-wrap: normal; }
tbody th, thead th:not(:first-child) { white-space: normal; overflow-wrap: anywhere; min-width: 5.2rem; }
.short tbody th, .short thead th:not(:first-child) { overflow-wrap: break-word; }
.lead tbody th { min-width: 8.5rem; }
.lead thead th { cursor: pointer; }
.lead thead th[aria-sort=ascending]::after { content: " ▲"; }
.lead thead th[aria-sort=descending]::after { content: " ▼"; }
.best { font-weight: 600; white-space: nowrap; }
.lead thead th:not(:first-child) { overflow-wrap: normal; }
thead th { position: sticky; top: 0; background: var(--soft); z-index: 1; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
.chip { float: left; margin-top: .35em; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
.mark { background: #fff1d6; border: 1px solid #e0b050; border-radius: 4px; padding: 0 .35em; font-size: .85em;
  font-weight: 500; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; overflow: auto;
  font-size: .82rem; max-height: 34rem; }
"""

SORT = """
for (const head of document.querySelectorAll(".lead thead th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], place = head.cellIndex;
    const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
    const value = row => {
      const words = row.cells[place].textContent, number = parseFloat(words.replace(/[,≥≤ ]/g, ""));
      return place && !isNaN(number) ? number : words;
    };
    const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -up : up;
    const rows = [...body.rows].sort((a, b) => up * order(value(a), value(b)));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
    body.append(...rows);
  });
}
"""
SORT_HASH = f"sha256-{base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()}"
"""The only script that the page lets run."""
