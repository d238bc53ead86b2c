"use strict";
// What a model writes as Markdown, as nodes: read by markdown-it, code by highlight.js. Neither makes any HTML: the
// tokens of the one and the scopes of the other become elements here, of kinds that are named here.

const markdown = (() => {
  const MAX_HIGHLIGHTED = 30_000;  // characters of code; more is shown without colours
  const SLOW_MS = 150;
  const slowFrom = new Map();      // characters from which a language took too long: some code takes squares of time
  const SAFE_LINK = /^(https?:|mailto:)/i;

  const parser = markdownit({ html: false, breaks: true });
  parser.validateLink = (url) => SAFE_LINK.test(url);  // others, such as javascript:, stay text
  parser.core.ruler.disable("text_join");  // escaped characters stay apart: the painter finds the rest

  /**
   * Show a text, block by block; blocks that are as they were stay, with what is selected or scrolled in them.
   * `painter` makes the nodes of each text.
   */
  function show(box, source, painter) {
    const context = {};
    const blocks = blocksOf(parser.parse(source, context));
    const links = Object.keys(context.references ?? {}).length;
    if (box.links !== links) box.replaceChildren();  // a link's address can stand behind it
    box.links = links;
    blocks.forEach((tokens, i) => {
      const text = painter.linesOf(tokens[0].map);
      const old = box.children[i];
      if (old?.source === text) return;
      const holder = document.createDocumentFragment();
      build(tokens, holder, painter);
      const node = holder.firstElementChild;
      node.source = text;
      if (old) old.replaceWith(node); else box.append(node);
    });
    while (box.children.length > blocks.length) box.lastElementChild.remove();
  }

  function blocksOf(tokens) {
    const blocks = [];
    let depth = 0;
    for (const token of tokens) {
      if (depth === 0) blocks.push([]);
      blocks.at(-1).push(token);
      depth += token.nesting;
    }
    return blocks;
  }

  function build(tokens, into, painter) {
    const parents = [into];
    for (const token of tokens) {
      if (token.map) painter.enter(token.map);
      if (token.hidden) continue;  // the paragraphs of a tight list
      if (token.nesting < 0) { parents.pop(); continue; }
      const node = token.nesting > 0 ? opened(token) : null;
      if (node) { parents.at(-1).append(node); parents.push(node); }
      else leaf(token, parents.at(-1), painter);
    }
  }

  /** Return the element that a token opens. */
  function opened(token) {
    if (token.type === "link_open") return link(token.attrGet("href"));
    const heading = /^h([1-6])$/.exec(token.tag);
    if (heading) return make(`h${Math.min(6, Number(heading[1]) + 2)}`);  // the page has titles of its own
    const node = make(token.tag);
    const align = /text-align:(\w+)/.exec(token.attrGet("style") ?? "");
    if (align) node.style.textAlign = align[1];
    if (token.attrGet("start")) node.start = Number(token.attrGet("start"));
    return node;
  }

  function link(href, ...children) {
    const node = make("a", "", ...children);
    Object.assign(node, { href, title: href, target: "_blank", rel: "noopener noreferrer" });
    return node;
  }

  const leaves = {
    inline: (token, parent, painter) => build(token.children, parent, painter),
    softbreak: (_, parent) => parent.append(make("br")),
    hardbreak: (_, parent) => parent.append(make("br")),
    hr: (_, parent) => parent.append(make("hr")),
    code_inline: (token, parent, painter) => parent.append(make("code", "", ...painter.nodes(token.content))),
    code_block: (token, parent, painter) => parent.append(codeBlock(token.content, "", painter)),
    fence(token, parent, painter) {
      painter.enter([token.map[0] + 1, token.map[1]]);  // behind the line that names the language
      parent.append(codeBlock(token.content, token.info.trim().split(/\s+/)[0], painter));
    },
    // A picture is never fetched: who serves it would learn that it was looked at, and what its address says.
    image: (token, parent) => parent.append(link(token.attrGet("src"), `picture: ${token.content || "untitled"}`)),
  };

  function leaf(token, parent, painter) {
    const add = Object.hasOwn(leaves, token.type) ? leaves[token.type] : null;
    if (add) add(token, parent, painter); else parent.append(...painter.nodes(token.content));
  }

  // Code

  function codeBlock(text, language, painter) {
    const code = make("code", "", highlighted(text, language));
    painter.paint(code);
    const button = makeButton("Copy", () => copy(text, button), { name: "Copy the code" });
    return make("div", "code", make("div", "bar", make("span", "", language), button), make("pre", "", code));
  }

  function highlighted(text, language) {
    const most = slowFrom.get(language) ?? MAX_HIGHLIGHTED;
    if (text.length > most || !hljs.getLanguage(language)) return text;
    const begin = performance.now();
    const result = hljs.highlight(text, { language, ignoreIllegals: true });
    if (performance.now() - begin > SLOW_MS) slowFrom.set(language, text.length / 2);
    return result._emitter.root;
  }

  /** What highlight.js tells its findings to instead of writing HTML. Its interface, though not a promised one. */
  class Emitter {
    constructor() {
      this.root = document.createDocumentFragment();
      this.parents = [this.root];
    }

    addText(text) { this.parents.at(-1).append(text); }

    startScope(scope) {
      const node = make("span", `hljs-${String(scope).split(".")[0]}`);
      this.parents.at(-1).append(node);
      this.parents.push(node);
    }

    endScope() { if (this.parents.length > 1) this.parents.pop(); }
    openNode(scope) { this.startScope(scope); }
    closeNode() { this.endScope(); }
    __addSublanguage(emitter) { this.parents.at(-1).append(emitter.root); }
    finalize() {}
    toHTML() { return ""; }
  }

  hljs.configure({ __emitter: Emitter });

  return { show };
})();

