// One head: a map of queries by keys on a canvas, and its tokens as text, shaded by a row or a column.

const SIDE = 480, LABELLED = 44, LETTERS = 13, LISTED = 8, WINDOWED = 320;

function render({ model, el }) {
  const get = (name) => model.get(name);
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const heard = listener(model);
  const shade = colours(get("about").shades);
  // A byte of the map as a pixel (little-endian alpha, blue, green, red), and what cannot be seen.
  const pixels = Uint32Array.from({ length: 256 }, (_, byte) => {
    const all = get("about").shades, [r, g, b] = all[Math.round((byte / 255) * (all.length - 1))];
    return 0xff000000 + b * 65536 + g * 256 + r;
  });
  const UNSEEN = 0xfff3f0ee;
  // waiting: the kernel was asked and has not answered yet; next: what to ask then, if anything
  const state = { waiting: false, next: null, cell: null, picture: null, weights: [], rows: [], tile: null };

  const layer = slider("layer", "ernie-layer", () => get("about").layers, () => get("layer"),
    (value) => set({ layer: value }));
  const head = slider("head", "ernie-head", () => get("heads"), () => get("head"), (value) => set({ head: value }));
  const sequence = picker("sequence", "ernie-sequence", () => get("sequence"), (value) => set({ sequence: value }));
  const ways = ["looks at", "is looked at by"].map((way) =>
    make("button", { type: "button", textContent: way, onclick: () => set({ facing: way }) }));
  const facing = make("span", { className: "ernie-picker ernie-facing", role: "group",
    "aria-label": "what the shades of the text below mean" }, "text shaded by what the token", ...ways);
  const title = make("div", { className: "ernie-title" });
  const hint = make("p", { className: "ernie-hint", textContent:
    "Point at a cell or a token; click to keep it, Esc to let go. Keys on the map: ← → head, ↑ ↓ layer; " +
    "on the text: ← → token; m on either: looks at / is looked at by." });
  const map = make("canvas", { className: "ernie-map", role: "img", tabIndex: 0 });
  const part = make("canvas", { className: "ernie-window", role: "img" });
  const partWords = make("div", { className: "ernie-hint" });
  const window_ = make("div", { className: "ernie-part" }, partWords, part);
  const scale = make("canvas", { className: "ernie-scale-bar", role: "img",
    "aria-label": "scale of attention weights, from 0, white, to 1, black" });
  const readout = make("p", { className: "ernie-readout" });
  const asks = make("section", { className: "ernie-asks", "aria-live": "polite" });
  const asked = make("section", { className: "ernie-asked", "aria-live": "polite" });
  const strip = make("div", { className: "ernie-strip", tabIndex: 0, role: "listbox", "aria-label": "tokens" });
  const root = make("div", { className: "ernie-explorer ernie-attention" },
    title, hint, make("div", { className: "ernie-bar" }, layer, head, sequence),
    make("div", { className: "ernie-body" }, make("div", {}, map, scale),
      make("div", { className: "ernie-right" }, window_, readout,
        make("div", { className: "ernie-side" }, asks, asked))),
    make("div", { className: "ernie-bar" }, facing), strip);
  // JupyterLab's own keys (arrows move between cells) stay out.
  root.setAttribute("data-lm-suppress-shortcuts", "true");
  el.append(root);

  const texts = () => get("tokens").texts;
  const position = (key) => get("tokens").positions[key];
  const queries = () => get("tokens").queries;
  const queryOf = (key) => state.rows[key] ?? -1;
  const called = (key) => `“${texts()[key]}” (${position(key)})`;
  const current = () => (get("probe") >= 0 ? get("probe") : get("token"));
  const known = (byte) => (byte / 255) ** 2;
  const number = (x) => (x >= 0.0995 ? x.toFixed(2) : x >= 0.00095 ? x.toFixed(3) : x > 0 ? "< 0.001" : "0");
  const dark = (x) => Math.sqrt(x) > 0.55;

  // Where the cells lie on the canvas: margins for names or numbers, and the size of a cell.
  function frame() {
    const n = texts().length, m = queries().length, named = n <= LABELLED;
    const [rows, cols] = get("overview").shape, [down, across] = get("overview").factors;
    const cell = Math.max(SIDE / Math.max(n, m), 0.05), size = named ? Math.min(Math.floor(cell), 24) : cell;
    return { n, m, rows, cols, down, across, named, size, left: named ? 104 : 40, top: named ? 104 : 22,
      width: (named ? 104 : 40) + size * n + 4, height: (named ? 104 : 22) + size * m + 4 };
  }

  // The map in its own pixels, drawn once; later keys, which no query of the block can see, are grey.
  function paint(bytes, rows, cols, down, across, q0, k0) {
    const canvas = document.createElement("canvas"), at = queries();
    canvas.width = cols;
    canvas.height = rows;
    const ctx = canvas.getContext("2d"), image = ctx.createImageData(cols, rows);
    const out = new Uint32Array(image.data.buffer);
    for (let r = 0; r < rows; r++) {
      const last = at[Math.min(q0 + (r + 1) * down, at.length) - 1];
      for (let c = 0; c < cols; c++)
        out[r * cols + c] = k0 + c * across <= last ? pixels[bytes[r * cols + c]] : UNSEEN;
    }
    ctx.putImageData(image, 0, 0);
    return canvas;
  }

  function read() {
    const { shape, factors, weights } = get("overview");
    state.weights = numbers(weights, Uint8Array);
    state.rows = [];
    queries().forEach((key, query) => { state.rows[key] = query; });
    state.picture = paint(state.weights, shape[0], shape[1], factors[0], factors[1], 0, 0);
  }

  const whole = () => Math.max(...get("overview").factors) === 1;

  function drawMap() {
    const f = frame(), ctx = sheet(map, f.width, f.height), key = current(), query = queryOf(key);
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(state.picture, 0, 0, f.n / f.across, f.m / f.down, f.left, f.top, f.size * f.n, f.size * f.m);
    ctx.strokeStyle = RULE;
    ctx.strokeRect(f.left - 0.5, f.top - 0.5, f.size * f.n + 1, f.size * f.m + 1);
    ctx.font = `${f.named ? Math.min(11, f.size) : 10}px ${FONT}`;
    ctx.textBaseline = "middle";
    const step = f.named ? 1 : [50, 100, 200, 250, 500, 1000, 2000, 5000].find((s) => f.n / s <= 8) || 10000;
    const write = (at, words, mine) => {
      ctx.fillStyle = mine ? FOUND : f.named ? INK : MUTED;
      ctx.fillText(words, at, 0);
    };
    const short = (k) => (f.named ? cut(texts()[k]) : `${position(k)}`);
    for (let k = 0; k < f.n; k++) {
      if (!f.named && position(k) % step) continue;
      ctx.save();
      ctx.translate(f.left + (k + 0.5) * f.size, f.top - 5);
      if (f.named) ctx.rotate(-Math.PI / 2);
      ctx.textAlign = f.named ? "left" : "center";
      write(0, short(k), k === key && get("facing") === "is looked at by");
      ctx.restore();
      const q = queryOf(k);
      if (q < 0) continue;
      ctx.save();
      ctx.translate(f.left - 5, f.top + (q + 0.5) * f.size);
      ctx.textAlign = "right";
      write(0, short(k), k === key && get("facing") === "looks at");
      ctx.restore();
    }
    ctx.fillStyle = MUTED;
    ctx.font = `10px ${FONT}`;
    ctx.textAlign = "left";
    if (f.named) {
      ctx.textAlign = "right";
      ctx.fillText("key →", f.left - 8, f.top - 20);
      ctx.fillText("query ↓", f.left - 8, f.top - 7);
    } else ctx.fillText("query ↓  key →", 2, 7);
    ctx.strokeStyle = FOUND;
    ctx.lineWidth = 1.2;
    if (key >= 0 && get("facing") === "looks at" && query >= 0) box(ctx, f.left, f.top + query * f.size, f.n * f.size, f.size);
    if (key >= 0 && get("facing") === "is looked at by") box(ctx, f.left + key * f.size, f.top, f.size, f.m * f.size);
    if (state.cell) box(ctx, f.left + state.cell[1] * f.size, f.top + state.cell[0] * f.size, f.size, f.size);
    if (!whole() && state.tile) {
      ctx.strokeStyle = INK;
      const [q0, k0] = state.tile.start, [rows, cols] = state.tile.shape;
      ctx.strokeRect(f.left + k0 * f.size, f.top + q0 * f.size, cols * f.size, rows * f.size);
    }
    map.setAttribute("aria-label", get("overview").words +
      (key >= 0 ? ` Token ${called(key)} ${get("facing")} ${strongest(key)}.` : ""));
  }

  const box = (ctx, x, y, w, h) => ctx.strokeRect(x - 0.5, y - 0.5, Math.max(w, 1) + 1, Math.max(h, 1) + 1);
  const cut = (words) => (Array.from(words).length > LETTERS ? `${Array.from(words).slice(0, LETTERS - 1).join("")}…` : words);

  // The part around the spot, every cell of it.
  function drawPart() {
    const tile = get("tile");
    window_.hidden = whole() || !tile.shape;
    if (window_.hidden) return;
    state.tile = { ...tile, bytes: numbers(tile.weights, Uint8Array) };
    const [rows, cols] = tile.shape, [q0, k0] = tile.start, size = WINDOWED / get("about").window;
    const ctx = sheet(part, cols * size, rows * size);
    ctx.imageSmoothingEnabled = false;
    ctx.drawImage(paint(state.tile.bytes, rows, cols, 1, 1, q0, k0), 0, 0, cols * size, rows * size);
    ctx.strokeStyle = INK;
    ctx.strokeRect(0.5, 0.5, cols * size - 1, rows * size - 1);
    const words = `in full: queries ${position(queries()[q0])} to ${position(queries()[q0 + rows - 1])}, ` +
      `keys ${position(k0)} to ${position(k0 + cols - 1)}`;
    partWords.textContent = words;
    part.setAttribute("aria-label", `The part around the place that is pointed at, ${words}`);
    if (state.cell) {
      ctx.strokeStyle = FOUND;
      box(ctx, (state.cell[1] - k0) * size, (state.cell[0] - q0) * size, size, size);
    }
  }

  // Weights of a token along the keys (looks at) or the keys that are queries (looked at by); null if not known yet.
  function along(key, way) {
    const detail = get("detail"), n = texts().length, out = new Float32Array(n);
    const query = queryOf(key);
    if (way === "looks at" && query < 0) return out;
    if (detail.token === key && detail.layer === get("overview").layer && detail.head === get("overview").head) {
      if (way === "looks at") return numbers(detail.row, Float32Array);
      numbers(detail.column, Float32Array).forEach((x, q) => { out[queries()[q]] = x; });
      return out;
    }
    if (!whole()) return null;
    const cols = get("overview").shape[1];
    if (way === "looks at") for (let k = 0; k < n; k++) out[k] = known(state.weights[query * cols + k]);
    else queries().forEach((k, q) => { out[k] = known(state.weights[q * cols + key]); });
    return out;
  }

  function ranked(key, way) {
    const weights = along(key, way);
    if (!weights) return [];
    return Array.from(weights, (x, k) => [k, x]).filter(([, x]) => x >= 0.0005)
      .sort((a, b) => b[1] - a[1]).slice(0, LISTED);
  }

  const strongest = (key) => {
    const [top] = ranked(key, get("facing"));
    return top ? `most ${called(top[0])}, ${number(top[1])}` : "none";
  };

  function drawStrip() {
    const key = current(), weights = key < 0 ? [] : along(key, get("facing"));
    if (!weights) return; // asked for; until the answer comes the old shades stay
    for (const node of strip.children) {
      const k = Number(node.dataset.key), x = weights[k] || 0;
      node.style.background = x > 0 ? shade(Math.sqrt(x)) : "";
      node.style.color = dark(x) ? "#fff" : "";
      node.classList.toggle("ernie-here", k === key);
      node.setAttribute("aria-selected", k === get("token"));
    }
    strip.setAttribute("aria-label", key < 0 ? "tokens; none is picked"
      : `tokens; ${called(key)} ${get("facing")} ${strongest(key)}`);
    ways.forEach((node) => node.setAttribute("aria-pressed", node.textContent === get("facing")));
  }

  function drawLists() {
    const key = current();
    if (key >= 0 && !along(key, "looks at")) return;
    if (key < 0) {
      asks.replaceChildren(make("p", { className: "ernie-hint", textContent: "No token is picked: point at one." }));
      asked.replaceChildren();
      return;
    }
    const list = (node, way, className, none) => {
      const rows = ranked(key, way).map(([k, x]) => ({ cells: [
        make("bdi", { textContent: texts()[k] }), `${position(k)}`, number(x), ""] }));
      node.replaceChildren(make("h4", {}, make("bdi", { textContent: `“${texts()[key]}”` }),
        ` at position ${position(key)} ${way}`),
      rows.length ? table(className, ["token", "position", "weight", ""], rows)
        : make("p", { className: "ernie-hint", textContent: none }));
    };
    list(asks, "looks at", "ernie-keys", "Not among the queries of this trace.");
    list(asked, "is looked at by", "ernie-queries", "Nobody gives it 0.0005 or more.");
  }

  function say() {
    const cell = state.cell, { factors } = get("overview");
    if (!cell) {
      const pooled = whole() ? "" : ` A pixel of the map is the strongest of ${factors[0]} x ${factors[1]} cells.`;
      readout.textContent = `${get("overview").words}${pooled} A map says where a head looks, not what it does.`;
      return;
    }
    const [query, key] = cell, from = queries()[query];
    const words = [`Query `, make("bdi", { textContent: called(from) }), ` looks at key `, make("bdi", { textContent: called(key) }), `: `];
    if (key > from) return readout.replaceChildren(...words, "it comes later and cannot be seen.");
    readout.replaceChildren(...words, make("b", { textContent: weightAt(query, key) }), ".");
  }

  function weightAt(query, key) {
    const row = along(queries()[query], "looks at");
    if (row) return number(row[key]);
    const t = state.tile;
    if (t && query >= t.start[0] && query < t.start[0] + t.shape[0] && key >= t.start[1] && key < t.start[1] + t.shape[1])
      return number(known(t.bytes[(query - t.start[0]) * t.shape[1] + key - t.start[1]]));
    const { shape, factors } = get("overview");
    return `at most ${number(known(state.weights[Math.floor(query / factors[0]) * shape[1] + Math.floor(key / factors[1])]))}`;
  }

  // One question at a time: what comes meanwhile is asked when the answer is there.
  function ask(changes) {
    const news = Object.entries(changes).filter(([name, value]) => String(get(name)) !== String(value));
    if (!news.length) return;
    if (state.waiting) {
      state.next = { ...state.next, ...changes };
      return;
    }
    state.waiting = true;
    set(changes);
    drawFocus();
  }
  function answered() {
    const next = state.next;
    state.waiting = false;
    state.next = null;
    if (next) ask(next);
  }

  function cellAt(event) {
    const f = frame(), edges = map.getBoundingClientRect();
    const query = Math.floor((event.clientY - edges.top - f.top) / f.size);
    const key = Math.floor((event.clientX - edges.left - f.left) / f.size);
    return query >= 0 && query < f.m && key >= 0 && key < f.n ? [query, key] : null;
  }
  function cellOfPart(event) {
    const edges = part.getBoundingClientRect(), size = WINDOWED / get("about").window, [q0, k0] = state.tile.start;
    const cell = [q0 + Math.floor((event.clientY - edges.top) / size), k0 + Math.floor((event.clientX - edges.left) / size)];
    return cell[0] < queries().length && cell[1] < texts().length ? cell : null;
  }
  const tokenOf = ([query, key]) => (get("facing") === "looks at" ? queries()[query] : key);

  function point(cell, moves) {
    state.cell = cell;
    const probe = cell ? tokenOf(cell) : -1;
    ask(moves && cell && !whole() ? { probe, spot: cell } : { probe });
    drawMap();
    if (!moves) drawPart();
    say();
  }
  map.onpointermove = (event) => point(cellAt(event), true);
  map.onpointerleave = () => point(null, false);
  part.onpointermove = (event) => point(cellOfPart(event), false);
  part.onpointerleave = () => point(null, false);
  const keep = (cell) => { if (cell) set({ token: tokenOf(cell) === get("token") ? -1 : tokenOf(cell) }); };
  map.onclick = (event) => { map.focus({ preventScroll: true }); keep(cellAt(event)); };
  part.onclick = (event) => keep(cellOfPart(event));
  strip.onpointermove = (event) => {
    const node = event.target.closest(".ernie-token");
    ask({ probe: node ? Number(node.dataset.key) : -1 });
  };
  strip.onpointerleave = () => ask({ probe: -1 });
  strip.onclick = (event) => {
    const node = event.target.closest(".ernie-token");
    if (node) set({ token: Number(node.dataset.key) === get("token") ? -1 : Number(node.dataset.key) });
  };

  const turn = () => set({ facing: get("facing") === "looks at" ? "is looked at by" : "looks at" });
  const step = (name, values, by) => {
    const next = values[values.indexOf(get(name)) + by];
    if (next !== undefined) set({ [name]: next });
  };
  const walk = (by) => {
    const next = get("token") < 0 ? (by > 0 ? 0 : texts().length - 1) : get("token") + by;
    const key = Math.max(0, Math.min(texts().length - 1, next));
    state.cell = null;
    set({ token: key, probe: -1 });
  };
  // Scrolls the text alone: the page stays where it is.
  const show = (key) => {
    if (key < 0) return;
    const { offsetTop, offsetHeight } = strip.children[key];
    if (offsetTop < strip.scrollTop || offsetTop + offsetHeight > strip.scrollTop + strip.clientHeight)
      strip.scrollTop = offsetTop - strip.clientHeight / 3;
  };
  const onKeys = (node, acts) => {
    node.onkeydown = (event) => {
      if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      acts[event.key]();
    };
  };
  const common = { m: turn, Escape: () => set({ token: -1, probe: -1 }) };
  onKeys(map, { ...common,
    ArrowRight: () => step("head", get("heads"), 1), ArrowLeft: () => step("head", get("heads"), -1),
    ArrowDown: () => step("layer", get("about").layers, 1), ArrowUp: () => step("layer", get("about").layers, -1) });
  onKeys(strip, { ...common,
    ArrowRight: () => walk(1), ArrowDown: () => walk(1), ArrowLeft: () => walk(-1), ArrowUp: () => walk(-1),
    Home: () => walk(-texts().length), End: () => walk(texts().length) });

  function write() {
    const { prompt } = get("tokens");
    strip.replaceChildren(...texts().map((words, key) => {
      const node = make("span", { className: "ernie-token", role: "option", textContent: words,
        title: `position ${position(key)}` });
      node.dataset.key = key;
      if (key === prompt) node.classList.add("ernie-generated");
      if (queryOf(key) < 0) node.classList.add("ernie-no-query");
      return node;
    }));
    if (prompt >= 0) strip.title = "right of the bar: generated";
  }

  function drawScale() {
    const ctx = sheet(scale, 250, 26), ticks = [0, 0.01, 0.05, 0.25, 0.5, 1];
    for (let x = 0; x < 200; x++) {
      ctx.fillStyle = shade(x / 199);
      ctx.fillRect(4 + x, 3, 1, 8);
    }
    ctx.strokeStyle = RULE;
    ctx.strokeRect(3.5, 2.5, 201, 9);
    ctx.fillStyle = MUTED;
    ctx.font = `9.5px ${FONT}`;
    for (const tick of ticks) {
      ctx.textAlign = tick === 0 ? "left" : "center";
      ctx.fillText(String(tick), 4 + 200 * Math.sqrt(tick), 23);
    }
    ctx.textAlign = "left";
    ctx.fillText("weight", 211, 11);
  }

  function pickers() {
    const about = get("about");
    title.textContent = `Where attention looks${about.model ? ` in ${about.model}` : ""}: layer ${get("layer")}, head ${get("head")}`;
    layer.show(`layer ${get("layer")}`);
    head.show(`head ${get("head")}`);
    sequence.show(about.sequences.map((one) => [one, `${one}`]));
  }
  function drawFocus() {
    drawMap();
    drawStrip();
    drawLists();
    say();
  }
  function all() {
    pickers();
    read();
    if (strip.children.length !== texts().length || strip.dataset.sequence !== String(get("sequence"))) {
      write();
      strip.dataset.sequence = get("sequence");
    }
    drawPart();
    drawFocus();
    root.dataset.layer = get("overview").layer; // what the picture shows, for tests
    root.dataset.head = get("overview").head;
  }
  const whenWhole = () => {
    const shown = get("overview");
    if (["sequence", "layer", "head"].every((name) => shown[name] === get(name))) all();
  };
  heard.on(["change:overview", "change:tokens"], whenWhole);
  heard.on(["change:layer", "change:head", "change:heads", "change:sequence"], pickers);
  heard.on(["change:detail"], () => {
    drawFocus();
    root.dataset.token = get("detail").token;
    answered();
  });
  heard.on(["change:tile"], () => { drawPart(); drawMap(); say(); answered(); });
  heard.on(["change:token"], () => { drawFocus(); show(get("token")); });
  heard.on(["change:facing"], drawFocus);
  drawScale();
  all();
  return () => heard.end();
}

export default { render };
