"use strict";
// Doubtful pairs: a mark for each pair, remembered by the browser, and written to decisions.csv.
{
  const found = read("doubtful");
  const place = document.getElementById("cards"), count = document.getElementById("count");
  const search = document.getElementById("search"), save = document.getElementById("save");
  const WORDS = { keep: "keep", swap: "swap", drop: "drop" }, KEYS = { k: "keep", s: "swap", d: "drop" };
  const memory = "diffalign doubtful " + found.identity;
  const list = inPieces(place);
  let marks = {}, only = "all";
  try { marks = JSON.parse(localStorage.getItem(memory)) ?? {}; } catch { /* the browser has no storage for files */ }

  const mark = (pair, card, word) => {
    if (marks[pair.id] === word || word === undefined) delete marks[pair.id];
    else marks[pair.id] = word;
    try { localStorage.setItem(memory, JSON.stringify(marks)); } catch { /* marks last as long as the page is open */ }
    paint(pair, card);
    tell();
  };
  const paint = (pair, card) => {
    card.dataset.mark = marks[pair.id] ?? "";
    for (const button of card.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.dataset.word === marks[pair.id]));
  };
  const tell = () => {
    const of = (word) => Object.values(marks).filter((one) => one === word).length;
    count.textContent = `${list_shown().length} of ${found.pairs.length} pairs · ${of("keep")} keep · ${of("swap")} swap · ${of("drop")} drop`;
    save.disabled = of("swap") + of("drop") === 0;
  };
  const list_shown = () => found.pairs.filter((pair) =>
    (only === "all" || !marks[pair.id]) && pair.prompt.toLowerCase().includes(search.value.trim().toLowerCase()));

  const side = (uri, word, tone) => make("figure", {}, picture(uri, `${word} picture`, found.pixels), make("figcaption", {}, make("b", { class: tone }, word)));
  const render = (pair) => {
    const buttons = make("div", { class: "group" }, ...Object.keys(WORDS).map((word) =>
      make("button", { type: "button", "data-word": word, onclick: () => mark(pair, card, word) }, WORDS[word])));
    const card = make("article", { class: "card", tabindex: "0", "data-id": pair.id },
      make("header", {}, make("h3", {}, pair.prompt), make("span", { class: "soft" }, `#${pair.rank}`)),
      make("div", { class: "pictures" }, side(pair.chosen, "chosen", "good"), side(pair.rejected, "rejected", "bad")),
      make("p", { class: "small soft numbers facts" }, `margin ${signed(pair.margin, 4)}`, ...(pair.quarter ? [` · ${pair.quarter}`] : []), " · ", make("code", {}, pair.id)),
      buttons);
    card.addEventListener("keydown", (event) => { if (KEYS[event.key] && !writing(event)) mark(pair, card, KEYS[event.key]); });
    paint(pair, card);
    return card;
  };
  const show = () => {
    const shown = list_shown();
    list.show(shown, render);
    if (!shown.length) place.append(make("p", { class: "empty" }, "No pair is left under this search and filter."));
    tell();
  };

  choice(document.getElementById("only"), [["all", "all"], ["open", "without a mark"]], "all", (value) => { only = value; show(); });
  search.addEventListener("input", show);
  save.addEventListener("click", () => {
    const cell = (text) => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    const rows = found.pairs.filter((pair) => ["swap", "drop"].includes(marks[pair.id]))
      .map((pair) => `${cell(pair.id)},${marks[pair.id]},${cell(pair.prompt)},${pair.chosen_image}\n`);
    const link = make("a", { href: URL.createObjectURL(new Blob(["id,decision,prompt,chosen_image\n", ...rows], { type: "text/csv" })), download: "decisions.csv" });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  document.addEventListener("keydown", (event) => {
    if (writing(event)) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); }
    const by = { ArrowDown: 1, ArrowUp: -1, ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) { event.preventDefault(); walk(by); }
  });
  show();
}
