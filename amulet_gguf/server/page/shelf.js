"use strict";
// The list of conversations: opened, renamed, exported, deleted.

const shelf = (() => {
  let drawn = "";  // what the list was made of

  /** Show the list; one that is as it was stays, with the menu or the name being edited in it. */
  function render() {
    const all = storage.list();
    const state = JSON.stringify([talk.current()?.id, ...all.map(({ id, title, changed }) => [id, title, changed])]);
    if (state === drawn) return;
    drawn = state;
    const entries = all.map(entry);
    $("conversations").replaceChildren(...entries);
    $("none").hidden = entries.length > 0;
  }

  function entry(conversation) {
    const isCurrent = conversation.id === talk.current()?.id;
    const opening = makeButton(conversation.title, () => choose(conversation), { className: "title" });
    if (isCurrent) opening.setAttribute("aria-current", "true");
    const node = make("li", isCurrent ? "current" : "", opening, menuOf(conversation));
    node.dataset.id = conversation.id;
    return node;
  }

  function menuOf(conversation) {
    const summary = make("summary", "", "⋯");
    summary.setAttribute("aria-label", `What to do with ${conversation.title}`);
    const choices = make("div", "choices",
      makeButton("Rename", () => rename(conversation)),
      makeButton("Export as Markdown", () => exportAs("md", "text/markdown", toMarkdown(conversation), conversation)),
      makeButton("Export as JSON", () => exportAs("json", "application/json", toJson(conversation), conversation)),
      makeButton("Delete", () => remove(conversation)));
    const menu = make("details", "menu", summary, choices);
    menu.name = "menu";  // one is open at a time
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      menu.open = false;
      summary.focus();
    });
    return menu;
  }

  function choose(conversation) {
    if (conversation.id !== talk.current()?.id) talk.open(conversation);
    if (isNarrow()) toggle(false);
    $("question").focus();
  }

  function rename(conversation) {
    const node = $("conversations").querySelector(`[data-id="${CSS.escape(conversation.id)}"]`);
    const input = make("input");
    Object.assign(input, { type: "text", value: conversation.title, maxLength: 200 });
    input.setAttribute("aria-label", "Name of the conversation");
    const end = (isTaken) => {
      if (isTaken && input.value.trim()) {
        conversation.title = input.value.trim();
        storage.save(conversation);
      }
      drawn = "";
      render();
      $("conversations").querySelector(`[data-id="${CSS.escape(conversation.id)}"] .title`)?.focus();
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); end(false); }
      if (isSending(event)) { event.preventDefault(); end(true); }  // or it would press what has the focus then
    });
    node.replaceChildren(input);
    input.select();
  }

  function remove(conversation) {
    const wasOpen = conversation === talk.current();
    storage.remove(conversation.id);
    if (wasOpen) talk.open(null); else render();
    notice.say(`“${conversation.title}” was deleted.`, () => {
      storage.save(conversation);
      if (wasOpen && !talk.current()) talk.open(conversation); else render();
    });
  }

  // Files

  function exportAs(extension, type, text, { title }) {
    const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 60) || "conversation";
    download(`${name}.${extension}`, type, text);
  }

  function toMarkdown({ title, turns }) {
    const parts = [`# ${title}`];
    for (const turn of turns) {
      parts.push(`## Question\n\n${turn.question}`);
      turn.answers.forEach((answer, i) => parts.push(`## ${nameOf(turn, i)}\n\n${textOf(answer)}`));
    }
    return `${parts.join("\n\n")}\n`;
  }

  function nameOf({ isPair, chosen, answers }, i) {
    if (answers.length === 1) return "Answer";
    if (!isPair) return i === 0 ? "Answer of the base" : "Realigned answer";
    return `Answer ${"AB"[i]}${chosen === i ? " (chosen)" : ""}`;
  }

  function toJson(conversation) {
    return JSON.stringify(conversation, null, 1);
  }

  // The list itself

  const isNarrow = () => matchMedia("(max-width: 60rem)").matches;

  function toggle(isOpen = $("shelf").hidden) {
    $("shelf").hidden = !isOpen;
    $("list").setAttribute("aria-expanded", isOpen);
  }

  function begin() {
    toggle(!isNarrow() && storage.read("amulet.shelf") !== false && storage.list().length > 0);
    $("list").addEventListener("click", () => {
      toggle();
      if (!isNarrow()) storage.write("amulet.shelf", !$("shelf").hidden);
    });
    document.addEventListener("click", ({ target }) => {
      for (const menu of $("shelf").querySelectorAll("details[open]")) if (!menu.contains(target)) menu.open = false;
    });
    $("shelf").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !isNarrow()) return;
      event.stopPropagation();
      toggle(false);
      $("list").focus();
    });
    render();
  }

  return { begin, render, isNarrow, toggle };
})();
