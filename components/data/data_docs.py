"""Data Docs that open offline: Great Expectations renders each suite, our own page and stylesheet hold it together.

Great Expectations' whole-page template takes its styles and scripts from seven hosts; its sections take none. So each
suite's sections are rendered by Great Expectations' own renderers and put into a page of ours. The pages carry no
time and no run id: the same data give the same bytes.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from couturier.components.data.expectations import Report, Verdict, percent

_SHOWN_REASONS = 25
# Ids that the templates draw at random; nothing refers to them once the scripts are gone.
_RANDOM_IDS = re.compile(
    r'\s(?:id|href|aria-controls|data-target)="?[^"\s>]*[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]+[^"\s>]*"?'
)

STYLE = """
:root { --ink:#1d2530; --soft:#5d6876; --line:#dfe4ea; --paper:#fff; --ground:#f5f6f8; --good:#1a7f4b; --warn:#9a6700;
  --bad:#c0352b; --accent:#2f5bb7; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e9ee; --soft:#9aa5b3; --line:#323a45; --paper:#1b2027;
  --ground:#13171c; --good:#4cc38a; --warn:#e0b04a; --bad:#ff7b70; --accent:#8fb0ff; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink);
  font:15px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif; }
header { background:var(--paper); border-bottom:1px solid var(--line); padding:18px 32px 0; }
h1 { font-size:22px; margin:0 0 2px; } h2 { font-size:17px; margin:0 0 10px; }
h5 { font-size:16px; margin:0 0 6px; } h6 { font-size:14px; margin:0 0 6px; }
.lead { color:var(--soft); margin:0 0 12px; }
nav { display:flex; flex-wrap:wrap; gap:2px; }
nav a { padding:7px 10px; white-space:nowrap; font-size:14px; color:var(--soft); text-decoration:none;
  border-bottom:3px solid transparent; }
nav a:hover { color:var(--ink); } nav a.here { color:var(--ink); border-color:var(--accent); font-weight:600; }
nav a .dot { margin-right:6px; }
a { color:var(--accent); }
details { color:var(--soft); font-size:13px; } summary { cursor:pointer; }
details code { overflow-wrap:anywhere; }
main { max-width:1240px; margin:24px auto; padding:0 24px; }
.card, .ge-section { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:18px 20px;
  margin:0 0 18px; overflow-x:auto; }
.ge-section hr, .ge-section .alert hr { display:none; }
table { border-collapse:collapse; width:100%; }
th, td { text-align:left; vertical-align:top; padding:7px 12px; border-bottom:1px solid var(--line); }
th { color:var(--soft); font-weight:600; font-size:13px; } tr:last-child > td { border-bottom:0; }
td.n, th.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap; }
table table { width:auto; margin:8px 0 2px; font-size:13px; background:var(--ground); border-radius:6px; }
table table th, table table td { padding:3px 12px; } table table th { white-space:nowrap; }
.badge { display:inline-block; padding:0 7px; margin:1px 0; border-radius:6px; background:var(--ground);
  border:1px solid var(--line); font-size:13px; overflow-wrap:anywhere; }
