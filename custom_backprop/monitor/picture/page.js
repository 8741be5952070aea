"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const nodes = data.nodes;
const get = (id) => document.getElementById(id);
const [canvas, drawing, view, map, frame, panel] =
  ["canvas", "drawing", "view", "map", "frame", "panel"].map(get);
const parts = new Map(); // index -> its groups in the drawing; a shared leaf has several
for (const group of drawing.querySelectorAll("[data-node]"))
  for (const index of group.dataset.node.split(" "))
    parts.set(+index, [...(parts.get(+index) || []), group]);

// ---- where the drawing is seen ----
let scale = 1, left = 0, top_ = 0;

function place() {
  view.setAttribute("transform", `translate(${left} ${top_}) scale(${scale})`);
  frame.setAttribute("x", -left / scale);
  frame.setAttribute("y", -top_ / scale);
  frame.setAttribute("width", canvas.clientWidth / scale);
  frame.setAttribute("height", canvas.clientHeight / scale);
  frame.setAttribute("stroke-width", 1.5 / mapScale);
}

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const to = Math.min(4, Math.max(0.02, scale * factor));
  left = x - (x - left) * to / scale;
  top_ = y - (y - top_) * to / scale;
  scale = to;
  place();
}

function fit() {
  const margin = 40;
  scale = Math.min(1.2, (canvas.clientWidth - margin) / data.width,
    (canvas.clientHeight - margin) / data.height);
  left = (canvas.clientWidth - scale * data.width) / 2;
  top_ = (canvas.clientHeight - scale * data.height) / 2;
  place();
}

function centre(x, y) {
  left = canvas.clientWidth / 2 - x * scale;
  top_ = canvas.clientHeight / 2 - y * scale;
  place();
}

function start() { // the whole graph if it can be read then, else its beginning and a map
  fit();
  map.style.display = scale < 0.6 ? "" : "none";
  if (scale < 0.6) {
    const first = view.querySelector(".box").getBBox();
    const at = view.querySelector(".box").transform.baseVal[0].matrix;
    scale = 0.9;
    centre(at.e + first.width / 2, 0);
    top_ = 28;
    place();
  }
}

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect();
  if (event.ctrlKey || !event.shiftKey)
    zoom(Math.exp(-event.deltaY / 500), event.clientX - box.left, event.clientY - box.top);
  else { left -= event.deltaY; place(); }
}, { passive: false });

const fingers = new Map();
let moved = 0;
drawing.addEventListener("pointerdown", (event) => {
  fingers.set(event.pointerId, event);
  moved = 0;
});
window.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const others = [...fingers.values()].filter((f) => f.pointerId !== event.pointerId);
  if (others.length === 1) { // two fingers zoom
    const far = (f) => Math.hypot(f.clientX - others[0].clientX, f.clientY - others[0].clientY);
    zoom(far(event) / Math.max(1, far(before)));
  } else {
    left += event.clientX - before.clientX;
    top_ += event.clientY - before.clientY;
    place();
  }
  moved += Math.abs(event.clientX - before.clientX) + Math.abs(event.clientY - before.clientY);
  if (moved > 4) canvas.classList.add("moving");
  fingers.set(event.pointerId, event);
});
for (const name of ["pointerup", "pointercancel"])
  window.addEventListener(name, (event) => {
    fingers.delete(event.pointerId);
    canvas.classList.remove("moving");
  });

