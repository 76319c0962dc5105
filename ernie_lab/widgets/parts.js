// What the views share. Texts of tokens reach the page as textContent or on a canvas, never as markup.

const INK = "#1b1f24", MUTED = "#5b6470", PALE = "#eef0f3", RULE = "#c3c9d1", FOUND = "#D55E00";
const FONT = "system-ui, 'DejaVu Sans', sans-serif";

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("aria-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

// Bytes of the kernel as numbers; a copy, because a DataView need not start at a multiple of 4.
function numbers(view, type) {
  if (!view) return new type(0);
  return new type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// A canvas of this size in CSS pixels, sharp on any screen.
function sheet(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  const across = Math.round(width * scale), down = Math.round(height * scale);
  if (canvas.width !== across || canvas.height !== down) {
    canvas.width = across;
    canvas.height = down;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.clearRect(0, 0, width, height);
  ctx.direction = "ltr";
  return ctx;
}

// value in 0..1 to a CSS colour of a scale of the figures
function colours(shades) {
  const css = shades.map(([r, g, b, a]) => `rgba(${r},${g},${b},${a})`);
  return (value) => css[Math.max(0, Math.min(css.length - 1, Math.round(value * (css.length - 1))))];
}

// A slider over `values()`, with its value in words and steps of one to both sides.
function slider(name, className, values, get, set) {
  const input = make("input", { type: "range", className, step: 1, min: 0, "aria-label": name });
  const shown = make("output", { className: "ernie-value" });
  const step = (by) => {
    const next = values()[values().indexOf(get()) + by];
    if (next !== undefined) set(next);
  };
  const less = make("button", { type: "button", textContent: "‹", "aria-label": `${name} before` });
  const more = make("button", { type: "button", textContent: "›", "aria-label": `${name} after` });
  less.onclick = () => step(-1);
  more.onclick = () => step(1);
  input.oninput = () => set(values()[Number(input.value)]);
  const node = make("span", { className: "ernie-picker" }, `${name} `, less, input, more, shown);
  ownKeys(node);
  node.show = (words) => {
    input.max = values().length - 1;
    input.value = values().indexOf(get());
    input.setAttribute("aria-valuetext", words);
    shown.textContent = words;
    node.hidden = values().length < 2;
  };
  return node;
}

// A list to pick from; `options` are [value, words].
function picker(name, className, get, set) {
  const select = make("select", { className, "aria-label": name });
  select.onchange = () => set(select.options[select.selectedIndex].known);
  const node = make("label", { className: "ernie-picker" }, `${name} `, select);
  node.show = (options) => {
    select.replaceChildren(...options.map(([value, words]) => {
      const option = make("option", { textContent: words, selected: value === get() });
      option.known = value;
      return option;
    }));
    node.hidden = options.length < 2;
  };
  return node;
}

// Rows of cells; a cell is a text or a node.
function table(className, head, rows) {
  const line = (tag) => (cells) => make("tr", {}, ...cells.map((cell) => {
    const node = make(tag, {});
    node.append(cell);
    return node;
  }));
  const body = rows.map((row) => {
    const made = line("td")(row.cells);
    made.className = row.className || "";
    return made;
  });
  return make("table", { className }, make("thead", {}, line("th")(head)), make("tbody", {}, ...body));
}

function link(words, title, onclick) {
  return make("button", { type: "button", className: "ernie-link", textContent: words, title, onclick });
}

// Listens to the model for as long as the view is on the page.
function listener(model) {
  const heard = [];
  return {
    on(events, act) {
      for (const event of events) {
        model.on(event, act);
        heard.push([event, act]);
      }
    },
    end() {
      for (const [event, act] of heard) model.off(event, act);
    },
  };
}

const percent = (part, whole) => `${((100 * part) / Math.max(1, whole)).toFixed(1)}\u00a0%`;

// JupyterLab reads arrows and letters as its own (another cell), and keeps them from sliders as well.
function ownKeys(root) {
  root.setAttribute("data-lm-suppress-shortcuts", "true");
  root.addEventListener("keydown", (event) => event.stopPropagation());
}
