"use strict";
// One answer, from the request to its last token.

const textOf = (answer) => answer.pieces.map((piece) => piece.text).join("");

const writing = (() => {
  const newAnswer = (kind, prefer = "") =>
    ({ kind, prefer, pieces: [], thought: "", seconds: 0, reason: "", note: "", error: "" });

  /** Return an answer as a message. */
  const said = (answer) => ({
    role: "assistant", content: textOf(answer), ...(answer.thought && { reasoning_content: answer.thought }),
  });

  /** Return the request for an answer. A draft is a text that it may be much like. */
  function request({ turn, answer, isRealigned, chosen }, messages, draft) {
    const common = { messages, stream: true, stream_options: { include_usage: true }, return_progress: true, ...settings.asked() };
    if (draft) common.prediction = { type: "content", content: draft };
    if (!isRealigned) return { ...common, strength: 0, prefer: [], avoid: "", explain: false };
    const prefer = chosen.map((each) => ({ text: each.text, weight: style.weight(each) }));
    return {
      ...common,
      strength: style.strength(),
      avoid: style.avoid(),
      prefer: answer.prefer ? [{ text: answer.prefer, weight: 1 }] : prefer,
      adjustable: true,
      explain: !turn.isPair,  // shades would tell the two apart
    };
  }

  /** Write an answer to its end, which never fails: the answer says how it ended. */
  async function write(stream, request, signal, onProgress) {
    const { answer, view } = stream;
    Object.assign(answer, { reason: "", note: "Reading…", error: "" });
    view.render();
    const begin = performance.now();
    try {
      const response = await server.post("/v1/chat/completions", request, signal);
      const { count, reason } = await read(stream, response, onProgress);
      const speed = count / ((performance.now() - begin) / 1000);
      answer.reason = reason || "stop";
      const end = reason === "length" ? "; cut at the limit" : "";
      answer.note = `${count} tokens, ${speed.toFixed(0)} per second${end}`;
    } catch (error) {
      answer.reason = "stopped";
      if (error.name === "AbortError") answer.note = "stopped"; else answer.error = server.said(error);
    }
    stream.id = null;
    endThought(stream);
    view.render();
  }

  /** Take what the server writes; return how many tokens there were, and why it ended. */
  async function read(stream, response, onProgress) {
    let count = 0, reason = "";
    for await (const event of server.events(response)) {
      stream.id = event.id;
      count = event.usage?.completion_tokens ?? count;
      if (event.prompt_progress) showProgress(stream, event.prompt_progress);
      const choice = event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      take(stream, choice);
      onProgress();
    }
    return { count, reason };
  }

  function showProgress({ answer, view }, { processed, total }) {
    if (processed >= total) return;
    answer.note = `Reading… ${Math.floor(100 * processed / total)} %`;
    view.update();
  }

  function take(stream, { delta, amulet }) {
    const { answer, view } = stream;
    if (delta.content || delta.reasoning_content) answer.note = "";
    if (delta.reasoning_content) {
      stream.thinkingSince ??= performance.now();
      answer.thought += delta.reasoning_content;
    }
    if (delta.content) {
      endThought(stream);
      answer.pieces.push({ text: delta.content, ...(amulet && moved(amulet)) });
    }
    view.update();
  }

  function endThought(stream) {
    if (!stream.thinkingSince) return;
    stream.answer.seconds = (performance.now() - stream.thinkingSince) / 1000;
    stream.thinkingSince = null;
  }

  /** Return what is kept of an explanation. */
  function moved({ shade, changed, divergence, alternatives }) {
    const short = (value) => Number(value.toFixed(4));
    const rows = alternatives.map((each) => [each.text, short(each.probability), short(each.prompted)]);
    return { shade: short(shade), changed, divergence: short(divergence), alternatives: rows };
  }

  /** Tell the server of a moved dial; the newest value goes out when the last one has arrived. */
  async function adjust(stream) {
    stream.isStale = true;
    if (stream.isAdjusting) return;
    stream.isAdjusting = true;
    while (stream.isStale && stream.id) {
      stream.isStale = false;
      const change = { strength: style.strength() };
      if (stream.chosen.length) change.weights = stream.chosen.map(style.weight);
      await server.patch(`/v1/chat/completions/${stream.id}`, change).catch(() => {});  // it has ended
    }
    stream.isAdjusting = false;
  }

  return { newAnswer, said, request, write, adjust };
})();
