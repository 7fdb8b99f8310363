"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const stored = {  // what the reader has set, kept over a reload
  read: () => { try { return JSON.parse(sessionStorage.getItem(location.pathname)) || {}; } catch { return {}; } },
  write: value => { try { sessionStorage.setItem(location.pathname, JSON.stringify(value)); } catch { /* no storage */ } },
};
const before = stored.read();
const hidden = new Set(before.hidden || []);

const make = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  Object.assign(node, attributes);
  node.append(...children);
  return node;
};
const draw = (parent, name, attributes = {}, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  parent.append(node);
  return node;
};
const colour = group => data.names.length <= 7
  ? `var(--c${group})` : `hsl(${(group * 360 / data.names.length).toFixed(0)} 70% var(--many))`;
const paint = (node, group) => node.style.setProperty("--of", colour(group));
const short = value => {
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(4) + "B";
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
  return size && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
};

function ticks(least, most, log, count) {
  if (log) {
    const found = [];
    const steps = most / least > 1000 ? [1] : most / least > 15 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
    for (let power = Math.floor(Math.log10(least)); power <= Math.log10(most); power++)
      for (const step of steps) found.push(step * 10 ** power);
    const inside = found.filter(value => value >= least && value <= most);
    if (inside.length > 2) return inside.filter((_, i) => i % Math.ceil(inside.length / count) === 0);
  }
  const rough = (most - least) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough) * power;
  const found = [];
  for (let value = Math.ceil(least / step) * step; value <= most + step / 1e6; value += step) found.push(+value.toPrecision(8));
  return found;
}

function scale(values, log, from, to, pad) {
  let least = Math.min(...values), most = Math.max(...values);
  if (least === most) { least = log ? least / 1.1 : least - (Math.abs(least) || 1) / 10; most = log ? most * 1.1 : most + (Math.abs(most) || 1) / 10; }
  const f = log ? Math.log : value => value;
  const space = pad * (f(most) - f(least));
  const low = f(least) - space, high = f(most) + space;
  const at = value => from + (to - from) * (f(value) - low) / (high - low);
  return Object.assign(at, { least: log ? Math.exp(low) : low, most: log ? Math.exp(high) : high });
}

