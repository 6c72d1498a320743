// Shows what the server sends, section by section. Whatever comes from a job is set as text or as a
// property, never as markup; elements are kept from one change to the next, so that a video goes on
// playing and the focus stays where it is.

import { drawStages, drawThroughput, roughly, seconds, span } from "./plots.js";

const byId = (id) => document.getElementById(id);
const state = { csrf: "", skew: 0, workers: [], queues: [], known: {}, figures: null };
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** An element with a class and content. */
function make(name, className, ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content.map((part) => (part instanceof Node ? part : String(part ?? ""))));
  return made;
}

/** One list entry an item, by key: new ones are made, present ones filled again, those gone removed. */
function sync(list, items, keyOf, build, fill) {
  const present = new Map([...list.children].map((child) => [child.dataset.key, child]));
  let place = list.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let entry = present.get(key);
    present.delete(key);
    if (entry === undefined) {
      entry = build(item);
      entry.dataset.key = key;
    }
    fill?.(entry, item);
    if (entry === place) place = place.nextElementSibling;
    else list.insertBefore(entry, place);
  }
  for (const gone of present.values()) {
    if (gone.contains(document.activeElement)) document.activeElement.closest("section").querySelector("h2").focus();
    gone.remove();
  }
  const empty = document.querySelector(`[data-for="${list.id}"]`);
  if (empty) empty.hidden = items.length > 0;
}

/** A list that begins short, with a button for the rest. */
function capped(id, few, show) {
  const button = document.querySelector(`[data-more="${id}"]`);
  let isWhole = false, last = [];
  const render = () => {
    button.hidden = last.length <= few;
    button.setAttribute("aria-expanded", isWhole);
    say(button, isWhole ? "Show fewer" : `Show all ${last.length}`);
    show(isWhole ? last : last.slice(0, few));
  };
  button.addEventListener("click", () => { isWhole = !isWhole; render(); });
  return (items) => { last = items; render(); };
}

