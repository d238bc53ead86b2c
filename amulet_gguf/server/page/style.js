"use strict";
// What the answer should be: preferences with weights, how far to go along them, and what to avoid.

const style = (() => {
  const preferences = [];  // { text, weight, isOn, isOwn, chip, set }
  let onChange = () => {};
  let exact = { shown: NaN, value: NaN };  // a strength that was given, and where the slider could show it

  /** Begin with what the server does by itself. */
  function begin({ presets, strength, defaults }) {
    for (const name of presets) add(name, false);
    $("strength").max = Math.max(12, strength);
    take({ prefer: defaults.prefer, avoid: defaults.avoid ?? "", strength });
  }

  function add(text, isOwn) {
    const toggle = makeButton(text, () => each.set(!each.isOn), { className: isOwn ? "own" : "", hint: text });
    const chip = make("span", "chip", toggle, weightOf(text));
    const each = { text, isOwn, chip, isOn: false, weight: chip.lastChild };
    each.set = (isOn) => {
      each.isOn = isOn;
      toggle.setAttribute("aria-pressed", isOn);
      chip.classList.toggle("on", isOn);
      refresh();
    };
    if (isOwn) chip.append(makeButton("×", () => remove(each), { name: `Remove ${text}` }));
    preferences.push(each);
    $("presets").insertBefore(chip, $("own"));
    each.set(isOwn);
    return each;
  }

  function weightOf(text) {
    const input = make("input");
    Object.assign(input, { type: "number", min: -2, max: 2, step: 0.1, value: 1 });
    input.setAttribute("aria-label", `Weight of ${text}`);
    input.addEventListener("input", () => onChange());
    return input;
  }

  function remove(each) {
    preferences.splice(preferences.indexOf(each), 1);
    each.chip.remove();
    $("own").focus();
    refresh();
  }

  const chosen = () => preferences.filter((each) => each.isOn);
  const ownTexts = () => preferences.filter((each) => each.isOwn).map((each) => each.text);
  const weight = (each) => Math.max(-10, Math.min(10, Number(each.weight.value) || 0));
  const shownStrength = () => Number($("strength").value);
  /** Return the strength. One that was given is not rounded to the slider's steps unless somebody moves it. */
  const strength = () => (shownStrength() === exact.shown ? exact.value : shownStrength());
  const avoid = () => $("avoid").value.trim();
  const isAny = () => chosen().length > 0 || avoid() !== "";
  const asked = () => chosen().map((each) => ({ text: each.text, weight: weight(each) }));

  /** Return what is chosen, to be taken again. */
  function state() {
    return { prefer: asked(), avoid: avoid(), strength: strength() };
  }

  /** Choose what was chosen once. */
  function take(saved) {
    setPreferences(saved.prefer ?? []);
    $("avoid").value = saved.avoid ?? "";
    if (Number.isFinite(saved.strength)) setStrength(saved.strength);
    refresh();
  }

  function setStrength(value) {
    $("strength").value = value;
    exact = { shown: shownStrength(), value };
  }

  function setPreferences(prefer) {
    for (const each of preferences) each.set(false);
    for (const { text, weight } of prefer) {
      const each = preferences.find((other) => other.text === text) ?? add(text, true);
      each.weight.value = weight;
      each.set(true);
    }
  }

  /** Say what the strength means. Without anything to go along it means nothing, and cannot be moved. */
  function refresh() {
    const value = strength();
    const names = new Map([[0, "the base model"], [1, "ordinary prompting"]]);
    const isOff = !isAny() && !$("learn").checked;
    $("strength").disabled = isOff;
    $("amount").replaceChildren(isOff ? "choose a preference" : value.toFixed(2));
    if (!isOff && names.has(value)) $("amount").append(make("span", "roomy", ` ${names.get(value)}`));
  }

  function listen(listener) {
    onChange = listener;
    $("strength").addEventListener("input", () => { refresh(); onChange(); });
    $("avoid").addEventListener("input", refresh);
    $("learn").addEventListener("change", refresh);
    $("own").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      if ($("own").value.trim()) add($("own").value.trim(), true);
      $("own").value = "";
    });
  }

  return { begin, listen, chosen, ownTexts, weight, strength, avoid, isAny, asked, state, take, setPreferences };
})();
