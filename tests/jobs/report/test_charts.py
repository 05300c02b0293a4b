"""Charts: every point is inside of the axes, in its place, at every size; equal input gives equal bytes."""

import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest

from jobs.report import charts
from jobs.report.charts import histogram, loss_curve, recall_over_time, smooth_curve
from jobs.telemetry import plot_style
from jobs.telemetry.units import format_number

Point = tuple[float, float]
KINDS: list[dict[str, list[tuple[str, float, float]]]] = [
    {"images": [("nprobe=1", 0.01, 0.2), ("nprobe=2", 0.013, 0.2), ("nprobe=4", 7.0, 1.0)]},
    {"images": [("a", 0.5, 1.0), ("b", 0.5, 1.0)], "captions": [("a", 0.4, 0.0), ("b", 0.45, 0.01)]},
    {"images": [("a", 0.5, 1.0), ("b", 0.5, 1.0)]},
    {"images": [("a", 0.0, 0.3), ("b", 3.0, 0.99), ("c", 3.1, 0.995)]},
]


def drawings(chart: str | None) -> list[ElementTree.Element]:
    """The wide and the narrow SVG of a chart."""
    assert chart is not None
    svgs = list(ElementTree.fromstring(chart))
    assert [svg.get("class") for svg in svgs] == ["wide", "narrow"]
    return svgs


def numbers(text: str) -> list[Point]:
    coordinates = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    return list(zip(coordinates[::2], coordinates[1::2], strict=True))


def points(drawing: ElementTree.Element, name: str) -> list[list[Point]]:
    """The points of each artist of a class."""
    return [numbers(path.get("d", "")) for group in drawing.iter("g") if group.get("class") == name
            for path in group.findall("path")]


def dots(drawing: ElementTree.Element) -> list[Point]:
    return [(float(use.get("x", "")), float(use.get("y", ""))) for group in drawing.iter("g")
            if group.get("class") == "dot" for use in group.iter("use")]


