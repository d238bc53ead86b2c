"use strict";
// What the browser keeps: conversations, each under a key of its own, and settings.
//
// Storage can be forbidden or full, and can hold what something else has written. So what is true while the page is
// open stands in memory, and storage gets a copy of it where it takes one.
//
// conversation: { id, title, changed, style, turns }
// turn:         { question, isPair, chosen, answers }       chosen: number of the answer that is gone on from
// answer:       { kind, prefer, pieces, thought, seconds, reason, note, error }
//               kind: "realigned" or "base"; prefer: what one of a pair was written with;
//               reason: "stop", "length" or "stopped", "" while it is written
// piece:        { text, shade, changed, divergence, alternatives }
//               what realignment did to a token; no more than a text where it did nothing

const storage = (() => {
  const PREFIX = "amulet.conversation.";
  const conversations = new Map();
  let tellTrouble = () => {};

  function area(kind = "localStorage") {
    try { return window[kind]; } catch { return null; }
  }

  function read(key, kind) {
    try { return JSON.parse(area(kind).getItem(key)); } catch { return null; }
  }

  function write(key, value, kind) {
    try { area(kind).setItem(key, JSON.stringify(value)); return true; } catch { return false; }
  }

  /** Read all that is kept, and go on listening to other windows. */
  function open({ onTrouble, onChange }) {
    tellTrouble = onTrouble;
    for (const key of keys()) take(key);
    addEventListener("storage", ({ key }) => {
      if (!key?.startsWith(PREFIX)) return;
      const id = key.slice(PREFIX.length);
      conversations.delete(id);
      take(key);
      onChange(id);
    });
  }

  function keys() {
    try { return Object.keys(area()).filter((key) => key.startsWith(PREFIX)); } catch { return []; }
  }

  /** Take one conversation from storage. One that is damaged is passed over, and left where it is. */
  function take(key) {
    try {
      const conversation = revived(read(key));
      if (PREFIX + conversation.id === key) conversations.set(conversation.id, conversation);
    } catch { /* somebody else's, or cut off */ }
  }

  function save(conversation) {
    conversations.set(conversation.id, conversation);
    if (put(conversation)) return;
    if (!area()) { tellTrouble("This browser keeps nothing for this page"); return; }
    const older = list().reverse().filter((other) => other !== conversation);
    for (const each of [...older, conversation]) {  // room is made by what can be missed: why tokens were chosen
      if (!lighten(each)) continue;
      put(each);
      if (put(conversation)) return;
    }
    tellTrouble("This browser's storage is full");
  }

  const put = (conversation) => write(PREFIX + conversation.id, slim(conversation));

  function remove(id) {
    conversations.delete(id);
    try { area().removeItem(PREFIX + id); } catch { /* it was never there */ }
  }

  /** All conversations, the newest first. */
  function list() {
    return [...conversations.values()].sort((a, b) => b.changed - a.changed);
  }

  // Forms of a conversation

  function withAnswers(conversation, change) {
    const turns = conversation.turns.map((turn) => ({ ...turn, answers: turn.answers.map(change) }));
    return { ...conversation, turns };
  }

  /** Return a copy in which pieces that nothing moved are one text. */
  function slim(conversation) {
    return withAnswers(conversation, (answer) => ({ ...answer, pieces: merged(answer.pieces, isMoved) }));
  }

  /** Drop all but the texts of a conversation; return whether there was anything to drop. */
  function lighten(conversation) {
    const answers = conversation.turns.flatMap((turn) => turn.answers);
    const heavy = answers.filter((answer) => answer.pieces.some(isMoved));
    for (const answer of heavy) answer.pieces = merged(answer.pieces, () => false);
    return heavy.length > 0;
  }

  function merged(pieces, isKept) {
    const found = [];
    let plain = null;
    for (const piece of pieces) {
      if (isKept(piece)) {
        found.push(piece);
        plain = null;
      } else if (plain) {
        plain.text += piece.text;
      } else {
        plain = { text: piece.text };
        found.push(plain);
      }
    }
    return found;
  }

  /** Return a conversation of what was read, with everything of its type. Throws if it is none. */
  function revived({ id, title, changed, style, turns }) {
    if (typeof id !== "string" || !Array.isArray(turns)) throw new TypeError("no conversation");
    return {
      id, title: string(title) || "Untitled", changed: number(changed),
      style: style && revivedStyle(style),
      turns: turns.map(revivedTurn),
    };
  }

  function revivedStyle({ prefer, avoid, strength }) {
    const texts = prefer.map(({ text, weight }) => ({ text: string(text), weight: number(weight) }));
    return { prefer: texts.filter(({ text }) => text), avoid: string(avoid), strength: number(strength) };
  }

  function revivedTurn({ question, isPair, chosen, answers }) {
    if (!answers.length) throw new TypeError("a turn without an answer");
    return {
      question: string(question), isPair: isPair === true, chosen: chosen in answers ? number(chosen) : null,
      answers: answers.map(revivedAnswer),
    };
  }

  function revivedAnswer(answer) {
    return {
      kind: answer.kind === "base" ? "base" : "realigned", prefer: string(answer.prefer),
      pieces: answer.pieces.map(revivedPiece), thought: string(answer.thought), seconds: number(answer.seconds),
      reason: string(answer.reason) || "stopped",  // the page was left while it was written
      note: answer.reason ? string(answer.note) : "stopped", error: string(answer.error),
    };
  }

  function revivedPiece({ text, shade, changed, divergence, alternatives }) {
    if (divergence === undefined) return { text: string(text) };
    const rows = Array.isArray(alternatives) ? alternatives.filter(Array.isArray) : [];
    return {
      text: string(text), shade: number(shade), changed: changed === true, divergence: number(divergence),
      alternatives: rows.map(([other, ...shares]) => [string(other), ...shares.map(number)]),
    };
  }

  function string(value) {
    return typeof value === "string" ? value : "";
  }

  function number(value) {
    return Number.isFinite(value) ? value : 0;
  }

  return {
    open, save, remove, list, read, write,
    get: (id) => conversations.get(id),
    has: (id) => conversations.has(id),
  };
})();

/** Tell whether realignment moved a token so far that there is something to see. */
function isMoved(piece) {
  return piece.changed || piece.divergence > 0.01;
}
