// What the npm packages of OpenAI and Hugging Face make of our answers:   node node_clients.mjs URL PACKAGES
// The last line of output is JSON, for test_real_clients.py to look at.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";

const [url, packages] = process.argv.slice(2);
const require = createRequire(path.join(packages, "package.json"));
const { OpenAI } = require("openai");
const { InferenceClient } = require("@huggingface/inference");

const messages = [{ role: "user", content: "What is the capital of France?" }];
const greedy = { model: "tgi", messages, temperature: 0, max_tokens: 16 };
const prompt = "The capital of France is";
const weather = {
  type: "object",
  properties: { city: { type: "string", maxLength: 12 } },
  required: ["city"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "get_weather", parameters: weather, strict: true } }];
const results = {};

async function collected(stream, textOf) {
  let text = "";
  for await (const chunk of stream) text += textOf(chunk) ?? "";
  return text;
}

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "-", maxRetries: 0 });

const chat = await openai.chat.completions.create({ ...greedy, logprobs: true, top_logprobs: 2 });
results.openaiChat = chat.choices[0].message.content;
assert.equal(chat.choices[0].logprobs.content.length, chat.usage.completion_tokens);
assert.ok(chat.choices[0].logprobs.content[0].top_logprobs.length >= 2);

const chunks = await openai.chat.completions.create({ ...greedy, stream: true });
results.openaiChatStream = await collected(chunks, (chunk) => chunk.choices[0]?.delta.content);

const completion = { model: "tgi", prompt, temperature: 0, max_tokens: 8 };
results.openaiCompletion = (await openai.completions.create(completion)).choices[0].text;
const completionChunks = await openai.completions.create({ ...completion, stream: true });
results.openaiCompletionStream = await collected(completionChunks, (chunk) => chunk.choices[0].text);

const choice = { tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 64 };
const called = await openai.chat.completions.create({ ...greedy, ...choice });
assert.equal(called.choices[0].finish_reason, "tool_calls");
results.openaiArguments = called.choices[0].message.tool_calls[0].function.arguments;
const runner = openai.chat.completions.stream({ ...greedy, ...choice });
const final = await runner.finalChatCompletion();
results.openaiArgumentsStream = final.choices[0].message.tool_calls[0].function.arguments;

const json = { type: "json_schema", json_schema: { name: "weather", strict: true, schema: weather } };
const parsed = await openai.chat.completions.parse({ ...greedy, response_format: json, max_tokens: 64 });
results.openaiParsed = parsed.choices[0].message.parsed ?? JSON.parse(parsed.choices[0].message.content);

const [model] = (await openai.models.list()).data;
results.openaiModel = (await openai.models.retrieve(model.id)).id === model.id;
await assert.rejects(openai.chat.completions.create({ ...greedy, top_p: 7 }), OpenAI.BadRequestError);

const huggingface = new InferenceClient().endpoint(url);
// It asks /v1/completions, and a stream yields that route's chunks, whatever its types say.
const text = { inputs: prompt, parameters: { max_new_tokens: 8, temperature: 0 } };
results.huggingfaceText = (await huggingface.textGeneration(text)).generated_text;
const tokens = huggingface.textGenerationStream(text);
results.huggingfaceTextStream = await collected(tokens, (chunk) => chunk.choices[0].text);
results.huggingfaceChat = (await huggingface.chatCompletion(greedy)).choices[0].message.content;
const deltas = huggingface.chatCompletionStream(greedy);
results.huggingfaceChatStream = await collected(deltas, (chunk) => chunk.choices[0]?.delta.content);
const huggingfaceCalled = await huggingface.chatCompletion({ ...greedy, ...choice });
results.huggingfaceArguments = huggingfaceCalled.choices[0].message.tool_calls[0].function.arguments;

console.log(JSON.stringify(results));
