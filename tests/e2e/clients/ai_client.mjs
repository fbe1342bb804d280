// What Vercel's `ai` makes of our answers:   node ai_client.mjs URL PACKAGES
// The last line of output is JSON, for test_tool_loop.py to look at.

import { createRequire } from "node:module";
import path from "node:path";

const [url, packages] = process.argv.slice(2);
const require = createRequire(path.join(packages, "package.json"));
const { generateObject, generateText, stepCountIs, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");

const provider = createOpenAICompatible({
  name: "pytgi",
  baseURL: `${url}/v1`,
  apiKey: "-",
  supportsStructuredOutputs: true,
});
const greedy = { model: provider("tgi"), temperature: 0, maxOutputTokens: 64, maxRetries: 0 };
const calls = [];
const get_weather = tool({
  description: "Look up the weather of a city.",
  inputSchema: z.object({ city: z.string(), unit: z.enum(["celsius", "fahrenheit"]) }),
  execute: async (input) => {
    calls.push(input);
    return "18 degrees";
  },
});

const loop = await generateText({
  ...greedy,
  prompt: "What is the weather in Paris in celsius? Look it up.",
  tools: { get_weather },
  toolChoice: { type: "tool", toolName: "get_weather" },
  prepareStep: ({ stepNumber }) => (stepNumber > 0 ? { toolChoice: "none" } : undefined),
  stopWhen: stepCountIs(3),
});
const person = await generateObject({
  ...greedy,
  schema: z.object({ name: z.string().max(20), age: z.number().int().min(0).max(120) }),
  prompt: "Anna is 31 years old. Answer with a JSON object that has the keys name and age.",
});
const prompt = "Say hello.";
let streamed = "";
for await (const text of streamText({ ...greedy, prompt, maxOutputTokens: 8 }).textStream) streamed += text;
const whole = await generateText({ ...greedy, prompt, maxOutputTokens: 8 });

console.log(
  JSON.stringify({
    calls,
    answer: loop.text,
    steps: loop.steps.length,
    person: person.object,
    streamed,
    whole: whole.text,
  }),
);
