"use strict";
// The few words that all scripts of the page share. Each other script is one object with what the rest may call.

const $ = (id) => document.getElementById(id);

/** Return an element. Children are nodes or texts; nothing on this page ever reads HTML. */
function make(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function makeButton(label, onClick, { className = "", name = "", hint = "" } = {}) {
  const button = make("button", className, label);
  button.type = "button";
  if (name) button.setAttribute("aria-label", name);
  if (hint || name) button.title = hint || name;
  button.addEventListener("click", onClick);
  return button;
}

/** Change what a scrolled box shows; who looked at its end still does afterwards. */
function keepingEnd(box, change) {
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

/** Put a text on the clipboard, and say so on the button for a moment. */
async function copy(text, button) {
  const label = button.textContent;
  button.textContent = (await isCopied(text)) ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = label; }, 1500);
}

async function isCopied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return isCopiedFromBox(text);
  }
}

/** Copy as it was done before there was a clipboard to write to, which plain HTTP to another machine has not. */
function isCopiedFromBox(text) {
  const before = document.activeElement;
  const box = make("textarea", "hidden");
  box.value = text;
  document.body.append(box);
  box.select();
  const isDone = document.execCommand("copy");
  box.remove();
  before?.focus();
  return isDone;
}

/** Offer a text as a file. */
function download(name, type, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Say something, with a way to take back what was done. */
const notice = (() => {
  let timer = 0;

  function say(message, undo = null) {
    const parts = [make("span", "", message)];
    if (undo) parts.push(makeButton("Undo", () => { hide(); undo(); }));
    parts.push(makeButton("×", hide, { name: "Dismiss" }));
    $("notice").replaceChildren(...parts);
    $("notice").hidden = false;
    clearTimeout(timer);
    timer = setTimeout(hide, 20_000);
  }

  function hide() {
    $("notice").hidden = true;
  }

  return { say, hide };
})();
