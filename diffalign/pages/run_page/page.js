// Draws the curves of a run's page, moves its sliders and tabs, and reloads it gently while the run goes on.
"use strict";
const read = (id) => JSON.parse(document.getElementById(id + "-data").textContent);
const page = read("page"), charts = read("chart"), margins = read("margin"), images = read("image");
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const element = (tag, text, className) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
};

// ---- what survives a reload: tab, place, sliders, focus, and whether to reload at all
// In the history entry, not in sessionStorage: a reload may begin in a new process before the browser has that.
const state = { tab: "training", scroll: 0, sliders: {}, reload: true, focus: "", ...history.state };
const save = () => {
  state.scroll = window.scrollY;
  state.focus = document.activeElement ? document.activeElement.id : "";
  try { history.replaceState(state, ""); } catch { /* too often for this browser: saved before the reload */ }
};

// ---- numbers
function short(v) {
  if (v === null || v === undefined) return "–";
  const size = Math.abs(v);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(parseFloat(v.toPrecision(4)));
}

// ---- curves
const drawn = [];
function colours() {
  return { ink: css("--soft"), grid: css("--line"), series: [1, 2, 3, 4, 5, 6].map((i) => css("--series-" + i)) };
}
function faint(colour) { // 6-digit hex to the same with alpha
  return colour + "33";
}
function levelLine(level, ink) {
  return { hooks: { draw: (u) => {
    if (!level) return;
    const y = Math.round(u.valToPos(level.at, "y", true)), { left, width } = u.bbox, ctx = u.ctx;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = ink;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    ctx.beginPath(); ctx.moveTo(left, y); ctx.lineTo(left + width, y); ctx.stroke();
    ctx.font = 11 * devicePixelRatio + "px system-ui, sans-serif";
    ctx.textAlign = "right"; ctx.textBaseline = "bottom";
    ctx.fillText(level.label, left + width - 4, y - 2);
    ctx.restore();
  } } };
}
function axes(ink, grid, xLabel, percent) {
  const common = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "11px system-ui, sans-serif" };
  return [
    { ...common, label: xLabel, labelSize: 16, labelFont: "11px system-ui, sans-serif", size: 28, values: (u, vs) => vs.map(short) },
    { ...common, size: 58, values: (u, vs) => vs.map(percent ? (v) => Math.round(v * 100) + " %" : short) },
  ];
}
function shownNow(u, v, i) { // the value under the cursor, or the last one
  const j = u.cursor.idx;
  if (j !== null && j !== undefined) return u.data[i][j];
  return u.data[i].findLast((x) => x !== null && x !== undefined) ?? null;
}
function curveChart(host, chart) {
  const c = colours(), several = page.runs.length > 1;
  const parts = [], series = [{ label: "step", value: (u, v) => shownNow(u, v, 0).toLocaleString("en") }], bands = [], ends = [];
  const labels = [...new Set(chart.tables.flatMap((t) => t.series.map((s) => s.label)))];
  for (const table of chart.tables) {
    const part = [table.x];
    for (const s of table.series) {
      const k = labels.indexOf(s.label), colour = c.series[(several ? table.run : k) % c.series.length];
      const label = several ? page.runs[table.run] + (labels.length > 1 ? " · " + s.label : "") : s.label;
      const at = series.length;
      part.push(s.y);
      series.push({ label, stroke: colour, width: 1.6, dash: several ? DASHES[k % DASHES.length] : [],
        value: (u, v) => short(shownNow(u, v, at)) +
          (s.low ? ` [${short(shownNow(u, null, at + 1))}, ${short(shownNow(u, null, at + 2))}]` : "") });
      if (s.low) {
        part.push(s.low, s.high);
        for (const end of ["low", "high"]) {
          ends.push(series.length);
          series.push({ label: label + " " + end, stroke: faint(colour), width: 1, points: { show: false } });
        }
        bands.push({ series: [at + 2, at + 1], fill: faint(colour) });
      }
    }
    parts.push(part);
  }
  const box = element("div", undefined, "chart");
  box.append(element("h3", chart.title));
  if (chart.help) box.append(element("p", chart.help));
  host.append(box);
  const at = chart.level && chart.level.at;
  const range = (u, low, high) => {
    if (low === null) [low, high] = [0, 1];
    if (chart.level) [low, high] = [Math.min(low, at), Math.max(high, at)];
    if (low === high) { const d = Math.abs(low) * 0.1 || 0.5; [low, high] = [low - d, high + d]; }
    const gap = (high - low) * 0.08;
    return [low - gap, high + gap];
  };
  const plot = new uPlot({
    width: Math.max(200, box.clientWidth - 26), height: 210, series, bands,
    scales: { x: { time: false }, y: { range } },
    axes: axes(c.ink, c.grid, "step", false),
    cursor: { sync: { key: "steps" }, drag: { x: true, y: false } },
    plugins: [levelLine(chart.level, c.ink)],
  }, parts.length > 1 ? uPlot.join(parts) : parts[0], box);
  const rows = plot.root.querySelectorAll(".u-legend .u-series");
  for (const i of ends) rows[i].hidden = true;
  box.dataset.title = chart.title;
  drawn.push({ plot, box, scale: 210 });
}

