"use strict";
// What is preferred is learned from choices, under one name: that of the profile it makes on the server.

const taste = (() => {
  const PATH = "/v1/tastes/mine";
  let learned = [];  // preferences with weights

  /** Return the two preferences to answer with next, and show what is known. */
  async function pair(signal) {
    const query = new URLSearchParams(style.ownTexts().map((text) => ["own", text]));
    const state = await (await server.get(`${PATH}?${query}`, signal)).json();
    show(state);
    return state.pair;
  }

  async function choose(messages, better, worse) {
    const candidate = (answer) => ({ text: textOf(answer), prefer: answer.prefer });
    const body = { messages, better: candidate(better), worse: candidate(worse), own: style.ownTexts() };
    show(null, "learning…");
    try {
      show(await (await server.post(PATH, body)).json());
      return true;
    } catch (error) {
      show(null, server.said(error));
      return false;
    }
  }

  function show(state, message) {
    if (state) learned = state.prefer;
    const found = learned.map((each) => `${each.text} ${each.weight}`).join(", ");
    const n = state?.choices ?? 0;
    const [note, use] = $("taste").children;
    note.textContent = message ?? `${n} choice${n === 1 ? "" : "s"}: ${found || "nothing is sure yet"}`;
    use.hidden = !learned.length;
    $("taste").hidden = !$("learn").checked;
  }

  function use() {
    style.setPreferences(learned);
    $("learn").checked = false;
    $("learn").dispatchEvent(new Event("change"));
  }

  function listen() {
    $("taste").querySelector("button").addEventListener("click", use);
    $("learn").addEventListener("change", () => {
      $("taste").hidden = true;
      if ($("learn").checked) pair().catch((error) => show(null, server.said(error)));
    });
  }

  return { isOn: () => $("learn").checked, pair, choose, show, listen };
})();