// ---- the small map ----
const mapScale = Math.min(150 / data.width, 260 / data.height);
map.setAttribute("viewBox", `0 0 ${data.width} ${data.height}`);
map.setAttribute("width", Math.max(30, data.width * mapScale));
map.setAttribute("height", data.height * mapScale);
const MARKS = ["non-finite", "exploding", "vanishing"];
for (const row of view.querySelectorAll(".row")) {
  const back = row.querySelector(".back"), at = row.parentNode.transform.baseVal[0].matrix;
  const tile = document.createElementNS(map.namespaceURI, "rect");
  const mark = MARKS.find((m) => row.classList.contains(m) || row.querySelector(`.leaf.${m}`));
  tile.setAttribute("class", `tile ${mark || ""}`);
  tile.setAttribute("x", at.e);
  tile.setAttribute("y", at.f + +back.getAttribute("y") + 2);
  tile.setAttribute("width", back.getAttribute("width"));
  tile.setAttribute("height", back.getAttribute("height") - 4);
  map.insertBefore(tile, frame);
}
function fromMap(event) {
  if (event.buttons !== 1) return;
  const box = map.getBoundingClientRect();
  centre((event.clientX - box.left) * data.width / box.width,
    (event.clientY - box.top) * data.height / box.height);
}
map.addEventListener("pointerdown", fromMap);
map.addEventListener("pointermove", fromMap);

// ---- the panel ----
const text = (value) => String(value).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const shape = (s) => s.length ? s.join(" × ") : "scalar";
const number = (x) => typeof x === "number" ? x === 0 ? "0" : x.toPrecision(4) : x ?? "–";
const share = (x) => typeof x === "number" ? `${+(100 * x).toPrecision(3)} %` : x;
const link = (i) => `<a data-to="${i}">${text(nodes[i].op === "leaf" ? nodes[i].label
  : nodes[i].op)} #${i}</a>`;
const table = (rows) =>
  `<table>${rows.map((r) => `<tr>${r.map((c) => `<td>${c}</td>`).join("")}</tr>`).join("")}</table>`;
const senders = nodes.map(() => []);
nodes.forEach((n) => n.edges.forEach((e) => senders[e.to].push([n.index, e.norm])));

function histogram(bins) {
  const { first, last, low, bins: each } = data.histogram;
  const used = bins.slice(first, last), most = Math.max(...used, 1), step = 316 / used.length;
  const bars = used.map((n, i) => n && `<rect x="${i * step + 0.5}" y="${86 - 82 * n / most}"
    width="${step - 1}" height="${82 * n / most}"><title>${n}</title></rect>`).join("");
  let marks = "";
  const every = Math.ceil((last - first) / each / 6);
  for (let d = 0; d <= (last - first) / each; d += every)
    marks += `<text x="${Math.min(300, Math.max(16, d * each * step))}" y="104">10${
      [...String(low + first / each + d)].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)])
        .join("")}</text>`;
  return `<svg viewBox="0 0 316 110" role="img" aria-label="Histogram of magnitudes">
    <line x1="0" x2="316" y1="87" y2="87"/>${bars}${marks}</svg>`;
}

