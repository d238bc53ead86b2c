"use strict";
// Puts the parts together, and begins.

async function start() {
  try {
    const models = await (await server.get("/v1/models")).json();
    const { id, amulet } = models.data[0];
    $("model").textContent = id;
    $("unlock").hidden = true;
    begin(amulet);
  } catch (error) {
    $("model").textContent = server.said(error);
  }
}

let isBegun = false;

/** Take over what the server says of itself, once. */
function begin(served) {
  if (isBegun) return;
  isBegun = true;
  style.begin(served);
  settings.begin(served);
  talk.reopen();
  $("question").focus();
}

function listenToForms() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = $("question").value.trim();
    if (!question || talk.isRunning()) return;
    $("question").value = "";
    talk.ask(question);
  });
  $("question").addEventListener("keydown", (event) => {
    if (!isSending(event)) return;
    event.preventDefault();
    $("ask").requestSubmit();
  });
  $("unlock").addEventListener("submit", (event) => {
    event.preventDefault();
    server.useKey($("key").value);
    $("key").value = "";
    start();
  });
}

function listenToButtons() {
  $("stop").addEventListener("click", talk.stop);
  $("new").addEventListener("click", () => {
    talk.open(null);
    if (shelf.isNarrow()) shelf.toggle(false);
    $("question").focus();
  });
  $("tune").addEventListener("click", () => {
    const isOpen = document.body.classList.toggle("tuning");
    $("tune").setAttribute("aria-expanded", isOpen);
  });
  $("strength").addEventListener("change", talk.restyle);
}

function listenToPointers() {
  for (const kind of ["mouseover", "focusin"]) $("talk").addEventListener(kind, why.show);
  for (const kind of ["mouseleave", "focusout", "scroll"]) $("talk").addEventListener(kind, why.hide);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if ($("why").hidden) talk.stop(); else why.hide();
  });
}

server.onKeyNeeded((message) => {
  $("unlock").hidden = false;
  $("unlock").querySelector("label").textContent = message;
  $("key").focus();
});
storage.open({
  onTrouble: (message) => {
    $("trouble").textContent =
      `${message}: what is new is gone when the page is closed. Export it, or delete others.`;
    $("trouble").hidden = false;
  },
  onChange: talk.refresh,
});
style.listen(talk.adjust);
taste.listen();
display.begin(talk.renderAll);
talk.listen(shelf.render);
shelf.begin();
listenToForms();
listenToButtons();
listenToPointers();
addEventListener("pagehide", talk.leave);
start();