/** Write only what differs, so that nothing is announced or drawn anew for nothing. */
function say(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

function announce(text) {
  byId("announcements").textContent = text;
}

// -- times: the server's clock, on this side

const now = () => Date.now() / 1000 + state.skew;

/** A time that goes on by itself. */
function ticking(since, before = "", after = "") {
  const made = make("time");
  tick(made, since, before, after);
  return made;
}

function tick(element, since, before = "", after = "") {
  Object.assign(element.dataset, { since, before, after });
  if (since) element.dateTime = new Date(since * 1000).toISOString();
  turn(element);
}

function turn(element) {
  const { since, before, after } = element.dataset;
  const passed = Math.max(Math.floor(now() - Number(since)), 0);
  say(element, Number(since) ? `${before}${after ? roughly(passed) : seconds(passed)}${after}` : "–");
}

setInterval(() => document.querySelectorAll("time[data-since]").forEach(turn), 1000);

// -- queues and workers

function showQueues(queues) {
  state.queues = queues;
  byId("queues-table").hidden = queues.length === 0;
  sync(byId("queues"), queues, (queue) => queue.name, (queue) => {
    const row = make("tr", "", make("th", "", queue.name));
    row.firstChild.scope = "row";
    for (const name of ["Waiting", "Oldest", "Running", "Retrying", "Callbacks"]) {
      row.append(make("td"));
      row.lastChild.dataset.name = name;
    }
    row.children[2].append(ticking(0));
    return row;
  }, (row, queue) => {
    const [, waiting, oldest, running, retrying, callbacks] = row.children;
    say(waiting, queue.waiting);
    tick(oldest.firstChild, queue.oldest_at ?? 0);
    say(running, queue.lease_overdue ? `${queue.in_flight}, overdue` : queue.in_flight);
    running.classList.toggle("is-bad-text", queue.lease_overdue);
    say(retrying, queue.retrying);
    say(callbacks, queue.undelivered ? `${queue.callbacks}, ${queue.undelivered} given up` : queue.callbacks);
    callbacks.classList.toggle("is-bad-text", queue.undelivered > 0);
  });
  showTiles();
}

const STATES = { idle: "good", working: "good", starting: "warn", draining: "warn" };

function showWorkers(workers) {
  state.workers = workers;
  sync(byId("workers"), workers, (worker) => worker.name, () => {
    const entry = make("li", "", make("div", "split", make("h3"), make("span", "badges", make("span"), make("span", "badge bad", "engine does not start"))), make("p", "facts"), make("div"));
    entry.children[2].append(make("div", "split", make("span", "facts", "GPU memory"), make("span", "facts")), make("progress"));
    return entry;
  }, (entry, worker) => {
    const [head, facts, memory] = entry.children;
    say(head.firstChild, worker.name);
    const [doing, broken] = head.lastChild.children;
    doing.className = `badge ${STATES[worker.state] ?? ""}`;
    say(doing, worker.state);
    broken.hidden = worker.engine !== "failed";
    say(facts, [`on ${worker.host}`, worker.queues.join(", "), `engine ${worker.engine}${worker.engine_doing ? `: ${worker.engine_doing}` : ""}`, `${worker.completed} completed`, `${worker.failed} failed`, `${worker.retried} retried`].join(" · "));
    memory.hidden = worker.device === null;
    if (worker.device !== null) {
      const { used_gb, total_gb } = worker.device;
      say(memory.firstChild.lastChild, `${used_gb.toFixed(1)} of ${total_gb.toFixed(1)} GiB`);
      const bar = memory.lastChild;
      bar.max = total_gb;
      bar.value = used_gb;
      bar.setAttribute("aria-label", `GPU memory of ${worker.name}`);
      bar.classList.toggle("is-full", used_gb > 0.95 * total_gb);
    }
  });
  const jobs = workers.flatMap((worker) => worker.jobs.map((job) => ({ ...job, worker: worker.name })));
  sync(byId("running"), jobs, (job) => `${job.worker} ${job.id} ${job.attempt}`, (job) => {
    const bar = make("progress");
    bar.setAttribute("aria-label", `Progress of ${job.type} ${job.id}`);
    const sketch = make("img", "sketch");
    Object.assign(sketch, { alt: `Preview of ${job.type} ${job.id}`, hidden: true, decoding: "async" });
    sketch.addEventListener("load", () => { sketch.hidden = false; });
    sketch.addEventListener("error", () => { sketch.hidden = true; });
    return make("li", "", make("div", "split", make("h3", "", job.type), ticking(job.claimed_at)), bar,
      make("div", "split", make("span"), make("span")), make("p", "id", job.id), make("p", "facts"), sketch);
  }, (entry, job) => {
    const [, bar, steps, , facts, sketch] = entry.children;
    if (job.preview && sketch.getAttribute("src") !== job.preview) sketch.src = job.preview;
    say(steps.firstChild, job.stage);
    if (job.total) {
      bar.max = job.total;
      bar.value = Math.min(job.step, job.total);
      say(steps.lastChild, `${job.step} of ${job.total}`);
    } else {
      if (job.stage === "waiting") bar.value = 0;
      else bar.removeAttribute("value");
      say(steps.lastChild, "");
    }
    say(facts, `on ${job.worker}${job.attempt > 1 ? `, attempt ${job.attempt}` : ""}`);
  });
  showTiles();
}

function showTiles() {
  const dead = sum(state.queues, "dead");
  say(byId("tile-waiting"), sum(state.queues, "waiting") + sum(state.queues, "retrying"));
  say(byId("tile-running"), state.workers.reduce((count, worker) => count + worker.jobs.length, 0));
  setTile("tile-dead", dead);
  byId("dead-note").hidden = dead === 0;
}

function setTile(id, count) {
  say(byId(id), count);
  byId(id).parentElement.classList.toggle("is-bad", count > 0);
}

const sum = (items, name) => items.reduce((total, item) => total + item[name], 0);

// -- results

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) target.pause();
    else if (!calm.matches) target.play().catch(() => {});
  }
}, { threshold: 0.5 });

const showResults = capped("results", 10, (results) => {
  sync(byId("results"), results, (job) => `${job.id} ${job.finished_at}`, (job) => {
    const media = make("div", "media", ...job.assets.map((asset, index) => showAsset(asset, job, index)));
    const many = job.assets.length > 1;
    if (many) {
      media.tabIndex = 0;
      media.setAttribute("role", "group");
      media.setAttribute("aria-label", `${job.assets.length} results, side by side`);
    }
    const took = job.seconds.generate ?? job.seconds.total;
    const count = many ? `${job.assets.length} files · ` : "";
    return make("li", "", media, make("h3", "", job.type), make("p", "facts", count, took ? `made in ${seconds(took)} · ` : "", ticking(job.finished_at, "", " ago")), titled(make("p", "id", job.id)));
  });
});

function titled(element) {
  element.title = element.textContent;
  return element;
}

function showAsset(asset, job, index) {
  if (asset.address === null) return make("p", "absent", `${asset.media_type} is not shown`);
  const named = `${job.type} ${job.id}, file ${index + 1}`;
  const absent = () => make("p", "absent", "It cannot be shown from here.");
  if (asset.media_type.startsWith("video/")) {
    const video = make("video");
    Object.assign(video, { src: asset.address, controls: true, muted: true, loop: true, playsInline: true, preload: "metadata" });
    video.setAttribute("aria-label", named);
    video.addEventListener("error", () => video.replaceWith(absent()), { once: true });
    seen.observe(video);
    return video;
  }
  const image = make("img"), link = make("a");
  Object.assign(image, { src: asset.address, alt: named, loading: "lazy", decoding: "async" });
  Object.assign(link, { href: asset.address, target: "_blank", rel: "noopener" });
  image.addEventListener("error", () => link.replaceWith(absent()), { once: true });
  link.append(image);
  return link;
}

// -- failures and dead letters