// ---- sliders over steps
const shows = {}; // what each slider shows, which a change of colours replaces
function slider(id, steps, show) {
  const host = document.getElementById(id), first = !(id in shows);
  const input = host.querySelector("input"), output = host.querySelector("output"), last = steps.length - 1;
  input.max = String(last);
  const go = (index) => {
    const i = Math.max(0, Math.min(last, index));
    input.value = String(i);
    output.textContent = "step " + steps[i].toLocaleString("en");
    input.setAttribute("aria-valuetext", "step " + steps[i]);
    shows[id](steps[i]);
    // at the end: stay at the end, also when the run has gone on
    state.sliders[id] = i === last ? null : steps[i];
  };
  shows[id] = show;
  if (first) input.addEventListener("input", () => go(Number(input.value)));
  for (const button of first ? host.querySelectorAll("button") : []) {
    button.addEventListener("click", () => go(Number(input.value) + Number(button.dataset.move)));
  }
  const wanted = state.sliders[id];
  const found = wanted === null || wanted === undefined ? last : steps.findLastIndex((step) => step <= wanted);
  go(found < 0 ? 0 : found);
}
const allSteps = (parts) => [...new Set(parts.flatMap((part) => part.steps))].sort((a, b) => a - b);
const at = (part, step) => Math.max(0, part.steps.findLastIndex((s) => s <= step));

function drawImages() {
  const host = document.querySelector("#images .shown");
  if (!host) return;
  const frame = (part, fixed) => {
    const figure = element("figure"), caption = element("figcaption"), img = element("img");
    figure.append(caption, img);
    host.append(figure);
    return { part, fixed, caption, img };
  };
  const alone = images.length === 1 && images[0].steps.length > 1; // one run: its first images stay beside the others
  const shown = images.flatMap((part) => [...(alone ? [frame(part, true)] : []), frame(part, false)]);
  slider("images", allSteps(images), (step) => {
    for (const { part, fixed, caption, img } of shown) {
      const i = fixed ? 0 : at(part, step), name = page.runs.length > 1 ? page.runs[part.run] + ", " : "";
      if (img.src !== part.uris[i]) img.src = part.uris[i];
      img.alt = `${name}validation images at step ${part.steps[i]}`;
      const of = part.of > part.steps.length ? ` (${part.steps.length} of ${part.of} steps are on this page)` : "";
      caption.textContent = `${name}step ${part.steps[i].toLocaleString("en")}${fixed ? ", the first" : of}`;
    }
  });
}

function drawMargins() {
  const host = document.querySelector("#margins .shown");
  if (!host) return;
  const c = colours(), box = element("div", undefined, "chart"), text = element("p"), { width } = margins[0];
  const half = (margins[0].counts[0].length - 1) / 2;
  const centres = margins[0].counts[0].map((_, i) => (i - half) * width);
  const share = (counts) => { const n = counts.reduce((a, b) => a + b, 0); return counts.map((x) => (n ? x / n : null)); };
  box.append(text);
  host.append(box);
  const bars = uPlot.paths.bars({ size: [1, 100], align: 0 });
  const mine = margins.filter((part) => part.width === width && part.counts[0].length === centres.length);
  const plot = new uPlot({
    width: Math.max(200, box.clientWidth - 26), height: 230,
    series: [{ label: "margin", value: (u, v) => (v === null ? "–" : short(v)) }, ...mine.map((part) => {
      const colour = c.series[part.run % c.series.length];
      return { label: page.runs.length > 1 ? page.runs[part.run] : "pairs", stroke: colour, fill: faint(colour), width: 1,
        paths: bars, points: { show: false }, value: (u, v) => (v === null ? "–" : (v * 100).toFixed(1) + " %") };
    })],
    scales: { x: { time: false, range: [-half * width - width, half * width + width] }, y: { range: (u, low, high) => [0, (high || 1) * 1.08] } },
    axes: axes(c.ink, c.grid, `margin h (bars at ±${half * width}: all beyond)`, true),
  }, [centres, ...mine.map(() => centres.map(() => null))], box);
  drawn.push({ plot, box, scale: 230 });
  slider("margins", allSteps(mine), (step) => {
    const counts = mine.map((part) => part.counts[at(part, step)]);
    plot.setData([centres, ...counts.map(share)]);
    text.textContent = mine.map((part, k) => {
      const n = counts[k].reduce((a, b) => a + b, 0) || 1;
      const sum = (from, to) => Math.round((counts[k].slice(from, to).reduce((a, b) => a + b, 0) / n) * 100);
      const name = page.runs.length > 1 ? page.runs[part.run] + ": " : "";
      return `${name}step ${part.steps[at(part, step)].toLocaleString("en")}, ${n.toLocaleString("en")} pairs since the log before: ` +
        `${sum(half + 1)} % above ${short(width / 2)}, ${sum(half, half + 1)} % within ±${short(width / 2)}, ${sum(0, half)} % below −${short(width / 2)}.`;
    }).join(" ");
  });
}

