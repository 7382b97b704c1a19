"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const lineColours = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#5fa8a3", "#c79a06", "#ff6f91", "#9c755f", "#7f8891"];
const cellColours = ["#8ecae6", "#f4a261", "#90be6d", "#e5989b", "#cdb4db", "#f9c74f", "#83c5be", "#c9ada7", "#b5e48c", "#a0b4f0"];
const dashes = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const colourOf = i => lineColours[i % lineColours.length];
const dashOf = i => dashes[Math.floor(i / lineColours.length) % dashes.length];
const titles = Object.fromEntries(data.measures.map(m => [m.name, m.title]));
const hidden = new Set();
const redraws = [];  // what is drawn on canvases: again when the colours change
const redraw = () => redraws.forEach(draw => draw());

// --- pieces of a page; text is never taken for HTML ---
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) key === "style" ? element.style.cssText = value : element.setAttribute(key, value);
  element.append(...children);
  return element;
}
function section(title, ...children) {
  const element = make("section", {}, make("h2", {}, title), ...children);
  main.append(element);
  return element;
}
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const alpha = (hex, a) => hex + Math.round(a * 255).toString(16).padStart(2, "0");
const isNumber = v => typeof v === "number" && isFinite(v);

function short(v, digits = 4) {
  if (!isNumber(v)) return "—";
  const size = Math.abs(v);
  if (size >= 1e15 || (size > 0 && size < 1e-4)) return v.toExponential(digits - 1);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return Number((v / (letter === "k" ? 1e3 : unit)).toPrecision(digits)) + " " + letter;
  return String(Number(v.toPrecision(digits)));
}
function bytes(v) {
  if (!isNumber(v)) return "—";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let u = 0;
  for (; v >= 1024 && u < 4; ++u) v /= 1024;
  return Number(v.toPrecision(4)) + " " + units[u];
}
const inUnits = (name, v) => name.endsWith("bytes") ? bytes(v) : short(v);
function interval(name, s) {  // [n, mean, half, low, high]
  if (!s || !s[0]) return "—";
  if (!isNumber(s[2])) return inUnits(name, s[1]);
  if (name.endsWith("bytes") || Math.abs(s[1]) >= 1e4 || s[2] === 0) return inUnits(name, s[1]) + " ± " + inUnits(name, s[2]);
  const decimals = Math.min(8, Math.max(0, 1 - Math.floor(Math.log10(s[2]))));
  return s[1].toFixed(decimals) + " ± " + s[2].toFixed(decimals);
}
function choice(id, label, options, whenChanged) {
  let kept = null;
  try { kept = sessionStorage.getItem(id); } catch (blocked) { /* not kept then */ }
  const select = make("select", { id });
  for (const [value, text] of options) select.append(make("option", { value }, text));
  if (options.some(o => String(o[0]) === kept)) select.value = kept;
  select.addEventListener("change", () => {
    try { sessionStorage.setItem(id, select.value); } catch (blocked) { /* not kept then */ }
    whenChanged();
  });
  return [select, make("label", { for: id }, label, select)];
}

// --- charts ---
Chart.defaults.animation = false;
Chart.defaults.maintainAspectRatio = false;
Chart.defaults.plugins.legend.display = false;
Chart.defaults.font.family = "system-ui, sans-serif";
function chart(parent, title, config) {  // config(): a Chart.js configuration, made again for every drawing
  const canvas = make("canvas", { role: "img", "aria-label": title });
  const box = make("div", { class: "chart" }, canvas);
  parent.append(box);
  let drawn = null;
  const draw = () => {
    if (drawn) drawn.destroy();
    Chart.defaults.color = css("--soft");
    Chart.defaults.borderColor = css("--line");
    drawn = new Chart(canvas, config(box));
  };
  redraws.push(draw);
  return draw;
}
const axis = (text, extra) => Object.assign({ title: { display: true, text }, ticks: { callback: v => short(v, 3), maxRotation: 0, autoSkipPadding: 12 } }, extra);

