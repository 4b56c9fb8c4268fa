"use strict";
/* One pair at a time. A vote counts when the server has it on the disk; until then no key does anything. */
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", "=": "tie", s: "skip", S: "skip", u: "undo", U: "undo", Enter: "finish" };
const WAITS = [0.5, 1, 2, 4]; // seconds between attempts to reach the server
const main = document.getElementById("main"), frames = document.querySelectorAll(".frame");
const text = (id, value) => { document.getElementById(id).textContent = value; };
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
let state = null, busy = true, since = 0;
const images = new Map(); // by place: promise of both images, loaded ahead

async function load(place, side) {
  const image = new Image();
  image.alt = side ? "right image" : "left image";
  image.draggable = false;
  image.src = `image/${place}/${side}`;
  try {
    await image.decode();
    image.classList.toggle("pixels", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
    return image;
  } catch {
    const fault = document.createElement("span");
    fault.className = "fault bad";
    fault.textContent = "This image cannot be read. Skip the pair.";
    try {
      fault.textContent = `${(await (await fetch(image.src)).json()).error}. Skip the pair.`;
    } catch { /* the server does not answer: the next vote says so */ }
    return fault;
  }
}

function pair(place) {
  if (!images.has(place)) images.set(place, Promise.all([load(place, 0), load(place, 1)]));
  return images.get(place);
}

function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

async function show(next) {
  state = next;
  const left = state.total - state.judged;
  const eta = state.seconds_left === null || !left ? "" : ` · about ${duration(state.seconds_left)} left`;
  text("progress", `${state.annotator} · ${state.judged} of ${state.total} judged${eta}`);
  document.getElementById("bar").value = state.total ? state.judged / state.total : 1;
  document.querySelectorAll("[data-key=undo]").forEach((button) => { button.disabled = state.last === null; });
  if (state.current === null) {
    text("counts", `${state.total} pairs, ${state.skipped} of them skipped.`);
    main.dataset.view = "end";
  } else {
    const both = await pair(state.current.place);
    frames.forEach((frame, side) => frame.replaceChildren(both[side]));
    const most = (size) => Math.max(...both.map((image) => image[size] || 1));
    document.getElementById("pair").style.setProperty("--ratio", most("naturalWidth") / most("naturalHeight"));
    text("prompt", state.current.prompt);
    document.querySelectorAll(".side").forEach((side) => side.classList.remove("chosen"));
    main.dataset.view = "pair";
    const kept = new Set([state.current, state.next, state.last].filter(Boolean).map((each) => each.place));
    for (const place of images.keys()) if (!kept.has(place)) images.delete(place);
    if (state.next) pair(state.next.place);
  }
  since = performance.now();
  busy = false;
}

/* Sends until the server answers. The event stays the same, so a vote that arrived twice counts once. */
async function send(what, content) {
  for (let attempt = 0; ; attempt++) {
    try {
      const answer = await fetch(what, content && {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content),
      });
      if (answer.status === 404 || answer.status === 403) throw new Error("The server was started again: open the address that it printed.");
      const found = await answer.json();
      if (found.stale) text("notice", "Not counted: another window was faster.");
      if (answer.ok) return found;
      text("notice", `Not stored: ${found.error}`);
      return null;
    } catch (error) {
      const gone = !(error instanceof TypeError); // fetch raises TypeError where nobody answers
      text("notice", gone ? error.message : "The server does not answer. Trying again; nothing is lost.");
      if (gone) return null;
      await sleep(WAITS[Math.min(attempt, WAITS.length - 1)]);
      text("notice", "");
    }
  }
}

async function act(key) {
  if (busy || state === null) return;
  const view = main.dataset.view;
  if (key === "finish" ? view !== "end" : key === "undo" ? state.last === null : view !== "pair") return;
  busy = true;
  text("notice", "");
  document.querySelector(`.side[data-key=${key}]`)?.classList.add("chosen");
  const event = crypto.randomUUID(), seconds = (performance.now() - since) / 1000;
  if (key === "finish") {
    const found = await send("finish", {});
    if (found?.report !== undefined) { text("report", found.report); main.dataset.view = "result"; return; }
    busy = false;
    return;
  }
  const found = key === "undo"
    ? await send("undo", { event, place: state.last.place })
    : await send("vote", { event, place: state.current.place, key, seconds });
  if (found) await show(found);
  else { document.querySelectorAll(".side").forEach((side) => side.classList.remove("chosen")); busy = false; }
}

addEventListener("keydown", (event) => {
  const key = KEYS[event.key];
  if (!key || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === "finish" && (main.dataset.view !== "end" || document.activeElement.matches("button"))) return; // it presses that one
  event.preventDefault();
  act(key);
});
addEventListener("click", (event) => {
  const button = event.target.closest("[data-key]");
  if (button) { button.blur(); act(button.dataset.key); }
});
send("state").then((found) => found && show(found));
