"use strict";
// What the scripts of pages share. Text is only ever put into a page as text, never as HTML.

const read = (id) => JSON.parse(document.getElementById(id).textContent);

// make("button", {class: "x", onclick: f, title: "t"}, "text", child): an element; undefined children are left out
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== undefined));
  return element;
}

// Buttons of which one is pressed; returns the function that presses one from elsewhere.
function choice(place, options, first, chosen) {
  const buttons = new Map(options.map(([value, label]) =>
    [value, make("button", { type: "button", "aria-pressed": String(value === first), onclick: () => choose(value) }, label)]));
  const choose = (value) => {
    for (const [own, button] of buttons) button.setAttribute("aria-pressed", String(own === value));
    chosen(value);
  };
  place.append(...buttons.values());
  return choose;
}

function picture(uri, text, pixels) {
  return make("img", { src: uri, alt: text, class: pixels ? "pixels" : "", decoding: "async", loading: "lazy", draggable: "false" });
}

// A number with as many digits as its scorer needs; a difference has its sign, and a true minus.
const digits = (number, places) => number.toFixed(places).replace("-", "−");
const signed = (number, places) => (number >= 0 ? "+" : "") + digits(number, places);

// Shows items in pieces: the next piece when the end of the list comes near, so that a long list opens at once.
function inPieces(place, piece = 24) {
  let items = [], render, done = 0;
  const end = make("div", { "aria-hidden": "true" });
  const more = () => {
    end.before(...items.slice(done, done + piece).map(render));
    done += piece;
  };
  place.append(end);
  new IntersectionObserver((seen) => {
    if (seen.some((one) => one.isIntersecting) && done < items.length) {
      more();
      again();
    }
  }, { rootMargin: "1500px" }).observe(end);
  // where a piece is shorter than the window, its end is still in view and no new event comes
  const again = () => requestAnimationFrame(() => {
    if (done < items.length && end.getBoundingClientRect().top < innerHeight + 1500) { more(); again(); }
  });
  return {
    show(list, with_) {
      [items, render, done] = [list, with_, 0];
      place.replaceChildren(end);
      more();
      again();
    },
    until(index) { while (done <= index && done < items.length) more(); },
  };
}

// Moves the focus from one card to the next (by: 1) or the last (by: -1).
function walk(by) {
  const cards = [...document.querySelectorAll(".card")];
  const here = cards.indexOf(document.activeElement?.closest?.(".card"));
  const next = cards[here < 0 ? 0 : here + by];
  if (!next) return;
  next.focus({ preventScroll: true });
  next.scrollIntoView({ block: "center" });
}

// Whether a key belongs to a field in which text is written or a list is open.
const writing = (event) => event.target.matches?.("input:not([type=range]), select, textarea") || event.ctrlKey || event.metaKey || event.altKey;

// One picture over another: left of the line `under`, right of it `over`. A range input on top takes drags and keys.
function wipe({ under, over, left, right, text, pixels }) {
  const range = make("input", { type: "range", min: "0", max: "100", step: "5", value: "50", "aria-label": `${left} on the left, ${right} on the right` });
  const above = picture(over, `${right}: ${text}`, pixels);
  above.classList.add("over");
  const box = make("div", { class: "wipe" }, picture(under, `${left}: ${text}`, pixels), above,
    make("span", { class: "grip", "aria-hidden": "true" }, "↔"),
    make("span", { class: "tag left" }, left), make("span", { class: "tag right" }, right), range);
  const follow = (event) => { // a drag follows the pointer exactly, keys go in steps
    const { left: start, width } = box.getBoundingClientRect();
    box.style.setProperty("--at", `${Math.min(100, Math.max(0, 100 * (event.clientX - start) / width))}%`);
  };
  range.addEventListener("input", () => box.style.setProperty("--at", `${range.value}%`));
  range.addEventListener("pointerdown", (event) => requestAnimationFrame(() => follow(event)));
  range.addEventListener("pointermove", (event) => { if (event.buttons) requestAnimationFrame(() => follow(event)); });
  return box;
}

function moveWipe(box, by) {
  const range = box.querySelector("input");
  range.value = String(Math.min(100, Math.max(0, Number(range.value) + by)));
  range.dispatchEvent(new Event("input"));
}