function show(index, move = false) {
  const n = nodes[index], flow = n.flow;
  for (const old of drawing.querySelectorAll(".chosen")) old.classList.remove("chosen");
  for (const group of parts.get(index) || []) group.classList.add("chosen");
  let html = `<h2>${text(n.op === "leaf" ? n.label : n.op)}</h2>
    <p>${text(n.name)} · #${index} in the order of backward</p>`;
  const colour = { "non-finite": "bad" }[n.mark] || n.mark;
  if (n.mark) html += `<p><span class="badge" style="background:var(--${colour})">${n.mark}</span></p>`;
  if (n.label && n.op !== "leaf") html += `<p>the tensor ${text(n.label)}</p>`;
  if (n.formula) html += "<h3>Formula</h3>" + n.formula.split(/;\s+/)
    .map((line) => `<p class="formula-line">${text(line)}</p>`).join("");
  html += "<h3>Gradient</h3>";
  const where = `${n.shapes.map(shape).join(", ")} · ${n.dtype} · ${n.device}`;
  html += flow ? table([["shape", where], ["norm", number(flow.norm)], ["mean", number(flow.mean)],
    ["standard deviation", number(flow.std)], ["zeros", share(flow.zeros)],
    ...(flow.nonfinite ? [["not finite", share(flow.nonfinite)]] : [])])
    + (flow.histogram.some(Boolean) ? histogram(flow.histogram) + "<p>magnitudes of its elements</p>" : "")
    : `<p>${where}</p><p>none was measured here</p>`;
  if (n.saved.length) html += `<h3>Held for backward ${n.bytes && "· " + n.bytes}</h3>`
    + table(n.saved.map((s) => [`${text(s.name)}<small>${s.dtype ? shape(s.shape) : ""} ${s.dtype}</small>`,
      s.bytes || (s.shared !== null ? `counted at ${link(s.shared)}` : text(s.note))]));
  if (n.edges.length) html += "<h3>Sends to</h3>"
    + table(n.edges.map((e) => [link(e.to), number(e.norm)]));
  if (senders[index].length) html += "<h3>Gets from</h3>"
    + table(senders[index].map(([i, norm]) => [link(i), number(norm)]));
  panel.innerHTML = html;
  panel.scrollTop = 0;
  const group = (parts.get(index) || [])[0];
  if (move && group) {
    const at = group.closest(".box").transform.baseVal[0].matrix;
    const back = group.querySelector(".back");
    if (scale < 0.5) scale = 0.9;
    centre(at.e + back.getAttribute("width") / 2, at.f + +back.getAttribute("y"));
  }
}
drawing.addEventListener("click", (event) => {
  const group = event.target.closest("[data-node]");
  if (!group || moved > 4) return;
  const all = group.dataset.node.split(" ").map(Number);
  const at = all.findIndex((i) => panel.dataset.node === String(i));
  panel.dataset.node = all[(at + 1) % all.length]; // a row of several shows the next one
  show(+panel.dataset.node);
});
panel.addEventListener("click", (event) => {
  const to = event.target.closest("[data-to]")?.dataset.to;
  if (to !== undefined) show(+(panel.dataset.node = to), true);
});

// ---- the search ----
const search = get("search"), words = nodes.map((n) => [n.op, n.name, n.label, n.kind, n.mark,
  n.dtype, ...n.shapes.map((s) => s.join("x")), ...n.shapes.map((s) => s.join("×"))]
  .join(" ").toLowerCase());
let hits = [], hit = -1;
search.addEventListener("input", () => {
  const wanted = search.value.trim().toLowerCase();
  for (const old of drawing.querySelectorAll(".hit")) old.classList.remove("hit");
  hits = wanted ? nodes.map((n) => n.index).filter((i) => words[i].includes(wanted)) : [];
  for (const i of hits) for (const group of parts.get(i) || []) group.classList.add("hit");
  drawing.classList.toggle("searching", hits.length > 0);
  get("found").textContent = wanted ? `${hits.length} found` : "";
  hit = -1;
});
search.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !hits.length) return;
  hit = (hit + (event.shiftKey ? hits.length - 1 : 1)) % hits.length;
  get("found").textContent = `${hit + 1} of ${hits.length}`;
  show(hits[hit], true);
});

// ---- buttons and keys ----
get("in").onclick = () => zoom(1.3);
get("out").onclick = () => zoom(1 / 1.3);
get("fit").onclick = fit;
get("theme").onclick = () => {
  const root = document.documentElement.style;
  const dark = root.colorScheme ? root.colorScheme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.colorScheme = dark ? "light" : "dark";
};
window.addEventListener("keydown", (event) => {
  if (event.target === search) return;
  const step = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
  if (step[event.key]) { left += step[event.key][0]; top_ += step[event.key][1]; place(); }
  else if (event.key === "+") zoom(1.3);
  else if (event.key === "-") zoom(1 / 1.3);
  else if (event.key === "0") fit();
  else if (event.key === "/") search.focus();
  else return;
  event.preventDefault();
});
window.addEventListener("resize", place);
start();
panel.dataset.node = 0;
show(0);
