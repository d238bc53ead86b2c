"""People as judges: the page in a real browser, and what its exports say."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from amulet_gguf.errors import BatchError
from amulet_gguf.evaluation.reading import (
    Group,
    make_groups,
    preferred_pairs,
    read_ranks,
    reader_values,
    write_page,
)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METHODS = ("prompting", "amulet", "strong")
ANSWERS = [
    (question, f"Question {question}?", "concise", method, f"{method} <b>answers</b> {question}")
    for question in range(2)
    for method in METHODS
]
GROUPS = make_groups(ANSWERS)


def writes(group: Group, method: str) -> str:
    return next(each for each, methods in group.methods.items() if method in methods)


def export(
    path: Path, said: Mapping[int, Sequence[Sequence[str]]], broken: Mapping[int, Sequence[str]] = {}
) -> None:
    """Write what the page would, of places of methods by group."""
    ranks = [
        {
            "group": GROUPS[i].id,
            "order": [[writes(GROUPS[i], method) for method in tied] for tied in order],
            "broken": [writes(GROUPS[i], method) for method in broken.get(i, ())],
        }
        for i, order in said.items()
    ]
    path.write_text(json.dumps({"format": "amulet-ranks", "reader": path.stem, "ranks": ranks}))


def measured(folder: Path) -> dict[tuple[int, str, str], float]:
    values = reader_values(GROUPS, read_ranks(folder), "prompting")
    found = [((v.question, v.method, v.measure), v.value) for v in values]
    assert len(dict(found)) == len(found)  # one value a cell: a table keeps the last
    return dict(found)


def test_wins_broken_ones_and_agreement_are_means_over_readers(tmp_path: Path) -> None:
    export(tmp_path / "ranks-a.json", {0: [["amulet"], ["prompting"], ["strong"]]}, {0: ["strong"]})
    export(tmp_path / "ranks-b.json", {0: [["amulet", "prompting"], ["strong"]]})
    assert measured(tmp_path) == {
        (0, "amulet", "read_wins"): 0.75,  # one win, one tie
        (0, "strong", "read_wins"): 0.0,
        (0, "prompting", "read_broken"): 0.0,
        (0, "amulet", "read_broken"): 0.0,
        (0, "strong", "read_broken"): 0.5,
        (0, "prompting", "read_agreement"): 0.5,  # about strong, not about amulet
        (0, "amulet", "read_agreement"): 0.5,
        (0, "strong", "read_agreement"): 1.0,
    }


def test_a_reader_who_exports_again_counts_once_as_last_said(tmp_path: Path) -> None:
    for age, order in ((10, ["amulet", "prompting", "strong"]), (5, ["prompting", "amulet", "strong"])):
        path = tmp_path / f"ranks-a ({age}).json"
        export(path, {0: [[method] for method in order]})
        content = {**json.loads(path.read_text()), "reader": "a"}
        path.write_text(json.dumps(content))
        os.utime(path, (1e9 - age, 1e9 - age))
    assert measured(tmp_path)[0, "amulet", "read_wins"] == 0
    assert (0, "amulet", "read_agreement") not in measured(tmp_path)


def test_a_group_that_a_reader_left_unfinished_does_not_count(tmp_path: Path) -> None:
    export(tmp_path / "ranks-a.json", {0: [["amulet"], ["prompting"]], 1: [list(METHODS)]})
    assert {question for question, _, _ in measured(tmp_path)} == {1}


def test_without_the_opponent_there_are_no_wins(tmp_path: Path) -> None:
    export(tmp_path / "ranks.json", {0: [list(METHODS)]})
    measures = {v.measure for v in reader_values(GROUPS, read_ranks(tmp_path), "nosuch")}
    assert measures == {"read_broken"}


def test_equal_answers_are_shown_once_and_share_their_place(tmp_path: Path) -> None:
    (group,) = make_groups(
        [(0, "Q", "concise", m, t) for m, t in zip("abc", ["x", "x ", "y"], strict=True)]
    )
    assert sorted(map(sorted, group.methods.values())) == [["a", "b"], ["c"]]
    x, y = writes(group, "a"), writes(group, "c")
    rank = {"group": group.id, "order": [[y], [x]], "broken": []}
    (tmp_path / "ranks.json").write_text(json.dumps({"format": "amulet-ranks", "ranks": [rank]}))
    wins = {
        v.method: v.value
        for v in reader_values([group], read_ranks(tmp_path), "a")
        if v.measure == "read_wins"
    }
    assert wins == {"b": 0.5, "c": 1.0}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": "other", "ranks": []}', '{"format": "amulet-ranks", "ranks": [{}]}',
     '{"format": "amulet-ranks", "ranks": [{"group": "g", "order": [[[]]], "broken": 3}]}',
     "[" * 100_000],
)  # fmt: skip
def test_a_file_that_the_page_did_not_export_is_refused_in_one_line(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "ranks-x.json").write_text(content)
    with pytest.raises(BatchError, match=r"ranks-x\.json is not what") as caught:
        read_ranks(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_page_names_no_method_and_runs_no_answer(tmp_path: Path) -> None:
    answers = [(0, "Q </script>", "concise", "secret-method", "</script><script>alert(1)</script>")]
    html = write_page(tmp_path, make_groups(answers)).read_text()
    assert "secret-method" not in html
    assert html.count("<script") == html.count("</script>") == 2


def test_what_readers_preferred_is_read_back_place_by_place(tmp_path: Path) -> None:
    write_page(tmp_path, GROUPS)
    export(tmp_path / "ranks-a.json", {0: [["amulet"], ["prompting", "strong"]]})
    export(tmp_path / "ranks-b.json", {1: [["strong"], ["amulet"], ["prompting"]]})
    export(tmp_path / "ranks-c.json", {1: [["strong"], ["amulet"], ["prompting"]]})
    export(tmp_path / "ranks-d.json", {1: [["prompting"], ["strong"], ["amulet"]]}, {1: ["strong"]})

    def text(question: int, method: str) -> str:
        return next(answer for q, _, _, m, answer in ANSWERS if (q, m) == (question, method))

    expected = [(0, "amulet", "prompting"), (0, "amulet", "strong")]
    expected += [(1, "strong", "amulet"), (1, "amulet", "prompting")]  # most, and not of what is broken
    assert sorted(preferred_pairs(tmp_path)) == sorted(
        (f"Question {q}?", text(q, better), text(q, worse)) for q, better, worse in expected
    )


def test_without_a_page_that_can_be_read_there_are_no_preferred_pairs(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="amulet eval --read writes it"):
        preferred_pairs(tmp_path)
    (tmp_path / "reading.html").write_text("<html>")
    with pytest.raises(BatchError, match="is damaged"):
        preferred_pairs(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_reader_ranks_with_the_keyboard_and_the_export_is_what_was_said(tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
    page = write_page(tmp_path, GROUPS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(accept_downloads=True)
        tab = context.new_page()
        complaints: list[str] = []
        tab.on("console", lambda m: complaints.append(m.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(page.as_uri())
        said = [rank_as(tab, "A = B", "A=BC"), rank_as(tab, "C > A", "CAb")]
        tab.keyboard.press("Backspace")
        tab.keyboard.press("b")  # changed their mind, and says the same
        tab.keyboard.press("Shift+B")
        tab.reload()  # nothing is lost
        tab.get_by_text("2 done").wait_for()
        tab.get_by_label("Your name").fill("An na")
        with tab.expect_download() as download:
            tab.get_by_role("button", name="Export").click()
        assert download.value.suggested_filename == "ranks-Anna.json"
        download.value.save_as(tmp_path / "ranks-Anna.json")
        browser.close()
    assert complaints == []
    (ranks,) = read_ranks(tmp_path)
    for texts, places in zip(said, ((0, 0, 1), (1, 2, 0)), strict=True):
        (group,) = (group for group in GROUPS if set(group.texts.values()) == set(texts))
        assert [ranks.places[group.id][writes_text(group, text)] for text in texts] == list(places)
    assert {writes_text(group, said[1][1])} == set(ranks.broken[group.id])


def writes_text(group: Group, text: str) -> str:
    return next(each for each, found in group.texts.items() if found == text)


def rank_as(tab: Any, expected: str, keys: str) -> list[str]:
    """Rank the group that is shown and go on to the next; return its answers as A, B, C."""
    answers: list[str] = tab.eval_on_selector_all(
        ".answer", "all => all.map(each => each.lastChild.textContent)"
    )
    for key in keys:
        tab.keyboard.press(key)
    assert expected in tab.text_content("#ranks")
    if "1 of" in tab.text_content("#progress"):
        tab.keyboard.press("Enter")
    return answers
