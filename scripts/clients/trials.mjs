// Usage: node trials.mjs URL [CLIENT...]; scripts/try_clients runs it. As trials.py, for Node.js.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { HumanMessage } from "@langchain/core/messages";
import { tool as langchainTool } from "@langchain/core/tools";
import { ChatOpenAI } from "@langchain/openai";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";
import { z } from "zod";
import { Pet, Weather, askPet, askWeather, check, hi, openaiTrials, reason } from "./openai.mjs";

const [url, ...only] = process.argv.slice(2);
const baseURL = `${url}/v1`;
const trials = [];
const trial = (client, name, run) => trials.push({ client, name, run });

const Rich = z.object({
  id: z.nanoid(),
  sign: z.string().startsWith("a").max(4),
  born: z.iso.date(),
  host: z.ipv4(),
  name: z.string().max(4).nullable(),
  ages: z.record(z.enum(["a", "b"]), z.literal(1)),
  pets: z.array(Pet).min(1).max(1),
});
async function joined(pieces) {
  let text = "";
  for await (const piece of pieces) text += piece;
  return text;
}

openaiTrials(new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 }), (name, run) => trial("openai", name, run));

// Vercel's AI SDK

const provider = createOpenAICompatible({
  name: "amulet",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("amulet");
const tools = {
  getWeather: tool({ description: "The weather", inputSchema: Weather, execute: async () => "sunny" }),
};

trial("ai", "generateText", async () => {
  const answer = await generateText({ model, prompt: hi, maxOutputTokens: 20 });
  check(answer.text && answer.usage.outputTokens, "text or usage");
});

trial("ai", "streamText", async () => {
  const answer = streamText({ model, prompt: hi, maxOutputTokens: 20 });
  check(await joined(answer.textStream), "text");
  check((await answer.usage).outputTokens, "usage");
});

trial("ai", "generateObject", async () => {
  Pet.parse((await generateObject({ model, schema: Pet, prompt: askPet })).object);
});

trial("ai", "generateObject of a rich schema", async () => {
  Rich.parse((await generateObject({ model, schema: Rich, prompt: askPet })).object);
});

trial("ai", "generateObject without schemas", async () => {
  const plain = createOpenAICompatible({ name: "amulet", baseURL })("amulet");
  const answer = await generateObject({ model: plain, output: "no-schema", prompt: askPet });
  check(answer.object, "object");
});

trial("ai", "streamObject", async () => {
  const answer = streamObject({ model, schema: Pet, prompt: askPet });
  for await (const _ of answer.partialObjectStream); // nothing comes unless it is taken
  Pet.parse(await answer.object);
});

trial("ai", "a tool", async () => {
  const answer = await generateText({ model, prompt: askWeather, tools, toolChoice: "required" });
  Weather.parse(answer.toolCalls[0].input);
  check(answer.toolResults[0].output === "sunny", "result");
});

trial("ai", "two steps of tools", async () => {
  const stopWhen = stepCountIs(2);
  const answer = await generateText({ model, prompt: askWeather, tools, toolChoice: "required", stopWhen });
  check(answer.steps.length === 2 && answer.toolCalls.length, "second step");
});

trial("ai", "a tool streamed", async () => {
  const toolChoice = { type: "tool", toolName: "getWeather" };
  const answer = streamText({ model, prompt: askWeather, tools, toolChoice });
  await answer.consumeStream();
  Weather.parse((await answer.toolCalls)[0].input);
});

// LangChain

const chat = (maxTokens) =>
  new ChatOpenAI({ model: "amulet", apiKey: "none", maxTokens, maxRetries: 0, configuration: { baseURL } });

trial("@langchain/openai", "invoke", async () => {
  check((await chat(20).invoke([new HumanMessage(hi)])).content, "text");
});

trial("@langchain/openai", "stream", async () => {
  let text = "";
  for await (const chunk of await chat(20).stream(hi)) text += chunk.content;
  check(text, "text");
});

for (const method of ["jsonSchema", "functionCalling"]) {
  trial("@langchain/openai", method, async () => {
    Pet.parse(await chat(80).withStructuredOutput(Pet, { name: "pet", method }).invoke(askPet));
  });
}

trial("@langchain/openai", "jsonMode", async () => {
  const options = { name: "pet", method: "jsonMode", includeRaw: true };
  JSON.parse((await chat(150).withStructuredOutput(Pet, options).invoke(askPet)).raw.content);
});

trial("@langchain/openai", "bindTools", async () => {
  const weather = langchainTool(async () => "sunny", { name: "get_weather", description: "…", schema: Weather });
  const answer = await chat(80).bindTools([weather], { tool_choice: "required" }).invoke(askWeather);
  Weather.parse(answer.tool_calls[0].args);
});

for (const { client, name, run } of trials) {
  if (only.length && !only.includes(client) && !only.includes("npm")) continue;
  let result = "passed";
  try {
    await run();
  } catch (error) {
    result = reason(error);
  }
  const about = new URL(`node_modules/${client}/package.json`, import.meta.url);
  const { version } = JSON.parse(readFileSync(about, "utf8"));
  const shown = client === "openai" ? "openai (Node.js)" : client;
  // The first field is what run.py knows the line by.
  console.log(JSON.stringify({ client: shown, version, trial: name, result }));
}
