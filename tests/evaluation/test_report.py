"""The grid's pixels, the curve, and that the page stands alone and holds what it should."""

from __future__ import annotations

import base64
import io
import json
import math
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from drwkv.evaluation.pictures import curve_svg, grid_image
from drwkv.evaluation.protocol import Evaluation, LabelledImages, evaluate
from drwkv.evaluation.report import save_grid, write_report

LOSSES = [(step, 2.0 / step) for step in range(1, 1001)]
RUN = {
    "checkpoint": Path("runs/demo/<7>"),
    "steps": np.int64(50),
    "guidance": {"scale": 1.5, "channels": None},
}


@pytest.fixture(scope="module")
def evaluation(digits) -> Evaluation:
    train, held_out = digits
    noise = np.random.default_rng(0).normal(0, 40, train.images[:200].shape)
    images = np.clip(train.images[:200] + noise, 0, 255).astype(np.uint8)
    return evaluate(LabelledImages(images, train.labels[:200]), train, held_out)


class Page(HTMLParser):
    """Collects elements and texts; fails on tags that do not nest."""

    VOID = frozenset({"meta", "img", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def embedded_images(page: Page) -> list[Image.Image]:
    prefix = "data:image/png;base64,"
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert all(source.startswith(prefix) for source in sources)
    return [
        Image.open(io.BytesIO(base64.b64decode(source[len(prefix) :], validate=True))) for source in sources
    ]


def test_the_page_parses_and_holds_the_images_the_numbers_and_the_curve(tmp_path, evaluation):
    files = write_report(tmp_path / "out", evaluation, losses=LOSSES, run=RUN, title="Digits & co")
    page = Page(files.html.read_text())
    pictures = embedded_images(page)
    assert len(pictures) == 1 + 10 + 1  # the grid, a strip a class, the nearest pairs
    np.testing.assert_array_equal(np.array(pictures[0]), np.array(Image.open(files.grid)))
    texts = " ".join(page.texts)
    for metric in evaluation.metrics.values():
        assert f"{metric.value:.4g}" in texts and f"{metric.floor:.4g}" in texts
    assert "Digits & co" in texts and "runs/demo/<7>" in texts
    assert len([tag for tag, _ in page.elements if tag == "polyline"]) == 2


def test_the_page_needs_no_script_and_nothing_from_outside(tmp_path, evaluation):
    text = write_report(tmp_path, evaluation, losses=LOSSES, run=RUN).html.read_text()
    assert {tag for tag, _ in Page(text).elements}.isdisjoint({"script", "link", "iframe", "object"})
    assert "url(" not in text and "@import" not in text
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"')


def test_the_json_holds_every_number_with_its_floor_and_the_run(tmp_path, evaluation):
    files = write_report(tmp_path, evaluation, losses=LOSSES, run=RUN)
    record = json.loads(files.json.read_text())
    assert set(record["metrics"]) == set(evaluation.metrics)
    for name, metric in evaluation.metrics.items():
        assert (record["metrics"][name]["value"], record["metrics"][name]["floor"]) == (
            metric.value,
            metric.floor,
        )
    assert record["run"] == {"checkpoint": "runs/demo/<7>", "steps": 50, "guidance": RUN["guidance"]}
    assert record["protocol"]["num_samples"] == 200
    assert set(record["per_class"]) == {str(c) for c in range(10)}
    assert record["near_copies"]["threshold"] == evaluation.copies.threshold


def test_a_run_that_json_cannot_hold_leaves_nothing_half_written(tmp_path, evaluation):
    for value in (math.nan, object()):
        with pytest.raises((ValueError, TypeError)):
            write_report(tmp_path / "out", evaluation, losses=LOSSES, run={"value": value})
    assert not (tmp_path / "out").exists()
    write_report(tmp_path / "out", evaluation, losses=LOSSES, run={})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grid.png",
        "report.html",
        "report.json",
    ]


def test_losses_that_are_not_finite_are_left_out_and_counted(tmp_path, evaluation):
    files = write_report(tmp_path, evaluation, losses=[*LOSSES, (1001, math.nan)], run={})
    assert "1000 steps (1 not finite, left out), the last at step 1000" in files.html.read_text()
    files = write_report(tmp_path, evaluation, losses=[], run={})
    assert "No curve: 0 finite losses" in files.html.read_text()
    files = write_report(tmp_path, evaluation, losses=[(5, 1.0), (5, 0.9)], run={})
    assert "No curve: 1 finite losses" in files.html.read_text()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_places_each_image_in_its_class_row_with_repeated_pixels(channels):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, channels)).astype(np.uint8)
    labels = np.array([2, 0, 2, 2, 0, 1, 2])
    picture = np.array(grid_image(images, labels, columns=3, scale=6))
    gap, height, width = 2, 24, 30
    margin = picture.shape[1] - 3 * (width + gap) - gap
    assert margin > 0 and picture.shape == (3 * (height + gap) + gap, picture.shape[1], 3)
    for row, members in enumerate([[1, 4], [5], [0, 2, 3]]):
        top = gap + row * (height + gap)
        for column in range(3):
            left = margin + gap + column * (width + gap)
            tile = picture[top : top + height, left : left + width]
            if column < len(members):
                expected = images[members[column]].repeat(6, 0).repeat(6, 1)
                np.testing.assert_array_equal(tile, np.broadcast_to(expected, tile.shape))
            else:
                assert (tile == 255).all()
        assert (picture[top : top + height, :margin] < 128).any(), "the label is written"


