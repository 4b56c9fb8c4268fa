"use strict";
// Strengths of tuned weights: one slider for all models, one for each, and a strip of one model through all strengths.
{
  const found = read("strengths");
  const { models, strengths, scorers, images, rows } = found; // row.cells[model][strength]: index into images
  const byId = (id) => document.getElementById(id);
  const place = byId("cards"), all = byId("strength");
  const start = Math.max(0, strengths.indexOf(1));
  const state = { view: "models", at: models.map(() => start), model: 0 };
  const text = (strength) => String(strength).replace("-", "−");
  let cards = []; // of each row what is painted again when a slider moves

  const uri = (row, model, place) => images[row.cells[model][place]];
  const base = (row) => images[row.base];
  const name = (model) => `${models[model]} at ${text(strengths[state.at[model]])}`;
  const scoreLines = (scores) => scorers.map((scorer, i) =>
    make("div", { class: "score" }, make("span", {}, scorer.name), make("span", {}, digits(scores[i], scorer.places))));
  const caption = (title, scores) => make("figcaption", {}, make("b", {}, title), ...scoreLines(scores));
  const figure = (title, address, row, scores) => make("figure", {}, picture(address, `${title}: ${row.prompt}`, found.pixels), caption(title, scores));

  const render = (row) => {
    const pictures = make("div", { class: "pictures" }), painted = [];
    if (state.view === "strip") {
      pictures.classList.add("strip");
      pictures.append(...strengths.map((strength, i) =>
        figure(`strength ${text(strength)}`, uri(row, state.model, i), row, row.scores[state.model][i])));
    } else {
      if (state.view === "models") pictures.append(figure("base", base(row), row, row.baseScores));
      models.forEach((_, model) => {
        const at = uri(row, model, state.at[model]);
        const one = make("figure", {}, state.view === "wipe"
          ? wipe({ under: base(row), over: at, left: "base", right: models[model], text: row.prompt, pixels: found.pixels })
          : picture(at, `${models[model]}: ${row.prompt}`, found.pixels), make("figcaption"));
        pictures.append(one);
        painted[model] = () => {
          one.querySelector(state.view === "wipe" ? ".over" : "img").src = uri(row, model, state.at[model]);
          one.querySelector("figcaption").replaceWith(caption(name(model), row.scores[model][state.at[model]]));
        };
        painted[model]();
      });
    }
    cards.push(painted);
    const card = make("article", { class: "card", tabindex: "0" },
      make("header", {}, make("h3", {}, row.prompt), make("span", { class: "soft" }, `seed ${row.seed}`)), pictures);
    return card;
  };

  const means = () => { // the cells of the table that the sliders stand at
    for (const cell of document.querySelectorAll(".means td[data-at]"))
      cell.classList.toggle("here", state.at[Number(cell.dataset.model)] === Number(cell.dataset.at));
  };
  const set = (model, value) => {
    state.at[model] = value;
    const range = byId("each").querySelectorAll("input")[model];
    range.value = String(value);
    range.nextElementSibling.textContent = text(strengths[value]);
    range.setAttribute("aria-valuetext", text(strengths[value]));
    for (const painted of cards) painted[model]?.();
    means();
  };
  const setAll = (value) => {
    all.value = String(value);
    all.setAttribute("aria-valuetext", text(strengths[value]));
    byId("value").textContent = text(strengths[value]);
    models.forEach((_, model) => set(model, value));
  };
  const show = () => {
    cards = [];
    const count = { models: models.length + 1, wipe: models.length, strip: strengths.length }[state.view];
    place.style.setProperty("--columns", String(count));
    byId("model").hidden = state.view !== "strip";
    place.replaceChildren(...rows.map(render));
    means();
  };

  all.max = String(strengths.length - 1);
  byId("ticks").append(...strengths.map((strength) => make("span", {}, text(strength))));
  all.addEventListener("input", () => setAll(Number(all.value)));
  byId("each").append(...models.map((model, i) => make("label", {}, model,
    make("input", { type: "range", min: "0", max: all.max, step: "1", "aria-label": `strength of ${model}`, oninput: (event) => {
      byId("value").textContent = "…";
      set(i, Number(event.target.value));
    } }), make("output"))));
  const views = [["models", "models"], ["wipe", "wipe"], ["strip", "all strengths"]];
  const view = choice(byId("view"), views, "models", (value) => { state.view = value; show(); });
  const model = choice(byId("model"), models.map((one, i) => [i, one]), 0, (value) => { state.model = value; show(); });
  byId("size").addEventListener("input", (event) => document.documentElement.style.setProperty("--cell", `${event.target.value}px`));
  const timer = { id: 0, by: 1 };
  byId("play").addEventListener("click", (event) => {
    const on = timer.id === 0;
    event.target.setAttribute("aria-pressed", String(on));
    if (!on) { clearInterval(timer.id); timer.id = 0; return; }
    timer.id = setInterval(() => {
      const here = Number(all.value), last = strengths.length - 1;
      if (here + timer.by > last || here + timer.by < 0) timer.by = -timer.by;
      setAll(Math.min(last, Math.max(0, here + timer.by)));
    }, 700);
  });
  document.addEventListener("keydown", (event) => {
    if (writing(event)) return;
    const range = event.target.matches?.("input[type=range]");
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by && !range) setAll(Math.min(strengths.length - 1, Math.max(0, Number(all.value) + by)));
    else if (step && !range) walk(step);
    else if (event.key === "v") view(views[(views.findIndex(([one]) => one === state.view) + 1) % views.length][0]);
    else if (state.view === "strip" && models[Number(event.key) - 1]) model(Number(event.key) - 1);
    else return;
    event.preventDefault();
  });
  show();
  setAll(start);
}
