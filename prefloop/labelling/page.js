"use strict";

// The server decides what is asked next; this page only shows it and sends what was pressed.
// Text reaches the page as textContent, never as HTML.

const at = (id) => document.getElementById(id);
let state = null;   // as the server gave it
let picked = [];    // answers on the screen, best first, of the ranking being made
let began = 0;      // when the task was shown
let busy = false;   // a request is under way: keys wait, so that none is answered twice

function element(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text, bad) {
  at("said").textContent = text;
  at("said").classList.toggle("bad", Boolean(bad));
}

function message(one) {
  const made = element("div", "message");
  if (one.role) made.append(element("span", "role", one.role));
  made.append(one.content);
  return made;
}

function answer(text, index) {
  const made = element("button", "answer");
  made.type = "button";
  const top = element("span", "top");
  top.append(element("kbd", "", String(index + 1)));
  made.append(top, text.trim() ? element("span", "text", text) : element("span", "text empty", "(empty)"));
  made.addEventListener("click", () => pick(index));
  return made;
}

function show(next) {
  state = next;
  picked = [];
  began = performance.now();
  const done = next.judged + next.skipped;
  const skipped = next.skipped ? `, ${next.skipped} skipped` : "";
  at("count").textContent = `${next.annotator}: ${done} of ${next.total}${skipped}`;
  at("bar").style.width = `${(100 * done) / Math.max(1, next.total)}%`;
  at("work").hidden = !next.task;
  at("end").hidden = Boolean(next.task);
  if (!next.task) return;
  at("prompt").replaceChildren(...next.task.prompt.map(message));
  at("answers").replaceChildren(...next.task.answers.map(answer));
  at("third").hidden = next.task.answers.length < 3;
  window.scrollTo(0, 0);
}

function mark() {
  [...at("answers").children].forEach((made, index) => {
    const rank = picked.indexOf(index) + 1;
    made.querySelector(".badge")?.remove();
    delete made.dataset.rank;
    if (!rank) return;
    made.dataset.rank = rank;
    made.querySelector(".top").append(element("span", "badge", rank === 1 ? "best" : `number ${rank}`));
  });
}

async function ask(action, body) {
  if (busy) return;
  busy = true;
  try {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const reply = await fetch(action, action === "state" ? {} : options);
    const said = await reply.json();
    if (reply.ok) {
      show(said);
      say({ judge: "Saved.", skip: "Skipped.", undo: "Taken back.", state: "" }[action]);
    } else {
      picked = [];
      mark();
      say(`Not saved: ${said.error}`, true);
    }
  } catch {
    picked = [];
    mark();
    say("Not saved: prefloop label does not answer. Start it again, then open the address that it prints.", true);
  } finally {
    busy = false;
  }
}

function send(ranks) {
  const seconds = Math.round(performance.now() - began) / 1000;
  return ask("judge", { id: state.task.id, ranks, seconds });
}

function pick(index) {
  const count = state.task.answers.length;
  if (busy || index >= count || picked.includes(index)) return;
  picked.push(index);
  if (picked.length === count - 1) picked.push([...Array(count).keys()].find((i) => !picked.includes(i)));
  mark();
  if (picked.length === count) send([...Array(count).keys()].map((i) => picked.indexOf(i) + 1));
  else say(`Best is ${picked[0] + 1}. And of the others?`);
}

function tie() {
  const rest = picked.length + 1;
  send(state.task.answers.map((_, index) => picked.indexOf(index) + 1 || rest));
}

function undo() {
  if (picked.length) {
    picked = [];
    mark();
    say("");
  } else ask("undo", {});
}

function press(key) {
  if (busy || !state) return;
  if (key === "u" || key === "backspace") undo();
  else if (!state.task) return;
  else if (/^[1-9]$/.test(key)) pick(Number(key) - 1);
  else if (key === "t" || key === "=") tie();
  else if (key === "s") ask("skip", { id: state.task.id });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  press(event.key.toLowerCase());
});
document.querySelectorAll("footer button").forEach((made) => {
  made.addEventListener("click", () => { made.blur(); press(made.dataset.key); });
});
ask("state");
