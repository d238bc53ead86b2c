"""The page in a real browser, against a real server."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixture_types import Tiny
from serving import Running, is_free, serving, until

from amulet_gguf.preferences import PRESETS
from amulet_gguf.prompts.sandbox import CHATML
from amulet_gguf.server.guard import Access
from amulet_gguf.taste.taste import Candidate, Choice, Taste, open_taste

sync_api = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Running]:
    with serving(tiny("llama"), n_ctx=2048, max_tokens=1500) as running:
        engine = running.service.wait_ready().engine
        step = engine.step

        def slow() -> bool:  # as a model of a useful size
            time.sleep(0.02)
            return step()

        engine.step = slow  # type: ignore[method-assign]
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    page = browser.new_page()
    complaints: list[str] = []
    foreign: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith(server.url) else None)
    page.goto(server.url)
    page.get_by_role("button", name="concise").wait_for()
    yield page
    page.close()
    assert [text for text in complaints if "404" not in text] == []  # a change that came too late
    assert [url for url in foreign if not url.startswith("data:")] == []
    until(lambda: is_free(server.service))


def ask(page: Any, question: str = "How are you?") -> None:
    page.get_by_label("Message").fill(question)
    page.get_by_label("Message").press("Enter")


def wait_for_end(page: Any) -> None:
    page.get_by_text("tokens,").last.wait_for(timeout=60_000)


def limit(page: Any, tokens: int) -> list[dict[str, Any]]:
    """Make answers short; return the requests as they are made."""
    bodies: list[dict[str, Any]] = []

    def shorten(route: Any) -> None:
        if route.request.method != "POST":
            route.continue_()
            return
        body = route.request.post_data_json
        bodies.append(body)
        route.continue_(post_data={**body, "max_tokens": tokens})

    page.route("**/v1/chat/completions", shorten)
    return bodies


def test_a_question_gets_an_answer_and_a_history(page: Any) -> None:
    bodies = limit(page, 20)
    ask(page)
    wait_for_end(page)
    text = page.locator(".text").inner_text()
    assert text
    assert page.locator(".text span").count() > 5
    ask(page, "And then?")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    roles = [message["role"] for message in bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    ask(page, "Again")
    wait_for_end(page)
    assert len(bodies[2]["messages"]) == 1


def test_preferences_are_sent_with_their_weights(page: Any) -> None:
    bodies = limit(page, 8)
    page.get_by_role("button", name="concise").click()
    page.get_by_label("Weight of concise").fill("0.5")
    own = page.get_by_label("Add a preference of your own")
    own.fill("Write for a child: simply.")
    own.press("Enter")
    ask(page)
    wait_for_end(page)
    assert bodies[0]["prefer"] == [
        {"text": "concise", "weight": 0.5},
        {"text": "Write for a child: simply.", "weight": 1},
    ]
    page.get_by_label("Remove Write for a child: simply.").click()
    page.get_by_role("button", name="concise").click()
    ask(page)
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    assert bodies[1]["prefer"] == []


def test_what_to_avoid_is_sent_but_not_for_the_base(page: Any) -> None:
    bodies = limit(page, 8)
    page.get_by_label("Avoid").fill(" Long lists. ")
    page.get_by_label("Side by side").check()
    ask(page)
    page.get_by_text("tokens,").nth(1).wait_for()
    assert sorted(body.get("avoid", "") for body in bodies) == ["", "Long lists."]


def test_a_choice_between_two_teaches_a_taste_and_goes_on(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    monkeypatch.setattr(Taste, "pair", lambda _: (PRESETS["formal"], PRESETS["verbose"]))
    bodies = limit(page, 8)
    own = page.get_by_label("Add a preference of your own")
    own.fill("Write for a child: simply.")
    own.press("Enter")
    page.get_by_label("Two to choose from").check()
    page.get_by_text("0 choices: nothing is sure yet").wait_for()
    ask(page)
    page.get_by_role("button", name="B is better").wait_for()
    assert page.locator(".answer h2").all_inner_texts() == ["A", "B"]
    asked = [body["prefer"][0]["text"] if body["prefer"] else "" for body in bodies]
    assert asked[0] != asked[1]
    assert not any(body["explain"] for body in bodies)
    texts = page.locator(".text").all_inner_texts()
    page.get_by_role("button", name="B is better").click()
    page.get_by_text("1 choice: ").wait_for()
    (choice,) = open_taste("mine").choices
    named = {PRESETS.get(text, text) for text in asked}
    assert {choice.better.prefer, choice.worse.prefer} == named
    assert " ".join(choice.better.text.split()) == " ".join(texts[1].split())
    assert "Write for a child: simply." in choice.better.features
    assert page.get_by_role("button", name="is better").count() == 0
    page.get_by_label("Two to choose from").uncheck()
    ask(page, "And then?")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    assert bodies[2]["messages"][1]["content"] == choice.better.text


def test_what_was_learned_becomes_the_buttons(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    features = dict.fromkeys(PRESETS.values(), 0.0)
    for i, other in enumerate(("verbose", "creative", "complex") * 4):
        better = Candidate("x", features | {PRESETS["formal"]: 0.1}, PRESETS["formal"])
        worse = Candidate("y", features | {PRESETS[other]: 0.1}, PRESETS[other])
        open_taste("mine").add(Choice([{"role": "user", "content": str(i)}], better, worse))
    page.get_by_role("button", name="concise").click()
    page.get_by_label("Two to choose from").check()
    page.get_by_text("12 choices: formal 1").wait_for()
    page.get_by_role("button", name="Use it").click()
    bodies = limit(page, 4)
    ask(page)
    wait_for_end(page)
    assert [body["prefer"] for body in bodies] == [[{"text": "formal", "weight": 1}]]


def test_the_slider_acts_while_text_streams(page: Any, server: Running) -> None:
    limit(page, 1500)
    page.get_by_role("button", name="concise").click()
    ask(page)
    page.locator(".text span").nth(3).wait_for()
    with page.expect_response(lambda r: r.request.method == "PATCH") as caught:
        page.get_by_label("Strength", exact=True).fill("2")
    assert caught.value.json()["strength"] == 2
    assert "2.00" in page.locator("#amount").inner_text()
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()


def move(page: Any, strength: float) -> None:
    """Drag the slider and let go."""
    slider = page.get_by_label("Strength")
    slider.evaluate(
        "(node, value) => { node.value = value; for (const kind of ['input', 'change'])"
        " node.dispatchEvent(new Event(kind)); }",
        strength,
    )


def test_the_slider_after_an_answer_writes_it_again(page: Any) -> None:
    bodies = limit(page, 30)
    move(page, 3)
    assert bodies == []  # there is no answer
    page.get_by_role("button", name="concise").click()
    ask(page)
    wait_for_end(page)
    old = page.locator(".text").inner_text()
    move(page, 9)
    for _ in range(500):
        if len(bodies) > 1:
            break
        page.wait_for_timeout(20)  # the browser's events come meanwhile
    wait_for_end(page)
    assert bodies[1]["prediction"]["content"].strip() == old.strip()
    assert bodies[1]["strength"] == 9
    assert bodies[1]["prefer"] == bodies[0]["prefer"]
    assert bodies[1]["messages"] == bodies[0]["messages"]
    assert page.locator(".turn").count() == 1
    new = page.locator(".text").inner_text()
    assert new
    assert new != old
    ask(page, "And then?")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    assert bodies[2]["messages"][1]["content"].strip() == new.strip()

    page.get_by_role("button", name="concise").click()  # off: a strength means nothing
    move(page, 4)
    page.get_by_role("button", name="concise").click()
    assert len(bodies) == 3
    page.unroute("**/v1/chat/completions")  # long ones can be stopped
    before = page.locator(".text").nth(1).inner_text()
    move(page, 5)
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stop", disabled=True).wait_for()
    assert page.locator(".text").nth(1).inner_text() == before


def test_an_answer_that_cannot_be_written_again_stands(page: Any) -> None:
    limit(page, 10)
    page.get_by_role("button", name="concise").click()
    ask(page)
    wait_for_end(page)
    old = page.locator(".text").inner_text()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=404, body="{}"))
    move(page, 7)
    page.get_by_text("not written again").wait_for()
    assert page.locator(".text").inner_text() == old


def test_a_thought_is_folded(browser: Any, tiny: Tiny, tmp_path: Path) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text(CHATML.replace("assistant\n", "assistant\n<think>\n"), "utf-8")
    with serving(tiny("llama"), n_ctx=1024, chat_template=template) as running:
        page = browser.new_page()
        page.goto(running.url)
        bodies: list[dict[str, Any]] = []

        def shorten(route: Any) -> None:
            bodies.append(route.request.post_data_json)
            route.continue_(post_data={**bodies[-1], "max_tokens": 12, "think_tokens": 20})

        page.route("**/v1/chat/completions", shorten)
        page.get_by_role("button", name="concise").click()
        ask(page)
        wait_for_end(page)
        fold = page.locator("details.thought")
        assert re.fullmatch(r"Thought for \d+\.\d s", fold.locator("summary").inner_text())
        assert not fold.locator("div").is_visible()
        fold.locator("summary").click()
        thought = fold.locator("div").inner_text()
        assert len(thought) > 10
        assert thought not in page.locator(".text").inner_text()
        ask(page, "And then?")
        page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
        said = bodies[1]["messages"][1]
        assert said["reasoning_content"].strip() == thought.strip()
        assert said["content"].strip() == page.locator(".text").first.inner_text().strip()
        page.close()


def test_stop_ends_the_answer_and_keeps_it(page: Any, server: Running) -> None:
    limit(page, 1500)
    ask(page)
    page.locator(".text span").nth(3).wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()
    until(lambda: is_free(server.service))
    assert page.locator(".text").inner_text()
    assert page.get_by_role("button", name="Send").is_enabled()


def test_side_by_side_writes_both_at_once(page: Any) -> None:
    bodies = limit(page, 30)
    page.get_by_role("button", name="formal").click()
    page.get_by_label("Side by side").check()
    ask(page)
    for i in range(2):
        page.locator(".answer").nth(i).get_by_text("tokens,").wait_for()
    assert page.locator(".answer h2").all_inner_texts() == ["Base", "Realigned"]
    assert sorted(body["strength"] for body in bodies)[0] == 0
    assert all(page.locator(".text").all_inner_texts())
    assert page.locator(".text").nth(0).locator("span.changed").count() == 0


def test_tokens_are_shaded_and_explained(page: Any) -> None:
    limit(page, 40)
    page.get_by_role("button", name="concise").click()
    page.get_by_label("Strength").fill("5.65")
    ask(page)
    wait_for_end(page)
    token = page.locator(".text span[tabindex]").first
    token.hover()
    assert "nats" in page.locator("#why").inner_text()
    assert float(token.evaluate("node => getComputedStyle(node).getPropertyValue('--shade')")) > 0
    page.keyboard.press("Escape")
    assert page.locator("#why").is_hidden()
    shaded = token.evaluate("node => getComputedStyle(node).backgroundColor")
    page.get_by_label("Shade changes").uncheck()
    assert token.evaluate("node => getComputedStyle(node).backgroundColor") != shaded


def test_the_keyboard_is_enough(page: Any) -> None:
    limit(page, 1500)
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")

    def tab_to(test: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate(test):
                return
        raise AssertionError(test)

    tab_to("document.activeElement.textContent === 'concise'")
    page.keyboard.press("Space")
    assert page.get_by_role("button", name="concise").get_attribute("aria-pressed") == "true"
    tab_to("document.activeElement.id === 'strength'")
    before = page.locator("#amount").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#amount").inner_text() != before
    tab_to("document.activeElement.id === 'send'")
    page.keyboard.press("Enter")
    page.locator(".text span").nth(2).wait_for()
    assert page.locator(".question").inner_text() == "Hello\nthere"
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()


def test_what_looks_like_html_is_text(page: Any) -> None:
    limit(page, 5)
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    wait_for_end(page)
    assert page.locator(".question").inner_text() == "<img src=x onerror=alert(1)><b>bold</b>"
    assert page.locator("main img, main b").count() == 0


def test_errors_are_shown_and_can_be_tried_again(page: Any, server: Running) -> None:
    calls = []

    def fail_once(route: Any) -> None:
        calls.append(route)
        if len(calls) == 1:
            body = 'data: {"error":{"message":"the model is tired"}}\n\n'
            route.fulfill(status=200, content_type="text/event-stream", body=body)
        else:
            route.continue_(post_data={**route.request.post_data_json, "max_tokens": 5})

    page.route("**/v1/chat/completions", fail_once)
    ask(page)
    page.get_by_text("the model is tired").wait_for()
    page.get_by_role("button", name="Retry").click()
    wait_for_end(page)
    assert page.locator(".turn").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser: Any, server: Running, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme, viewport={"width": 360, "height": 640})
    page.goto(server.url)
    page.get_by_role("button", name="concise").wait_for()
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in colour.strip("rgb()").split(",")) / 3
    assert (brightness > 127) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.close()


def test_a_key_is_asked_for_and_kept_for_the_visit(browser: Any, tiny: Tiny) -> None:
    with serving(tiny("llama"), Access(api_key="secret")) as running:
        page = browser.new_page()
        page.goto(running.url)
        page.get_by_label("asks for its key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("button", name="concise").wait_for()
        limit(page, 5)
        ask(page)
        wait_for_end(page)
        page.close()


def test_the_page_needs_nothing_else(server: Running) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "://" not in answer.text
