"""Figures as SVG: colours of the page, ids of their own, nothing lost and nothing invented."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from fake_run import HOSTILE

from prefloop.report.drawing import PALETTE, _edges, describe, draw, legend
from prefloop.report.section import Heatmap, Histogram, Key, Lines, Point, Scatter, Series

SVG = "{http://www.w3.org/2000/svg}"
RISE = Series(name="rise", x=(0, 1, 2, 3), y=(1.0, 2.0, math.nan, 4.0))
FALL = Series(name="fall", x=(0, 3), y=(4.0, 1.0), low=(3.0, 0.0), high=(5.0, 2.0), dashed=True)
FIGURES = [
    Lines(title="Lines", x_label="step", y_label="nats", series=(RISE, FALL)),
    Lines(title="Logarithmic", series=(RISE, Series(name="no", x=(0, 1), y=(-1, 0))), log_y=True),
    Scatter(title="Scatter", points=(Point(name="a", x=1, y=2, x_error=0.1, y_error=math.nan),)),
    Heatmap(title="Heat", rows=("r", "s"), columns=("c",), values=((0.5,), (math.nan,))),
    Histogram(title="Histogram", values=(1.0, 2.0, 2.0, 5.0, math.nan), cut=2.0),
]
each_figure = pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)


def svg(figure, identity="figure-1") -> ElementTree.Element:
    return ElementTree.fromstring(draw(figure, identity, describe(figure)))


def path_of(figure: Lines, colour: int) -> str:
    """The path of the only line in a colour of the palette."""
    stroke = f"stroke: var(--series-{colour})"
    paths = [
        part.get("d")
        for part in svg(figure).iter(f"{SVG}path")
        if stroke in part.get("style", "") and "fill: none" in part.get("style", "")
    ]
    assert len(paths) == 1
    return paths[0]


@each_figure
def test_a_figure_is_named_described_and_scales(figure):
    root = svg(figure)
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == "figure-1-title figure-1-desc"
    assert root.find(f"{SVG}title").text == figure.title
    assert root.find(f"{SVG}desc").text == describe(figure)
    assert root.get("viewBox")
    assert root.get("width") is None


@each_figure
def test_the_same_figure_gives_the_same_text_and_another_id_shares_none(figure):
    assert draw(figure, "figure-1", "") == draw(figure, "figure-1", "")
    ids = [
        {part.get("id") for part in svg(figure, identity).iter()} - {None}
        for identity in ("figure-1", "figure-2")
    ]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])


@each_figure
def test_every_reference_has_its_target(figure):
    text = draw(figure, "figure-1", "")
    ids = set(re.findall(r'id="([^"]+)"', text))
    assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)) <= {
        pair for name in ids for pair in ((name, ""), ("", name))
    }


@each_figure
def test_colours_come_from_the_page(figure):
    text = draw(figure, "figure-1", "")
    assert "#0a0b" not in text
    assert "var(--muted)" in text
    colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", text))
    if not isinstance(figure, Heatmap):  # whose cells have a scale of their own
        assert colours == set()


def test_a_value_that_is_missing_is_a_gap():
    whole = Lines(title="l", series=(Series(name="s", x=(0, 1, 2, 3), y=(1, 2, 3, 4)),))
    gap = Lines(title="l", series=(RISE,))
    assert path_of(whole, 0).count("M") == 1
    assert path_of(gap, 0).count("M") == 2


def test_a_value_between_two_gaps_is_a_dot():
    def dots(*y: float) -> int:
        series = Series(name="s", x=(0, 1, 2, 3), y=y)
        return len(list(svg(Lines(title="l", series=(series,))).iter(f"{SVG}use")))

    assert dots(1, 2, 3, 4) == 0
    assert dots(1, 2, math.nan, 4) == 1
    assert dots(1, math.nan, 2, math.nan) == 2


def test_a_heat_map_labels_its_cells_and_leaves_the_missing_one_empty():
    texts = [part.text for part in svg(FIGURES[3]).iter(f"{SVG}text")]
    assert "0.5" in texts
    assert "NaN" not in texts


def test_a_large_heat_map_is_one_picture():
    values = tuple(tuple(float(row * column) for column in range(60)) for row in range(60))
    names = tuple(map(str, range(60)))
    text = draw(Heatmap(title="h", rows=names, columns=names, values=values), "figure-1", "")
    assert text.count("data:image/png;base64,") == 1
    assert len(text) < 100_000


def test_the_bins_of_a_histogram_part_at_the_cut_and_lose_nothing():
    values = np.random.default_rng(0).normal(size=500)
    for cut in (None, -1.3, 0.0, 2.0, 99.0):
        edges = _edges(values, cut)
        assert np.histogram(values, edges)[0].sum() == 500
        assert np.allclose(np.diff(edges), np.diff(edges)[0])
        if cut is not None and values.min() < cut < values.max():
            assert np.abs(edges - cut).min() < 1e-12
            kept = np.histogram(values, edges)[0][edges[:-1] >= cut - 1e-12].sum()
            assert kept == (values >= cut).sum()


def test_the_bars_that_are_kept_have_their_own_colour_at_the_cut_too():
    def kept(below: bool) -> int:
        figure = Histogram(title="h", values=(1.0, 2.0, 3.0, 4.0, 5.0), cut=3.0, below=below)
        heights = [
            abs(float(points[0][1]) - float(points[2][1]))
            for part in svg(figure).iter(f"{SVG}path")
            if "fill: var(--series-0)" in part.get("style", "")
            for points in [corners(part)]
        ]
        return round(sum(heights) / max(heights))  # each bar holds one value

    assert kept(below=False) == 3  # 3, 4, 5
    assert kept(below=True) == 3  # 1, 2, 3


def corners(bar: ElementTree.Element) -> list[list[str]]:
    return [corner.split() for corner in re.findall(r"[\d.]+ [\d.]+", bar.get("d"))]


def test_equal_values_make_a_histogram_too():
    assert "200 values from 3 to 3, median 3" in describe(Histogram(title="h", values=(3.0,) * 200))
    svg(Histogram(title="h", values=(3.0,) * 200, cut=3.0))


@pytest.mark.parametrize(
    "figure",
    [
        Lines(title="l", series=()),
        Lines(title="l", series=(Series(name="s", x=(), y=()),)),
        Lines(title="l", series=(Series(name="s", x=(1,), y=(math.nan,)),), log_y=True),
        Lines(title="l", series=(Series(name="s", x=(1e300,), y=(math.inf,)),)),
        Scatter(title="s", points=()),
        Heatmap(title="h", rows=(), columns=(), values=()),
        Heatmap(title="h", rows=("a",), columns=("b",), values=((math.nan,),)),
        Histogram(title="h", values=()),
        Histogram(title="h", values=(math.nan,), cut=1.0),
    ],
)
def test_a_figure_of_nothing_is_still_a_figure(figure):
    assert svg(figure).get("role") == "img"
    assert isinstance(describe(figure), str)


def test_names_in_any_script_and_markup_are_drawn_as_text():
    figure = Heatmap(title=HOSTILE, rows=(HOSTILE,), columns=("日本語 $x^2$",), values=((1.0,),))
    texts = "".join(part.text or "" for part in svg(figure).iter(f"{SVG}text"))
    assert "日本語 $x^2$" in texts
    assert "<script>window.pw" in texts


def test_the_legend_tells_apart_what_needs_it():
    assert legend(Lines(title="l", series=(RISE,))) == ()
    assert legend(FIGURES[0]) == (
        Key(name="rise", colour=0, mark=" "),
        Key(name="fall", colour=1, mark="dashed "),
    )
    own = (Key(name="mine"),)
    assert legend(Lines(title="l", series=(RISE, FALL), keys=own)) == own
    many = tuple(Point(name=str(place), x=0, y=0) for place in range(PALETTE + 1))
    assert legend(Scatter(title="s", points=many))[-1].colour == 0
    assert [key.name for key in legend(FIGURES[4])] == ["at or above 2", "below"]


def test_a_description_says_the_course_of_each_line():
    assert describe(FIGURES[0]) == "rise: 1 at 0, 4 at 3; fall: 4 at 0, 1 at 3"
    nothing = Lines(title="l", series=(Series(name="s", x=(1,), y=(math.nan,)),))
    assert describe(nothing) == "s: no finite value"
    assert describe(FIGURES[4]) == "4 values from 1 to 5, median 2, cut at 2"
