"use strict";
// A comparison: base and tuned pictures side by side or one over the other, filtered by outcome, scorer and prompt.
{
  const found = read("comparison");
  const { columns, scorers, rows } = found; // columns[0] is the base; row.scores[scorer][column]
  const byId = (id) => document.getElementById(id);
  const place = byId("cards"), count = byId("count"), search = byId("search"), large = byId("large");
  const state = { view: "side", outcome: "all", scorer: 0, column: 1, sort: "made", hidden: new Set(), shown: [], open: 0 };
  const list = inPieces(place);

  const gain = (row, scorer, column) => row.scores[scorer][column] - row.scores[scorer][0];
  // as the table counts: a difference below the scorer's threshold is a tie
  const outcome = (row, scorer, column) => {
    const difference = gain(row, scorer, column);
    if (difference === 0 || Math.abs(difference) < scorers[scorer].tie) return "tie";
    return difference > 0 ? "win" : "loss";
  };
  const disagree = (row, column) => {
    const all = scorers.map((_, scorer) => outcome(row, scorer, column));
    return all.includes("win") && all.includes("loss");
  };
  const matches = (row, kind) =>
    kind === "all" || (kind === "disagree" ? disagree(row, state.column) : outcome(row, state.scorer, state.column) === kind);
  const SORTS = {
    made: () => 0,
    gain: (a, b) => gain(b, state.scorer, state.column) - gain(a, state.scorer, state.column),
    loss: (a, b) => gain(a, state.scorer, state.column) - gain(b, state.scorer, state.column),
    prompt: (a, b) => a.prompt.localeCompare(b.prompt) || a.seed - b.seed,
  };
  const MARKS = { win: "▲", loss: "▼", tie: "tie" }, TONES = { win: "good", loss: "bad", tie: "tie" };

  const scoreLines = (row, column) => scorers.map((scorer, i) => {
    const value = make("span", {}, digits(row.scores[i][column], scorer.places));
    if (column > 0) {
      const kind = outcome(row, i, column);
      value.append(make("span", { class: TONES[kind], title: kind }, ` ${MARKS[kind]} ${signed(gain(row, i, column), scorer.places)}`));
    }
    return make("div", { class: "score" }, make("span", {}, scorer.name), value);
  });
  const image = (row, column) => picture(row.images[column], `${columns[column]}: ${row.prompt}`, found.pixels);

  const over = (row, column) => wipe({ under: row.images[0], over: row.images[column], left: columns[0], right: columns[column], text: row.prompt, pixels: found.pixels });

  const visible = () => columns.map((_, column) => column).filter((column) => column > 0 && !state.hidden.has(column));
  const render = (row) => {
    const figure = (column) => make("figure", {}, state.view === "wipe" ? over(row, column) : image(row, column),
      make("figcaption", {}, make("b", {}, columns[column]), ...scoreLines(row, column)));
    const shown = state.view === "wipe" ? visible() : [0, ...visible()];
    const card = make("article", { class: `card is-${outcome(row, state.scorer, state.column)}`, tabindex: "0" },
      make("header", {}, make("h3", {}, row.prompt), make("span", { class: "soft" }, `seed ${row.seed}`)),
      make("div", { class: "pictures" }, ...shown.map(figure)));
    card.addEventListener("click", (event) => { if (event.target.matches("img")) enlarge(state.shown.indexOf(row)); });
    card.addEventListener("keydown", (event) => {
      if (writing(event)) return;
      const by = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
      if (event.key === "Enter") enlarge(state.shown.indexOf(row));
      else if (by && state.view === "wipe" && event.target === card) for (const box of card.querySelectorAll(".wipe")) moveWipe(box, by);
      else return;
      event.preventDefault();
    });
    return card;
  };

  const show = () => {
    const text = search.value.trim().toLowerCase();
    const searched = rows.filter((row) => row.prompt.toLowerCase().includes(text));
    state.shown = searched.filter((row) => matches(row, state.outcome)).sort(SORTS[state.sort]);
    for (const button of byId("outcome").querySelectorAll("button"))
      button.querySelector("span").textContent = searched.filter((row) => matches(row, button.dataset.kind)).length;
    place.style.setProperty("--columns", String(Math.max(1, visible().length + (state.view === "side" ? 1 : 0))));
    list.show(state.shown, render);
    if (!state.shown.length) place.append(make("p", { class: "empty" }, "No picture is left under this search and filter."));
    count.textContent = `${state.shown.length} of ${rows.length} shown`;
  };

  // The large view: one picture over the other, through the shown rows.
  const enlarge = (index) => {
    const row = state.shown[index];
    if (!row) return;
    state.open = index;
    byId("large-title").textContent = row.prompt;
    byId("large-seed").textContent = `seed ${row.seed} · ${index + 1} of ${state.shown.length}`;
    byId("large-view").replaceChildren(over(row, state.column), make("div", { class: "facts" }, ...scorers.map((scorer, i) => {
      const kind = outcome(row, i, state.column);
      return make("span", { class: "numbers" }, `${scorer.name}: ${digits(row.scores[i][0], scorer.places)} → ${digits(row.scores[i][state.column], scorer.places)} `,
        make("span", { class: TONES[kind] }, `${MARKS[kind]} ${kind}`));
    })));
    if (!large.open) large.showModal();
    byId("large-view").querySelector("input").focus();
  };
  large.addEventListener("keydown", (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by || event.target.matches("select")) return;
    event.preventDefault();
    enlarge(Math.min(state.shown.length - 1, Math.max(0, state.open + by)));
  });
  large.addEventListener("click", (event) => { if (event.target === large) large.close(); });
  large.addEventListener("close", () => {
    list.until(state.open);
    place.querySelectorAll(".card")[state.open]?.focus();
  });
  byId("before").addEventListener("click", () => enlarge(Math.max(0, state.open - 1)));
  byId("next").addEventListener("click", () => enlarge(Math.min(state.shown.length - 1, state.open + 1)));
  byId("close").addEventListener("click", () => large.close());

  const KINDS = [["all", "all"], ["win", "win"], ["tie", "tie"], ["loss", "loss"], ...(scorers.length > 1 ? [["disagree", "scorers disagree"]] : [])];
  const filter = choice(byId("outcome"), KINDS, "all", (value) => { state.outcome = value; show(); });
  [...byId("outcome").querySelectorAll("button")].forEach((button, i) => {
    button.dataset.kind = KINDS[i][0];
    button.append(" ", make("span", { class: "numbers" }));
  });
  const view = choice(byId("view"), [["side", "side by side"], ["wipe", "wipe"]], "side", (value) => { state.view = value; show(); });
  const select = (id, names, first, chosen) => {
    byId(id).append(...names.map((name, i) => make("option", { value: String(i + first), selected: i === 0 }, name)));
    byId(id).addEventListener("change", (event) => { chosen(Number(event.target.value)); show(); });
    if (names.length < 2) byId(id).closest("label").hidden = true;
  };
  select("scorer", scorers.map((scorer) => scorer.name), 0, (value) => { state.scorer = value; });
  select("column", columns.slice(1), 1, (value) => { state.column = value; });
  byId("sort").addEventListener("change", (event) => { state.sort = event.target.value; show(); });
  byId("size").value = String(found.cell);
  document.documentElement.style.setProperty("--cell", `${found.cell}px`);
  byId("size").addEventListener("input", (event) => document.documentElement.style.setProperty("--cell", `${event.target.value}px`));
  search.addEventListener("input", show);
  if (columns.length > 2) {
    byId("columns").append(make("span", {}, "Show"), ...columns.slice(1).map((name, i) => make("button", {
      type: "button", "aria-pressed": "true", onclick: (event) => {
        const hide = event.target.getAttribute("aria-pressed") === "true";
        event.target.setAttribute("aria-pressed", String(!hide));
        state.hidden[hide ? "add" : "delete"](i + 1);
        show();
      },
    }, name)));
  } else byId("columns").hidden = true;

  document.addEventListener("keydown", (event) => {
    if (writing(event) || large.open) return;
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by) walk(by);
    else if (event.key === "/") search.focus();
    else if (event.key === "v") view(state.view === "side" ? "wipe" : "side");
    else if (KINDS[Number(event.key) - 1]) filter(KINDS[Number(event.key) - 1][0]);
    else return;
    event.preventDefault();
  });
  show();
}
