"use strict";
// Settings of the person at this browser. A field that is empty leaves the matter to the server, and says what that
// will do; so nothing here goes before what `amulet serve` was told, unless somebody wanted it to.

const settings = (() => {
  const KEY = "amulet.settings";
  const FIELDS = ["system", "temperature", "length"];

  function begin({ defaults, max_tokens: most }) {
    $("system").placeholder = defaults.system || "None";
    $("temperature").placeholder = defaults.temperature;
    $("length").placeholder = defaults.max_tokens;
    $("length").max = most;
    const saved = storage.read(KEY) ?? {};
    for (const id of FIELDS) if (typeof saved[id] === "string") $(id).value = saved[id];
    for (const id of FIELDS) $(id).addEventListener("change", keep);
  }

  function keep() {
    storage.write(KEY, Object.fromEntries(FIELDS.map((id) => [id, $(id).value])));
  }

  /** Return what a request must say. */
  function asked() {
    const found = {};
    if (isGiven("temperature")) found.temperature = Number($("temperature").value);
    if (isGiven("length")) found.max_tokens = Number($("length").value);
    return found;
  }

  /** Tell whether a number was written that the field takes. */
  function isGiven(id) {
    return $(id).value !== "" && $(id).validity.valid;
  }

  /** Return the messages that go before all others. */
  function messages() {
    const content = $("system").value.trim();
    return content ? [{ role: "system", content }] : [];
  }

  return { begin, asked, messages };
})();

// How answers are shown.
const display = (() => {
  const KEY = "amulet.display";
  const IDS = ["shading", "formatted"];

  function begin(onFormat) {
    const saved = storage.read(KEY) ?? {};
    for (const id of IDS) {
      if (typeof saved[id] === "boolean") $(id).checked = saved[id];
      $(id).addEventListener("change", () => {
        storage.write(KEY, Object.fromEntries(IDS.map((each) => [each, $(each).checked])));
        refresh();
      });
    }
    $("formatted").addEventListener("change", onFormat);
    refresh();
  }

  function refresh() {
    document.body.classList.toggle("plain", !$("shading").checked);
  }

  return { begin, isFormatted: () => $("formatted").checked };
})();