function groupKeys() {
  const box = make("div", { class: "keys" });
  data.groups.forEach((group, i) => {
    const key = make("button", { type: "button", "aria-pressed": "true" }, make("i", { style: `background:${colourOf(i)};opacity:${dashOf(i).length ? .6 : 1}` }), group.label);
    key.addEventListener("click", () => {
      hidden.has(i) ? hidden.delete(i) : hidden.add(i);
      document.querySelectorAll(`[data-group="${i}"]`).forEach(k => k.setAttribute("aria-pressed", String(!hidden.has(i))));
      redraw();
    });
    key.dataset.group = i;
    box.append(key);
  });
  return box;
}

// --- the table ---
function table() {
  const keys = data.varied.slice(0, data.most_columns);
  const shown = data.measures.map((m, i) => i).filter(i => data.groups.some(g => g.summaries[i][0]));
  const columns = [...(keys.length ? keys.map((key, i) => ({ title: key.split(".").slice(-1)[0], about: key, word: true, text: g => g.values[i], sort: g => g.values[i] }))
    : [{ title: "run", word: true, text: g => g.label, sort: g => g.label }]),
    { title: "runs", text: g => g.status, sort: g => g.counted },
    ...shown.map(i => ({ title: data.measures[i].title, text: g => interval(data.measures[i].name, g.summaries[i]), sort: g => g.summaries[i][1] }))];
  const head = make("tr"), body = make("tbody");
  let by = null, up = true;
  const fill = () => {
    const order = data.groups.slice();
    const value = g => by.sort(g);
    const empty = v => v === null || v === undefined || v === "";
    const compare = (a, b) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      const x = Number(a), y = Number(b), numbers = isNumber(x) && isNumber(y);
      return (numbers ? x - y : String(a).localeCompare(String(b))) * (up ? 1 : -1);
    };
    if (by) order.sort((a, b) => compare(value(a), value(b)));
    body.replaceChildren(...order.map(g => make("tr", {}, ...columns.map(c => make("td", { class: (c.word ? "word" : "") + (g.unfinished && c.title === "runs" ? " mark" : "") }, c.text(g))))));
    head.querySelectorAll("th").forEach((th, i) => {
      const mine = columns[i] === by;
      mine ? th.setAttribute("aria-sort", up ? "ascending" : "descending") : th.removeAttribute("aria-sort");
      th.querySelector("button").textContent = columns[i].title + (mine ? (up ? " ▲" : " ▼") : "");
    });
  };
  for (const column of columns) {
    const button = make("button", { type: "button", title: column.about || "sort" }, column.title);
    button.addEventListener("click", () => { up = by === column ? !up : true; by = column; fill(); });
    head.append(make("th", { class: column.word ? "word" : "" }, button));
  }
  fill();
  section("Comparison", make("div", { class: "wide" }, make("table", {}, make("thead", {}, head), body)),
    make("p", { class: "soft" }, "Means over seeds ± half of the 95 % confidence interval by Student’s t, where there are two runs or more. A click on a heading sorts." +
      (data.varied.length > keys.length ? ` ${data.varied.length - keys.length} further keys differ; the CSV has them all.` : "")));
}

// --- architectures ---
function stacks() {
  const types = [...new Set(data.groups.flatMap(g => g.stack.map(c => c.type || c.symbol)))].sort();
  if (!types.length) return;
  const colour = c => cellColours[types.indexOf(c.type || c.symbol) % cellColours.length];
  const legend = make("div", { class: "keys" }, ...types.map(t => make("span", {}, make("i", { style: `background:${cellColours[types.indexOf(t) % cellColours.length]}` }), t)));
  const rows = data.groups.map(group => {
    const row = make("div", { class: "stack" });
    let stage = 0, head = false, number = 0;
    for (const c of group.stack) {
      if (c.stage !== stage) row.append(make("u", {}, "|"));
      if (c.head && !head) row.append(make("u", {}, "/")), number = 0;
      stage = c.stage, head = c.head;
      row.append(make("b", { style: `background:${colour(c)}`, title: `${c.head ? "head " : ""}layer ${number++}: ${c.block || c.symbol}${c.elements ? ", " + short(c.elements) + " parameters" : ""}` }, c.symbol));
    }
    return make("div", {}, make("div", {}, group.label), row);
  });
  section("Architectures", legend, ...rows);
}

