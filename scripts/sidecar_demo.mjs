// A program in another language that brings its own `amulet serve`: Node.js 18 or newer, no dependency.
//
//     node scripts/sidecar_demo.mjs [PROGRAM [ARGUMENT…]]
//
// They are what starts the server, such as `.venv/bin/amulet serve -m MODEL`; by default `amulet serve`.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const ADJUST_AT = 20; // tokens
const OPTIONS = ["--port", "0", "--ready-json", "--exit-with-parent", "--log-level", "warning"];
const [program = "amulet", ...parameters] = process.argv.slice(2);
if (parameters.length === 0) parameters.push("serve");

// The pipe to its stdin tells the server that this program is there: nothing is ever written to it.
const server = spawn(program, [...parameters, ...OPTIONS], { stdio: ["pipe", "pipe", "inherit"] });
const ended = once(server, "exit").then(([code, signal]) => signal ?? code);
const gone = ended.then((how) => {
  throw new Error(`the server has ended: ${how}`);
});

async function begun() {
  const [line] = await Promise.race([once(createInterface(server.stdout), "line"), gone]);
  return JSON.parse(line);
}

/** Wait for the model; it is loaded while the server listens. */
async function loaded(url) {
  for (let shown; ; await sleep(100)) {
    const health = await fetch(`${url}/health`).catch(() => gone);
    if (health.ok) return;
    const percent = Math.round((await health.json()).progress * 100);
    if (percent !== shown) console.error(`loading: ${percent} %`);
    shown = percent;
  }
}

async function request(method, url, body) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(url, { method, headers, body: JSON.stringify(body) });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

const ask = (url, body) => request("POST", `${url}/v1/chat/completions`, body);

/** Change the strength of an answer from its next token on; one that has just ended is refused. */
const adjust = (url, id, strength) => request("PATCH", `${url}/v1/chat/completions/${id}`, { strength });

/** Yield what a stream of server-sent events says; other lines are signs of life. */
async function* events(response) {
  let rest = "";
  for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + chunk).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function demo() {
  const { url, model } = await begun();
  await loaded(url);
  const messages = [{ role: "user", content: "How do I ask for a raise?" }];

  const whole = await ask(url, { messages, prefer: "concise", max_tokens: 40 });
  console.log(`${model}, concise:\n${(await whole.json()).choices[0].message.content}\n`);

  console.log("Uplifting, and more so while it is written:");
  const dial = { prefer: "uplifting", strength: 0, adjustable: true };
  let count = 0;
  for await (const piece of events(await ask(url, { messages, ...dial, max_tokens: 60, stream: true }))) {
    if (piece.error) throw new Error(piece.error.message);
    process.stdout.write(piece.choices[0].delta.content ?? "");
    if (++count === ADJUST_AT) {
      const { strength } = await (await adjust(url, piece.id, 3)).json();
      process.stdout.write(` [strength ${strength}] `);
    }
  }
  console.log();
}

try {
  await demo().finally(() => server.stdin.end()); // and with it the server
  console.log(`\nThe server has ended: ${await ended}`);
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
