// Clients from npm:   node node_clients.mjs URL PACKAGES
// The last line of output is JSON, as that of task.py.

import { createRequire } from "node:module";
import path from "node:path";

const [url, packages] = process.argv.slice(2);
const require = createRequire(path.join(packages, "package.json"));
const { OpenAI } = require("openai");
const { zodResponseFormat, zodTextFormat } = require("openai/helpers/zod");
const Anthropic = require("@anthropic-ai/sdk");
const { ChatOpenAI } = require("@langchain/openai");
const { tool } = require("@langchain/core/tools");
const { InferenceClient } = require("@huggingface/inference");
const { z } = require("zod");

const HELLO = "Say hello.";
const QUESTION = "What is the weather in Paris in celsius? Look it up.";
const PERSON = "Anna is 31 years old. Answer with a JSON object that has the keys name and age.";
const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(120) });
const personSchema = {
  type: "object",
  properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 120 } },
  required: ["name", "age"],
};
const description = "Look up the weather of a city.";
const parameters = {
  type: "object",
  properties: { city: { type: "string" }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
  required: ["city", "unit"],
};
const getWeather = async () => "18 degrees";
const said = (content) => [{ role: "user", content }];
const results = { chats: [], calls: [], people: [], answers: [] };

async function joined(stream, textOf) {
  let text = "";
  for await (const item of stream) text += textOf(item) ?? "";
  return text;
}

async function openai() {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "-", maxRetries: 0 });
  const greedy = { model: "tgi", temperature: 0, max_tokens: 64 };
  const runner = client.chat.completions.runTools({
    ...greedy,
    messages: said(QUESTION),
    tool_choice: { type: "function", function: { name: "get_weather" } }, // ends the loop after the call
    tools: [
      {
        type: "function",
        function: { name: "get_weather", description, parameters, parse: JSON.parse, function: getWeather },
      },
    ],
  });
  const called = [];
  runner.on("functionToolCall", (call) => called.push([call.name, JSON.parse(call.arguments)]));
  await runner.done();
  results.calls.push(...called);
  const format = zodResponseFormat(Person, "person");
  const parsed = await client.chat.completions.parse({ ...greedy, messages: said(PERSON), response_format: format });
  results.people.push(parsed.choices[0].message.parsed);
  const responses = { model: "tgi", temperature: 0, max_output_tokens: 64 };
  results.chats.push((await client.responses.create({ ...responses, input: HELLO })).output_text);
  const stream = client.responses.stream({ ...responses, input: HELLO });
  stream.on("error", () => {});
  results.chats.push((await stream.finalResponse()).output_text);
  const text = { format: zodTextFormat(Person, "person") };
  results.people.push((await client.responses.parse({ ...responses, input: PERSON, text })).output_parsed);
  const asked = {
    ...responses,
    input: QUESTION,
    tools: [{ type: "function", name: "get_weather", description, parameters, strict: false }],
    tool_choice: "required",
  };
  const [item] = (await client.responses.create(asked)).output;
  results.calls.push([item.name, JSON.parse(item.arguments)]);
}

async function anthropic() {
  const client = new Anthropic({ baseURL: url, apiKey: "-", maxRetries: 0 });
  const greedy = { model: "tgi", max_tokens: 64, temperature: 0 };
  const whole = await client.messages.create({ ...greedy, messages: said(HELLO) });
  results.chats.push(whole.content.map((block) => block.text).join(""));
  results.chats.push(await client.messages.stream({ ...greedy, messages: said(HELLO) }).finalText());
  const tools = [{ name: "get_weather", description, input_schema: parameters }];
  const choice = { tools, tool_choice: { type: "any", disable_parallel_tool_use: true } };
  const message = await client.messages.stream({ ...greedy, ...choice, messages: said(QUESTION) }).finalMessage();
  for (const block of message.content) if (block.type === "tool_use") results.calls.push([block.name, block.input]);
}

async function langchain() {
  for (const useResponsesApi of [false, true]) {
    const configuration = { baseURL: `${url}/v1` };
    const model = new ChatOpenAI({
      model: "tgi",
      apiKey: "-",
      temperature: 0,
      maxTokens: 64,
      maxRetries: 0,
      useResponsesApi,
      configuration,
    });
    results.chats.push((await model.invoke(HELLO)).text);
    results.chats.push(await joined(await model.stream(HELLO), (chunk) => chunk.text));
    const schema = z.object({ city: z.string(), unit: z.enum(["celsius", "fahrenheit"]) });
    const weather = tool(getWeather, { name: "get_weather", description, schema });
    const called = await model.bindTools([weather], { tool_choice: "get_weather" }).invoke(QUESTION);
    results.calls.push(...called.tool_calls.map((call) => [call.name, call.args]));
    for (const method of useResponsesApi ? ["jsonSchema"] : ["jsonSchema", "functionCalling", "jsonMode"])
      results.people.push(await model.withStructuredOutput(Person, { method, name: "person" }).invoke(PERSON));
  }
}

async function huggingface() {
  const client = new InferenceClient("", { endpointUrl: url });
  const greedy = { model: "tgi", temperature: 0, max_tokens: 64 };
  results.chats.push((await client.chatCompletion({ ...greedy, messages: said(HELLO) })).choices[0].message.content);
  const stream = client.chatCompletionStream({ ...greedy, messages: said(HELLO) });
  results.chats.push(await joined(stream, (chunk) => chunk.choices[0]?.delta.content));
  const tools = [{ type: "function", function: { name: "get_weather", description, parameters } }];
  const asked = { ...greedy, tools, tool_choice: "required", messages: said(QUESTION) };
  const called = await client.chatCompletion(asked);
  for (const call of called.choices[0].message.tool_calls)
    results.calls.push([call.function.name, JSON.parse(call.function.arguments)]);
  const response_format = { type: "json_schema", json_schema: { name: "person", schema: personSchema, strict: true } };
  const formatted = await client.chatCompletion({ ...greedy, response_format, messages: said(PERSON) });
  results.people.push(JSON.parse(formatted.choices[0].message.content));
}

await openai();
await anthropic();
await langchain();
await huggingface();
console.log(JSON.stringify(results));