// --- curves ---
const axes = { step: "step", tokens: "tokens", flops: "FLOPs", seconds: "wall time of the steps, s" };
function curves() {
  const names = [...new Set(data.groups.flatMap(g => Object.keys(g.curves.series || {})))];
  if (!names.length) return;
  const rank = n => ["loss", "val_loss", "val_accuracy"].indexOf(n) + 1 || 9;
  names.sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  let draw = () => {};
  const again = () => draw();
  const [y, yLabel] = choice("curve-y", "show", names.map(n => [n, titles[n] && n !== "loss" ? titles[n] : n === "loss" ? "training loss" : n]), again);
  const [x, xLabel] = choice("curve-x", "against", Object.entries(axes), again);
  const [scale, scaleLabel] = choice("curve-scale", "axes", [["linear", "linear"], ["logx", "log x"], ["logy", "log y"], ["log", "log x and y"]], again);
  const part = section("Curves", make("div", { class: "controls" }, yLabel, xLabel, scaleLabel), groupKeys());
  draw = chart(part, "curves of training", () => {
    const datasets = [];
    data.groups.forEach((group, i) => {
      const series = group.curves.series && group.curves.series[y.value];
      if (!series || hidden.has(i)) return;
      const xs = group.curves[x.value];
      const points = values => values.map((v, k) => ({ x: xs[k], y: v, k })).filter(p => isNumber(p.x) && isNumber(p.y));
      const line = { label: group.label, data: points(series.mean), series, borderColor: colourOf(i), backgroundColor: colourOf(i), borderDash: dashOf(i), borderWidth: 1.8, pointHitRadius: 8 };
      line.pointRadius = line.data.length < 40 ? 2 : 0;
      datasets.push(line);
      if (!series.low) return;
      const edge = { borderWidth: 0, pointRadius: 0, pointHitRadius: 0, pointHoverRadius: 0, band: true, backgroundColor: alpha(colourOf(i), .18) };
      datasets.push({ ...edge, data: points(series.high), fill: false }, { ...edge, data: points(series.low), fill: "-1" });
    });
    const log = (letter) => scale.value === "log" || scale.value === "log" + letter ? "logarithmic" : "linear";
    return { type: "line", data: { datasets }, options: {
      parsing: false, normalized: false,
      interaction: { mode: "nearest", axis: "xy", intersect: false },
      scales: { x: axis(axes[x.value], { type: log("x") }), y: axis(y.value, { type: log("y") }) },
      plugins: { tooltip: { filter: item => !item.dataset.band, callbacks: {
        title: items => items.length ? `${axes[x.value]} ${short(items[0].raw.x)}` : "",
        label: item => {
          const s = item.dataset.series, k = item.raw.k;
          return `${item.dataset.label}: ${short(item.raw.y, 5)}${s.low ? ` (${short(s.low[k], 5)} to ${short(s.high[k], 5)})` : ""}`;
        } } } } } };
  });
  part.append(make("p", { class: "soft" }, data.thinning + " Bands reach from the least to the greatest seed."));
}