function drawChart(chart, svg, tip) {
  const width = Math.max(svg.parentNode.clientWidth, 200), height = Math.round(Math.min(300, width * .6));
  const left = 46, right = 8, top = 8, bottom = 36;
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.height = `${height}px`;
  tip.hidden = true;
  svg.onpointermove = svg.onpointerleave = null;
  const logX = document.getElementById("log-x").checked;
  const lines = chart.lines.filter(line => !hidden.has(line.group)).map(line => ({
    ...line, points: line.points.filter(([x, y]) => (!logX || x > 0) && (!chart.log || y > 0)),
  })).filter(line => line.points.length);
  if (!lines.length) return;
  const keep = ([x, ...ys]) => (!logX || x > 0) && (!chart.log || ys.every(y => y > 0));
  const xs = lines.flatMap(line => line.points.map(point => point[0]));
  const ys = lines.flatMap(line => [line.points, line.band || [], ...line.logged].flat().filter(keep).flatMap(point => point.slice(1)));
  if (chart.zero) ys.push(0);
  const x = scale(xs, logX, left, width - right, logX ? 0 : .01), y = scale(ys, chart.log, height - bottom, top, .05);
  if (chart.zero) y.least = 0;
  for (const value of ticks(y.least, y.most, chart.log, 5)) {
    draw(svg, "line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) });
    draw(svg, "text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
  }
  for (const value of ticks(Math.max(x.least, logX ? x.least : 0), x.most, logX, Math.max(3, Math.floor(width / 90)))) {
    if (x(value) < left - 1 || x(value) > width - right + 1) continue;
    draw(svg, "line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom });
    const anchor = x(value) > width - 30 ? "end" : "middle";
    draw(svg, "text", { x: x(value), y: height - bottom + 16, "text-anchor": anchor }, short(value));
  }
  draw(svg, "text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, chart.over);
  const clip = `clip-${chart.name}`;
  draw(draw(svg, "clipPath", { id: clip }), "rect", { x: left, y: 0, width: width - left, height: height - bottom + 4 });
  const plot = draw(svg, "g", { "clip-path": `url(#${clip})` });
  const path = points => "M" + points.map(point => `${x(point[0]).toFixed(1)} ${y(point[1]).toFixed(1)}`).join("L");
  for (const line of lines) {
    const group = draw(plot, "g");
    paint(group, line.group);
    for (const logged of line.logged.map(points => points.filter(keep)))
      if (logged.length) draw(group, "path", { class: "logged", d: path(logged) });
    const band = (line.band || []).filter(keep);
    if (band.length) draw(group, "path", {
      class: "band", d: path([...band.map(([at, low]) => [at, low]), ...band.map(([at, , high]) => [at, high]).reverse()]) + "Z",
    });
    draw(group, "path", { class: "mean", d: path(line.points) });
    if (chart.markers || line.points.length === 1)
      for (const [at, value] of line.points) draw(group, "circle", { class: "marker", cx: x(at), cy: y(value), r: 2.6 });
  }
  const cross = draw(svg, "line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
  const dots = draw(svg, "g");
  svg.onpointermove = event => {
    const pointer = (event.clientX - svg.getBoundingClientRect().left) * width / svg.clientWidth;
    const nearest = line => line.points.reduce((a, b) => Math.abs(x(b[0]) - pointer) < Math.abs(x(a[0]) - pointer) ? b : a);
    const found = lines.map(line => [line.group, nearest(line)]);
    const at = found.map(([, point]) => point).reduce((a, b) => Math.abs(x(b[0]) - pointer) < Math.abs(x(a[0]) - pointer) ? b : a)[0];
    cross.setAttribute("x1", x(at));
    cross.setAttribute("x2", x(at));
    cross.setAttribute("visibility", "visible");
    dots.replaceChildren();
    const near = found.filter(([, point]) => Math.abs(x(point[0]) - x(at)) < 20).sort((a, b) => b[1][1] - a[1][1]);
    tip.replaceChildren(make("div", { textContent: `${short(at)} ${chart.over}` }));
    for (const [group, [px, py]] of near) {
      paint(draw(dots, "circle", { class: "marker", cx: x(px), cy: y(py), r: 4 }), group);
      const dot = make("i", { className: "dot" });
      paint(dot, group);
      if (tip.childElementCount < 13)
        tip.append(make("div", {}, dot, `${lines.length > 1 ? data.names[group] + " " : ""}${+py.toPrecision(5)}`));
    }
    tip.hidden = false;
    const middle = x(at) > (left + width) / 2;
    tip.style.left = middle ? "" : `${x(at) + 12}px`;
    tip.style.right = middle ? `${width - x(at) + 12}px` : "";
  };
  svg.onpointerleave = () => {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
    dots.replaceChildren();
  };
}

let section = "";
const charts = data.charts.map(chart => {
  if (chart.data !== section) {
    section = chart.data;
    document.getElementById("charts").append(make("h3", { textContent: section || "All runs", className: "section" }));
  }
  const svg = draw(document.createElement("div"), "svg", { role: "img", "aria-label": chart.title });
  const tip = make("div", { className: "tip", hidden: true });
  const title = make("h3", {}, chart.title, make("small", { textContent: chart.unit }));
  const figure = make("figure", { id: chart.name }, title, svg, tip);
  if (chart.caption) figure.append(make("figcaption", { textContent: chart.caption }));
  document.getElementById("charts").append(figure);
  return { chart, svg, tip };
});
const drawAll = () => charts.forEach(({ chart, svg, tip }) => drawChart(chart, svg, tip));

const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37]];
function viridis(share) {
  const place = Math.min(share, .9999) * (VIRIDIS.length - 1), i = Math.floor(place);
  return VIRIDIS[i].map((from, k) => Math.round(from + (VIRIDIS[i + 1][k] - from) * (place - i)));
}

function drawMap(details, coverage) {
  const { layers, tokens, percent } = coverage, columns = 400;
  const canvas = make("canvas", { width: columns, height: layers.length });
  const rowHeight = Math.max(3, Math.min(14, 560 / layers.length));
  canvas.style.height = `${rowHeight * layers.length}px`;
  const last = tokens[tokens.length - 1] || 1;
  const columnOf = at => Math.max(0, tokens.findIndex(token => token >= at));
  const image = new ImageData(columns, layers.length);
  for (let column = 0; column < columns; column++) {
    const source = columnOf((column + .5) / columns * last);
    for (let row = 0; row < layers.length; row++)
      image.data.set([...viridis(percent[row][source] / 100), 255], 4 * (row * columns + column));
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  const name = layer => layer.replace("layers.", "").replace("self_attn.", "").replace("mlp.", "");
  const shown = rowHeight >= 11 ? layers.map(name) : [...new Set(layers.map(layer => name(layer).split(".")[0]))].map(block => `block ${block}`);
  const labels = make("div", { className: "layers" }, ...shown.map(text => make("span", { textContent: text })));
  const tip = make("div", { className: "tip", hidden: true });
  const below = make("div", { className: "below" }, make("span", { textContent: "0" }), make("span", { textContent: "tokens; dark: no row, yellow: every row" }), make("span", { textContent: short(last) }));
  canvas.onpointermove = event => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(layers.length - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * layers.length)));
    const column = columnOf((event.clientX - box.left) / box.width * last);
    tip.textContent = `${name(layers[row])}: ${percent[row][column]} % after ${short(tokens[column])} tokens`;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX - box.left + canvas.offsetLeft, box.width - 120)}px`;
    tip.style.top = `${event.clientY - box.top + 16}px`;
  };
  canvas.onpointerleave = () => { tip.hidden = true; };
  details.append(make("div", { className: "map" }, labels, canvas, tip, below));
}
for (const details of document.querySelectorAll("details.coverage")) {
  const coverage = data.coverage.find(each => each.run === details.dataset.run);
  details.addEventListener("toggle", () => drawMap(details, coverage), { once: true });
}

const sortTable = (table, column, descending) => {
  const body = table.tBodies[0], value = row => row.cells[column].dataset.value;
  const number = text => text === "" ? NaN : Number(text);
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [number(value(a)), number(value(b))];
    if (!isNaN(x) && !isNaN(y)) return descending ? y - x : x - y;
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;  // rows without a number last
    return (descending ? -1 : 1) * value(a).localeCompare(value(b), undefined, { numeric: true });
  });
  body.append(...rows);
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
};
const tables = [...document.querySelectorAll("table.sortable")];
tables.forEach(table => [...table.tHead.rows[0].cells].forEach((head, column) => {
  head.firstChild.onclick = () => sortTable(table, column, head.getAttribute("aria-sort") === "ascending");
}));

for (const dot of document.querySelectorAll(".dot[data-group]")) paint(dot, dot.dataset.group);
for (const button of document.querySelectorAll(".legend button")) {
  const group = Number(button.dataset.group);
  button.setAttribute("aria-pressed", !hidden.has(group));
  button.onclick = () => {
    if (!hidden.delete(group)) hidden.add(group);
    button.setAttribute("aria-pressed", !hidden.has(group));
    drawAll();
  };
}
const logX = document.getElementById("log-x");
logX.checked = Boolean(before.logX);
logX.onchange = drawAll;
let width = 0;
new ResizeObserver(() => {
  if (width !== document.body.clientWidth) { width = document.body.clientWidth; drawAll(); }
}).observe(document.body);

const all = [...document.querySelectorAll("details")];
(before.open || []).forEach(i => { if (all[i]) all[i].open = true; });
(before.sorted || []).forEach((sort, i) => { if (sort && tables[i]) sortTable(tables[i], ...sort); });
const seconds = Number(document.documentElement.dataset.reload);
if (seconds) setTimeout(() => {
  stored.write({
    hidden: [...hidden], logX: logX.checked, open: all.flatMap((details, i) => details.open ? [i] : []),
    sorted: tables.map(table => {
      const heads = [...table.tHead.rows[0].cells], column = heads.findIndex(head => head.hasAttribute("aria-sort"));
      return column < 0 ? null : [column, heads[column].getAttribute("aria-sort") === "descending"];
    }),
  });
  location.reload();
}, 1000 * seconds);