def test_names_widen_the_margin_and_no_labels_drop_it():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    labels = np.array([0, 1, 0, 1])
    plain = grid_image(images, None, columns=2, scale=2)
    numbered = grid_image(images, labels, columns=2, scale=2)
    named = grid_image(images, labels, columns=2, scale=2, names=["Siamese cat", "tench"])
    assert plain.width == 2 * 18 + 2 < numbered.width < named.width
    assert plain.height == 2 * 18 + 2


def test_tiny_images_are_enlarged_and_large_ones_left():
    assert grid_image(np.zeros((1, 8, 8, 1), np.uint8), None).width == 8 * 6 + 4
    assert grid_image(np.zeros((1, 256, 256, 3), np.uint8), None).width == 256 + 4


def test_save_grid_writes_a_png_that_reads_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    labels = np.array([0, 1, 0, 1])
    path = save_grid(images, labels, tmp_path / "deep" / "grid.png", columns=2, scale=3)
    np.testing.assert_array_equal(
        np.array(Image.open(path)), np.array(grid_image(images, labels, columns=2, scale=3))
    )
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: grid_image(np.zeros((2, 8, 8), np.uint8), None), r"uint8 \(2, 8, 8\)"),
        (lambda: grid_image(np.zeros((2, 8, 8, 1)), None), "float64"),
        (lambda: grid_image(np.zeros((0, 8, 8, 1), np.uint8), None), "1 or more"),
        (lambda: grid_image(np.zeros((2, 8, 8, 1), np.uint8), np.zeros(3, int)), r"labels of shape \(3,\)"),
        (lambda: grid_image(np.zeros((2, 8, 8, 1), np.uint8), None, columns=0), "columns=0"),
        (lambda: curve_svg([(1, 0.5), (2, math.nan)]), "1 finite points"),
    ],
)
def test_bad_pictures_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def polylines(svg: str) -> list[np.ndarray]:
    lines = [e.attrib["points"] for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("polyline")]
    return [np.array([[float(v) for v in point.split(",")] for point in line.split()]) for line in lines]


def test_the_curve_falls_with_the_loss_and_stays_in_its_frame():
    for points in (LOSSES, [(s, 3.0 - s) for s in range(10)], [(1, 0.5), (2, 0.5)], [(0, 10.0), *LOSSES]):
        values, smooth = polylines(curve_svg(points, width=700, height=200))
        for line in (values, smooth):
            assert 2 <= len(line) <= 400
            assert (np.diff(line[:, 0]) > 0).all() and (np.diff(line[:, 1]) >= 0).all()  # y counts downwards
            assert line.min() >= 0 and line[:, 0].max() <= 700 and line[:, 1].max() <= 200


def test_of_two_losses_of_one_step_the_last_counts():
    assert curve_svg([(1, 9.0), (1, 4.0), (2, 1.0)]) == curve_svg([(1, 4.0), (2, 1.0)])


def test_the_dark_line_is_the_mean_of_the_last_25th_of_the_points():
    losses = np.random.default_rng(0).uniform(1, 2, 200)
    values, smooth = polylines(curve_svg([(s, -loss) for s, loss in enumerate(losses)], height=1000))
    means = [
        values[max(0, end - 8) : end, 1].mean() for end in range(1, 201)
    ]  # 200 / 25 = 8; y is linear here
    np.testing.assert_allclose(smooth[:, 1], means, atol=0.2)