// --- cost against quality ---
const errorBars = { id: "errorBars", afterDatasetsDraw(c) {
  const { ctx } = c;
  c.data.datasets.forEach((dataset, d) => {
    if (!isNumber(dataset.half)) return;
    const point = c.getDatasetMeta(d).data[0], y = c.scales.y, p = dataset.data[0];
    ctx.save();
    ctx.strokeStyle = dataset.borderColor;
    ctx.beginPath();
    ctx.moveTo(point.x, y.getPixelForValue(p.y - dataset.half));
    ctx.lineTo(point.x, y.getPixelForValue(p.y + dataset.half));
    ctx.stroke();
    ctx.restore();
  });
} };
function fronts() {
  const index = Object.fromEntries(data.measures.map((m, i) => [m.name, i]));
  const has = name => data.groups.some(g => g.summaries[index[name]][0]);
  const names = data.measures.map(m => m.name).filter(has);
  const ys = names.filter(n => n in data.fronts), xs = names.filter(n => !(n in data.fronts));
  if (!ys.length || !xs.length || data.groups.length < 2) return;
  let draw = () => {};
  const again = () => draw();
  const [y, yLabel] = choice("front-y", "show", ys.map(n => [n, titles[n]]), again);
  const [x, xLabel] = choice("front-x", "against", xs.map(n => [n, titles[n]]), again);
  const [scale, scaleLabel] = choice("front-scale", "x", [["linear", "linear"], ["logarithmic", "logarithmic"]], again);
  const list = make("p", { class: "soft" });
  const part = section("Cost and quality", make("div", { class: "controls" }, yLabel, xLabel, scaleLabel), groupKeys());
  draw = chart(part, "cost and quality with the Pareto front", () => {
    const at = g => ({ x: (g.summaries[index[x.value]] || [])[1], y: (g.summaries[index[y.value]] || [])[1] });
    const front = (data.fronts[y.value][x.value] || []).map(i => data.groups[i]);
    list.textContent = "On the Pareto front (dashed), by cost: " + (front.map(g => g.label).join(", ") || "none") + ". Bars are 95 % confidence intervals over seeds.";
    const datasets = data.groups.map((g, i) => ({ label: g.label, data: [at(g)], half: g.summaries[index[y.value]][2], group: i, borderColor: colourOf(i), backgroundColor: colourOf(i),
      pointRadius: 5, pointStyle: dashOf(i).length ? "rectRot" : "circle", pointHitRadius: 8 })).filter(d => !hidden.has(d.group) && isNumber(d.data[0].x) && isNumber(d.data[0].y));
    datasets.push({ type: "line", front: true, data: front.map(at), borderColor: css("--soft"), borderDash: [5, 4], borderWidth: 1.5, pointRadius: 0, pointHitRadius: 0 });
    return { type: "scatter", data: { datasets }, plugins: [errorBars], options: {
      interaction: { mode: "nearest", intersect: false },
      scales: { x: axis(titles[x.value], { type: scale.value, grace: scale.value === "linear" ? "5%" : 0 }), y: axis(titles[y.value], { grace: "10%" }) },
      plugins: { tooltip: { filter: item => !item.dataset.front, callbacks: { label: item => {
        const s = data.groups[item.dataset.group].summaries;
        return [item.dataset.label, `${titles[y.value]}: ${interval(y.value, s[index[y.value]])}`, `${titles[x.value]}: ${interval(x.value, s[index[x.value]])}`];
      } } } } } };
  });
  part.append(list);
}

// --- accuracy by length, pairs, ... ---
function heatMaps() {
  for (const [name, parts] of Object.entries(data.by_parts)) {
    const all = data.groups.flatMap(g => Object.values(g.by[name] || {}).map(s => s[1])).filter(isNumber);
    if (!all.length) continue;
    const share = name.includes("accuracy");
    const low = share ? 0 : Math.min(...all), high = share ? 1 : Math.max(...all);
    const cell = s => {
      if (!s || !s[0]) return make("td", { class: "heat" }, "—");
      const strength = high > low ? Math.min(1, Math.max(0, (s[1] - low) / (high - low))) : .5;
      return make("td", { class: "heat", style: `background:rgba(var(--heat), ${(strength * .75).toFixed(3)})`, title: `${interval(name, s)} over ${s[0]} run${s[0] > 1 ? "s" : ""}` }, Number(s[1].toPrecision(3)).toString());
    };
    const rows = data.groups.filter(g => g.by[name]).map(g => make("tr", {}, make("td", { class: "word" }, g.label), ...parts.map(p => cell(g.by[name][p]))));
    section(name.replace(/^val_/, "validation ").replace(/_/g, " "), make("div", { class: "wide" }, make("table", {},
      make("thead", {}, make("tr", {}, make("th", { class: "word" }, ""), ...parts.map(p => make("th", {}, p)))), make("tbody", {}, ...rows))),
      make("p", { class: "soft" }, "The last validation of each run, means over seeds; hovering shows intervals."));
  }
}

