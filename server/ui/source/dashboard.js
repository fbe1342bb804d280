// The dashboard: reads the stream of figures, keeps the last five minutes of them, and draws.

import { getJson, KEY_REFUSED } from "./api.js";
import { Chart } from "./charts.js";
import { byId, element } from "./dom.js";
import { dataOf } from "./events.js";
import { CHARTS, SPAN_S, TILES, combined, sum, textOf, tilesOf, valueAt } from "./figures.js";
import { askForKey, authorization, hasKey, keyFields } from "./key.js";

const RETRY_MS = 2000;
/** A stream that says nothing for so long is opened anew. */
const SILENCE_MS = 10_000;
const ALL = "";
const COLUMNS = ["Now", "Lowest", "Mean", "Highest"];

/** Moments, each a `time` in milliseconds and the figures by name of replica. */
const history = [];
const charts = CHARTS.map((chart) => new Chart(chart));
const tiles = TILES.map(({ label }) => ({ label, value: element("dd", {}, "–") }));
const rows = CHARTS.flatMap((chart) =>
  chart.lines.map((line) => ({ chart, line, cells: COLUMNS.map(() => element("td")) })),
);
let isPaused = false;
let isDrawingSoon = false;
let keyChanged = () => {};

// ---- the stream ----

async function watch() {
  for (;;) {
    const control = new AbortController();
    const changed = new Promise((resolve) => (keyChanged = resolve));
    changed.then(() => control.abort());
    const { words, needsKey = false } = await read(control).catch((error) => ({ words: wordsOf(error) }));
    say(words);
    await (needsKey ? changed : Promise.race([changed, new Promise((resolve) => setTimeout(resolve, RETRY_MS))]));
  }
}

/** Read one stream to its end; the reason why it ended in words, and whether another key is needed. */
async function read(control) {
  let timer = setTimeout(() => control.abort(), SILENCE_MS);
  try {
    const options = { headers: authorization(), cache: "no-store", signal: control.signal };
    const response = await fetch("dashboard/events", options);
    if (!response.ok) return refusalOf(response.status);
    say("Connected");
    for await (const data of dataOf(response.body)) {
      clearTimeout(timer);
      timer = setTimeout(() => control.abort(), SILENCE_MS);
      take(JSON.parse(data).replicas);
    }
    return { words: "The server has ended the stream. Asking again…" };
  } finally {
    clearTimeout(timer);
  }
}

function refusalOf(status) {
  if (status === 401) {
    byId("key").hidden = false;
    askForKey();
    return { words: KEY_REFUSED, needsKey: true };
  }
  if (status === 429) return { words: "Too many dashboards are open. Asking again…" };
  return { words: `The server answers ${status}. Asking again…` };
}

function wordsOf(error) {
  return `${error.name === "AbortError" ? "The server says nothing." : "The server is not there."} Asking again…`;
}

function say(words) {
  if (byId("server").textContent !== words) byId("server").textContent = words;
}

function take(replicas) {
  history.push({ time: Date.now(), replicas });
  while (history[0].time < Date.now() - SPAN_S * 1000) history.shift();
  if (!isPaused) drawSoon();
}

// ---- the page ----

/** Draw with the next frame: once however much comes until then, and not while nobody sees it. */
function drawSoon() {
  if (isDrawingSoon) return;
  isDrawingSoon = true;
  requestAnimationFrame(() => {
    isDrawingSoon = false;
    draw();
  });
}

function draw() {
  if (history.length === 0) return;
  const names = Object.keys(history.at(-1).replicas);
  offer(names);
  const chosen = byId("replica").value;
  const allOf = (replicas) => (chosen === ALL ? Object.values(replicas) : [replicas[chosen]].filter(Boolean));
  const moments = history
    .map(({ time, replicas }) => ({ time, all: allOf(replicas) }))
    .filter(({ all }) => all.length > 0)
    .map(({ time, all }) => ({ time, figures: combined(all) }));
  byId("combined").hidden = names.length < 2 || chosen !== ALL;
  if (moments.length === 0) return;
  const texts = tilesOf(moments.map(({ figures }) => figures));
  tiles.forEach(({ value }, index) => (value.textContent = texts[index]));
  if (byId("table").hidden) drawCharts(moments);
  else writeTable(moments);
  writeReplicas(names);
}

