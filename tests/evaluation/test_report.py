"""The report: numbers that come back, and a page that loads nothing and trusts nothing."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from amulet_gguf.evaluation.report import html, markdown, write_table
from amulet_gguf.evaluation.table import ALL, Result
from amulet_gguf.evaluation.text_measures import MEASURES

HOSTILE = '<script>alert("x")</script> | $\\frac{1}{2}$ & "q\''


def results(*methods: str) -> list[Result]:
    return [
        Result(method, preference, measure, 0.125 + i, 0.0 + i, 0.25 + i, 9)
        for i, method in enumerate(methods)
        for preference in (ALL, "concise")
        for measure in ("words", "echo", "reward", "likelihood")
    ]


ABOUT = {"model": HOSTILE, "command": "amulet eval"}
ANSWERS = [
    {"question": HOSTILE, "preference": "concise", "method": method, "text": HOSTILE}
    for method in ("base", "amulet")
]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_tables_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [*results("a", HOSTILE), Result("a", ALL, "grade", math.nan, math.nan, math.nan, 0)]
    write_table(tmp_path, rows)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        found = [
            Result(
                row["method"],
                row["preference"],
                row["measure"],
                float(row["value"] or "nan"),
                float(row["low"] or "nan"),
                float(row["high"] or "nan"),
                int(row["n"]),
            )
            for row in csv.DictReader(file)
        ]
    assert repr(found) == repr(rows)
    listed = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert listed[-1]["value"] is None
    assert [row["method"] for row in listed] == [row.method for row in rows]


def test_markdown_has_every_number_and_explains_every_measure() -> None:
    text = markdown(results("base", "amulet"), ABOUT, MEASURES)
    for name in ("words", "echo", "reward", "likelihood"):
        assert MEASURES[name].limits in text
    assert text.count("| amulet |") >= 2
    rows = [line for line in text.splitlines() if line.startswith("| amulet")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


@pytest.mark.parametrize("methods", [("base",), ("base", "amulet"), tuple(f"m{i}" for i in range(12))])
def test_the_page_loads_nothing_and_runs_nothing(methods: tuple[str, ...]) -> None:
    text = html(results(*methods, HOSTILE), ABOUT, MEASURES, ANSWERS)
    page = Page()
    page.feed(text)
    assert "svg" in page.tags
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert text == html(results(*methods, HOSTILE), ABOUT, MEASURES, ANSWERS)


def test_nothing_but_nan_is_a_page_too() -> None:
    empty = [Result("a", ALL, "echo", math.nan, math.nan, math.nan, 0)]
    assert "<html" in html(empty, {}, MEASURES, [])
    assert markdown(empty, {}, MEASURES)