// --- bars ---
function bars(parent, title, labels, datasets, format, height) {
  const words = labels.map(l => l.length > 34 ? l.slice(0, 33) + "…" : l);
  chart(parent, title, box => {
    box.style.height = (height || 70 + 30 * labels.length) + "px";
    return { type: "bar", data: { labels: words, datasets }, options: {
      indexAxis: "y", interaction: { mode: "nearest", axis: "xy", intersect: true },
      scales: { x: axis(title, { stacked: true, beginAtZero: true, ticks: { callback: v => format(v), maxRotation: 0, autoSkipPadding: 16 } }), y: { stacked: true, ticks: { autoSkip: false, font: { size: 11 } } } },
      plugins: { tooltip: { callbacks: { title: items => labels[items[0].dataIndex], label: item => `${item.dataset.label || title}: ${format(item.raw)}` } } } } };
  });
}
function stackedBars(parent, title, labels, rows, format) {  // rows: one object {part: number} a label
  const parts = [...new Set(rows.flatMap(r => Object.keys(r)))];
  const of = p => colourOf(parts.indexOf(p));
  parent.append(make("h3", {}, title), make("div", { class: "keys" }, ...parts.map(p => make("span", {}, make("i", { style: `background:${of(p)}` }), p))));
  bars(parent, title, labels, parts.map(p => ({ label: p, data: rows.map(r => r[p] || 0), backgroundColor: of(p), maxBarThickness: 26 })), format);
}
function benches() {
  if (!data.benches.length) return;
  const part = section("Throughput"), pair = make("div", { class: "pair" });
  const labels = data.benches.map(b => b.label), step = data.benches.some(b => b.train.step_s > 0);
  part.append(make("p", { class: "soft" }, [...new Set(data.benches.map(b => `${b.label}: ${b.about}`))].join("; ")), pair);
  for (const [title, of, format] of [["training, tokens/s", b => b.train.tokens_per_s, short], ["decoding, tokens/s", b => b.decode.tokens_per_s, short],
    ["prefill, tokens/s", b => b.decode.prefill_tokens_per_s, short], ["peak memory", b => b.peak_bytes, bytes]])
    if (data.benches.some(b => of(b) > 0)) {
      const box = make("div", {}, make("h3", {}, title));
      pair.append(box);
      bars(box, title, labels, [{ data: data.benches.map(of), backgroundColor: labels.map((l, i) => colourOf(i)), maxBarThickness: 26 }], format);
    }
  for (const [title, key, format] of [["prefill tokens/s by length of context", "prefill_tokens_per_s", short], ["decoding tokens/s by length of context", "decode_tokens_per_s", short], ["decode state by length of context", "state_bytes", bytes]])
    if (data.benches.some(b => b.contexts.length > 1)) {
      const box = make("div", {}, make("h3", {}, title));
      pair.append(box);
      chart(box, title, () => ({ type: "line", data: { datasets: data.benches.map((b, i) => ({ label: b.label, data: b.contexts.map(c => ({ x: c.context, y: c[key] })), borderColor: colourOf(i), backgroundColor: colourOf(i), borderDash: dashOf(i), borderWidth: 1.8 })) },
        options: { parsing: false, interaction: { mode: "nearest", intersect: false }, scales: { x: axis("tokens of context", { type: "logarithmic" }), y: { beginAtZero: true, ticks: { callback: v => format(v) } } },
          plugins: { tooltip: { callbacks: { label: item => `${item.dataset.label}: ${format(item.raw.y)}` } } } } }));
    }
  if (!step) return;
  stackedBars(part, "time of a training step by block type, ms", labels, data.benches.map(b => {
    const row = Object.fromEntries(b.parts.map(p => [p.part, 1e3 * (p.forward_s + p.recompute_s + p.backward_s)]));
    row.rest = Math.max(0, 1e3 * b.train.step_s - Object.values(row).reduce((a, v) => a + v, 0));
    return row;
  }), v => short(v));
  const rows = data.benches.flatMap(b => b.parts.map(p => {
    const s = p.forward_s + p.recompute_s + p.backward_s;
    return [b.label, p.part, short(1e3 * p.forward_s), short(1e3 * p.recompute_s), short(1e3 * p.backward_s), short(p.flops / s), short(100 * p.flops / s / b.matrix_peak, 3), short(100 * p.bytes / s / b.memory_peak, 3)];
  }));
  const heads = ["", "part", "forward ms", "recompute ms", "backward ms", "FLOP/s", "% of matrix peak", "% of memory peak"];
  part.append(make("div", { class: "wide" }, make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((h, i) => make("th", { class: i < 2 ? "word" : "" }, h)))),
    make("tbody", {}, ...rows.map(r => make("tr", {}, ...r.map((c, i) => make("td", { class: i < 2 ? "word" : "" }, c))))))));
}
function sizes() {
  const known = data.groups.filter(g => Object.keys(g.elements).length);
  if (!known.length) return;
  const part = section("Parameters and planned memory"), pair = make("div", { class: "pair" });
  part.append(pair);
  for (const [title, of, format] of [["trained parameters by block type", g => g.elements, short], ["planned memory of a rank", g => g.memory, bytes]]) {
    const box = make("div");
    pair.append(box);
    stackedBars(box, title, known.map(g => g.label), known.map(of), format);
  }
}