function drawCharts(moments) {
  for (const chart of charts) {
    const valuesOf = (figures) => chart.lines.map(({ place }) => valueAt(figures, place));
    chart.draw(moments.map(({ time, figures }) => ({ time, values: valuesOf(figures) })));
  }
}

function writeTable(moments) {
  for (const { chart, line, cells } of rows) {
    const values = moments.map(({ figures }) => valueAt(figures, line.place));
    const known = values.filter((value) => value !== null);
    const facts = [values.at(-1), Math.min(...known), sum(known) / known.length, Math.max(...known)];
    const texts = facts.map((fact) => textOf(known.length === 0 ? null : fact, chart.unit));
    cells.forEach((cell, index) => (cell.textContent = texts[index]));
  }
}

/** Let the person choose among these replicas if there are several. The choice of one that is gone becomes all. */
function offer(names) {
  const choice = byId("replica");
  byId("replica-choice").hidden = byId("replicas").hidden = names.length < 2;
  const offered = [ALL, ...names];
  if (offered.join("\n") === [...choice.options].map((option) => option.value).join("\n")) return;
  const before = choice.value;
  const labelOf = (name) => (name === ALL ? "All replicas" : name);
  choice.replaceChildren(...offered.map((name) => element("option", { value: name }, labelOf(name))));
  choice.value = names.includes(before) ? before : ALL;
}

function writeReplicas(names) {
  if (byId("replicas").hidden) return;
  const columns = ["Replica", ...TILES.map(({ label }) => label)];
  const head = element("tr", {}, columns.map((name) => element("th", { scope: "col" }, name)));
  const body = names.map((name) => {
    const moments = history.map(({ replicas }) => replicas[name]).filter(Boolean);
    const cells = tilesOf(moments).map((text) => element("td", {}, text));
    return element("tr", {}, element("th", { scope: "row" }, name), cells);
  });
  byId("replica-table").replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, body)));
}

function tableOfRows() {
  const head = element("tr", {}, ["Figure", ...COLUMNS].map((name) => element("th", { scope: "col" }, name)));
  const bodies = CHARTS.map((chart) => {
    const own = rows.filter((row) => row.chart === chart);
    const title = element("tr", {}, element("th", { scope: "rowgroup", colspan: COLUMNS.length + 1 }, chart.title));
    const lines = own.map(({ line, cells }) => element("tr", {}, element("th", { scope: "row" }, line.label), cells));
    return element("tbody", {}, title, lines);
  });
  return element("table", {}, element("thead", {}, head), bodies);
}

/** Let a button turn something on and off. */
function toggle(id, act) {
  const button = byId(id);
  button.addEventListener("click", () => {
    const isOn = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(isOn));
    act(isOn);
    drawSoon();
  });
}

async function nameModel() {
  byId("model").textContent = (await getJson("info")).model_id;
}

function start() {
  byId("now").append(...tiles.map(({ label, value }) => element("div", {}, element("dt", {}, label), value)));
  byId("charts").append(...charts.map(({ root }) => root));
  byId("table").append(tableOfRows());
  byId("key").append(keyFields(() => keyChanged()));
  byId("key").hidden = !hasKey();
  byId("replica").addEventListener("change", drawSoon);
  toggle("pause", (isOn) => (isPaused = isOn));
  toggle("as-table", (isOn) => {
    byId("table").hidden = !isOn;
    byId("charts").hidden = isOn;
  });
  nameModel().catch(() => {}); // the stream's own trouble is told
  watch();
}

start();
