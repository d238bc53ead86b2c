// The trials of the package openai, for Node.js and for a browser.
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

export const hi = "Say hello.";
export const askPet = 'Invent a pet. Answer in JSON, like {"kind": "cat", "legs": 4}.';
export const askWeather = "How is the weather in Rome?";
export const Pet = z.object({ kind: z.enum(["cat", "dog", "spider"]), legs: z.number().int() });
export const Weather = z.object({ city: z.enum(["Rome", "Oslo"]) });

const user = (content) => [{ role: "user", content }];
const openaiTool = {
  type: "function",
  function: { name: "get_weather", description: "The weather", parameters: z.toJSONSchema(Weather) },
};

export function check(condition, what) {
  if (!condition) throw new Error(`no ${what}`);
}

export function reason(error) {
  const found = error.lastError ?? error;
  const more = found.responseBody ?? found.cause?.message ?? "";
  return `${found.name}: ${found.message} ${more}`.trim().replace(/\s+/g, " ").slice(0, 300);
}

// `trial` is called with the name and the function of each.
export function openaiTrials(openai, trial) {
  trial("chat", async () => {
    const answer = await openai.chat.completions.create({ model: "amulet", messages: user(hi), max_tokens: 20 });
    check(answer.choices[0].message.content, "text");
  });

  trial("stream", async () => {
    const stream = openai.chat.completions.stream({ model: "amulet", messages: user(hi), max_tokens: 20 });
    check((await stream.finalChatCompletion()).choices[0].message.content, "text");
  });

  trial("parse", async () => {
    const answer = await openai.chat.completions.parse({
      model: "amulet",
      messages: user(askPet),
      response_format: zodResponseFormat(Pet, "pet"),
    });
    Pet.parse(answer.choices[0].message.parsed);
  });

  trial("tools", async () => {
    const answer = await openai.chat.completions.create({
      model: "amulet",
      messages: user(askWeather),
      tools: [openaiTool],
      tool_choice: "required",
    });
    Weather.parse(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments));
  });

  trial("runTools", async () => {
    const called = [];
    const run = (given) => called.push(given) && "sunny";
    const runner = openai.chat.completions.runTools({
      model: "amulet",
      messages: user(askWeather),
      tools: [{ type: "function", function: { ...openaiTool.function, parse: JSON.parse, function: run } }],
      tool_choice: { type: "function", function: { name: "get_weather" } },
      stream: true,
    });
    await runner.done();
    Weather.parse(called[0]);
  });

  trial("responses", async () => {
    const answer = await openai.responses.create({ model: "amulet", input: hi, max_output_tokens: 20 });
    check(answer.output_text, "text");
  });
}