// --- experts ---
function experts() {
  const found = data.groups.flatMap((g, i) => Object.keys(g.loads).map(layer => ({ i, layer, load: g.loads[layer] })));
  if (!found.length) return;
  const canvas = make("canvas", { class: "load", role: "img", "aria-label": "expert load over time" }), says = make("p", { class: "soft" });
  let draw = () => {};
  const [which, label] = choice("experts", "layer", found.map((f, k) => [k, `${data.groups[f.i].label}: ${f.layer}`]), () => { draw(); imbalance(); });
  const part = section("Expert load", make("div", { class: "controls" }, label), canvas, says);
  draw = () => {
    const { steps, share } = found[which.value].load, rows = share[0].length;
    canvas.width = steps.length, canvas.height = rows;
    const ctx = canvas.getContext("2d");
    ctx.clearRect(0, 0, steps.length, rows);
    share.forEach((column, x) => column.forEach((v, y) => { ctx.fillStyle = `rgba(${css("--heat")}, ${Math.min(1, v / 3).toFixed(3)})`; ctx.fillRect(x, y, 1, 1); }));
    says.textContent = `${rows} experts from top to bottom, steps ${steps[0]} to ${steps[steps.length - 1]} from left to right; full colour is three times the mean load or more.`;
  };
  canvas.addEventListener("mousemove", event => {
    const { steps, share } = found[which.value].load, box = canvas.getBoundingClientRect();
    const x = Math.min(steps.length - 1, Math.floor((event.clientX - box.left) / box.width * steps.length)), y = Math.min(share[0].length - 1, Math.floor((event.clientY - box.top) / box.height * share[0].length));
    if (x >= 0 && y >= 0) says.textContent = `step ${steps[x]}, expert ${y}: ${short(share[x][y])} times the mean load`;
  });
  redraws.push(draw);
  const imbalance = chart(part, "greatest load of an expert over the mean", () => {
    const { steps, share } = found[which.value].load, i = found[which.value].i;
    return { type: "line", data: { datasets: [{ data: steps.map((s, k) => ({ x: s, y: Math.max(...share[k]) })), borderColor: colourOf(i), backgroundColor: colourOf(i), pointRadius: 0, borderWidth: 1.6 }] },
      options: { parsing: false, scales: { x: axis("step", { type: "linear" }), y: axis("greatest load / mean", { suggestedMin: 1 }) }, interaction: { mode: "nearest", axis: "x", intersect: false } } };
  });
}

// --- every run ---
function runs() {
  if (!data.runs.length) return;
  section("Runs", ...data.runs.map(run => {
    const item = make("details", {}, make("summary", {}, run.name, make("span", { class: run.state === "done" ? "soft" : "mark" }, ` ${run.state}${run.seed === null ? "" : ", seed " + run.seed}, ${run.lines} steps recorded`)));
    if (run.error) item.append(make("p", { class: "mark" }, run.error));
    item.append(make("p", { class: "soft" }, run.folder));
    for (const start of run.starts) item.append(make("p", { class: "soft" }, "start: " + Object.entries(start).map(([k, v]) => `${k} ${typeof v === "string" ? v : JSON.stringify(v)}`).join(", ")));
    if (run.match) item.append(make("p", { class: "soft" }, "match: " + run.match));
    if (run.fitted) item.append(make("p", { class: "soft" }, "fitted: " + run.fitted));
    if (run.config) item.append(make("pre", {}, run.config));
    return item;
  }));
}

document.getElementById("summary").textContent = data.summary;
document.querySelector("footer").append(make("p", { class: "soft" }, data.made));
if (data.notes.length) document.querySelector("header").append(make("ul", { class: "notes" }, ...data.notes.map(n => make("li", {}, n))));
if (data.groups.length) table();
for (const part of [stacks, curves, fronts, heatMaps, benches, sizes, experts, runs]) part();
redraw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("beforeprint", () => { document.documentElement.classList.add("print"); redraw(); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("print"); redraw(); });
