"""Templates of files are bounded in time and memory, and harm nothing but themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from amulet_gguf.errors import PromptError, TemplateLimitError
from amulet_gguf.llama.gguf import read_header
from amulet_gguf.models.find import bundled_model
from amulet_gguf.prompts import sandbox
from amulet_gguf.prompts.sandbox import CHATML, Renderer

NOW = datetime(2026, 1, 2)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = "{{ 'x'.center(900000000) }}"
SAYS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def said(template: Renderer, text: str) -> str:
    return template.render([{"role": "user", "content": text}], NOW, {})


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A process that renders, for one test alone."""
    new = sandbox._Process()
    monkeypatch.setattr(sandbox, "_process", new)
    yield new
    new.close()


@pytest.mark.skipif(sys.platform != "linux", reason="where limits of memory are known to hold")
def test_bombs_are_refused_within_time_and_memory() -> None:
    """Every seventeenth of them, and of those that only time ends one: each takes two seconds."""
    program = """
        import json, resource, sys
        from datetime import datetime
        from bombs import BOMBS
        from amulet_gguf.errors import PromptError, TemplateLimitError
        from amulet_gguf.prompts import sandbox
        slow, allowed = 0, []
        for bomb in BOMBS[int(sys.argv[1])::17]:
            if "for b in" in bomb or "macro" in bomb or "lipsum" in bomb:
                slow += 1
                if slow > 1:
                    continue
            try:
                sandbox.Renderer(bomb).render([{"role": "user", "content": "x"}], datetime.now(), {})
                allowed.append(bomb)
            except PromptError as error:
                assert len(str(error)) < 400 and chr(10) not in str(error), error
        sandbox._process.close()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(json.dumps({"allowed": allowed, "peak": peak / 1024}))
    """
    support = Path(__file__).parent.parent / "support"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), "1"],
        env={**os.environ, "PYTHONPATH": str(support)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["allowed"] == []
    assert found["peak"] < 200  # MiB


@pytest.mark.parametrize(("bomb", "reason"), [(ENDLESS, "2 seconds"), (GREEDY, "192 MiB")])
def test_after_a_bomb_templates_render_as_before(process: Any, bomb: str, reason: str) -> None:
    template = Renderer(SAYS)
    with pytest.raises(TemplateLimitError, match=reason):
        said(Renderer(bomb), "boo")
    assert said(template, "é\ud800🙂\n") == "é\ud800🙂\n"


def test_folding_of_constants_counts_too(process: Any) -> None:
    with pytest.raises(TemplateLimitError):
        Renderer("{{ [1]|slice(99999999)|list|length }}")


def test_threads_get_what_they_asked_for(process: Any) -> None:
    template, wrong = Renderer(SAYS), []

    def ask(name: int) -> None:
        for i in range(20):
            text = f"{name} {i} " * 50
            if said(template, text) != text:
                wrong.append(text)
        if name == 1:
            with contextlib.suppress(TemplateLimitError):
                said(Renderer(ENDLESS), "")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_process_that_was_killed_is_started_anew(process: Any) -> None:
    template = Renderer(SAYS)
    process._running.kill()
    process._running.wait()
    assert said(template, "hello") == "hello"


def test_a_process_killed_at_work_ends_that_answer_alone(process: Any) -> None:
    template = Renderer(SAYS)
    threading.Timer(0.3, process._running.kill).start()
    with pytest.raises(TemplateLimitError, match="ended the process"):
        said(Renderer(ENDLESS), "")
    assert said(template, "hello") == "hello"


def test_what_an_interrupted_answer_left_is_not_the_next_one(
    process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = Renderer(SAYS)
    within = sandbox._within

    def interrupted(*arguments: Any) -> bytes:
        within(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "_within", interrupted)
    with pytest.raises(KeyboardInterrupt):
        said(template, "first")
    monkeypatch.setattr(sandbox, "_within", within)
    assert said(template, "second") == "second"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_one_of_its_own() -> None:
    program = f"""
        import os
        from datetime import datetime
        from amulet_gguf.prompts import sandbox
        template = sandbox.Renderer({SAYS!r})
        first = sandbox._process._running.pid
        def said(text):
            assert template.render([{{"role": "user", "content": text}}], datetime.now(), {{}}) == text
        child = os.fork()
        for i in range(50):
            said(f"{{child}} {{i}}")
        assert (sandbox._process._running.pid == first) == (child > 0)
        if child:
            assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(program)], check=True)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("ending", [None, signal.SIGKILL])
def test_no_process_stays(ending: signal.Signals | None) -> None:
    program = f"""
        import sys
        from amulet_gguf.prompts import sandbox
        sandbox.Renderer({SAYS!r})
        print(sandbox._process._running.pid, flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if ending is not None:
            parent.send_signal(ending)
        _, stderr = parent.communicate()
    assert stderr == b""
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text("utf-8"):
            return  # whoever adopted it has not looked
        threading.Event().wait(0.02)
    pytest.fail(f"process {pid} is still there")


def test_the_bundled_model_needs_no_process(process: Any) -> None:
    bundled = bundled_model()
    assert bundled is not None
    template = read_header(bundled).metadata["tokenizer.chat_template"]
    for source in (str(template), CHATML):
        assert hashlib.sha256(source.encode()).hexdigest() in sandbox._TRUSTED
        assert "hello" in said(Renderer(source), "hello")
    assert process._running is None


def test_an_application_that_is_not_python_is_not_started_again(
    process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/Writer/writer")
    assert said(Renderer(SAYS), "hello") == "hello"
    with pytest.raises(PromptError, match="refused to compute"):
        said(Renderer("{{ 'x' * 99999999 }}"), "hello")
    assert process._running is None
