"""No pointer of llama.cpp is used when it was freed: whatever threads, collection, exit and forks do."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from fixture_types import Tiny

from amulet_gguf.errors import ClosedError, EngineError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.handle import Handle, Owner
from amulet_gguf.llama.model import Model, lib

SETUP = """
import gc, os, random, sys, threading, time
from amulet_gguf import Amulet, AmuletError, AmuletService, ClosedError, Settings
from amulet_gguf.engine.likelihood import Likelihood

path = sys.argv[1]
wrong = []

def repeat(act):
    try:
        while True:
            act()
    except ClosedError:
        pass
    except Exception as error:
        wrong.append(error)

def begin(amulet, service=None):
    model = amulet.model
    def score():
        with Likelihood(model, n_ctx=256, n_prompts=1, n_threads=1) as likelihood:
            likelihood.log_likelihood(model.tokenize("the people of"), model.tokenize("the world"))
    acts = [
        lambda: amulet.generate("What is time?", prefer="concise", strength=2, max_tokens=20),
        lambda: amulet.planner.request("How is it?", None, Settings(prefer="formal")),
        lambda: model.tokenize("the people of the world " * 500),
        lambda: model.special_texts() and model.metadata("general.name"),
        score,
    ]
    if service is not None:
        acts += 2 * [lambda: service.stream("Where?", prefer="concise", max_tokens=20).answer()]
    threads = [threading.Thread(target=repeat, args=(act,), daemon=True) for act in acts]
    for thread in threads:
        thread.start()
    return threads

def load():
    return Amulet.load(path, n_ctx=256, n_threads=1)
"""


def run(code: str, *arguments: str | Path) -> str:
    """Run a program in a process of its own, which may die; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SETUP + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_closing_while_threads_use_the_model_ends_what_they_do(tiny: Tiny) -> None:
    """Closed at some moment, all of them get ClosedError or were done, and the process lives."""
    run(
        """
chance = random.Random(1)
for _ in range(12):
    amulet, service = load(), AmuletService(path, n_ctx=256, n_threads=1)
    threads = begin(amulet, service)
    time.sleep(0.2 * chance.random())
    closing = [threading.Thread(target=each.close) for each in (amulet, service, amulet)]
    for thread in closing:
        thread.start()
    for thread in closing + threads:
        thread.join(20)
        assert not thread.is_alive()
assert not wrong, wrong
""",
        tiny("llama"),
    )


@pytest.mark.parametrize("what", ["all", "loading"])
def test_the_interpreter_ends_in_silence_while_threads_use_a_model(tiny: Tiny, what: str) -> None:
    begin = {
        "all": "kept = load(); begin(kept, AmuletService(path, n_ctx=256, n_threads=1))",
        "loading": "threading.Thread(target=repeat, args=(load,), daemon=True).start()",
    }[what]
    run(f"{begin}\nhalf = load().stream('x')\nnext(half)\ntime.sleep(0.1)", tiny("llama"))


