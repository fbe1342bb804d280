// From turns and settings to the body of a request, just as it is sent, shown and copied. Knows no document.

/**
 * The request for the next turn of a chat. `turns` are those before it; if the last one is the model's, the model goes
 * on with it.
 */
export function chatRequest(model, turns, settings) {
  const system = settings.system.trim() === "" ? [] : [{ role: "system", content: settings.system }];
  const tools = settings.tools.length === 0 ? {} : { tools: settings.tools, tool_choice: settings.toolChoice };
  return {
    path: "v1/chat/completions",
    body: {
      model,
      messages: [...system, ...turns.map(messageOf)],
      ...settings.parameters,
      ...tools,
      ...formatOf(settings),
      stream: true,
      stream_options: { include_usage: true },
    },
  };
}

function messageOf(turn) {
  if (turn.role === "tool") return { role: "tool", tool_call_id: turn.id, content: turn.text };
  if (turn.role === "user" || turn.calls.length === 0) return { role: turn.role, content: turn.text };
  const calls = turn.calls.map(({ id, name, arguments: text }) => ({
    id,
    type: "function",
    function: { name, arguments: text },
  }));
  return { role: "assistant", content: turn.text || null, tool_calls: calls };
}

function formatOf({ format, schema }) {
  if (format === "json_object") return { response_format: { type: "json_object" } };
  if (format !== "json_schema") return {};
  return { response_format: { type: "json_schema", json_schema: { name: "answer", schema } } };
}

/** The request to go on with a prompt. A suffix that is null is none: with one the model fills in what is between. */
export function completionRequest(model, prompt, suffix, numAlternatives, settings) {
  return {
    path: "v1/completions",
    body: {
      model,
      prompt,
      ...(suffix === null ? {} : { suffix }),
      logprobs: numAlternatives,
      ...settings.parameters,
      ...(suffix === null ? formatOf(settings) : {}),
      stream: true,
      stream_options: { include_usage: true },
    },
  };
}
