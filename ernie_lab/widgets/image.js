// Left the picture as the model saw it, right the same pale, each token's box tinted by its routing.

const SMALL = 200, LEAST = 320, MOST = 560, NUMBERED = 15, WIDE = 400;

function render({ model, el }) {
  const get = (name) => model.get(name);
  const set = (changes) => {
    for (const [name, value] of Object.entries(changes)) model.set(name, value);
    model.save_changes();
  };
  const heard = listener(model);
  const about = get("about"), nExperts = about.n_experts, nChosen = about.n_chosen;
  const shade = colours(about.shades);
  const hues = nExperts <= about.hues.length ? about.hues : null;
  const state = { bitmaps: [], cell: 0, pinned: 0, ids: [], weights: [], probs: [], entropy: [], margin: [] };

  const layer = slider("layer", "ernie-layer", () => about.layers, () => get("layer"),
    (value) => set({ layer: value }));
  const pairs = () => about.pairs[get("image")];
  const frame = slider("frames", "ernie-frame", () => pairs().map(([first]) => first), () => get("frame"),
    (value) => set({ frame: value }));
  const image = picker("picture", "ernie-image", () => get("image"), (value) => set({ image: value }));
  const value = picker("colour", "ernie-colour", () => get("value"), (picked) => set({ value: picked }));
  const slot = picker("choice", "ernie-slot", () => get("slot"), (picked) => set({ slot: picked }));
  const seen = make("div", { className: "ernie-seen" });
  const over = make("canvas", { className: "ernie-over", role: "img", tabIndex: 0 });
  const caption = make("p", { className: "ernie-hint" });
  const scale = make("div", { className: "ernie-scale" });
  const ofPatch = make("section", { className: "ernie-patch" });
  const ofExperts = make("section", { className: "ernie-legend", "aria-live": "polite" });
  const original = make("div", {}, make("p", { className: "ernie-hint", textContent: "what the model saw" }), seen);
  const side = make("div", { className: "ernie-side" }, ofPatch, ofExperts);
  const body = make("div", { className: "ernie-body" }, original, make("div", {}, caption, over, scale), side);
  const root = make("div", { className: "ernie-explorer ernie-images" },
    make("div", { className: "ernie-title",
      textContent: `Routing on the picture${about.model ? ` in ${about.model}` : ""}` }),
    make("p", { className: "ernie-hint", textContent:
      "Point at a patch for its experts, click to keep it. Click an expert to see only its patches. " +
      "Keys on the picture: arrows next patch, l / L next / previous layer, Esc no expert." }),
    make("div", { className: "ernie-bar" }, image, layer, frame, value, slot),
    body);
  ownKeys(root);
  el.append(root);

  const picture = () => get("picture");
  const rank = (k) => ["first", "second", "third"][k] || `${k + 1}th`;
  const number = (x) => (Number.isFinite(x) ? x.toFixed(3) : "–");
  const size = () => {
    const wide = Math.max(LEAST, Math.min(MOST, picture().cols * 18));
    const width = Math.min(wide, 560 / picture().aspect);
    return [Math.round(width), Math.round(width * picture().aspect)];
  };
  const idAt = (i, k) => state.ids[i * nChosen + k];
  const has = (i, expert) => chosen(i).includes(expert);

  function read() {
    const values = get("values");
    state.ids = numbers(values.ids, Int16Array);
    for (const name of ["weights", "probs", "entropy", "margin"]) state[name] = numbers(values[name], Float32Array);
    state.positions = numbers(picture().positions, Int32Array);
    state.boxes = numbers(picture().boxes, Float32Array);
    const n = picture().rows * picture().cols;
    state.cell = Math.min(state.cell, n - 1);
    state.pinned = Math.min(state.pinned, n - 1);
  }

  function drawSeen() {
    const height = SMALL * picture().aspect, { rows, cols } = picture();
    const home = size()[0] > WIDE ? side : body;
    if (original.parentNode !== home) home.prepend(original);
    while (seen.children.length > state.bitmaps.length) seen.lastChild.remove();
    while (seen.children.length < state.bitmaps.length) {
      const canvas = make("canvas", { role: "img" });
      canvas.style.marginBottom = "4px";
      canvas.style.cursor = "default";
      seen.append(canvas);
    }
    state.bitmaps.forEach((bitmap, i) => {
      const ctx = sheet(seen.children[i], SMALL, height);
      ctx.drawImage(bitmap, 0, 0, SMALL, height);
      frameBox(ctx, state.cell, SMALL / cols, height / rows, FOUND, 2);
      seen.children[i].setAttribute("aria-label", `${picture().name} as the model saw it`);
    });
  }

  function frameBox(ctx, i, w, h, colour, line) {
    const x = (i % picture().cols) * w, y = Math.floor(i / picture().cols) * h;
    ctx.strokeStyle = colour;
    ctx.lineWidth = line;
    ctx.strokeRect(x + line / 2, y + line / 2, w - line, h - line);
  }

  // In 0..1 of the scale, NaN where nothing is known.
  function amount(i) {
    const name = get("value"), weight = state.weights[i * nChosen + get("slot")];
    if (name === "entropy") return state.entropy[i] / about.highest_entropy;
    if (name === "margin") return state.margin[i] / picture().widest_margin;
    return weight;
  }

  function drawOver() {
    const [width, height] = size(), { rows, cols } = picture(), w = width / cols, h = height / rows;
    const ctx = sheet(over, width, height), byExpert = get("value") === "expert", picked = get("expert");
    over.parentNode.style.width = `${width}px`; // words below wrap, so that nothing moves
    if (state.bitmaps.length) ctx.drawImage(state.bitmaps[0], 0, 0, width, height);
    ctx.globalCompositeOperation = "saturation";
    ctx.fillStyle = "#888";
    ctx.fillRect(0, 0, width, height);
    ctx.globalCompositeOperation = "source-over";
    ctx.fillStyle = "rgba(255,255,255,0.55)";
    ctx.fillRect(0, 0, width, height);
    const written = Math.min(w, h) >= NUMBERED, points = Math.max(9, Math.min(16, w * 0.42));
    ctx.textAlign = "center";
    ctx.textBaseline = "middle";
    for (let i = 0; i < rows * cols; i++) {
      const x = (i % cols) * w, y = Math.floor(i / cols) * h, id = idAt(i, get("slot"));
      const tint = amount(i);
      if (byExpert && hues && id >= 0) ctx.fillStyle = `rgba(${hues[id].join()})`;
      else ctx.fillStyle = Number.isFinite(tint) ? shade(tint) : "rgba(0,0,0,0)";
      ctx.fillRect(x, y, w, h);
      const words = id < 0 ? "×" : byExpert ? `${id}` : w >= 34 ? shortNumber(i) : "";
      if (written && words) {
        ctx.font = `600 ${byExpert ? points : Math.min(points, 12)}px ${FONT}`;
        ctx.lineWidth = 3;
        ctx.strokeStyle = "#fff";
        ctx.strokeText(words, x + w / 2, y + h / 2);
        ctx.fillStyle = INK;
        ctx.fillText(words, x + w / 2, y + h / 2);
      }
    }
    ctx.strokeStyle = "#fff";
    ctx.lineWidth = w > 12 ? 1 : 0.3;
    ctx.beginPath();
    for (let c = 1; c < cols; c++) { ctx.moveTo(c * w, 0); ctx.lineTo(c * w, height); }
    for (let r = 1; r < rows; r++) { ctx.moveTo(0, r * h); ctx.lineTo(width, r * h); }
    ctx.stroke();
    for (let i = 0; picked >= 0 && i < rows * cols; i++) {
      if (has(i, picked)) {
        if (w > 24) frameBox(ctx, i, w, h, INK, 3);
      } else {
        ctx.fillStyle = "rgba(255,255,255,0.75)";
        ctx.fillRect((i % cols) * w, Math.floor(i / cols) * h, w, h);
      }
    }
    frameBox(ctx, state.cell, w, h, FOUND, 3);
    const first = idAt(state.cell, 0);
    over.setAttribute("aria-label", `${picture().name}, ${rows} by ${cols} patches by ${valueName()}, layer ` +
      `${get("layer")}. Patch at row ${Math.floor(state.cell / cols)}, column ${state.cell % cols}: ` +
      (first < 0 ? `not read by the ${about.bank} bank` : `experts ${chosen(state.cell).join(", ")}`));
    caption.textContent = `layer ${get("layer")}: ${valueName()}` +
      (picked < 0 ? "" : `; only patches that chose expert ${picked}`) +
      (byExpert && !written ? ". Too small for numbers: point at a patch" : "");
  }

  const chosen = (i) => Array.from({ length: nChosen }, (_, k) => idAt(i, k));
  const shortNumber = (i) => {
    const raw = { entropy: state.entropy[i], margin: state.margin[i] }[get("value")];
    return Number.isFinite(raw ?? amount(i)) ? (raw ?? amount(i)).toFixed(2) : "×";
  };
  function valueName() {
    const name = get("value");
    if (name === "expert") return `${rank(get("slot"))} choice of ${nExperts} ${about.bank} experts`;
    if (name === "weight") return `weight of the ${rank(get("slot"))} choice`;
    return name === "entropy" ? "entropy of the router (nats)" : "margin between the last chosen and the runner-up";
  }

  function drawScale() {
    const name = get("value");
    scale.hidden = name === "expert" && !!hues;
    if (scale.hidden) return;
    const high = { entropy: about.highest_entropy, margin: picture().widest_margin }[name] || 1;
    const bar = make("canvas", { role: "img", "aria-label": `scale from 0 to ${high.toPrecision(3)}` });
    const ctx = sheet(bar, 160, 10);
    for (let x = 0; x < 160; x++) {
      ctx.fillStyle = shade(x / 159);
      ctx.fillRect(x, 0, 1, 10);
    }
    ctx.strokeStyle = RULE;
    ctx.strokeRect(0.5, 0.5, 159, 9);
    const most = { entropy: "even over all experts", margin: "widest here in any layer" }[name] || "all the weight";
    scale.replaceChildren("0 ", bar, ` ${high.toPrecision(3)} (${most})`);
  }

  function drawPatch() {
    const i = state.cell, { cols } = picture(), first = idAt(i, 0);
    const heading = make("h4", { textContent: `Patch at row ${Math.floor(i / cols)}, column ${i % cols}, layer ${get("layer")}` });
    const [left, top, right, bottom] = [...state.boxes.slice(4 * i, 4 * i + 4)].map((x) => x.toFixed(1).replace(".0", ""));
    const where = make("p", { textContent: `Token at position ${state.positions[i]}. In the original (${picture().original} ` +
      `pixels): x ${left} to ${right}, y ${top} to ${bottom}.` });
    if (first < 0) {
      ofPatch.replaceChildren(heading, make("p", { textContent: `Not in the trace, or not read by the ${about.bank} bank.` }));
      return;
    }
    const rows = chosen(i).map((id, k) => ({ cells: [
      link(`expert ${id}`, "show only its patches", () => set({ expert: id })),
      number(state.weights[i * nChosen + k]), number(state.probs[i * nChosen + k]), `${rank(k)} choice`] }));
    ofPatch.replaceChildren(heading, table("ernie-chosen", ["", "weight", "probability", ""], rows),
      make("p", { textContent: `Margin ${number(state.margin[i])}, entropy ${number(state.entropy[i])} nats ` +
        `(even: ${about.highest_entropy.toFixed(2)}).` }), where);
  }

  function drawExperts() {
    const n = picture().rows * picture().cols, picked = get("expert"), count = new Array(nExperts).fill(0);
    for (let i = 0; i < n; i++) for (let k = 0; k < nChosen; k++) if (idAt(i, k) >= 0) count[idAt(i, k)] += 1;
    const order = count.map((_, e) => e).sort((a, b) => count[b] - count[a]);
    const some = order.slice(0, 8).filter((e) => count[e]);
    if (picked >= 0 && !some.includes(picked)) some.push(picked);
    const rows = some.map((e) => {
      const chip = make("span", { className: "ernie-chip" });
      if (hues) chip.style.background = `rgba(${hues[e].join()})`;
      const cell = make("span", {}, chip, link(`expert ${e}`, "show only its patches", () => set({ expert: e })));
      return { cells: [cell, `${count[e]}`, percent(count[e], n), e === picked ? "shown" : ""] };
    });
    const close = picked < 0 ? "" : link("show all", "", () => set({ expert: -1 }));
    ofExperts.replaceChildren(
      make("h4", { textContent: `Experts of these ${n} patches ` }, close),
      table("ernie-chosen", ["", "patches", "", ""], rows),
      make("p", { className: "ernie-hint", textContent: `Chosen at all (${nChosen} of ${nExperts} per patch); ` +
        `even use would be ${percent(nChosen, nExperts)}. Who was chosen, not what the expert does.` }));
  }

  function point(i, keep) {
    state.cell = i;
    if (keep) state.pinned = i;
    drawSeen();
    drawOver();
    drawPatch();
  }
  const under = (event) => {
    const box = over.getBoundingClientRect(), { rows, cols } = picture();
    const c = Math.floor(((event.clientX - box.left) * cols) / box.width);
    const r = Math.floor(((event.clientY - box.top) * rows) / box.height);
    return Math.max(0, Math.min(rows - 1, r)) * cols + Math.max(0, Math.min(cols - 1, c));
  };
  over.onmousemove = (event) => { if (under(event) !== state.cell) point(under(event)); };
  over.onmouseleave = () => point(state.pinned);
  over.onclick = (event) => point(under(event), true);
  over.onkeydown = (event) => {
    const { rows, cols } = picture(), r = Math.floor(state.cell / cols), c = state.cell % cols;
    const to = (row, col) => point(Math.max(0, Math.min(rows - 1, row)) * cols + Math.max(0, Math.min(cols - 1, col)), true);
    const at = about.layers.indexOf(get("layer"));
    const acts = {
      ArrowDown: () => to(r + 1, c), ArrowUp: () => to(r - 1, c),
      ArrowRight: () => to(r, c + 1), ArrowLeft: () => to(r, c - 1),
      Escape: () => set({ expert: -1 }),
      l: () => set({ layer: about.layers[Math.min(about.layers.length - 1, at + 1)] }),
      L: () => set({ layer: about.layers[Math.max(0, at - 1)] }),
    };
    if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    acts[event.key]();
  };

  function pickers() {
    layer.show(`layer ${get("layer")}`);
    const found = pairs().find(([first]) => first === get("frame"));
    frame.show(found ? found[1] : "");
    image.show(about.pictures);
    value.show(about.values);
    slot.show(Array.from({ length: nChosen }, (_, k) => [k, rank(k)]));
    slot.hidden = slot.hidden || !["expert", "weight"].includes(get("value"));
  }
  function all() {
    read();
    pickers();
    drawSeen();
    drawOver();
    drawScale();
    drawPatch();
    drawExperts();
    root.dataset.layer = get("layer"); // what the picture shows, for tests
    root.dataset.frame = get("frame");
  }
  const ready = () => ["image", "frame"].every((name) => picture()[name] === get(name) &&
    get("values")[name] === get(name)) && get("values").layer === get("layer");
  let newest = 0;
  async function decode() {
    const mine = (newest += 1);
    const bytes = picture().frames.map((view) => new Blob([view], { type: "image/png" }));
    const bitmaps = await Promise.all(bytes.map((blob) => createImageBitmap(blob)));
    if (mine !== newest) return; // another picture was picked meanwhile
    state.bitmaps = bitmaps;
    if (ready()) all();
  }
  heard.on(["change:picture"], decode);
  heard.on(["change:values"], () => { if (ready()) all(); });
  heard.on(["change:layer", "change:frame", "change:image"], pickers);
  heard.on(["change:value", "change:slot"], () => { pickers(); drawOver(); drawScale(); });
  heard.on(["change:expert"], () => {
    drawOver();
    drawExperts();
  });
  decode();
  return () => heard.end();
}

export default { render };
