"""The pipeline's report as one self-contained HTML file, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cluster.report import Report

CHART_WIDTH, CHART_HEIGHT, CHART_MARGIN = 640, 220, 44


def write_report(report: Report, directory: Path) -> tuple[Path, Path]:
    """Writes ``report.html`` and ``report.json`` into ``directory``, which is made if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    page, data = directory / "report.html", directory / "report.json"
    page.write_text(render(report), encoding="utf-8")
    data.write_text(report.model_dump_json(indent=2), encoding="utf-8")
    return page, data


def render(report: Report) -> str:
    """The report as an HTML page without any reference to another file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jobs", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    evaluation = report.details.get("evaluate", {})
    return environment.get_template("report.html").render(
        report=report,
        sources=[
            _score_table(source, evaluation, scores)
            for source, scores in evaluation.get("scores", {}).items()
        ],
        charts=[
            (title, line_chart(points))
            for title, points in _training_curves(report.details.get("train", {}))
            if len(points) > 1
        ],
        answers=report.details.get("answers", []),
        production=report.details.get("production", {}),
        total_seconds=sum(report.timings.values()),
    )


def _training_curves(details: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[tuple[float, float]]]]:
    """Titles and points of what the phases left by step."""
    for phase, points in details.get("loss_curves", {}).items():
        yield f"Loss of “{phase}”", points
        for metric, values in details.get("validation_curves", {}).get(phase, {}).items():
            yield f"{metric} of “{phase}”, measured while it trained", values


def _score_table(source: str, evaluation: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    """One source's systems × metrics, each score with its paired interval where there is one."""
    metrics = list(next(iter(scores.values()), {}))
    intervals = evaluation.get("intervals", {}).get(source, {})
    rows = [
        (system, [(values[metric], intervals.get(system, {}).get(metric)) for metric in metrics])
        for system, values in scores.items()
    ]
    best = [max((values[metric] for values in scores.values()), default=0.0) for metric in metrics]
    return {
        "name": source,
        "queries": evaluation.get("queries", {}).get(source, 0),
        "baseline": evaluation.get("baseline"),
        "metrics": metrics,
        "rows": rows,
        "best": best,
    }


def line_chart(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Coordinates of a line chart in SVG units: the path, and labelled ticks of both axes."""
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    low, high = min(ys), max(ys)
    span = (high - low) or 1.0
    inner_width, inner_height = CHART_WIDTH - 2 * CHART_MARGIN, CHART_HEIGHT - 2 * CHART_MARGIN
    width = (xs[-1] - xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(CHART_MARGIN + (x - xs[0]) / width * inner_width, 1),
            round(CHART_MARGIN + (high - y) / span * inner_height, 1),
        )

    return {
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "path": " ".join(f"{x},{y}" for x, y in map(place, xs, ys)),
        "y_ticks": [(place(xs[0], y)[1], f"{y:.3g}") for y in (low, (low + high) / 2, high)],
        "x_ticks": [(place(x, low)[0], f"{x:.0f}") for x in (xs[0], xs[-1])],
        "left": CHART_MARGIN,
        "right": CHART_WIDTH - CHART_MARGIN,
        "bottom": CHART_HEIGHT - CHART_MARGIN,
    }
