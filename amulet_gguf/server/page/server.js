"use strict";
// Requests to the server that the page came from, and its key.

const server = (() => {
  let key = storage.read("amulet.key", "sessionStorage");  // for the visit: it is a secret
  let askForKey = () => {};

  async function call(path, options = {}) {
    const headers = { "Content-Type": "application/json" };
    if (key) headers.Authorization = `Bearer ${key}`;
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status === 401) throw refused();
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${response.status}`);
  }

  function refused() {
    const message = key ? "Wrong key" : "This server asks for its key";
    askForKey(message);
    return new Error(message);
  }

  const send = (method) => (path, body, signal) => call(path, { method, body: JSON.stringify(body), signal });

  /** Yield the JSON of server-sent events, to the end that the server says. */
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection was lost; what is written stays");
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ")) continue;
        if (line === "data: [DONE]") return;
        yield parsed(line.slice(6));
      }
    }
  }

  function parsed(data) {
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    return event;
  }

  /** Say what went wrong, for people. */
  function said(error) {
    return error instanceof TypeError ? "the server cannot be reached" : error.message;
  }

  function useKey(given) {
    // A header takes no others; such a key is not the server's, which would be told to nobody.
    key = /^[\x21-\x7e\xa0-\xff]+$/.test(given.trim()) ? given.trim() : "?";
    storage.write("amulet.key", key, "sessionStorage");
  }

  return {
    get: (path, signal) => call(path, { signal }),
    post: send("POST"), patch: send("PATCH"), events, said, useKey,
    onKeyNeeded: (listener) => { askForKey = listener; },
  };
})();
