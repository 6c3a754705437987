"""Charts: they go through their points, long ones are thinned, and colours are left to the page."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from algorithms.common.charts import MAX_POINTS, compact, curve, heat_cells, heatmap, plot_curve, smoothed, thin


def drawn(x, y, **options) -> dict[str, np.ndarray]:
    """Data of the lines on the axes, by their class; "ylim" besides."""
    axes = Figure().add_subplot()
    plot_curve(axes, x, y, **options)
    return {str(line.get_gid()): line.get_xydata() for line in axes.lines} | {"ylim": np.array(axes.get_ylim())}


def test_a_curve_goes_through_its_points():
    shown = drawn([0, 50, 100], [0.0, 1.0, 0.5], is_rate=True)
    assert shown.keys() == {"curve", "point", "ylim"}
    for kind in ("curve", "point"):
        np.testing.assert_array_equal(shown[kind], [[0, 0], [50, 1], [100, 0.5]])
    assert shown["ylim"].tolist() == [0, 1]
    assert drawn([1, 2], [5e-6, 5e-6])["ylim"] == pytest.approx([4.5e-6, 5.5e-6])  # a constant lies in the middle
    assert drawn([1, 2], [0.0, 0.0])["ylim"].tolist() == [-1, 1]
    assert drawn([7], [3.0]).keys() == {"point", "ylim"}


def test_long_curves_are_thinned_and_smoothed():
    x, y = list(range(1000)), [i % 2 for i in range(1000)]
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= MAX_POINTS
    assert (thin_x[0], thin_y[0]) == (1.0, pytest.approx(1 / 3))
    assert thin_y[-1] == 1.0  # the last group has one member
    assert [part.tolist() for part in thin([1, 2], [3, 4])] == [[1, 2], [3, 4]]
    assert smoothed([0.0] * 39) is None
    smooth = smoothed([0.0] * 40 + [3.0] + [0.0] * 39)
    assert smooth is not None
    assert smooth[37:44] == pytest.approx([0, 0.6, 0.6, 0.6, 0.6, 0.6, 0])
    assert smoothed(np.ones(80)) == pytest.approx(np.ones(80))  # also at the ends
    shown = drawn(x, y)
    assert shown.keys() == {"raw", "curve", "ylim"}
    np.testing.assert_array_equal(shown["raw"][:, 1], thin_y)


def test_a_heatmap_joins_columns_and_leaves_gaps():
    rows = {7: [1.0] * 60 + [0.0] * 60 + [None] * 60, 2: [None, 0.5, 1.0] * 60}
    values, edges = heat_cells(rows, [10.0 * (i + 1) for i in range(180)])
    np.testing.assert_array_equal(values[0], [1.0] * 20 + [0.0] * 20 + [np.nan] * 20)
    np.testing.assert_array_equal(values[1], [0.75] * 60)
    np.testing.assert_array_equal(edges, np.arange(61) * 30.0)


def test_cells_are_the_darker_the_more_is_solved():
    picture = heatmap({0: [0.0, 0.5, None], 3: [1.0, 1.0, 1.0]}, [100.0, 200.0, 300.0], "success by task")
    (cells,) = re.findall(r'<g class="cells">(.*?)</g>', picture, re.DOTALL)
    styles = re.findall(r'style="([^"]*)"', cells)
    assert all("fill: var(--good)" in styles[i] for i in (0, 1, 3, 4, 5))
    assert "fill: none" in styles[2]
    opacities = [float(found[1]) if (found := re.search(r"fill-opacity: ([\d.]+)", s)) else 1.0 for s in styles]
    assert opacities[:2] == [pytest.approx(0.06, abs=0.005), pytest.approx(0.53, abs=0.005)]
    assert opacities[3:] == [1, 1, 1]


def test_a_picture_brings_no_colour_no_style_sheet_and_no_name_of_another_s():
    pictures = [curve([0, 50, 100], [0.0, 1.0, 0.5], name, is_rate=True) for name in ("env/a", "env/b")]
    assert pictures[0] != pictures[1]
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.attrib.keys() == {"viewBox", "role", "aria-label"}
        assert not re.search(r"#[0-9a-f]{6}\b|<style|xmlns|https?:", picture)
        texts = [element.text for element in root.iter("text")]
        assert texts == ["0", "50", "100", "0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    names = [set(re.findall(r'id="([^"]+)"', picture)) for picture in pictures]
    assert names[0]
    assert not names[0] & names[1]


def test_numbers_are_short():
    numbers = (0, 0.042, 3e-05, 1.5, 480.25, 9999, 12345, 2457600, 3.2e9, -0.5)
    shown = "0 0.042 3e-05 1.5 480.2 9999 12.3k 2.46M 3.2G -0.5"
    assert " ".join(compact(n) for n in numbers) == shown
