// Chat and text with nothing but fetch:   node examples/javascript.mjs [http://localhost:8080]
// Needs Node.js 18 or newer, no packages. API_KEY is sent if it is set; a server without a key ignores it.

const url = process.argv[2] ?? "http://localhost:8080";

async function post(path, body) {
  const response = await fetch(url + path, {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      Authorization: `Bearer ${process.env.API_KEY ?? "-"}`,
    },
    body: JSON.stringify(body),
  });
  if (!response.ok) {
    throw new Error(`${path} answered ${response.status}: ${await response.text()}`);
  }
  return response;
}

// The JSON values of a stream of server-sent events, as they come.
async function* events(response) {
  let buffer = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (buffer + text).split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice("data:".length));
      if (event.error) throw new Error(JSON.stringify(event.error));
      yield event;
    }
  }
}

const chat = await post("/v1/chat/completions", {
  model: "",
  messages: [{ role: "user", content: "What is the capital of France?" }],
  temperature: 0, // greedy; without it answers are sampled
  max_tokens: 32,
});
console.log("At once:", (await chat.json()).choices[0].message.content);

process.stdout.write("Chat, token by token: ");
const chatStream = await post("/v1/chat/completions", {
  model: "",
  messages: [{ role: "user", content: "Name three colours." }],
  temperature: 0,
  max_tokens: 32,
  stream: true,
});
for await (const chunk of events(chatStream)) {
  process.stdout.write(chunk.choices[0].delta.content);
}

process.stdout.write("\nTGI's own route, token by token: ");
const textStream = await post("/generate_stream", {
  inputs: "The capital of France is",
  parameters: { max_new_tokens: 16 },
});
for await (const event of events(textStream)) {
  process.stdout.write(event.token.text);
}
console.log();