.good, .text-success { color:var(--good); } .warn { color:var(--warn); } .bad, .text-danger { color:var(--bad); }
.dot { font-weight:700; } i.fas { font-style:normal; font-weight:700; }
i.fa-check-circle::before { content:"\\2713"; } i.fa-times::before { content:"\\2717"; }
i.fa-exclamation-triangle::before { content:"!"; }
.ge-section td:first-child { width:64px; } .ge-section td:last-child { width:190px; }
.ge-section table table td:first-child, .ge-section table table td:last-child { width:auto; }
.alert-secondary { border-left:4px solid var(--accent); padding-left:12px; margin-bottom:10px; }
code { font-family:ui-monospace,"DejaVu Sans Mono",monospace; font-size:13px; }
ul.notes { margin:0; padding-left:20px; } ul.notes li { margin:3px 0; }
.bar { display:block; height:6px; min-width:90px; border-radius:3px; background:var(--line); margin-top:8px; }
.bar span { display:block; height:6px; border-radius:3px; background:var(--good); }
footer { color:var(--soft); font-size:13px; padding:0 0 32px; text-align:center; }
"""


def write_docs(
    folder: Path,
    reports: Sequence[Report],
    summary: Sequence[dict[str, Any]],
    warnings: Sequence[str],
    reasons: Sequence[dict[str, Any]],
) -> None:
    """Write ``index.html`` and one page a suite into ``folder``.

    Args:
        reports: every suite as it was checked, in that order.
        summary: rows of :func:`couturier.components.data.contract.contract_summary`.
        warnings: sentences to show first.
        reasons: rows of :func:`couturier.components.data.quarantine.explain_quarantine`.
    """
    from great_expectations.render.view.view import DefaultJinjaSectionView

    folder.mkdir(parents=True, exist_ok=True)
    overview = _overview(reports, summary, warnings) + _reasons(reasons) + _rules(reports)
    (folder / "index.html").write_text(_page("Overview", overview, reports), encoding="utf-8")
    view = DefaultJinjaSectionView()  # one for all pages: it keeps its compiled templates
    for report in reports:
        page = _page(report.suite.name, _suite(report, view), reports)
        (folder / _file(report)).write_text(page, encoding="utf-8")


def _page(title: str, body: str, reports: Sequence[Report]) -> str:
    links = [_link("index.html", "Overview", title == "Overview", "")]
    links += [_link(_file(each), each.suite.name, title == each.suite.name, _mark(each.verdicts)) for each in reports]
    abouts = {each.suite.name: each.suite.about for each in reports}
    about = abouts.get(title, "What came in, what is kept, and why.")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is fetched and nothing runs, whatever stands in the data.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Data contract: {html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>Data contract</h1><p class='lead'>{html.escape(about)}</p><nav>{''.join(links)}</nav></header>"
        f"<main>{body}</main><footer>Couturier, with Data Docs by Great Expectations. "
        "Every failing row lies in quarantine.parquet beside this folder.</footer></body></html>\n"
    )


def _link(target: str, text: str, here: bool, mark: str) -> str:
    return f'<a href="{target}"{" class=here" if here else ""}>{mark}{html.escape(text)}</a>'


def _file(report: Report) -> str:
    return report.suite.name.replace(" ", "-") + ".html"


def _mark(verdicts: Sequence[Verdict]) -> str:
    if not all(verdict.ok for verdict in verdicts):
        return "<span class='dot bad'>✗</span>"
    if any(verdict.warns for verdict in verdicts):
        return "<span class='dot warn'>!</span>"
    return "<span class='dot good'>✓</span>"


def _overview(reports: Sequence[Report], summary: Sequence[dict[str, Any]], warnings: Sequence[str]) -> str:
    rows = "".join(
        f"<tr><td>{row['table']}</td><td class=n>{row['raw']:,}</td><td class=n>{row['kept']:,}</td>"
        f"<td class=n>{row['quarantined']:,}</td><td class=n>{percent(row['share'])}</td>"
        f"<td><span class=bar><span style='width:{100 - 100 * row['share']:.2f}%'></span></span></td></tr>"
        for row in summary
    )
    counts = (
        "<div class=card><h2>kept + quarantined = raw</h2><table><tr><th>Table</th><th class=n>Raw rows</th>"
        "<th class=n>Kept</th><th class=n>Quarantined</th><th class=n>Share set aside</th><th></th></tr>"
        f"{rows}</table></div>"
    )
    stops = [verdict for report in reports for verdict in report.verdicts if not verdict.ok]
    lines = [f"{verdict.rule.name}: {verdict.rule.reason} ({percent(verdict.share)})" for verdict in stops]
    refused = _notes("These rules stop the run", lines)
    return refused + counts + _notes("Warnings", list(warnings))


def _reasons(reasons: Sequence[dict[str, Any]]) -> str:
    """Why rows were set aside, commonest first, each with its first row."""
    if not reasons:
        return ""
    rows = "".join(
        f"<tr><td>{row['table']}</td><td class=n>{row['rows']:,}</td><td>{html.escape(row['reason'])}"
        f"<details><summary>row {row['first_row']:,}</summary><code>{html.escape(row['example'])}</code></details>"
        "</td></tr>"
        for row in reasons[:_SHOWN_REASONS]
    )
    left = len(reasons) - _SHOWN_REASONS
    more = f"<p class=lead>and {left:,} rarer reasons, all in quarantine.parquet.</p>" if left > 0 else ""
    return (
        "<div class=card><h2>Quarantine by reason</h2><table>"
        "<tr><th>Table</th><th class=n>Rows</th><th>Reason</th></tr>"
        f"{rows}</table>{more}</div>"
    )


def _rules(reports: Sequence[Report]) -> str:
    rules = "".join(_rule(report, verdict) for report in reports for verdict in report.verdicts)
    return (
        "<div class=card><h2>Rules</h2><table><tr><th></th><th>Rule</th><th>Wanted</th><th class=n>Failing rows</th>"
        f"<th class=n>Share</th><th class=n>Stops above</th></tr>{rules}</table></div>"
    )


def _rule(report: Report, verdict: Verdict) -> str:
    rule = verdict.rule
    return (
        f"<tr><td>{_mark([verdict])}</td><td><a href='{_file(report)}'><code>{html.escape(rule.name)}</code></a></td>"
        f"<td>{html.escape(rule.wanted)}</td><td class=n>{len(verdict.rows):,}</td>"
        f"<td class=n>{percent(verdict.share)}</td><td class=n>{percent(rule.stop_share)}</td></tr>"
    )


def _notes(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<div class=card><h2>{html.escape(title)}</h2><ul class=notes>{listed}</ul></div>"


def _suite(report: Report, view: Any) -> str:
    """Great Expectations' own sections (one a column) of a suite's result."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer

    document = ValidationResultsPageRenderer().render(_lean(report.result))
    # The first section is about the run: its time, its id and links to pages that are not written.
    rendered = [
        view.render({"section": section.to_json_dict(), "section_loop": {"index": index}})
        for index, section in enumerate(document.sections[1:], 2)
    ]
    counts = report.result.statistics
    met = f"{counts['successful_expectations']} of {counts['evaluated_expectations']} expectations met"
    looked_at = f"rows of {html.escape(report.suite.table)} looked at: {report.verdicts[0].checked:,}"
    mark = _mark(report.verdicts)
    head = f"<div class=card><h2>{mark} {html.escape(report.suite.name)}</h2>{met}; {looked_at}.</div>"
    return head + _RANDOM_IDS.sub("", "".join(rendered))


def _lean(result: Any) -> Any:
    """A copy of a suite's result with samples in place of every failing row, and text escaped: Great
    Expectations writes failing values and the names of columns into HTML as they are."""
    slim = copy(result)
    slim.results = [copy(each) for each in result.results]
    dropped = ("unexpected_list", "unexpected_index_list", "partial_unexpected_index_list", "unexpected_index_query")
    for each in slim.results:
        each.result = {key: _escaped(value) for key, value in each.result.items() if key not in dropped}
        each.expectation_config = copy(each.expectation_config)
        each.expectation_config.kwargs = _escaped(dict(each.expectation_config.kwargs))
        each.expectation_config.description = _escaped(each.expectation_config.description)
    return slim


def _escaped(value: Any) -> Any:
    if isinstance(value, np.generic):  # whose repr Great Expectations takes for no number
        return _escaped(value.item())
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, tuple):
        return tuple(_escaped(each) for each in value)
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    return value
