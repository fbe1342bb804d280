// The sampling parameters: what each is for and how its field is read. Limits come from the server's description.

const SCHEMAS = { chat: "ChatRequest", completion: "CompletionRequest", infill: "CompletionRequest" };
const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };

/**
 * Name, kind, hint, and the `placeholder` of an empty field; those without `isMore` are always in sight. A server may
 * say other defaults of the boxes.
 */
export const PARAMETERS = [
  { name: "temperature", kind: "number", step: 0.1, placeholder: "model's, or 1", hint: "0 takes the likeliest" },
  { name: "top_p", kind: "number", step: 0.05, placeholder: "model's, or 1", hint: "the likeliest up to this share" },
  { name: "max_tokens", kind: "integer", placeholder: "no limit", hint: "longest answer" },
  { name: "seed", kind: "integer", placeholder: "random", hint: "same seed, same answer" },
  { name: "top_k", kind: "integer", isMore: true, hint: "only so many of the likeliest" },
  { name: "min_p", kind: "number", step: 0.01, isMore: true, hint: "of the likeliest one's chance" },
  { name: "typical_p", kind: "number", step: 0.05, isMore: true, hint: "the typical, up to this share" },
  { name: "repetition_penalty", kind: "number", step: 0.05, isMore: true, hint: "above 1 repeats less" },
  { name: "frequency_penalty", kind: "number", step: 0.1, isMore: true, hint: "more for each use" },
  { name: "presence_penalty", kind: "number", step: 0.1, isMore: true, hint: "the same for any use" },
  { name: "min_tokens", kind: "integer", isMore: true, hint: "shortest answer" },
  { name: "truncate_prompt_tokens", kind: "integer", isMore: true, isLong: true, hint: "keep only so many, the last" },
  { name: "stop", kind: "lines", isMore: true, hint: "one on each line; \\n is a line break" },
  { name: "bad_words", kind: "lines", isMore: true, hint: "one on each line" },
  { name: "stop_token_ids", kind: "integers", isMore: true, hint: "ids and commas" },
  { name: "allowed_token_ids", kind: "integers", isMore: true, hint: "ids and commas" },
  { name: "logit_bias", kind: "object", isMore: true, hint: 'JSON: {"1234": -100}' },
  { name: "reasoning_effort", kind: "text", isMore: true, hint: "none, low, medium, high" },
  { name: "chat_template_kwargs", kind: "object", isMore: true, hint: 'JSON: {"enable_thinking": false}' },
  { name: "include_stop_str_in_output", kind: "box", isMore: true },
  { name: "skip_special_tokens", kind: "box", isMore: true, isOnByDefault: true },
  { name: "ignore_eos", kind: "box", isMore: true },
  { name: "parallel_tool_calls", kind: "box", isMore: true, isOnByDefault: true },
  { name: "include_reasoning", kind: "box", isMore: true, isOnByDefault: true },
];

/** The value in a field's text; undefined where there is none. Raises Error with the reason in words. */
export const READERS = {
  number: numberOf,
  integer: numberOf,
  text: (text) => text.trim() || undefined,
  lines: (text) => listOf(text.split("\n"), withoutEscapes),
  integers: (text) => listOf(text.split(/[\s,]+/), integerOf),
  object: (text) => (text.trim() === "" ? undefined : objectOf(text)),
};

function numberOf(text) {
  return text.trim() === "" ? undefined : Number(text);
}

function listOf(parts, read) {
  const list = parts.filter((part) => part !== "").map(read);
  return list.length === 0 ? undefined : list;
}

function integerOf(text) {
  if (!/^-?\d+$/.test(text)) throw new Error(`“${text}” is not a whole number.`);
  return Number(text);
}

function withoutEscapes(line) {
  return line.replace(/\\[nt\\]/g, (escape) => ESCAPES[escape]);
}

function objectOf(text) {
  const value = jsonOf(text);
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error("It must be a JSON object.");
  return value;
}

/** JSON out of a person's text. Raises Error with the reason in words. */
export function jsonOf(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
}

/** What a mode's requests may say: name -> `{min, max, fallback}`. Null if the server has not said so. */
export function limitsOf(mode, description, info) {
  const properties = description?.components?.schemas?.[SCHEMAS[mode]]?.properties;
  if (properties === undefined) return null;
  const limits = Object.fromEntries(Object.entries(properties).map(([name, schema]) => [name, limitOf(schema)]));
  const window = info?.max_total_tokens;
  for (const name of ["max_tokens", "min_tokens", "truncate_prompt_tokens"]) {
    if (limits[name] !== undefined && window !== undefined) limits[name].max = window;
  }
  return limits;
}

function limitOf(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const bound = (key) => parts.map((part) => part[key]).find((value) => value !== undefined);
  const max = bound("maximum");
  return {
    min: bound("minimum") ?? bound("exclusiveMinimum"),
    max: max !== undefined && max > Number.MAX_SAFE_INTEGER ? undefined : max,
    isMinExcluded: bound("minimum") === undefined,
    fallback: schema.default,
  };
}

/** The limits in words. */
export function rangeOf({ min, max, isMinExcluded }) {
  const low = min === undefined || min < -Number.MAX_SAFE_INTEGER ? null : `${isMinExcluded ? "above " : ""}${min}`;
  const high = max === undefined || max >= 2 ** 31 - 1 ? null : String(max);
  if (low !== null && high !== null) return `${low} to ${high}`;
  return low === null ? (high === null ? "" : `up to ${high}`) : isMinExcluded ? low : `${low} or more`;
}
