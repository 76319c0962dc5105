// Rows are tokens, columns are experts; only the rows in sight are drawn, so length costs nothing.

const ROW = 17, ROWS = 24, TEXT = 176, NUMBER = 40, HEAD = 54, STRIP = 56, LISTED = 12;

function render({ model, el }) {
  const get = (name) => model.get(name);
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const heard = listener(model);
  const nExperts = get("about").n_experts, nChosen = get("about").n_chosen;
  const cell = Math.max(6, Math.min(30, Math.floor(512 / nExperts)));
  const width = TEXT + nExperts * cell;
  const shade = colours(get("about").shades);
  const state = { ids: [], weights: [], best: 1, load: [], hover: null };

  const layer = slider("layer", "ernie-layer", () => get("about").layers, () => get("layer"),
    (value) => set({ layer: value }));
  const bank = picker("bank", "ernie-bank", () => get("bank"), (value) => set({ bank: value }));
  const sequence = picker("sequence", "ernie-sequence", () => get("sequence"),
    (value) => set({ sequence: value }));
  const find = make("input", { type: "search", placeholder: "find a token ⏎", "aria-label": "find a token" });
  const title = make("div", { className: "ernie-title" });
  const hint = make("p", { className: "ernie-hint", textContent:
    "Click a token (row) for its experts, an expert (number on top) for its tokens. " +
    "Keys on the map: ↑ ↓ token, ← → expert, Page Up/Down, l / L next / previous layer, Esc no expert." });
  const header = make("canvas", { className: "ernie-experts", role: "img" });
  const map = make("canvas", { className: "ernie-map", role: "img", tabIndex: 0 });
  const spacer = make("div", {});
  const scroll = make("div", { className: "ernie-scroll" }, map, spacer);
  const strip = make("canvas", { className: "ernie-strip", role: "img" });
  const above = make("div", { className: "ernie-above" });
  const status = make("div", { className: "ernie-status" });
  const ofToken = make("section", { className: "ernie-token", "aria-live": "polite" });
  const ofExpert = make("section", { className: "ernie-expert", "aria-live": "polite" });
  const root = make("div", { className: "ernie-explorer ernie-routing" },
    title, hint, make("div", { className: "ernie-bar" }, layer, bank, sequence, find),
    make("div", { className: "ernie-body" },
      make("div", {}, header, scroll, status), make("div", {}, above, strip),
      make("div", { className: "ernie-side" }, ofToken, ofExpert)));
  ownKeys(root);
  el.append(root);
  above.style.cssText = `height:${HEAD}px;width:${STRIP}px`;

  const tokens = () => get("tokens").texts || [];
  const position = (i) => get("tokens").positions[i];
  const called = (i) => `“${tokens()[i]}” (position ${position(i)})`;
  const height = () => Math.min(ROWS, tokens().length) * ROW;
  const weightOf = (i, expert) => {
    for (let k = 0; k < nChosen; k++) if (state.ids[i * nChosen + k] === expert) return state.weights[i * nChosen + k];
    return null;
  };

  function read() {
    const choices = get("choices");
    state.ids = numbers(choices.ids, Int16Array);
    state.weights = numbers(choices.weights, Float32Array);
    state.load = new Array(nExperts).fill(0);
    for (const id of state.ids) if (id >= 0) state.load[id] += 1;
  }

  function drawHeader() {
    const ctx = sheet(header, width, HEAD);
    const n = tokens().length, most = Math.max(...state.load, 1), floor = HEAD - 16;
    ctx.font = `10px ${FONT}`;
    ctx.fillStyle = MUTED;
    ctx.fillText("tokens per expert", 4, 12);
    ctx.fillText("(line: if all were even)", 4, 24);
    ctx.fillText("token", NUMBER, HEAD - 5);
    ctx.fillText("expert", TEXT - 38, HEAD - 5);
    const room = floor - 4, even = (n * nChosen) / nExperts, top = Math.max(most, even);
    for (let e = 0; e < nExperts; e++) {
      const x = TEXT + e * cell, tall = (room * state.load[e]) / top, picked = e === get("expert");
      ctx.fillStyle = picked ? FOUND : "#8fb8d8";
      ctx.fillRect(x + 0.5, floor - tall, cell - 1, tall);
      const beside = !picked && get("expert") >= 0 && Math.abs(e - get("expert")) * cell < 22;
      if (picked || cell >= 22 || (e % Math.ceil(22 / cell) === 0 && !beside)) {
        const words = String(e), w = ctx.measureText(words).width;
        if (picked) {
          ctx.fillStyle = "#fff";
          ctx.fillRect(x + cell / 2 - w / 2 - 3, floor + 1, w + 6, 15);
        }
        ctx.fillStyle = picked ? FOUND : INK;
        ctx.font = `${picked ? "bold " : ""}10px ${FONT}`;
        ctx.fillText(words, x + cell / 2 - w / 2, HEAD - 5);
      }
    }
    ctx.strokeStyle = INK;
    ctx.setLineDash([3, 2]);
    ctx.beginPath();
    ctx.moveTo(TEXT, floor - (room * even) / top);
    ctx.lineTo(width, floor - (room * even) / top);
    ctx.stroke();
    ctx.setLineDash([]);
    const busiest = state.load.indexOf(most);
    header.setAttribute("aria-label", `Load of the ${nExperts} experts in layer ${get("layer")}: expert ` +
      `${busiest} most often, ${percent(most, n)} of ${n} tokens; even use ${percent(nChosen, nExperts)}`);
  }

  function drawMap() {
    const n = tokens().length, h = height(), picked = get("expert"), border = get("tokens").border;
    spacer.style.height = `${n * ROW - h}px`;
    scroll.style.cssText = `height:${h}px;width:${width + 16}px`;
    const ctx = sheet(map, width, h);
    const top = scroll.scrollTop, first = Math.floor(top / ROW);
    ctx.font = `12px ${FONT}`;
    for (let i = first; i < Math.min(n, first + ROWS + 2); i++) {
      const y = i * ROW - top, mine = i === get("token"), weight = picked < 0 ? null : weightOf(i, picked);
      ctx.fillStyle = mine ? "#fdeee2" : "#fff";
      ctx.fillRect(0, y, TEXT, ROW);
      ctx.fillStyle = PALE;
      ctx.fillRect(TEXT, y + 0.5, width - TEXT, ROW - 1);
      ctx.globalAlpha = picked >= 0 && weight === null && !mine ? 0.5 : 1;
      ctx.fillStyle = MUTED;
      ctx.textAlign = "right";
      ctx.fillText(position(i), NUMBER - 8, y + 13);
      ctx.textAlign = "left";
      ctx.save();
      ctx.beginPath();
      ctx.rect(NUMBER, y, TEXT - NUMBER - 6, ROW);
      ctx.clip();
      ctx.fillStyle = INK;
      ctx.fillText(tokens()[i], NUMBER, y + 13);
      ctx.restore();
      for (let k = 0; k < nChosen; k++) {
        const e = state.ids[i * nChosen + k], w = state.weights[i * nChosen + k];
        if (e < 0 || e === undefined) continue;
        ctx.fillStyle = shade(w);
        ctx.fillRect(TEXT + e * cell + 0.5, y + 1, cell - 1, ROW - 2);
        if (cell >= 26) {
          ctx.fillStyle = w > 0.45 ? "#fff" : INK;
          ctx.font = `10px ${FONT}`;
          ctx.fillText(w.toFixed(2).replace(/^0/, ""), TEXT + e * cell + 6, y + 12.5);
          ctx.font = `12px ${FONT}`;
        }
      }
      ctx.globalAlpha = 1;
      if (i === border && i > 0) {
        ctx.fillStyle = INK;
        ctx.fillRect(0, y - 0.75, width, 1.5);
        ctx.font = `9px ${FONT}`;
        ctx.textAlign = "right";
        ctx.fillText("generated ↓", TEXT - 6, y + 10);
        ctx.textAlign = "left";
        ctx.font = `12px ${FONT}`;
      }
      if (mine) {
        ctx.strokeStyle = FOUND;
        ctx.lineWidth = 1.5;
        ctx.strokeRect(0.75, y + 0.75, width - 1.5, ROW - 1.5);
      }
    }
    if (cell >= 12) {
      ctx.fillStyle = "#fff";
      for (let e = 1; e < nExperts; e++) ctx.fillRect(TEXT + e * cell - 0.5, 0, 1, h);
    }
    if (picked >= 0) {
      ctx.strokeStyle = FOUND;
      ctx.lineWidth = 1.5;
      ctx.strokeRect(TEXT + picked * cell - 0.25, -4, cell + 0.5, h + 8);
    }
    const i = get("token"), chosen = [];
    for (let k = 0; k < nChosen; k++) chosen.push(state.ids[i * nChosen + k]);
    map.setAttribute("aria-label", `Tokens by experts, layer ${get("layer")}${bankWords()}. Token ${called(i)}: ` +
      `experts ${chosen.join(", ")}.` + (picked < 0 ? "" : ` Expert ${picked}: ${state.load[picked]} of ${n} tokens.`));
    drawStrip(top, h);
  }

  // The whole sequence beside the part in sight; a pixel line shows the heaviest of its tokens.
  function drawStrip(top, h) {
    const n = tokens().length;
    strip.hidden = above.hidden = n <= ROWS;
    if (strip.hidden) return;
    above.textContent = `all ${n}`;
    const ctx = sheet(strip, STRIP, h);
    ctx.fillStyle = PALE;
    ctx.fillRect(0, 0, STRIP, h);
    const picked = get("expert"), heaviest = new Float32Array(h * nExperts);
    for (let i = 0; i < n; i++) {
      const y = Math.floor((i * h) / n);
      for (let k = 0; k < nChosen; k++) {
        const e = state.ids[i * nChosen + k], at = y * nExperts + e;
        if (e >= 0) heaviest[at] = Math.max(heaviest[at], state.weights[i * nChosen + k]);
      }
    }
    const w = STRIP / nExperts, tall = Math.max(1, h / n);
    for (let at = 0; at < heaviest.length; at++) {
      if (!heaviest[at]) continue;
      const e = at % nExperts;
      ctx.fillStyle = e === picked ? FOUND : shade(heaviest[at]);
      ctx.fillRect(e * w, Math.floor(at / nExperts), Math.max(w, e === picked ? 2 : 0.5), tall);
    }
    const line = (i) => (i * h) / n;
    ctx.fillStyle = FOUND;
    ctx.fillRect(0, line(get("token")) - 0.5, STRIP, 1.5);
    ctx.strokeStyle = INK;
    ctx.lineWidth = 1.5;
    ctx.strokeRect(0.75, line(top / ROW) + 0.75, STRIP - 1.5, Math.max(4, line(h / ROW) - 1.5));
    strip.setAttribute("aria-label", `All ${n} tokens; in sight are those from position ${position(Math.floor(top / ROW))} on`);
    strip.title = `all ${n} tokens: click to go there`;
  }

  const bankWords = () => (get("about").banks.length ? `, ${get("bank")} bank` : "");
  const number = (x) => (x === null || x === undefined ? "–" : x.toFixed(3));

  function drawToken() {
    const detail = get("detail");
    if (!detail.lines || detail.token !== get("token") || detail.layer !== get("layer")) return;
    const heading = make("h4", {}, "Token ", make("bdi", { textContent: `“${tokens()[detail.token]}”` }),
      ` at position ${position(detail.token)}, layer ${detail.layer}${bankWords()}`);
    const rows = detail.lines.map((line) => ({
      className: line.weight === null ? "ernie-other" : "",
      cells: [link(`expert ${line.expert}`, "show its tokens", () => set({ expert: line.expert })),
        line.weight === null ? "not chosen" : number(line.weight), number(line.prob), number(line.score), line.note],
    }));
    ofToken.replaceChildren(heading,
      table("ernie-chosen", ["", "weight", "probability", "score", ""], rows),
      ...detail.words.map((words) => make("p", { textContent: words })),
      make("p", { className: "ernie-hint", textContent:
        `Score: probability + correction bias; the ${nChosen} highest are chosen.` }));
  }

  function drawExpert() {
    const picked = get("expert"), n = tokens().length;
    if (picked < 0) {
      ofExpert.replaceChildren(make("p", { className: "ernie-hint",
        textContent: "No expert is picked. Click a number above the map, or an expert in the list above." }));
      return;
    }
    const found = [];
    for (let i = 0; i < n; i++) {
      const w = weightOf(i, picked);
      if (w !== null) found.push([i, w]);
    }
    found.sort((a, b) => b[1] - a[1]);
    const close = link("close", "no expert", () => set({ expert: -1 }));
    const rows = found.slice(0, LISTED).map(([i, w]) => ({ cells: [
      link(tokens()[i], "show this token", () => pick(i)), `${position(i)}`, number(w), ""] }));
    ofExpert.replaceChildren(
      make("h4", { textContent: `Expert ${picked}, layer ${get("layer")}${bankWords()} ` }, close),
      make("p", { textContent: `Chosen by ${found.length} of ${n} tokens, ${percent(found.length, n)}; ` +
        `even use would be ${percent(nChosen, nExperts)}.` }),
      table("ernie-strongest", ["token", "position", "weight", ""], rows),
      make("p", { className: "ernie-hint", textContent: found.length > LISTED
        ? `The ${LISTED} heaviest of ${found.length}. Who was chosen, not what the expert does.`
        : "Who was chosen, not what the expert does." }));
  }

  function pick(i, more = {}) {
    const at = Math.max(0, Math.min(tokens().length - 1, i));
    set({ token: at, ...more });
    const y = at * ROW;
    if (y < scroll.scrollTop) scroll.scrollTop = y;
    if (y + ROW > scroll.scrollTop + height()) scroll.scrollTop = y + ROW - height();
  }

  const place = (event, canvas) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const expertAt = (x) => (x < TEXT ? -1 : Math.min(nExperts - 1, Math.floor((x - TEXT) / cell)));

  map.onclick = (event) => {
    const [x, y] = place(event, map), i = Math.floor((y + scroll.scrollTop) / ROW), expert = expertAt(x);
    if (i >= tokens().length) return;
    pick(i, expert >= 0 && weightOf(i, expert) !== null ? { expert } : {});
  };
  header.onclick = (event) => {
    const expert = expertAt(place(event, header)[0]);
    if (expert >= 0) set({ expert: expert === get("expert") ? -1 : expert });
  };
  strip.onclick = (event) => {
    const i = Math.floor((place(event, strip)[1] * tokens().length) / height());
    scroll.scrollTop = i * ROW - height() / 2;
  };
  map.onmousemove = (event) => {
    const [x, y] = place(event, map), i = Math.floor((y + scroll.scrollTop) / ROW), expert = expertAt(x);
    if (i >= tokens().length) return;
    const weight = expert < 0 ? null : weightOf(i, expert);
    status.textContent = `token ${called(i)}` +
      (expert < 0 ? "" : `, expert ${expert}: ${weight === null ? "not chosen" : `weight ${number(weight)}`}`);
  };
  map.onmouseleave = () => { status.textContent = ""; };
  map.onkeydown = (event) => {
    const i = get("token"), e = get("expert"), layers = get("about").layers;
    const at = layers.indexOf(get("layer"));
    const acts = {
      ArrowDown: () => pick(i + 1), ArrowUp: () => pick(i - 1),
      PageDown: () => pick(i + ROWS), PageUp: () => pick(i - ROWS),
      Home: () => pick(0), End: () => pick(tokens().length - 1),
      ArrowRight: () => set({ expert: Math.min(nExperts - 1, e + 1) }),
      ArrowLeft: () => set({ expert: Math.max(-1, e - 1) }),
      Escape: () => set({ expert: -1 }),
      l: () => set({ layer: layers[Math.min(layers.length - 1, at + 1)] }),
      L: () => set({ layer: layers[Math.max(0, at - 1)] }),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  };
  find.onkeydown = (event) => {
    if (event.key !== "Enter" || !find.value) return;
    const wanted = find.value.toLowerCase().replaceAll(" ", "␣"), n = tokens().length;
    for (let step = 1; step <= n; step++) {
      const i = (get("token") + step) % n;
      if (tokens()[i].toLowerCase().includes(wanted)) return pick(i);
    }
    status.textContent = `no token has “${find.value}” in it`;
  };
  scroll.onscroll = () => drawMap();

  function pickers() {
    const about = get("about");
    title.textContent = `Experts of each token${about.model ? ` in ${about.model}` : ""}`;
    layer.show(`layer ${get("layer")}`);
    bank.show(about.banks.map((name) => [name, name]));
    sequence.show(about.sequences.map((one) => [one, `${one}`]));
  }
  function all() {
    read();
    pickers();
    drawHeader();
    drawMap();
    drawToken();
    drawExpert();
    root.dataset.layer = get("layer"); // what the picture shows, for tests
    root.dataset.bank = get("bank");
  }
  // A new layer's choices come later than its number; until then the old picture stays.
  heard.on(["change:about", "change:tokens", "change:choices", "change:bank"], () => {
    const shown = get("choices");
    if (["bank", "sequence", "layer"].every((name) => shown[name] === get(name))) all();
  });
  heard.on(["change:layer", "change:sequence"], pickers);
  heard.on(["change:token"], drawMap);
  heard.on(["change:detail"], () => { drawToken(); root.dataset.token = get("detail").token; });
  heard.on(["change:expert"], () => { drawHeader(); drawMap(); drawExpert(); });
  all();
  return () => heard.end();
}

export default { render };
