// Usage: node client.js BASE_URL; writes what the OpenAI client makes of the server's answers as JSON.
import OpenAI, { APIError } from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const request = {
  model: "amulet",
  messages: [{ role: "user", content: "How are you?" }],
  max_tokens: 12,
  seed: 3,
  temperature: 0.8,
  prefer: "concise",
  strength: 3,
};

const whole = await client.chat.completions.create(request);
const stream = await client.chat.completions.create({
  ...request,
  stream: true,
  stream_options: { include_usage: true },
});
let text = "";
let usage = null;
let reason = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  reason = chunk.choices[0]?.finish_reason ?? reason;
  usage = chunk.usage ?? usage;
}
const legacy = await client.completions.create({ model: "amulet", prompt: "Once", max_tokens: 5 });
const names = [];
for await (const model of client.models.list()) names.push(model.id);
let failure = null;
try {
  await client.chat.completions.create({ ...request, strength: 1e9 });
} catch (error) {
  if (!(error instanceof APIError)) throw error;
  failure = { status: error.status, message: error.message };
}
const abandoned = await client.chat.completions.create({ ...request, max_tokens: 400, stream: true });
for await (const _ of abandoned) break; // closes the connection

console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    wholeUsage: whole.usage,
    text,
    usage,
    reason,
    legacy: legacy.choices[0].text,
    names,
    failure,
  }),
);
