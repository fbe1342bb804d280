// The figures that the server streams: which there are, how they are written, and what several replicas make together.

export const SPAN_S = 300;
/** Moments that make up a part of tokens: in one second there may be none. */
const NUM_RECENT = 10;

/** Title, unit, and for each line its label and its place in a replica's figures. */
export const CHARTS = [
  chart("Requests", "number", ["running", "requests_running"], ["waiting", "requests_waiting"]),
  chart("Tokens per second", "number", ["generated", "tokens_per_s"], ["of prompts", "prompt_tokens_per_s"],
    ["found in the prefix cache", "prefix_hit_tokens_per_s"]),
  chart("Time to the first token", "seconds", ...quantiles("first_token_s")),
  chart("Gap between tokens", "seconds", ...quantiles("inter_token_s")),
  chart("KV cache, tokens", "number", ["held by requests", "kv_tokens_used"], ["kept for prefixes", "kv_tokens_cached"],
    ["all there are", "kv_tokens_total"]),
  chart("Speculation, tokens per second", "number", ["guessed", "draft_tokens_per_s"],
    ["accepted", "draft_tokens_accepted_per_s"]),
  chart("Time of a decode step", "seconds", ...quantiles("decode_step_s")),
  chart("Time of a prefill step", "seconds", ...quantiles("prefill_step_s")),
  chart("Memory", "bytes", ["HTTP process", "server_memory_bytes"], ["engine", "engine_memory_bytes"]),
  chart("Per second", "number", ["requests finished", "requests_finished_per_s"],
    ["requests failed", "requests_failed_per_s"], ["preemptions", "preemptions_per_s"]),
];

/** What stands at the top of the page: label, unit, and what is made of a replica's figures and of its recent ones. */
export const TILES = [
  tile("Running", "number", (figures) => figures.requests_running),
  tile("Waiting", "number", (figures) => figures.requests_waiting),
  tile("Tokens per second", "number", (figures) => figures.tokens_per_s),
  tile("First token, median", "seconds", (figures) => valueAt(figures, "first_token_s.p50")),
  tile("Gap, median", "seconds", (figures) => valueAt(figures, "inter_token_s.p50")),
  tile("Decode step, median", "seconds", (figures) => valueAt(figures, "decode_step_s.p50")),
  tile("Steps per second", "number", (figures) => figures.steps_per_s),
  tile("KV cache in use", "part", (figures) => part(figures.kv_tokens_used, figures.kv_tokens_total)),
  tile("Prompt found in cache", "part",
    (_, recent) => part(recent.prefix_hit_tokens_per_s, recent.prompt_tokens_per_s)),
  tile("Guesses accepted", "part", (_, recent) => part(recent.draft_tokens_accepted_per_s, recent.draft_tokens_per_s)),
  tile("Memory", "bytes", (figures) => sum([figures.server_memory_bytes, figures.engine_memory_bytes])),
];

/** The texts of the tiles for the figures of some moments in a row; the last moment is the latest. */
export function tilesOf(moments) {
  const recent = combined(moments.slice(-NUM_RECENT));
  return TILES.map(({ unit, read }) => textOf(read(moments.at(-1), recent), unit));
}

function chart(title, unit, ...lines) {
  return { title, unit, lines: lines.map(([label, place]) => ({ label, place })) };
}

function quantiles(place) {
  return [["half within", `${place}.p50`], ["90% within", `${place}.p90`], ["99% within", `${place}.p99`]];
}

function tile(label, unit, read) {
  return { label, unit, read };
}

/** The number at a place such as `first_token_s.p50`, or null. */
export function valueAt(figures, place) {
  return place.split(".").reduce((value, name) => value?.[name] ?? null, figures);
}

/** One or several figures as one: sums, and of times those of the slowest. */
export function combined(all) {
  if (all.length === 1) return all[0];
  const names = Object.keys(all[0]);
  return Object.fromEntries(names.map((name) => [name, together(all.map((figures) => figures[name] ?? null))]));
}

function together(values) {
  const known = values.filter((value) => value !== null);
  if (known.length === 0 || typeof known[0] === "number") return sum(known);
  const names = Object.keys(known[0]);
  return Object.fromEntries(names.map((name) => [name, Math.max(...known.map((value) => value[name]))]));
}

/** The sum of the values that are known, or null. */
export function sum(values) {
  const known = values.filter((value) => value !== null);
  return known.length === 0 ? null : known.reduce((total, value) => total + value, 0);
}

function part(value, whole) {
  return whole ? Math.min(1, value / whole) : null;
}

/** A value in words; a value that is not known is a dash. */
export function textOf(value, unit) {
  return value === null ? "–" : WRITERS[unit](value);
}

const WRITERS = {
  number: (value) => {
    if (value >= 1e6) return `${digits(value / 1e6, 2)}M`;
    if (value >= 1e5) return `${digits(value / 1e3, 0)}k`;
    return digits(value, value < 100 ? 1 : 0);
  },
  seconds: (value) => (value < 1 ? `${digits(value * 1e3, value < 0.1 ? 1 : 0)} ms` : `${digits(value, 2)} s`),
  bytes: (value) => (value < 2 ** 30 ? `${digits(value / 2 ** 20, 0)} MiB` : `${digits(value / 2 ** 30, 2)} GiB`),
  part: (value) => `${digits(value * 100, 0)}%`,
};

function digits(value, maximumFractionDigits) {
  return value.toLocaleString("en", { maximumFractionDigits });
}