const showFailures = capped("failures", 6, (failures) => {
  sync(byId("failures"), failures, (job) => `${job.id} ${job.finished_at}`, (job) => make("li", "",
    make("div", "split", make("h3", "", job.type || "unreadable message"), ticking(job.finished_at, "", " ago")),
    make("p", "reason", make("span", "badge bad", job.error_type), " ", job.reason),
    make("p", "id", job.id), make("p", "facts", `on ${job.worker}${job.attempt > 1 ? `, after ${job.attempt} attempts` : ""}`)));
});

const showDead = capped("dead", 6, (dead) => {
  sync(byId("dead"), dead, (letter) => `${letter.queue} ${letter.letter}`, (letter) => {
    const button = make("button", "", "Run again");
    const name = letter.job_id ?? "a message without an id";
    button.type = "button";
    button.setAttribute("aria-label", `Run ${name} again`);
    const entry = make("li", "with-button", make("div", "",
      make("div", "split", make("h3", "", letter.job_type || "unreadable message"), ticking(Date.parse(letter.buried_at) / 1000 || 0, "", " ago")),
      make("p", "reason", make("span", "badge bad", letter.error_type), " ", letter.reason),
      make("p", "id", name), make("p", "facts", `in ${letter.queue}`)), button);
    button.addEventListener("click", () => requeue(letter, name, button));
    return entry;
  });
});

const ANSWERS = { done: "runs again", absent: "is not there any more", "in flight": "runs already: the producer pushed it again" };

async function requeue(letter, name, button) {
  if (button.ariaDisabled === "true") return;
  button.ariaDisabled = "true"; // one that is disabled outright would lose the focus
  try {
    const answer = await fetch("/api/requeue", {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": state.csrf },
      body: JSON.stringify({ queue: letter.queue, letter: letter.letter }),
    });
    if (answer.status === 401) return location.assign("/login");
    const said = await answer.json();
    announce(`${name} ${ANSWERS[said.answer] ?? `was not put back: ${said.error}`}`);
  } catch {
    announce(`${name} was not put back: the dashboard does not answer`);
  }
  button.ariaDisabled = "false";
}

// -- figures

function showFigures(figures) {
  state.figures = figures;
  const { throughput, stages } = figures;
  byId("stages").hidden = stages.length === 0;
  document.querySelector('[data-for="stages"]').hidden = stages.length > 0;
  drawFigures();
  const add = (counts) => counts.reduce((total, count) => total + count, 0);
  say(byId("tile-completed"), add(throughput.completed));
  setTile("tile-failed", add(throughput.failed));
  const window_ = `in the last ${span((throughput.stretch_seconds * throughput.completed.length) / 60)}`;
  say(byId("tile-window"), window_);
  say(byId("tile-window-2"), window_);
}

function drawFigures() {
  if (state.figures === null) return;
  drawThroughput(byId("throughput"), state.figures.throughput);
  if (state.figures.stages.length) drawStages(byId("stages"), state.figures.stages);
}

let drawnWidth = 0;
new ResizeObserver(([{ contentRect }]) => {
  if (contentRect.width !== drawnWidth) drawFigures();
  drawnWidth = contentRect.width;
}).observe(byId("throughput"));

/** Tell those who cannot see it what ended since the last time. */
function tell(kind, jobs) {
  const before = state.known[kind];
  const fresh = before ? jobs.filter((job) => !before.has(`${job.id} ${job.finished_at}`)) : [];
  state.known[kind] = new Set(jobs.map((job) => `${job.id} ${job.finished_at}`));
  if (fresh.length === 1) announce(`${fresh[0].type} ${fresh[0].id} ${kind}`);
  else if (fresh.length > 1) announce(`${fresh.length} jobs ${kind}`);
}

// -- the stream

function connect() {
  const stream = new EventSource("/api/events");
  const sections = {
    hello: ({ now: theirs, csrf, can_log_out }) => {
      state.skew = theirs - Date.now() / 1000;
      state.csrf = csrf;
      byId("logout").hidden = !can_log_out;
      setConnection("live", "live");
    },
    queues: showQueues,
    workers: showWorkers,
    results: (results) => { showResults(results); tell("completed", results); },
    failures: (failures) => { showFailures(failures); tell("failed", failures); },
    dead: showDead,
    figures: showFigures,
    trouble: (text) => { say(byId("trouble"), text); byId("trouble").hidden = !text; },
  };
  for (const [name, show] of Object.entries(sections)) {
    stream.addEventListener(name, (event) => show(JSON.parse(event.data)));
  }
  stream.addEventListener("error", async () => {
    setConnection("lost", "no connection, trying again");
    if (stream.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    // It does not after a refusal: the session has ended, or too many pages are open.
    const answer = await fetch("/api/overview", { method: "HEAD" }).catch(() => null);
    if (answer?.status === 401) location.assign("/login");
    else setTimeout(connect, 3000);
  });
}

function setConnection(kind, text) {
  byId("connection").dataset.state = kind;
  say(byId("connection-text"), text);
}

connect();