def frame(drawing: ElementTree.Element) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the axes."""
    [corners] = points(drawing, "frame")
    return (min(x for x, _ in corners), max(x for x, _ in corners),
            min(y for _, y in corners), max(y for _, y in corners))


def assert_inside(drawing: ElementTree.Element, positions: list[Point]) -> None:
    x_min, x_max, y_min, y_max = frame(drawing)
    width, height = numbers(drawing.get("viewBox", ""))[1]
    assert 0 < x_min < x_max < width and 0 < y_min < y_max < height
    assert positions
    assert all(x_min - 0.11 <= x <= x_max + 0.11 and y_min - 0.11 <= y <= y_max + 0.11 for x, y in positions)


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0], [2.0, 1.9, float("nan"), 1.95], [5e4, 3.0, 1e-7],
                                    [1 / (1 + step) for step in range(5000)], [-1.0, 3.0]])
def test_every_curve_is_inside_of_its_axes(losses: list[float]) -> None:
    for drawing in drawings(loss_curve([{"step": 10 * place, "loss": loss} for place, loss in enumerate(losses)])):
        for name in ("raw", "smooth"):
            [line] = points(drawing, name)
            assert_inside(drawing, line)


def test_a_curve_rises_where_the_loss_rises() -> None:
    losses = [3.0, 1.0, 2.0, 1.5]
    for drawing in drawings(loss_curve([{"step": place, "loss": loss} for place, loss in enumerate(losses)])):
        [line] = points(drawing, "raw")
        assert [x for x, _ in line] == sorted({x for x, _ in line}) and len(line) == len(losses)
        assert all((losses[first] < losses[second]) == (line[first][1] > line[second][1])
                   for first in range(4) for second in range(4))


def test_a_spike_of_a_long_curve_stays_visible() -> None:
    lines = [{"step": step, "loss": 9.0 if step == 12_345 else 1.0 + step % 7 / 1000} for step in range(30_000)]
    chart = loss_curve(lines)
    for drawing in drawings(chart):
        [line] = points(drawing, "raw")
        _, _, top, bottom = frame(drawing)
        assert len(line) <= 2 * 600 and min(y for _, y in line) < top + (bottom - top) / 8
    assert len(chart or "") < 60_000


def test_a_curve_without_points_is_not_plotted() -> None:
    assert loss_curve([]) is None and loss_curve([{"step": 1}]) is None


def test_smoothing_keeps_a_line_and_the_ends() -> None:
    line = [(float(x), 2.0 * x) for x in range(200)]
    assert all(smoothed == pytest.approx(expected) for smoothed, expected in zip(smooth_curve(line), line, strict=True))


@pytest.mark.parametrize("kinds", KINDS)
def test_a_tuning_curve_is_inside_its_axes(kinds: dict[str, list[tuple[str, float, float]]]) -> None:
    timed = [setting for settings in kinds.values() for setting in settings if setting[1] > 0]
    for drawing in drawings(recall_over_time(kinds)):
        positions = dots(drawing)
        titles = [title.text for title in drawing.iter("title")]
        assert titles == [f"{name}: {recall:.3f} in {format_number(time)} ms" for name, time, recall in timed]
        assert len(positions) == len(timed) == sum(map(len, points(drawing, "line")))
        assert_inside(drawing, positions)
        for (x, y), (_, time, recall) in zip(positions, timed, strict=True):
            assert all((time < other[1]) <= (x <= a) and (recall < other[2]) <= (y >= b)
                       for (a, b), other in zip(positions, timed, strict=True))


def test_a_tuning_of_one_point_is_not_plotted() -> None:
    assert recall_over_time({}) is None and recall_over_time({"images": [("all", 0.3, 0.9)]}) is None


@pytest.mark.parametrize("counts", [[0, 3, 0, 9, 1, 0], [5], [0, 0, 1]])
def test_bars_are_as_high_as_their_counts(counts: list[int]) -> None:
    filled = [place for place, count in enumerate(counts) if count]
    shown = counts[filled[0]:filled[-1] + 1]
    for drawing in drawings(histogram(counts, -1, 1, "scores")):
        _, _, top, bottom = frame(drawing)
        bars = points(drawing, "bar")
        assert len(bars) == len(shown) == len(list(drawing.iter("title")))
        for bar, count in zip(bars, shown, strict=True):
            assert_inside(drawing, bar)
            height = max(y for _, y in bar) - min(y for _, y in bar)
            assert height == pytest.approx((bottom - top) * count / max(shown), abs=0.25)
    assert histogram([0, 0], -1, 1, "scores") is None


def every_chart() -> list[str]:
    lines = [{"step": step, "loss": 1 / (1 + step)} for step in range(3000)]
    return [str(chart) for chart in (loss_curve(lines), histogram([1, 2, 3], 0, 1, "scores"),
                                     recall_over_time(KINDS[1]))]


def test_equal_input_gives_equal_bytes_in_every_process() -> None:
    code = ("import hashlib; from tests_charts import every_chart; "
            "print(hashlib.sha256(''.join(every_chart()).encode()).hexdigest())")
    code = code.replace("from tests_charts import every_chart", (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('charts_', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "every_chart = module.every_chart"))
    hashes = {subprocess.run([sys.executable, "-c", code, __file__], check=True, capture_output=True, text=True).stdout
              for _ in range(2)}
    assert len(hashes) == 1 and every_chart() == every_chart()


def test_charts_are_safe_inside_of_a_page() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    kinds = {hostile: [(hostile, 0.5, 0.9), ("b", 0.6, 1.0)]}
    for chart in (*every_chart(), str(recall_over_time(kinds)), str(histogram([1], 0, 1, hostile))):
        assert "<script" not in chart and "url(" not in chart and "<style" not in chart and "xmlns" not in chart
        assert "http" not in chart and "<?xml" not in chart and "<!DOCTYPE" not in chart
        for drawing in drawings(chart):
            ids = {element.get("id") for element in drawing.iter()}
            assert all(use.get("href", "")[1:] in ids for use in drawing.iter("use"))
    assert any(hostile in (text.text or "") for text in drawings(recall_over_time(kinds))[0].iter("text"))


def test_charts_have_the_colors_of_the_page() -> None:
    css = (charts.__file__.rpartition("/")[0] + "/report.css")
    with open(css) as file:
        light = file.read().partition("@media")[0]
    assert dict(re.findall(r"--(\w+): (#\w{6});", light)).items() >= plot_style.COLORS.items()
    for chart in every_chart():
        assert "var(--accent)" in chart and not re.search(r"#[0-9a-f]{6}\b(?!\")", chart)


def test_settings_of_matplotlib_neither_matter_nor_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib
    before = every_chart()
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        settings: dict[str, Any] = dict(matplotlib.rcParams)
        assert every_chart() == before and dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("command", ["import jobs.report.report, jobs.evaluation.plot, jobs.planning.plan_table",
                                     "from jobs.cli import main; import contextlib\n"
                                     "with contextlib.suppress(SystemExit): main.main(['--help'])"])
def test_matplotlib_is_loaded_only_for_plots(command: str) -> None:
    code = f"{command}\nimport sys; assert not {{'matplotlib', 'jinja2'}} & sys.modules.keys(), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