def test_a_model_nobody_has_is_freed_when_its_answer_ends(tiny: Tiny) -> None:
    run(
        """
from amulet_gguf.llama.handle import in_use
def answer():
    for draft in (None, path):
        for _ in Amulet.load(path, n_ctx=256, n_threads=1, draft_model=draft).stream("x", max_tokens=9):
            gc.collect()
threads = [threading.Thread(target=answer) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
gc.collect()
assert len(in_use) == 0
""",
        tiny("llama"),
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_a_forked_process_is_refused_at_once_and_its_parent_goes_on(tiny: Tiny) -> None:
    printed = run(
        """
import warnings
warnings.simplefilter("ignore")  # of threads that are not copied: these are meant
def in_child(act):
    if child := os.fork():
        end = time.monotonic() + 20
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                os.kill(child, 9)
            time.sleep(0.002)
    try:
        act()
    except ClosedError as error:
        os._exit(1 if "forked" in str(error) else 3)
    except BaseException as error:
        os._exit(2)
    os._exit(0)

amulet, service = load(), AmuletService(path, n_ctx=16384, n_threads=1)
expected = amulet.generate("x", max_tokens=8).text
own, other = amulet.stream("x", max_tokens=8), service.stream("x", max_tokens=16000, min_tokens=16000)
next(own), next(other)
begin(load(), service)  # they hold locks now and then
refused = [
    lambda: amulet.generate("x"), lambda: list(own), load, lambda: amulet.model.tokenize("x"),
    lambda: service.stream("x"), lambda: list(other), service.wait_ready,
    lambda: service.look(lambda amulet: 1), lambda: service.work(lambda amulet: iter(())),
    lambda: amulet.compare("x", {"one": Settings()}),
]
allowed = [own.close, other.close, amulet.close, service.close, gc.collect]
assert [in_child(act) for act in refused] == [1] * len(refused)
assert [in_child(act) for act in allowed] == [0] * len(allowed)
assert in_child(lambda: (globals().pop("amulet"), globals().pop("own"), gc.collect())) == 0
list(own)
assert own.text == amulet.generate("x", max_tokens=8).text == expected
assert next(other) and not other.is_finished
print("whole")
""",
        tiny("llama"),
    )
    assert printed == "whole"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.parametrize("has_device", [False, True])
def test_who_looked_for_devices_and_found_some_cannot_be_forked(tiny: Tiny, has_device: bool) -> None:
    printed = run(
        f"""
from amulet_gguf.llama import model
model.lib.llama_supports_rpc = lambda: False
model.lib.llama_supports_gpu_offload = lambda: {has_device}
assert model.can_offload() is {has_device}
child = os.fork()
if not child:
    try:
        model.Model(path, n_gpu_layers=0).close()
    except ClosedError:
        os._exit(1)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""",
        tiny("llama"),
    )
    assert printed == str(int(has_device))


def test_a_spawned_process_has_a_model_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import concurrent.futures, multiprocessing, sys
from amulet_gguf import Amulet

def answer(path):
    with Amulet.load(path, n_ctx=256, n_threads=1) as amulet:
        return amulet.generate("x", max_tokens=8).text

if __name__ == "__main__":
    path = sys.argv[1]
    here = answer(path)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        assert pool.submit(answer, path).result() == here
        try:
            pool.submit(answer, "nothing.gguf").result()
        except FileNotFoundError as error:
            print(type(error).__name__)
"""
    )
    done = subprocess.run(
        [sys.executable, program, tiny("llama")], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == "ModelNotFoundError"


def test_a_handle_is_freed_once_when_the_last_call_has_returned() -> None:
    freed: list[int] = []
    owner = Owner(Handle(1, freed.append), "thing")
    call = owner.handle
    owner.close()
    owner.close()
    with pytest.raises(ClosedError, match="the thing is closed"):
        owner.handle  # noqa: B018
    assert freed == []
    del call
    assert freed == [1]


def test_what_a_handle_needs_is_freed_later_than_it() -> None:
    freed: list[int] = []
    for order in (1, -1):  # whichever the collector comes to first
        model = Handle(1, freed.append)
        handles = [model, Handle(2, freed.append, needs=model)]
        garbage: list[object] = [*handles[::order]]
        garbage.append(garbage)
        del model, handles, garbage
        gc.collect()
    assert freed == [2, 1, 2, 1]


def test_logits_outlive_their_context_and_a_context_its_model(tiny: Tiny) -> None:
    model = Model(tiny("llama"))
    context = Context(model, n_ctx=256, n_sequences=1, n_threads=1)
    context.add(0, np.array([3, 4, 5], np.int32), output=True)
    logits = context.decode()
    before = logits.copy()
    model.close()
    context.close()
    with Model(tiny("llama")) as other, Context(other, n_ctx=256, n_sequences=1, n_threads=1) as again:
        again.add(0, np.array([9], np.int32), output=True)
        again.decode()
        np.testing.assert_array_equal(logits, before)
    with pytest.raises(ClosedError):
        context.decode()


def test_an_error_that_is_kept_keeps_no_weights(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(tiny("llama"))
    freed = weakref.ref(model.handle)
    with monkeypatch.context() as patch:
        patch.setattr(lib, "llama_init_from_model", lambda *_: None)
        with pytest.raises(EngineError) as caught:
            Context(model, n_ctx=256, n_sequences=1, n_threads=1)
    model.close()
    assert freed() is None, caught.traceback
