"""Usage: python scripts/bench_server.py [MODEL]

What the server costs over the engine: the same answers, one and eight at a time, straight from it
and through HTTP, in turns within one run. The clients are a process of their own. Medians of 5 rounds.
The CPU time of the server's thread is told, too, for other programs disturb it least (not on Windows).
"""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
import threading
import time

from amulet_gguf.amulet import Amulet
from amulet_gguf.server.app import create_app
from amulet_gguf.server.guard import Access
from amulet_gguf.server.run import listening, make_server
from amulet_gguf.server.served import Served
from amulet_gguf.service.service import AmuletService
from amulet_gguf.settings import Settings

ROUNDS = 5
TOKENS = 64
PROMPT = "How do I ask for a raise?"
SETTINGS = Settings(prefer="concise", max_tokens=TOKENS, temperature=1.5, seed=1)

CLIENT = """
import http.client, json, sys, threading, time
port, n, body = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def run(found):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", body)
    answer = connection.getresponse()
    for line in answer:
        if b'"content":"' in line and b'"content":""' not in line:
            found.append(time.time())
for line in sys.stdin:
    times = [[] for _ in range(n)]
    threads = [threading.Thread(target=run, args=(each,)) for each in times]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(json.dumps(times), flush=True)
"""


def from_engine(service: AmuletService, n: int) -> float:
    """Return seconds per step of n answers, on the thread that makes the server's steps, too."""
    results: queue.SimpleQueue[float] = queue.SimpleQueue()
    # Stepping elsewhere would start a second pool of llama.cpp's threads, which fight the first.
    service._commands.put(lambda amulet: results.put(steps(amulet, n)))
    return results.get()


def steps(amulet: Amulet, n: int) -> float:
    """Return seconds per step, between the first and the last token that all of n answers write."""
    requests = [amulet.planner.request(PROMPT, None, SETTINGS) for _ in range(n)]
    generations = [amulet.engine.submit(request) for request in requests]
    while not all(generation.n_tokens for generation in generations):
        amulet.engine.step()
    begin, n_steps = time.perf_counter(), 0  # not tokens: the step that ends an answer may write none
    while not any(generation.is_finished for generation in generations):
        amulet.engine.step()
        n_steps += 1
    took = (time.perf_counter() - begin) / n_steps
    for generation in generations:
        amulet.engine.cancel(generation)
    return took


def main() -> None:
    with AmuletService(sys.argv[1] if len(sys.argv) > 1 else None, n_ctx=512, n_sequences=16) as service:
        amulet = service.wait_ready()
        firsts: list[float] = []
        advance = type(amulet.engine)._advance

        def noted(engine: object, generation, logits) -> None:  # type: ignore[no-untyped-def]
            before = generation.first_token_at
            advance(engine, generation, logits)  # type: ignore[arg-type]
            if before is None:
                firsts.append(time.time())

        type(amulet.engine)._advance = noted  # type: ignore[method-assign, assignment]
        with listening(Access(), 0) as listeners:
            is_ready = threading.Event()
            app = create_app(Served(service, "bench", n_sequences=16), Access())
            server = make_server(app, is_ready.set, lambda: None)
            thread = threading.Thread(target=server.run, args=(listeners,))
            thread.start()
            is_ready.wait()
            assert thread.ident is not None
            clock = time.pthread_getcpuclockid(thread.ident)
            asked = {
                "messages": [{"role": "user", "content": PROMPT}],
                "prefer": "concise",
                "stream": True,
            }
            asked |= {"max_tokens": TOKENS, "temperature": 1.5, "seed": 1}
            port = str(listeners[0].getsockname()[1])
            for n in (1, 8):
                arguments = [sys.executable, "-c", CLIENT, port, str(n), json.dumps(asked)]
                client = subprocess.Popen(
                    arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                assert client.stdin is not None
                assert client.stdout is not None
                engine, http, late, spent = [], [], [], []
                for _ in range(ROUNDS + 1):
                    engine.append(from_engine(service, n))
                    firsts.clear()
                    before = time.clock_gettime(clock)
                    client.stdin.write("go\n")
                    client.stdin.flush()
                    times = json.loads(client.stdout.readline())
                    spent.append((time.clock_gettime(clock) - before) / sum(map(len, times)))
                    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
                    counts = [sum(begin < t <= end for t in each) for each in times]
                    http.append((end - begin) / max(counts))
                    late += [
                        a - b for a, b in zip(sorted(e[0] for e in times), sorted(firsts), strict=True)
                    ]
                client.stdin.close()
                client.wait()
                ratios = [b / a for a, b in zip(engine[1:], http[1:], strict=True)]  # the first warms up
                result = {
                    "model": amulet.model.path.name,
                    "clients": n,
                    "engine_ms": round(statistics.median(engine[1:]) * 1e3, 2),
                    "http_ms": round(statistics.median(http[1:]) * 1e3, 2),
                    "overhead_percent": round((statistics.median(ratios) - 1) * 100, 1),
                    "server_thread_us_per_token": round(statistics.median(spent[1:]) * 1e6),
                    "first_byte_after_first_token_ms": round(max(late[n:]) * 1e3, 1),
                }
                print(json.dumps(result))
            server.should_exit = True
            thread.join()


main()