/**
 * Makes texts into nodes that show what realignment did to the tokens in them.
 *
 * Formatting drops characters and keeps the order of the rest. So each text that is shown is looked for in what
 * was written, from where the last one ended and within its block. What is not found, such as an entity, is shown
 * without shades.
 */
class Painter {
  constructor(pieces) {
    this.pieces = pieces;
    this.starts = [];
    this.source = "";
    for (const piece of pieces) {
      this.starts.push(this.source.length);
      this.source += piece.text;
    }
    this.lines = [0];
    for (let i = this.source.indexOf("\n"); i >= 0; i = this.source.indexOf("\n", i + 1)) this.lines.push(i + 1);
    this.enter([0, this.lines.length]);
  }

  /** Go to the lines of a block. */
  enter([first, end]) {
    this.cursor = this.lines[first] ?? this.source.length;
    this.end = this.lines[end] ?? this.source.length;
  }

  linesOf([first, end]) {
    return this.source.slice(this.lines[first], this.lines[end]);
  }

  /** Return the nodes of a text that is shown. */
  nodes(text) {
    const start = this.source.indexOf(text, this.cursor);
    const end = start + text.length;
    if (!text || start < 0 || end > this.end) return text ? [text] : [];
    this.cursor = end;
    const nodes = [];
    for (let i = this.indexAt(start); i < this.pieces.length && this.starts[i] < end; i++) {
      const begin = this.starts[i];
      const part = this.pieces[i].text.slice(Math.max(0, start - begin), end - begin);
      if (part) nodes.push(this.node(part, this.pieces[i]));
    }
    return nodes;
  }

  node(text, piece) {
    if (piece.divergence === undefined) return text;
    const span = make("span", piece.changed ? "changed" : "", text);
    span.style.setProperty("--shade", piece.shade.toFixed(3));
    span.piece = piece;
    if (isMoved(piece)) {
      span.classList.add("moved");
      span.tabIndex = -1;
    }
    return span;
  }

  /** Return the number of the piece that a character belongs to. */
  indexAt(offset) {
    let low = 0, high = this.starts.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= offset) low = middle; else high = middle;
    }
    return low;
  }

  /** Replace the texts within a node. */
  paint(root) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode()) texts.push(walker.currentNode);
    for (const text of texts) text.replaceWith(...this.nodes(text.data));
  }
}
