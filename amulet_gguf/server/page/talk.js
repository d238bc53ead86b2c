"use strict";
// The conversation that is shown, and the answers being written in it.

const talk = (() => {
  const OPEN = "amulet.open";
  const SAVE_MS = 2000;     // what a reload in the middle of an answer may lose
  let conversation = null;  // none until the first question
  let running = null;       // { conversation, turn, streams, abort, isKept } while answers are written
  let onChange = () => {};  // of the list of conversations
  const shown = new Map();  // turn: { node, views }

  const lastTurn = () => conversation?.turns.at(-1);
  /** Return the answer that the conversation goes on from. */
  const kept = ({ isPair, chosen, answers }) => (isPair ? answers[chosen ?? 0] : answers.at(-1));

  // Conversations

  function create(question) {
    const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
    const title = question.split("\n", 1)[0].slice(0, 60);
    conversation = { id, title, changed: 0, style: null, turns: [] };
    remember();
  }

  /** Remember what this window shows, for when it is loaded again. */
  function remember() {
    storage.write(OPEN, conversation?.id ?? null, "sessionStorage");
  }

  function reopen() {
    const last = storage.get(storage.read(OPEN, "sessionStorage"));
    if (last && !conversation) open(last);
  }

  /** Show a conversation, or the beginning of a new one. */
  function open(next) {
    stop();
    running = null;
    conversation = next;
    remember();
    shown.clear();
    $("talk").replaceChildren($("empty"));
    for (const turn of conversation?.turns ?? []) addTurn(turn);
    if (lastTurn()?.isPair) offer(lastTurn());
    if (conversation?.style) style.take(conversation.style);
    $("empty").hidden = Boolean(conversation);
    $("talk").scrollTop = $("talk").scrollHeight;
    setBusy(false);
    $("status").textContent = "";
    onChange();
  }

  function stop() {
    running?.abort.abort();
  }

  /** The page is being left: what is written so far is kept. */
  function leave() {
    stop();
    if (running?.isKept && running.turn.answers.length) storage.save(running.conversation);
  }

  /** Another window changed a conversation, or deleted it. */
  function refresh(id) {
    if (!running && conversation?.id === id) open(storage.get(id) ?? null);
    else onChange();
  }

  function keep(changed) {
    const isGone = changed !== conversation && changed !== storage.get(changed.id);
    if (isGone) return;  // deleted, or put back to what it was, while an answer was written
    storage.save(changed);
    onChange();
  }

  // Turns

  function addTurn(turn) {
    const answers = make("div", turn.answers.length > 1 ? "answers two" : "answers");
    const node = make("section", "turn", questionOf(turn), answers);
    shown.set(turn, { node, answers, views: [] });
    turn.answers.forEach((_, i) => addAnswer(turn, i));
    $("talk").append(node);
  }

  function questionOf(turn) {
    const actions = make("div", "actions");
    const add = (label, act, className, name) => actions.append(makeButton(label, act, { className, name }));
    add("Copy", (event) => copy(turn.question, event.target), "quiet", "Copy the question");
    add("Edit", () => edit(turn), "quiet idle", "Edit the question");
    return make("div", "asked", make("div", "question", turn.question), actions);
  }

  function titleOf(turn, i) {
    if (turn.answers.length < 2) return "";
    const title = (turn.isPair ? ["A", "B"] : ["Base", "Realigned"])[i];
    return turn.isPair && turn.chosen === i ? `${title} ✓` : title;
  }

  /** Show an answer, in the place of one that was there. */
  function addAnswer(turn, i) {
    const { answers, views } = shown.get(turn);
    const answer = turn.answers[i];
    const view = new AnswerView(answer, titleOf(turn, i));
    view.node.classList.toggle("chosen", turn.isPair && turn.chosen === i);
    views[i]?.node.remove();
    views[i] = view;
    answers.insertBefore(view.node, answers.children[i] ?? null);
    refreshActions(turn, i);
  }

  function refreshActions(turn, i) {
    const answer = turn.answers[i], view = shown.get(turn).views[i];
    if (!answer.reason && !answer.error) return;  // it is being written
    const add = (label, act, className = "quiet idle last", name = "") =>
      view.actions.append(makeButton(label, act, { className, name }));
    view.actions.replaceChildren();
    add("Copy", (event) => copy(textOf(answer), event.target), "quiet", "Copy the answer");
    view.actions.append(view.walker);
    if (answer.error) add("Retry", () => rewrite(turn, i));
    else if (!turn.isPair) add("Regenerate", () => regenerate(turn, i));
    if (textOf(answer) && answer.reason !== "stop") add("Continue", () => goOn(turn, i));
  }

  // Asking

  async function ask(question) {
    if (running) return;
    if (!conversation) create(question);
    // A choice is made before one goes on.
    for (const button of document.querySelectorAll(".choose")) button.remove();
    const turn = { question, isPair: false, chosen: null, answers: [] };
    const run = begin(turn);
    const pair = taste.isOn() ? await askForPair(run) : null;
    if (running !== run) return;  // the conversation was left
    turn.isPair = Boolean(pair);
    turn.answers = pair ? pair.map((prefer) => writing.newAnswer("realigned", prefer)) : answersOf();
    conversation.turns.push(turn);
    Object.assign(conversation, { changed: Date.now(), style: style.state() });
    $("empty").hidden = true;
    addTurn(turn);
    $("talk").scrollTop = $("talk").scrollHeight;
    await finish(run, turn.answers.map((_, i) => streamOf(turn, i)));
    if (pair) offer(turn);
  }

  function answersOf() {
    const kinds = $("two").checked ? ["base", "realigned"] : ["realigned"];
    return kinds.map((kind) => writing.newAnswer(kind));
  }

  async function askForPair({ abort }) {
    try {
      return await taste.pair(abort.signal);
    } catch (error) {
      taste.show(null, server.said(error));
      return null;
    }
  }

  /** Begin to write answers; `isKept` tells whether what is unfinished is worth keeping. */
  function begin(turn, isKept = true) {
    running = { conversation, turn, isKept, streams: [], abort: new AbortController(), saved: performance.now() };
    setBusy(true);
    return running;
  }

  async function finish(run, streams, more = {}) {
    run.streams = streams;
    if (run.isKept) keep(run.conversation);
    await Promise.all(streams.map((stream) => write(run, stream, more)));
    if (run.isKept) keep(run.conversation);
    if (running !== run) return;
    running = null;
    setBusy(false);
  }

  function setBusy(isBusy) {
    document.body.classList.toggle("busy", isBusy);
    $("send").disabled = isBusy;
    $("stop").disabled = !isBusy;
    $("status").textContent = isBusy ? "Writing an answer" : "The answer is complete";
  }

  // Writing

  function streamOf(turn, i) {
    const answer = turn.answers[i], isRealigned = answer.kind === "realigned";
    const chosen = isRealigned && !answer.prefer ? style.chosen() : [];
    return { turn, i, answer, isRealigned, chosen, view: shown.get(turn).views[i], id: null };
  }

  function messagesOf({ turns }, turn) {
    const before = turns.slice(0, turns.indexOf(turn)).filter((each) => textOf(kept(each)));
    const history = before.flatMap((each) => [{ role: "user", content: each.question }, writing.said(kept(each))]);
    return [...settings.messages(), ...history, { role: "user", content: turn.question }];
  }

  async function write(run, stream, { draft, isContinued }) {
    const { turn, i, answer, view } = stream;
    const messages = messagesOf(run.conversation, turn);
    if (isContinued) messages.push(writing.said(answer));
    view.actions.replaceChildren();
    const request = writing.request(stream, messages, draft);
    await writing.write(stream, request, run.abort.signal, () => saveNowAndThen(run));
    const now = shown.get(turn)?.views[i];
    if (now === view) refreshActions(turn, i);
    else if (now?.answer === answer) addAnswer(turn, i);  // the conversation was left, and shown again
  }

  function saveNowAndThen(run) {
    if (!run.isKept || performance.now() - run.saved < SAVE_MS) return;
    run.saved = performance.now();
    keep(run.conversation);
  }

  function adjust() {
    for (const stream of running?.streams ?? []) if (stream.isRealigned && stream.id) writing.adjust(stream);
  }

  // Answers, once more

  /** The dial, after an answer: the old answer is the draft of the new one. */
  function restyle() {
    const turn = lastTurn();
    if (running || !turn || turn.isPair || !style.isAny()) return;
    const i = turn.answers.length - 1;
    if (textOf(turn.answers[i])) rewrite(turn, i, textOf(turn.answers[i]));
  }

  async function regenerate(turn, i) {
    const old = turn.answers[i];
    const home = conversation;
    await rewrite(turn, i);
    if (conversation !== home || turn.answers[i] === old) return;
    notice.say("The answer was written again.", () => {
      if (!running && conversation === home) swap(turn, i, old);
    });
  }

  function swap(turn, i, answer) {
    turn.answers[i] = answer;
    if (shown.has(turn)) addAnswer(turn, i);
    keep(conversation);
  }

  /** Write an answer again. A good one comes back unless the new one is written to its end. */
  async function rewrite(turn, i, draft = "") {
    if (running) return;
    const old = turn.answers[i], isGood = !old.error && textOf(old);
    const fresh = turn.answers[i] = writing.newAnswer(old.kind, old.prefer);
    addAnswer(turn, i);
    conversation.style = style.state();
    const run = begin(turn, !isGood);
    await finish(run, [streamOf(turn, i)], { draft });
    const isWhole = textOf(fresh) && !fresh.error && fresh.reason !== "stopped";
    if (isGood && !isWhole) {
      turn.answers[i] = old;
      if (shown.has(turn)) addAnswer(turn, i);
      if (fresh.error) shown.get(turn)?.views[i].note.append(`; not written again: ${fresh.error}`);
    }
    keep(run.conversation);
    if (turn.isPair) offer(turn);
  }

  /** Go on with an answer that was cut off. */
  async function goOn(turn, i) {
    if (running) return;
    await finish(begin(turn), [streamOf(turn, i)], { isContinued: true });
  }

  function edit(turn) {
    if (running) return;
    const { node } = shown.get(turn);
    const old = node.querySelector(".asked");
    const box = make("textarea", "");
    box.value = turn.question;
    box.setAttribute("aria-label", "The question, edited");
    const close = () => form.replaceWith(old);
    const form = make("form", "asked editing", box,
      make("div", "row", make("button", "main", "Ask this"), makeButton("Cancel", close)));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!running && box.value.trim()) askInstead(turn, box.value.trim());
    });
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); close(); old.querySelector(".idle").focus(); }
      if (isSending(event)) { event.preventDefault(); form.requestSubmit(); }
    });
    old.replaceWith(form);
    box.focus();
  }

  /** Ask another question in the place of one; what came after is gone, unless that is undone. */
  function askInstead(turn, question) {
    const before = structuredClone(conversation);
    const at = conversation.turns.indexOf(turn);
    for (const gone of conversation.turns.splice(at)) {
      shown.get(gone).node.remove();
      shown.delete(gone);
    }
    ask(question);
    notice.say("The question was replaced.", () => { open(before); keep(before); });
  }

  // Choosing between two answers

  function offer(turn) {
    const { views } = shown.get(turn) ?? {};
    const [first, second] = turn.answers.map(textOf);
    const isFailed = turn.answers.some((answer) => answer.error);
    if (!views || turn.chosen !== null || isFailed || !first || !second || first === second) return;
    views.forEach((view, i) => {
      view.node.querySelector(".choose")?.remove();
      view.node.append(makeButton(`${"AB"[i]} is better`, () => choose(turn, i), { className: "choose" }));
    });
  }

  async function choose(turn, i) {
    const { views } = shown.get(turn);
    const buttons = views.map(({ node }) => node.querySelector(".choose"));
    const setDisabled = (isDisabled) => { for (const button of buttons) button.disabled = isDisabled; };
    const home = conversation;
    setDisabled(true);
    turn.chosen = i;
    if (!await taste.choose(messagesOf(home, turn), turn.answers[i], turn.answers[1 - i])) {
      turn.chosen = null;
      setDisabled(false);  // to be chosen again
      return;
    }
    keep(home);
    for (const button of buttons) button.remove();
    views[i].node.classList.add("chosen");
    views[i].node.querySelector("h2").textContent = titleOf(turn, i);
  }

  return {
    ask, open, reopen, leave, stop, refresh, adjust, restyle,
    current: () => conversation,
    isRunning: () => running !== null,
    renderAll: () => { for (const { views } of shown.values()) for (const view of views) view.render(); },
    listen: (listener) => { onChange = listener; },
  };
})();

/** Tell whether a key sends what is written: Enter, but not within a word of an input method. */
function isSending(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}