function fit() { // charts of hidden tabs have no width
  for (const { plot, box, scale } of drawn) {
    const width = box.clientWidth - 26;
    if (width > 0 && width !== plot.width) plot.setSize({ width, height: scale });
  }
}
const complete = new Set(); // tabs that are drawn: each is when it is first shown
function drawTab(name) {
  if (complete.has(name)) return;
  complete.add(name);
  const host = document.querySelector(`.charts[data-tab="${name}"]`);
  for (const chart of charts) if (chart.tab === name) curveChart(host, chart);
  if (name === "training") drawMargins();
}
function drawAgain() { // in other colours
  for (const { plot, box } of drawn.splice(0)) { plot.destroy(); box.remove(); }
  complete.clear();
  drawTab(state.tab);
}

// ---- tabs
const tabs = [...document.querySelectorAll("[role=tab]")];
function select(tab, focus) {
  for (const each of tabs) {
    const on = each === tab;
    each.setAttribute("aria-selected", String(on));
    each.tabIndex = on ? 0 : -1;
    document.getElementById(each.getAttribute("aria-controls")).hidden = !on;
  }
  state.tab = tab.id.slice(4);
  if (focus) tab.focus();
  drawTab(state.tab);
  fit();
  save();
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => select(tab, false));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    select(tabs[(to + tabs.length) % tabs.length], true);
  });
});
document.addEventListener("keydown", (event) => {
  const tab = tabs[Number(event.key) - 1];
  if (tab && !event.ctrlKey && !event.metaKey && !event.altKey && event.target.type !== "text") select(tab, true);
});

// ---- age, and reloading while the run goes on
function age() {
  const seconds = Math.max(0, Date.now() / 1000 - page.written);
  const units = [[86400, "days"], [3600, "h"], [60, "min"], [1, "s"]].find(([size]) => seconds >= size * (size > 1 ? 2 : 1)) || [1, "s"];
  const late = page.running && seconds > 120 + 10 * page.pace;
  document.getElementById("ago").textContent = `(${Math.floor(seconds / units[0])} ${units[1]} ago` +
    (late ? "; no news for long: the run is in a long step, or was killed)" : ")");
  return seconds;
}
let pressed = false;
addEventListener("pointerdown", () => { pressed = true; });
addEventListener("pointerup", () => { pressed = false; });
addEventListener("pointercancel", () => { pressed = false; });
function reloadSoon() {
  const seconds = age();
  const wait = Math.min(300, Math.max(page.refresh, seconds / 20)); // an old page is asked for less often
  setTimeout(() => {
    const busy = document.hidden || pressed || !getSelection().isCollapsed;
    if (!state.reload || busy) { reloadSoon(); return; }
    save();
    location.reload();
  }, wait * 1000);
}
if (page.running) {
  const box = document.getElementById("reload-on");
  document.getElementById("reload").hidden = false;
  box.checked = state.reload;
  box.addEventListener("change", () => { state.reload = box.checked; save(); });
  reloadSoon();
}
age();
setInterval(age, 5000);
addEventListener("beforeunload", save);
addEventListener("pagehide", save); // where the other is not sent, as on telephones

// ---- begin
history.scrollRestoration = "manual";
const { scroll, focus } = state; // `select` saves the state anew
select(document.getElementById("tab-" + state.tab) || tabs[0], false);
drawImages();
scrollTo(0, scroll);
if (focus && document.getElementById(focus)) document.getElementById(focus).focus({ preventScroll: true });
new ResizeObserver(fit).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
