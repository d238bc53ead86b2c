"use strict";
// One answer on the page: its thought, its text with shades, what is said of it, and what can be done with it.

class AnswerView {
  #isScheduled = false;

  constructor(answer, title) {
    this.answer = answer;
    this.text = make("div", "text");
    this.note = make("div", "note");
    this.actions = make("div", "actions");
    this.fold = make("details", "thought", make("summary"), make("div"));
    this.node = make("div", "answer", this.fold, this.text, this.note, this.actions);
    if (title) this.node.prepend(make("h2", "", title));
    this.walker = makeButton("Changes", () => this.#walk(), {
      className: "quiet", name: "Walk through the changes", hint: "Walk through what was moved, with the arrow keys",
    });
    this.walker.setAttribute("aria-pressed", "false");
    this.text.addEventListener("keydown", (event) => this.#step(event));
    this.text.addEventListener("focusout", (event) => {
      if (!this.text.contains(event.relatedTarget)) this.walker.setAttribute("aria-pressed", "false");
    });
    this.render();
  }

  /** Show what is new, once before the browser paints: tokens can come faster. */
  update() {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    requestAnimationFrame(() => this.render());
  }

  render() {
    this.#isScheduled = false;
    keepingEnd($("talk"), () => {
      this.#renderThought();
      this.#renderText();
      this.#renderNote();
    });
    this.walker.hidden = !this.answer.pieces.some(isMoved);
  }

  #renderThought() {
    const { thought, seconds } = this.answer;
    this.fold.hidden = !thought;
    this.fold.firstChild.textContent = seconds ? `Thought for ${seconds.toFixed(1)} s` : "Thinking…";
    this.fold.lastChild.textContent = thought;
  }

  #renderText() {
    const painter = new Painter(this.answer.pieces);
    const isFormatted = display.isFormatted();
    if (this.text.classList.toggle("formatted", isFormatted) !== this.wasFormatted) this.text.replaceChildren();
    this.wasFormatted = isFormatted;
    if (isFormatted) markdown.show(this.text, painter.source, painter);
    else this.text.replaceChildren(...painter.nodes(painter.source));
  }

  #renderNote() {
    const { error, note } = this.answer;
    this.note.classList.toggle("error", Boolean(error));
    this.note.textContent = error || note;
  }

  // The changes, one by one: with hundreds of tokens they cannot all be stops of the Tab key.

  #walk() {
    this.walker.setAttribute("aria-pressed", "true");
    this.#moved()[0]?.focus();
  }

  #moved() {
    return [...this.text.querySelectorAll(".moved")];
  }

  #step(event) {
    const moved = this.#moved();
    const at = moved.indexOf(event.target);
    if (at < 0) return;
    const goals = {
      ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: moved.length - 1,
    };
    if (event.key === "Escape") this.walker.focus();
    else if (Object.hasOwn(goals, event.key)) moved[goals[event.key]]?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();  // Escape would end an answer
  }
}

// Why a token was chosen, in a box beside it.
const why = (() => {
  const MOST = 6;

  function show({ target }) {
    const { piece } = target;
    $("why").hidden = !piece?.alternatives;
    if (!piece?.alternatives) return;
    const head = make("div", "", `moved by ${piece.divergence.toFixed(2)} nats`);
    $("why").replaceChildren(head, table(piece.alternatives));
    place(target.getClientRects()[0] ?? target.getBoundingClientRect());
  }

  function table(alternatives) {
    const row = (tag, cells) => make("tr", "", ...cells.map((cell) => make(tag, "", cell)));
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    const rows = alternatives.slice(0, MOST).map(([text, realigned, prompted]) =>
      row("td", [text.replace(/\n/g, "⏎"), percent(realigned), percent(prompted)]));
    return make("table", "", row("th", ["token", "realigned", "prompted"]), ...rows);
  }

  function place(token) {
    const box = $("why");
    const above = token.top - box.offsetHeight - 6;
    box.style.left = `${Math.max(8, Math.min(token.left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${above > 8 ? above : token.bottom + 6}px`;
  }

  return { show, hide: () => { $("why").hidden = true; } };
})();
