// A request as a program: the same route and the same body, to the last character. Knows no document.

const OPENAI_METHODS = { "v1/chat/completions": "chat.completions", "v1/completions": "completions" };
const OPENAI_ARGUMENTS = new Set(
  `best_of echo frequency_penalty logit_bias logprobs max_completion_tokens max_tokens messages model n
  parallel_tool_calls presence_penalty prompt reasoning_effort response_format seed stop stream stream_options suffix
  temperature tool_choice tools top_logprobs top_p`.split(/\s+/),
);
const TEXT_OF_CHUNK = { "v1/chat/completions": "delta.content", "v1/completions": "text" };
const MAX_COLUMNS = 88;
const PYTHON_CALLS = `        for call in choice.delta.tool_calls or []:
            print(call.function.name or "", call.function.arguments or "", end="", flush=True)
`;
const JAVASCRIPT_CALLS = `      for (const { function: { name, arguments: part } } of choice.delta.tool_calls ?? []) {
        process.stdout.write(\`\${name ?? ""} \${part ?? ""}\`);
      }
`;

/** Pairs of a name and a function from `{path, body}`, the server's address and whether there is a key to a program. */
export const LANGUAGES = [
  ["curl", curl],
  ["Python", python],
  ["JavaScript", javascript],
];

function curl({ path, body }, origin, hasKey) {
  const key = hasKey ? ` \\\n  -H "Authorization: Bearer $API_KEY"` : "";
  const data = quoted(JSON.stringify(body, null, 2));
  return `curl -N ${quoted(origin + path)} \\\n  -H "Content-Type: application/json"${key} \\\n  -d ${data}\n`;
}

/** A text as a shell takes it, whatever stands in it. */
function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function python({ path, body }, origin, hasKey) {
  const entries = Object.entries(body);
  const extra = Object.fromEntries(entries.filter(([name]) => !OPENAI_ARGUMENTS.has(name)));
  const known = entries.filter(([name]) => OPENAI_ARGUMENTS.has(name));
  const keywords = Object.keys(extra).length === 0 ? known : [...known, ["extra_body", extra]];
  const lines = keywords.map(([name, value]) => `    ${name}=${pythonOf(value, 4)},\n`).join("");
  const key = hasKey ? `os.environ["API_KEY"]` : `"-"`;
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${origin}v1", api_key=${key})
stream = client.${OPENAI_METHODS[path]}.create(
${lines})
for chunk in stream:
    for choice in chunk.choices:
        print(choice.${TEXT_OF_CHUNK[path]} or "", end="", flush=True)
${body.tools ? PYTHON_CALLS : ""}`;
}

/** JSON in Python's words, on one line where that is short. A JSON string is a string of Python's as well. */
function pythonOf(value, indent) {
  if (value === true || value === false) return value ? "True" : "False";
  if (value === null) return "None";
  if (typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value);
  const items = isList
    ? value.map((item) => ["", item])
    : Object.entries(value).map(([key, item]) => [`${JSON.stringify(key)}: `, item]);
  const [open, close] = isList ? "[]" : "{}";
  const short = open + items.map(([key, item]) => key + pythonOf(item, 0)).join(", ") + close;
  if (short.length + indent <= MAX_COLUMNS && !short.includes("\n")) return short;
  const inner = " ".repeat(indent + 4);
  const lines = items.map(([key, item]) => `${inner}${key}${pythonOf(item, indent + 4)},\n`).join("");
  return `${open}\n${lines}${" ".repeat(indent)}${close}`;
}

function javascript({ path, body }, origin, hasKey) {
  const key = hasKey ? `, Authorization: \`Bearer \${process.env.API_KEY}\`` : "";
  return `const response = await fetch("${origin}${path}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")}),
});
let rest = "";
for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + text).split("\\n");
  rest = lines.pop();
  for (const line of lines) {
    if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
    for (const choice of JSON.parse(line.slice(6)).choices) {
      process.stdout.write(choice.${TEXT_OF_CHUNK[path]} ?? "");
${body.tools ? JAVASCRIPT_CALLS : ""}    }
  }
}
`;
}
