"""The report of an evaluation: tables for programs, Markdown for a README, a page for people."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from amulet_gguf.errors import SettingError
from amulet_gguf.evaluation.table import ALL, Result
from amulet_gguf.evaluation.text_measures import Measure
from amulet_gguf.home.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

Catalogue: TypeAlias = Mapping[str, Measure]

_BETTER: Final = {
    "higher": "higher is better",
    "lower": "lower is better",
    None: "which way is better depends on the preference",
}
_PANELS: Final = 3  # plots side by side
_LABEL: Final = 26  # characters of a method's name in a plot; the tables have all of it
_LARGEST: Final = 1e100  # beyond, matplotlib overflows

#: Colours in the drawing, and what the page's style sheet makes of them by day and by night.
_INK: Final = "#010203"
_LINE: Final = "#040506"
_ACCENT: Final = "#070809"
_COLORS: Final = {_INK: "currentColor", _LINE: "var(--line)", _ACCENT: "var(--accent)"}
_DRAWING: Final[dict[Any, object]] = {
    "axes.labelcolor": _INK,
    "figure.constrained_layout.h_pad": 0.08,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so the layout is the same everywhere
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "amulet",
    "text.color": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def write_table(folder: Path, results: Sequence[Result]) -> None:
    """Write results.csv and results.json, one row or object per result, undefined numbers left empty.

    Raises:
        OSError: a file cannot be written; it is as it was before.
    """
    rows = [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(result).items()
        }
        for result in results
    ]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [field.name for field in fields(Result)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.csv", table.getvalue())
    objects = json.dumps(rows, ensure_ascii=False, allow_nan=False, indent=1)
    write_atomically(folder / "results.json", objects + "\n")


def markdown(results: Sequence[Result], about: Mapping[str, str], measures: Catalogue) -> str:
    """Return the report as Markdown: about, the means over all preferences, each preference, legend.

    Args:
        results: in the order in which methods and preferences are to appear.
        about: what was evaluated and how: model, questions, settings, date, versions, command.
        measures: the catalogue; its order is that of the columns.
    """
    parts = ["# Evaluation"]
    if about:
        parts.append(_pipes([("", ""), *((_escaped(k), _escaped(v)) for k, v in about.items())], "---"))
    for table in _tables(results, measures):
        header = ["method", *(_escaped(_headed(measure)) for measure in table.columns)]
        rows = [header, *([_escaped(method), *cells] for method, cells in table.rows)]
        parts += [f"## {_escaped(table.title)}", f"{table.caption}.", _pipes(rows, "---:")]
    if legend := _columns(results, measures):
        parts += ["## Measures", "\n".join(map(_legend_line, legend))]
    return "\n\n".join(parts) + "\n"


def html(
    results: Sequence[Result],
    about: Mapping[str, str],
    measures: Catalogue,
    answers: Sequence[Mapping[str, str]],
) -> str:
    """Return the report as one page that loads nothing: tables, plots and the answers side by side.

    Args:
        results, about, measures: see `markdown`.
        answers: each with its question, preference, method and text, none of which is trusted.

    Raises:
        SettingError: matplotlib is not installed.
    """
    sides: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for answer in answers:
        sides.setdefault((answer["question"], answer["preference"]), []).append(answer)
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    template = resources.files("amulet_gguf.evaluation").joinpath("report.html.jinja")
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        about=about,
        all=ALL,
        tables=_tables(results, measures),
        plots=_plots(results, measures),
        sides=sides,
        legend=_columns(results, measures),
        headed=_headed,
        better=_BETTER,
    )
    # A model can write half of a surrogate pair; no file holds one.
    return page.encode(errors="replace").decode() + "\n"


# --- tables ---


@dataclass(frozen=True)
class _Table:
    preference: str
    title: str
    caption: str
    columns: list[Measure]
    rows: list[tuple[str, list[str]]]


def _tables(results: Sequence[Result], measures: Catalogue) -> list[_Table]:
    groups: dict[str, list[Result]] = {ALL: []}  # first, whatever comes first in the results
    for result in results:
        groups.setdefault(result.preference, []).append(result)
    return [_table(preference, group, measures) for preference, group in groups.items() if group]


def _table(preference: str, results: Sequence[Result], measures: Catalogue) -> _Table:
    columns = _columns(results, measures)
    found = {(result.method, result.measure): result for result in results}
    counts = sorted({result.n for result in results if not math.isnan(result.value)} or {0})
    title = "All preferences" if preference == ALL else f"Preference: {preference}"
    caption = f"Means with 95 % bootstrap intervals in brackets; n = {counts[0]}" + (
        f" to {counts[-1]}" if counts[1:] else ""
    )
    rows = [
        (method, [_cell(found.get((method, column.name)), column) for column in columns])
        for method in dict.fromkeys(result.method for result in results)
    ]
    return _Table(preference, title, caption, columns, rows)


def _columns(results: Sequence[Result], measures: Catalogue) -> list[Measure]:
    """Return the measures that occur, in the order of the catalogue; what it lacks comes last."""
    present = dict.fromkeys(result.measure for result in results)
    known = [measure for name, measure in measures.items() if name in present]
    return known + [Measure(name, "", None, 3, "", "") for name in present if name not in measures]


def _cell(result: Result | None, measure: Measure) -> str:
    if result is None or math.isnan(result.value):
        return "–"
    value, low, high = (
        # Adding zero turns -0.0, which rounding leaves, into 0.0.
        "–" if math.isnan(number) else f"{round(number, measure.digits) + 0.0:.{measure.digits}f}"
        for number in (result.value, result.low, result.high)
    )
    return value if low == high == "–" else f"{value} [{low}, {high}]"


def _headed(measure: Measure) -> str:
    return measure.name + {"higher": " ↑", "lower": " ↓", None: ""}[measure.better]


def _escaped(text: str) -> str:
    """Return text as one line of Markdown that means nothing but itself."""
    return re.sub(r"([\\|<`*\[])", r"\\\1", " ".join(text.split()))


def _pipes(rows: Sequence[Sequence[str]], alignment: str) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{'|'.join(['---', *[alignment] * (len(rows[0]) - 1)])}|")
    return "\n".join(lines)


def _legend_line(measure: Measure) -> str:
    line = f"- **{_escaped(measure.name)}** ({_BETTER[measure.better]})"
    for start, text in ((": ", measure.title), (". Source: ", measure.source), (". ", measure.limits)):
        line += start + _escaped(text) if text else ""
    return line


# --- plots ---

_Found: TypeAlias = Mapping[tuple[str, str], Result]  # by method and measure


def _plots(results: Sequence[Result], measures: Catalogue) -> list[Markup]:
    try:
        from matplotlib import rc_context, style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingError(f"evaluation needs pip install 'amulet-gguf[eval]' ({error})") from error

    drawn = [result for result in results if result.preference == ALL and _is_drawable(result.value)]
    found = {(result.method, result.measure): result for result in drawn}
    methods = list(dict.fromkeys(result.method for result in drawn))
    columns = _columns(drawn, measures)
    plots = []
    # No user's settings change the drawing, and it changes none of theirs.
    with warnings.catch_warnings(), style.context("default"), rc_context(_DRAWING):
        # The reader's browser draws the text, and has the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        if drawn:
            n_rows = math.ceil(len(columns) / _PANELS)
            figure = Figure(figsize=(9.6, n_rows * (0.8 + 0.26 * len(methods))), layout="constrained")
            panels = figure.subplots(n_rows, _PANELS, sharey=True, squeeze=False)
            _panels(panels, columns, methods, found)
            plots.append(_svg(figure, "The means and intervals of the table above, by measure"))
        both = [name for name in methods if {(name, "likelihood"), (name, "reward")} <= found.keys()]
        if len(both) > 1:
            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            _scatter(figure, {column.name: _headed(column) for column in columns}, both, found)
            plots.append(_svg(figure, "Reward against likelihood, both from the table above, by method"))
    return plots


def _panels(panels: Any, columns: Sequence[Measure], methods: Sequence[str], found: _Found) -> None:
    for panel in panels.flat[len(columns) :]:
        panel.remove()
    for panel, column in zip(panels.flat, columns, strict=False):
        for y, method in enumerate(methods):
            if result := found.get((method, column.name)):
                panel.plot(result.value, y, "o", color=_ACCENT, markersize=5)
                _interval(panel, (result.low, result.high), (y, y))
        panel.set_title(_label(_headed(column)), fontsize=9, fontweight="bold", loc="left")
        panel.set_yticks(range(len(methods)), [_label(method) for method in methods])
        panel.set_ylim(len(methods) - 0.4, -0.6)
        _tidy(panel, "x")


def _scatter(figure: Figure, heads: Mapping[str, str], methods: Sequence[str], found: _Found) -> None:
    axes = figure.subplots()
    points = [(found[method, "likelihood"], found[method, "reward"]) for method in methods]
    for x, y in points:
        axes.plot(x.value, y.value, "o", color=_ACCENT, markersize=5)
        _interval(axes, (x.low, x.high), (y.value, y.value))
        _interval(axes, (x.value, x.value), (y.low, y.high))
    axes.set_xlabel(heads["likelihood"])
    axes.set_ylabel(heads["reward"])
    axes.margins(0.12)
    _tidy(axes, "both")
    figure.draw_without_rendering()  # from here on, places in it are known
    taken: list[Bbox] = []
    for method, (x, y) in zip(methods, points, strict=True):
        label = axes.annotate(_label(method), (x.value, y.value), (5, 4), textcoords="offset points")
        label.set_in_layout(False)
        if label.get_window_extent().x1 > axes.bbox.x1:
            label.set(ha="right", position=(-5, 4))
        while label.get_window_extent().count_overlaps(taken):
            label.xyann = (label.xyann[0], label.xyann[1] + 4)
        taken.append(label.get_window_extent())


def _interval(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    if all(map(_is_drawable, (*x, *y))):
        axes.plot(x, y, color=_ACCENT, linewidth=1.6, alpha=0.55, solid_capstyle="round")


def _tidy(axes: Axes, grid: Literal["x", "both"]) -> None:
    axes.set_frame_on(False)
    axes.grid(axis=grid, color=_LINE, linewidth=0.6)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=4)
    axes.ticklabel_format(axis="x", useOffset=False)


def _is_drawable(number: float) -> bool:
    return abs(number) < _LARGEST  # NaN is not


def _label(name: str) -> str:
    """Return a name as a short line without characters that would break or turn around the text."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return line if len(line) <= _LABEL else line[: _LABEL - 1].rstrip() + "…"


def _svg(figure: Figure, label: str) -> Markup:
    """Return a figure as an element of a page: its colours, no identifiers of its own, nothing dated."""
    file = io.BytesIO()
    undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=undated)
    text = file.getvalue().decode()
    text = text[text.index("<svg ") :]
    # Its style sheet would hold for the whole page, and its names of groups occur in every figure.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for color, name in _COLORS.items():
        text = text.replace(f": {color}", f": {name}")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
