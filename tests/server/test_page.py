"""The page in a real browser, against a real server."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixture_types import Tiny
from serving import Running, is_free, serving, until

from amulet_gguf.preferences import PRESETS
from amulet_gguf.prompts.sandbox import CHATML
from amulet_gguf.server.guard import Access
from amulet_gguf.settings import Settings
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
    page = browser.new_context().new_page()
    complaints: list[str] = []
    foreign: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith(server.url) else None)
    page.goto(server.url)
    page.get_by_role("button", name="concise").wait_for()
    yield page
    page.context.close()
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


def kept(page: Any) -> list[dict[str, Any]]:
    """Return the conversations in the browser's storage, the newest first."""
    found = page.evaluate("Object.entries(localStorage)")
    prefix = "amulet.conversation."
    all_of_them = [json.loads(value) for key, value in found if key.startswith(prefix)]
    return sorted(all_of_them, key=lambda each: -each["changed"])


def written(page: Any, turn: int = -1) -> str:
    """Return an answer as the model wrote it: formatted, it looks different."""
    answer = kept(page)[0]["turns"][turn]["answers"][-1]
    return "".join(piece["text"] for piece in answer["pieces"])


def stub(
    page: Any, *texts: str, reason: str = "stop", moved: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Answer as a model that writes these texts, one for each question; return the requests.

    `moved`: words that a preference is said to have moved.
    """
    bodies: list[dict[str, Any]] = []

    def event(choice: dict[str, Any], **more: Any) -> str:
        chunk = {
            "id": "x",
            "choices": [{"index": 0, "finish_reason": None, "delta": {}, **choice}],
            **more,
        }
        return f"data: {json.dumps(chunk)}\n\n"

    def explained(word: str) -> dict[str, Any]:
        far = 1.5 if word in moved else 0.0
        others = [{"token": 1, "text": word, "probability": 0.8, "prompted": 0.1}]
        return {"shade": far / 2, "changed": far > 0, "divergence": far, "alternatives": others}

    def answer(route: Any) -> None:
        if route.request.method != "POST":
            route.fulfill(status=404, body="{}")
            return
        text = texts[len(bodies) % len(texts)]
        bodies.append(route.request.post_data_json)
        words = re.findall(r"\w+|\s+|[^\w\s]+", text)
        parts = [event({"delta": {"content": word}, "amulet": explained(word)}) for word in words]
        usage = {"completion_tokens": len(words)}
        body = [*parts, event({"finish_reason": reason}, usage=usage), "data: [DONE]\n\n"]
        route.fulfill(status=200, content_type="text/event-stream", body="".join(body))

    page.route("**/v1/chat/completions", answer)
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
    second = written(page)
    page.get_by_role("button", name="B is better").click()
    page.get_by_text("1 choice: ").wait_for()
    (choice,) = open_taste("mine").choices
    named = {PRESETS.get(text, text) for text in asked}
    assert {choice.better.prefer, choice.worse.prefer} == named
    assert choice.better.text == second
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
    old = written(page)
    move(page, 9)
    for _ in range(500):
        if len(bodies) > 1:
            break
        page.wait_for_timeout(20)  # the browser's events come meanwhile
    wait_for_end(page)
    assert bodies[1]["prediction"]["content"] == old
    assert bodies[1]["strength"] == 9
    assert bodies[1]["prefer"] == bodies[0]["prefer"]
    assert bodies[1]["messages"] == bodies[0]["messages"]
    assert page.locator(".turn").count() == 1
    new = written(page)
    assert new
    assert new != old
    ask(page, "And then?")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    assert bodies[2]["messages"][1]["content"] == new

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
        content = written(page)
        ask(page, "And then?")
        page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
        said = bodies[1]["messages"][1]
        assert said["reasoning_content"].strip() == thought.strip()
        assert said["content"] == content
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
    token = page.locator(".text span.moved").first
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


# The server's key and defaults


def test_a_key_is_asked_for_and_kept_for_the_visit(browser: Any, tiny: Tiny) -> None:
    with serving(tiny("llama"), Access(api_key="secret")) as running:
        page = browser.new_page()
        page.goto(running.url)
        field = page.get_by_label("This server asks for its key")
        field.fill("guessed")
        field.press("Enter")
        field = page.get_by_label("Wrong key")
        field.fill("señor €")  # a header cannot carry it
        field.press("Enter")
        page.get_by_label("Wrong key").fill("secret")
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("button", name="concise").wait_for()
        assert page.locator("#unlock").is_hidden()
        limit(page, 5)
        ask(page)
        wait_for_end(page)
        page.reload()
        page.get_by_role("button", name="concise").wait_for()
        page.close()


def test_what_the_server_does_by_itself_is_shown_and_done(browser: Any, tiny: Tiny) -> None:
    prefer: list[str | tuple[str, float]] = ["concise", ("Write for a child.", 0.5)]
    settings = Settings(
        prefer=prefer, strength=3.0123, avoid="Lists.", system="Be kind.", temperature=0.5, max_tokens=9
    )
    with serving(tiny("llama"), settings=settings) as running:
        page = browser.new_page()
        page.goto(running.url)
        page.get_by_role("button", name="concise", pressed=True).wait_for()
        assert page.get_by_label("Weight of Write for a child.").input_value() == "0.5"
        assert page.get_by_label("Strength").input_value() == "3"
        assert page.get_by_label("Avoid").input_value() == "Lists."
        page.get_by_role("button", name="Settings").click()
        shown = {"System prompt": "Be kind.", "Temperature": "0.5", "Length": "9"}
        for label, text in shown.items():
            assert page.get_by_label(label).get_attribute("placeholder") == text
        with page.expect_request("**/v1/chat/completions") as caught:
            ask(page)
        page.get_by_text("9 tokens").wait_for()  # or fewer, were its length not the server's
        body = caught.value.post_data_json
        assert body["strength"] == 3.0123  # which the slider cannot show
        assert body["prefer"][1] == {"text": "Write for a child.", "weight": 0.5}
        assert not {"max_tokens", "temperature"} & body.keys()
        assert [message["role"] for message in body["messages"]] == ["user"]
        page.close()


def test_settings_go_before_the_servers_and_are_kept(page: Any) -> None:
    bodies = stub(page, "Yes.")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Length").fill("33")
    page.get_by_label("Length").blur()
    ask(page)
    wait_for_end(page)
    page.reload()
    page.locator(".turn").first.wait_for()  # it is shown again once the server has told of itself
    ask(page, "Again")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    for body in bodies:
        assert (body["temperature"], body["max_tokens"]) == (0.7, 33)
        assert [each["role"] for each in body["messages"]].count("system") == 1
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_the_slider_is_off_while_it_means_nothing(page: Any) -> None:
    slider = page.get_by_label("Strength")
    assert slider.is_disabled()
    page.get_by_role("button", name="concise").click()
    assert slider.is_enabled()
    page.get_by_role("button", name="concise").click()
    assert slider.is_disabled()
    page.get_by_label("Avoid").fill("Lists.")
    assert slider.is_enabled()


# What is kept


def reopen(page: Any) -> None:
    page.reload()
    page.get_by_role("button", name="concise").wait_for()


def menu(page: Any, title: str, what: str) -> None:
    """Choose from the menu of a conversation."""
    page.get_by_label(f"What to do with {title}").click()
    page.get_by_role("button", name=what).locator("visible=true").click()


def titles(page: Any) -> list[str]:
    found: list[str] = page.locator("#shelf .title").all_text_contents()
    return found


def open_list(page: Any) -> None:
    button = page.get_by_role("button", name="Conversations", exact=True)
    if button.get_attribute("aria-expanded") == "false":
        button.click()


def test_a_conversation_survives_a_reload(page: Any) -> None:
    bodies = stub(page, "A **plain** word.", "Another.", moved=["plain"])
    page.get_by_role("button", name="formal").click()
    page.get_by_label("Weight of formal").fill("0.5")
    move(page, 4)
    ask(page)
    wait_for_end(page)
    before = page.locator(".turn").inner_text()
    reopen(page)
    assert page.locator(".turn").inner_text() == before
    assert page.locator(".text strong span.changed").inner_text() == "plain"
    page.locator(".text span.changed").hover()
    assert "80.0 %" in page.locator("#why").inner_text()
    assert page.get_by_label("Strength").input_value() == "4"
    ask(page, "And then?")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    contents = [message["content"] for message in bodies[1]["messages"]]
    assert contents == ["How are you?", "A **plain** word.", "And then?"]
    assert bodies[1]["prefer"] == bodies[0]["prefer"]


def test_a_reload_in_the_middle_keeps_what_was_written_and_can_go_on(page: Any) -> None:
    limit(page, 1500)
    ask(page)
    page.locator(".text span").nth(5).wait_for()
    reopen(page)
    begun = written(page)
    assert begun
    page.unroute("**/v1/chat/completions")
    bodies = limit(page, 10)
    page.get_by_role("button", name="Continue").click()
    wait_for_end(page)
    assert bodies[0]["messages"][-1] == {"role": "assistant", "content": begun}
    assert written(page).startswith(begun)
    assert len(written(page)) > len(begun)


def test_conversations_are_listed_renamed_and_deleted_with_a_way_back(page: Any) -> None:
    stub(page, "Yes.")
    for question in ("First", "Second"):
        page.get_by_role("button", name="New conversation").click()
        ask(page, question)
        wait_for_end(page)
    open_list(page)
    assert titles(page) == ["Second", "First"]
    menu(page, "First", "Rename")
    page.get_by_label("Name of the conversation").fill("Number <b>one</b>")
    page.keyboard.press("Enter")
    assert titles(page) == ["Second", "Number <b>one</b>"]
    page.get_by_role("button", name="Number").first.click()
    assert page.locator(".question").all_inner_texts() == ["First"]
    menu(page, "Number <b>one</b>", "Delete")
    assert titles(page) == ["Second"]
    assert page.locator(".turn").count() == 0
    page.get_by_role("button", name="Undo").click()
    assert page.locator(".question").all_inner_texts() == ["First"]
    menu(page, "Second", "Delete")
    reopen(page)
    assert titles(page) == ["Number <b>one</b>"]
    assert [each["title"] for each in kept(page)] == ["Number <b>one</b>"]


def test_a_conversation_that_is_deleted_while_it_is_written_stays_deleted(page: Any) -> None:
    limit(page, 1500)
    ask(page)
    page.locator(".text span").nth(2).wait_for()
    open_list(page)
    menu(page, "How are you?", "Delete")
    page.get_by_role("button", name="Send", disabled=False).wait_for()
    page.wait_for_timeout(100)  # the answer's end comes meanwhile
    assert kept(page) == []


def test_a_conversation_that_is_left_while_it_is_written_keeps_what_there_is(page: Any) -> None:
    limit(page, 1500)
    ask(page)
    page.locator(".text span").nth(2).wait_for()
    page.get_by_role("button", name="New conversation").click()
    open_list(page)
    page.get_by_role("button", name="How are you?", exact=True).click()
    page.get_by_role("button", name="Continue").wait_for()
    assert written(page)


def test_conversations_become_files(page: Any) -> None:
    stub(page, "A **bold** word.")
    ask(page, "What?\nTell me.")
    wait_for_end(page)
    open_list(page)
    with page.expect_download() as caught:
        menu(page, "What?", "Export as Markdown")
    assert caught.value.suggested_filename == "What.md"
    text = Path(caught.value.path()).read_text("utf-8")
    assert text == "# What?\n\n## Question\n\nWhat?\nTell me.\n\n## Answer\n\nA **bold** word.\n"
    with page.expect_download() as caught:
        page.get_by_role("button", name="Export as JSON").click()
    exported = json.loads(Path(caught.value.path()).read_text("utf-8"))
    assert exported["turns"][0]["question"] == "What?\nTell me."
    assert "".join(piece["text"] for piece in exported["turns"][0]["answers"][0]["pieces"])


DAMAGED = [
    "", "{", "null", "[]", "7", '{"id":"x"}', '{"id":"x","turns":[{}]}', '{"id":"x","turns":[null]}',
    '{"id":"x","turns":[{"question":1,"answers":[]}]}', '{"id":"y","turns":[]}',
    '{"id":"x","turns":[],"style":{"prefer":3}}', '{"id":"x","turns":[],"style":"concise"}',
    '{"id":"x","turns":[{"question":"q","answers":[{"pieces":[null]}]}]}',
]  # fmt: skip


def test_damaged_entries_are_passed_over(page: Any) -> None:
    stub(page, "Yes.")
    ask(page, "Good")
    wait_for_end(page)
    for i, text in enumerate(DAMAGED):
        text = text.replace('"x"', f'"x{i}"')
        page.evaluate(f"localStorage.setItem('amulet.conversation.x{i}', {json.dumps(text)})")
    odd = {"pieces": [{"text": 5, "divergence": "far", "shade": {}, "alternatives": [3, [1, "a"]]}]}
    turn = {"question": ["q"], "chosen": 9, "isPair": True, "answers": [odd, odd]}
    style = {"prefer": [{"text": ""}, {"text": "concise", "weight": "much"}], "strength": "full"}
    odd_one = json.dumps({"id": "odd", "title": 5, "style": style, "turns": [turn]})
    page.evaluate(f"localStorage.setItem('amulet.conversation.odd', {json.dumps(odd_one)})")
    page.evaluate("localStorage.setItem('amulet.settings', '[1')")
    page.evaluate("localStorage.setItem('amulet.display', '7')")
    reopen(page)
    assert titles(page) == ["Good", "Untitled"]
    page.get_by_role("button", name="Untitled", exact=True).click()
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Still there?")
    wait_for_end(page)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "for (const kind of ['localStorage', 'sessionStorage']) Object.defineProperty(window, kind,"
            " { get() { throw new DOMException('no', 'SecurityError'); } });",
            "keeps nothing",
        ),
        (
            "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); };",
            "is full",
        ),
    ],
    ids=["forbidden", "full"],
)
def test_without_storage_the_page_works_and_says_so(page: Any, script: str, said: str) -> None:
    page.add_init_script(script)
    reopen(page)
    stub(page, "Yes.", moved=["Yes"])
    ask(page)
    wait_for_end(page)
    ask(page, "Again")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    open_list(page)
    assert said in page.get_by_role("alert").locator("visible=true").inner_text()
    assert titles(page) == ["How are you?"]
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("button", name="How are you?", exact=True).click()
    assert page.locator(".turn").count() == 2


def test_a_full_storage_gives_up_shades_before_texts(page: Any) -> None:
    stub(page, " ".join(["moved"] * 300), moved=["moved"])
    ask(page, "Old")
    wait_for_end(page)
    page.evaluate(
        "(() => { for (let n = 2 ** 22; n >= 1; n = n >> 1) try { for (let i = 0; ; i++)"
        " localStorage.setItem(`x${n}.${i}`, '.'.repeat(n)); } catch {} })()"
    )
    page.get_by_role("button", name="New conversation").click()
    page.unroute("**/v1/chat/completions")
    stub(page, "A short one.", moved=["short"])
    ask(page, "New")
    wait_for_end(page)
    assert page.locator("#trouble").is_hidden()
    new, old = kept(page)
    assert len(new["turns"][0]["answers"][0]["pieces"]) > 1
    assert [len(piece["text"]) for piece in old["turns"][0]["answers"][0]["pieces"]] == [300 * 6 - 1]


def test_two_windows_do_not_disturb_each_other(page: Any) -> None:
    stub(page, "Yes.")
    ask(page, "First")
    wait_for_end(page)
    other = page.context.new_page()
    other.goto(page.url)
    other.get_by_role("button", name="concise").wait_for()
    assert other.locator(".turn").count() == 0
    open_list(other)
    menu(other, "First", "Delete")
    page.get_by_text("Ask something").wait_for()
    assert titles(page) == []
    other.close()


# Formatted answers

MARKDOWN = """\
# Title

Some **bold** and `inline code`, and [a link](https://example.org/a?b=c).

1. one
2. two &amp; \\* three

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return "text"
```
"""

HOSTILE = """\
<img src=x onerror="alert(1)"><script>alert(2)</script><svg onload=alert(3)>

![pixel](https://evil.example/pixel.png) ![data](data:image/svg+xml,<svg/onload=alert(4)>)

[a](javascript:alert(5)) [b](JaVaScRiPt&colon;alert(6)) [c](data:text/html,<script>alert(7)</script>)
<javascript:alert(8)> [d](vbscript:x) [e](//evil.example) [f][g] <https://evil.example/auto>

[g]: javascript:alert(9)

```html"><img src=x onerror=alert(10)>
</code></pre><script>alert(11)</script><style>@import "https://evil.example"</style>
```

```__proto__
x
```

<style>body { display: none }</style><base href="https://evil.example"><iframe src="https://evil.example">
"""


def test_markdown_is_formatted_and_shaded_at_once(page: Any) -> None:
    stub(page, MARKDOWN, moved=["bold", "inline", "two", "text", "link"])
    ask(page)
    wait_for_end(page)
    text = page.locator(".text")
    assert text.locator("h3").inner_text() == "Title"
    assert text.locator("strong span.changed").inner_text() == "bold"
    assert text.locator("p code").inner_text() == "inline code"
    assert text.locator("li").all_inner_texts() == ["one", "two & * three"]
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    assert text.locator("pre").inner_text() == 'def f(x):\n    return "text"\n'
    assert text.locator(".hljs-keyword").all_inner_texts() == ["def", "return"]
    assert text.locator(".hljs-string span.changed").inner_text() == "text"
    link = text.get_by_role("link", name="a link")
    assert link.get_attribute("href") == "https://example.org/a?b=c"
    assert "noopener" in (link.get_attribute("rel") or "")
    assert text.locator("span.changed").count() == 5
    page.get_by_label("Formatted").uncheck()
    assert text.inner_text() == MARKDOWN
    assert text.locator("span.changed").count() == 5


def test_hostile_markdown_does_nothing(page: Any) -> None:
    # That nothing foreign is asked for and nothing complains is seen to by the fixture.
    dialogs: list[str] = []

    def dismiss(dialog: Any) -> None:
        dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    stub(page, HOSTILE)
    ask(page, HOSTILE)
    wait_for_end(page)
    reopen(page)
    open_list(page)
    page.wait_for_timeout(100)
    assert dialogs == []
    inside = page.locator("main, nav")
    for tag in ("img", "script", "style", "svg", "iframe", "base", "object", "link", "form"):
        assert inside.locator(tag).count() == 0
    hrefs = inside.locator("a").evaluate_all("links => links.map((link) => link.href)")
    assert sorted(hrefs) == ["https://evil.example/auto", "https://evil.example/pixel.png"]
    handlers = (
        "nodes => nodes.flatMap((node) => node.getAttributeNames()).filter((n) => n.startsWith('on'))"
    )
    assert inside.locator("*").evaluate_all(handlers) == []
    assert "alert(1)" in page.locator(".text").inner_text()


def test_what_is_written_stays_as_it_is_while_more_comes(page: Any) -> None:
    same = page.evaluate(
        "(() => { const box = document.createElement('div');"
        " const show = (text) => { const painter = new Painter([{ text }]);"
        "   markdown.show(box, painter.source, painter); };"
        " show('# One\\n\\ntwo'); const first = box.firstChild;"
        " show('# One\\n\\ntwo *three*\\n\\nfour');"
        " return [box.firstChild === first, box.children.length, box.children[1].innerText]; })()"
    )
    assert same == [True, 3, "two three"]


# What can be done with an answer


def test_copying_gives_what_was_written(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    stub(page, "Some **bold**\n\n```js\nlet x;\n```\n")
    ask(page)
    wait_for_end(page)
    for name, text in {
        "Copy the question": "How are you?",
        "Copy the answer": "Some **bold**\n\n```js\nlet x;\n```\n",
        "Copy the code": "let x;\n",
    }.items():
        button = page.get_by_role("button", name=name)
        button.click()
        button.get_by_text("Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == text


def test_a_question_is_edited_and_the_talk_goes_on_from_there(page: Any) -> None:
    bodies = stub(page, "One.", "Two.", "Three.")
    for i, question in enumerate(("First", "Second")):
        ask(page, question)
        page.locator(".turn").nth(i).get_by_text("tokens,").wait_for()
    page.get_by_role("button", name="Edit the question").first.click()
    box = page.get_by_label("The question, edited")
    assert box.input_value() == "First"
    box.fill("Another first")
    box.press("Enter")
    page.get_by_text("Three.").wait_for()
    wait_for_end(page)
    assert page.locator(".question").all_inner_texts() == ["Another first"]
    assert [each["content"] for each in bodies[2]["messages"]] == ["Another first"]
    page.get_by_role("button", name="Undo").click()
    assert page.locator(".question").all_inner_texts() == ["First", "Second"]
    reopen(page)
    assert page.locator(".text").all_inner_texts() == ["One.", "Two."]


def test_an_answer_is_regenerated_with_a_way_back(page: Any) -> None:
    bodies = stub(page, "One.", "Two.")
    ask(page)
    wait_for_end(page)
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("Two.").wait_for()
    page.get_by_role("button", name="Undo").click()
    assert page.locator(".text").all_inner_texts() == ["One."]
    assert written(page) == "One."
    assert bodies[0]["messages"] == bodies[1]["messages"]


def test_an_answer_that_was_cut_off_is_gone_on_with(page: Any) -> None:
    bodies = stub(page, "Once upon", " a time.", reason="length")
    ask(page)
    page.get_by_text("cut at the limit").wait_for()
    page.get_by_role("button", name="Continue").click()
    page.get_by_text("Once upon a time.").wait_for()
    assert bodies[1]["messages"][-1] == {"role": "assistant", "content": "Once upon"}
    page.unroute("**/v1/chat/completions")
    bodies = stub(page, "Fine.")
    ask(page, "And then?")
    page.locator(".turn").nth(1).get_by_text("tokens,").wait_for()
    assert bodies[0]["messages"][1]["content"] == "Once upon a time."
    assert page.get_by_role("button", name="Continue").locator("visible=true").count() == 0


# Keyboard and room


def test_tokens_are_walked_with_arrow_keys_and_are_no_stops_of_tab(page: Any) -> None:
    stub(page, "One red and one blue word.", moved=["red", "blue"])
    ask(page)
    wait_for_end(page)
    assert page.locator(".text [tabindex='0']").count() == 0
    focused = "document.activeElement.textContent"
    walk = page.get_by_role("button", name="Walk through the changes")
    walk.press("Enter")
    assert page.evaluate(focused) == "red"
    assert "nats" in page.locator("#why").inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")  # there is none
    assert page.evaluate(focused) == "blue"
    page.keyboard.press("Home")
    assert page.evaluate(focused) == "red"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.ariaLabel") == "Walk through the changes"
    assert walk.get_attribute("aria-pressed") == "false"
    assert page.locator("#why").is_hidden()


def test_conversations_are_managed_by_keyboard(page: Any) -> None:
    stub(page, "Yes.")
    ask(page, "Tides")
    wait_for_end(page)
    page.get_by_role("button", name="Conversations", exact=True).press("Enter")
    page.get_by_label("What to do with Tides").press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Control+A")
    page.keyboard.type("Moon")
    page.keyboard.press("Enter")
    assert titles(page) == ["Moon"]
    assert page.evaluate("document.activeElement.textContent") == "Moon"


def test_there_is_room_in_a_small_window(browser: Any, server: Running) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 420})
    page.goto(server.url)
    page.get_by_role("button", name="concise").wait_for()
    stub(page, MARKDOWN + "\n```\n" + "wide " * 100 + "\n```\n\n" + "long" * 200, moved=["bold"])

    def looks_right() -> bool:
        fits: bool = page.evaluate("document.documentElement.scrollWidth <= 380")
        box = page.get_by_label("Message").bounding_box()
        return fits and box["y"] >= 0 and box["y"] + box["height"] <= 420

    assert looks_right()
    ask(page)
    wait_for_end(page)
    assert looks_right()
    assert page.locator("main").bounding_box()["height"] > 200
    assert page.evaluate("document.querySelector('main').scrollWidth <= 380")
    page.get_by_role("button", name="Settings").click()
    assert looks_right()
    page.get_by_role("button", name="Settings").click()
    open_list(page)
    assert looks_right()
    page.get_by_role("button", name="How are you?", exact=True).click()
    assert page.locator("#shelf").is_hidden()
    page.close()


# How it is served


def test_the_page_needs_nothing_else(server: Running) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "trusted-types 'none'" in policy
    assert "unsafe" not in policy
    assert "'self'" not in policy.replace("connect-src 'self'", "")
    assert re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:)", answer.text) == []


def test_a_page_that_the_browser_has_is_not_sent_again(server: Running) -> None:
    first = httpx.get(server.url)
    again = httpx.get(server.url, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    other = httpx.get(server.url, headers={"if-none-match": '"other"'})
    assert other.text == first.text
