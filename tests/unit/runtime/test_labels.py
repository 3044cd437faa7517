"""Label files: what Ultralytics accepts gives its boxes, everything else is named by line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from yolo_compress.runtime.measure import labels
from yolo_compress.runtime.measure.labels import label_path

ROW = b"1 0.5 0.5 0.25 0.5\n"

BAD_ROWS = [
    (b"2 .5 .5 .1 .1", "class 2 is outside 0..1"),
    (b"-1 .5 .5 .1 .1", "class -1 is outside 0..1"),
    (b"0.5 .5 .5 .1 .1", "class 0.5 is no whole number"),
    (b"cat .5 .5 .1 .1", "'cat' is no number"),
    (b"nan .5 .5 .1 .1", "'nan' is no finite number"),
    (b"0 nan .5 .1 .1", "'nan' is no finite number"),
    (b"0 .5 .5 inf .1", "'inf' is no finite number"),
    (b"0 .5 .5 1e999 .1", "'1e999' is no finite number"),
    (b"0 .5 .5 0_1 .1", "'0_1' is no finite number"),
    (b"0 .5 .5 .1", "4 columns instead of 5"),
    (b"0 .5 .5 .1 .1 .9", "6 columns instead of 5"),
    (b"0,.5,.5,.1,.1", "1 columns instead of 5"),
    (b"0 1.02 .5 .1 .1", "1.02 is outside 0..1"),
    (b"0 .5 -.02 .1 .1", "-.02 is outside 0..1"),
    (b"0 320 240 50 60", "320 is outside 0..1"),
    (b"0 .5 .5 -.005 .1", "negative size -.005 x .1"),
    (b"0 .5 .5 0 .1", "box without area"),
]


@pytest.mark.fault(14)
@pytest.mark.parametrize(("row", "what"), BAD_ROWS, ids=[row.decode() for row, _ in BAD_ROWS])
def test_bad_row_is_named_by_line(row: bytes, what: str) -> None:
    assert labels.parse(ROW + b"\n" + row + b"\n" + ROW, 2).findings == [(3, what)]


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("row", "what"),
    [
        (ROW, "a box in a file of polygons; Ultralytics rejects the mix"),
        (b"0 .1 .1 .2 .2 .3", "6 columns, a polygon has a class and at least three x y pairs"),
        (b"0 .1 .1 .2 .2 .3 .3 .4", "8 columns, a polygon has a class and at least three x y pairs"),
        (b"0 .1 .1 .1 .2 .1 .3", "box without area"),
        (b"0 .1 .1 1.1 .2 .1 .3", "1.1 is outside 0..1"),
    ],
)
def test_bad_row_among_polygons(row: bytes, what: str) -> None:
    assert labels.parse(b"0 .1 .1 .2 .2 .1 .3\n" + row, 2).findings == [(2, what)]


def test_polygons_become_the_boxes_of_ultralytics() -> None:
    (box,) = labels.parse(b"1 0.1 0.2 0.5 0.9 0.3 0.4 0.2 0.3\n", 2).boxes
    assert box == pytest.approx((1, 0.3, 0.55, 0.4, 0.7))


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    "data", [b"\xef\xbb\xbf1 0.5 0.5 0.25 0.5\r\n", b"1\t0.5\t0.5\t0.25\t0.5", b"\n\n 1.0  .5 .5 .25 5e-1 \r\n\r\n"]
)
def test_bom_crlf_tabs_and_blanks_are_no_fault(data: bytes) -> None:
    assert labels.parse(data, 2) == labels.Labels([(1, 0.5, 0.5, 0.25, 0.5)])


def test_rounding_of_annotation_tools_is_clipped() -> None:
    assert labels.parse(b"0 1.01 -0.005 0.1 1.009", 2).boxes == [(0, 1.0, 0.0, 0.1, 1.0)]


@pytest.mark.fault(14)
def test_repeated_rows_are_dropped_with_a_note() -> None:
    got = labels.parse(ROW + b"0 .1 .1 .1 .1\n" + b"1 .5 .50 .25 .5\n", 2)
    assert (len(got.boxes), got.findings, got.notes) == (2, [], [(3, "same as line 1, dropped")])


def test_polygons_that_share_a_box_are_both_kept() -> None:
    assert len(labels.parse(b"0 .1 .1 .3 .1 .3 .3 .1 .3\n0 .1 .1 .3 .1 .1 .3 .3 .3\n", 2).boxes) == 2


@pytest.mark.fault(14)
def test_binary_junk_huge_and_wholly_wrong_files() -> None:
    assert labels.parse(ROW + b"\x80\x02}q\x00.", 2).findings == [(2, "not UTF-8 text (byte 0x80)")]
    million = labels.parse(ROW * 1_000_000, 2)
    assert (million.boxes, million.findings) == ([], [(10_001, "1000000 rows, over the 10000 that one image may have")])
    wrong = labels.parse(b"9 .5 .5 .1 .1\n" * 500, 2).findings
    assert (len(wrong), wrong[-1]) == (21, (20, "and 480 more in this file"))


def test_pose_rows_keep_their_box() -> None:
    assert labels.parse(b"1 .5 .5 .25 .5 .1 .1 2 .2 .2 2", 2, pose_columns=6).boxes == [(1, 0.5, 0.5, 0.25, 0.5)]


@pytest.mark.parametrize(
    "path",
    ["/d/images/train/a.jpg", "/images/x/images/b.c.png", "/d/pics/a.jpg", "/images2/a.png", "/d/images/a.tar.jpg"],
)
def test_label_path_is_ultralytics_rule(path: str) -> None:
    a, b = os.sep + "images" + os.sep, os.sep + "labels" + os.sep
    assert str(label_path(Path(path))) == b.join(path.rsplit(a, 1)).rsplit(".", 1)[0] + ".txt"
