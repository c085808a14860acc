// OpenAI's client for JavaScript, for tests/test_clients.py: node client.js URL < ACTS. What comes of each act is printed as
// lines of JSON, {name: value}, as soon as it is known.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const say = (name, value) => console.log(JSON.stringify({ [name]: value }));

// Tells of each attempt, of which the client makes several.
async function told(url, init) {
  const response = await fetch(url, init);
  say("attempt", { status: response.status, at: performance.now() });
  return response;
}

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0, fetch: told });

const acts = {
  async create({ body, options }) {
    const answer = await client.completions.create(body, options);
    if (!body.stream) return say("answer", answer);
    const chunks = [];
    for await (const chunk of answer) chunks.push(chunk);
    say("answer", chunks);
  },
  async chat({ body }) {
    say("answer", await client.chat.completions.create(body));
  },
  async models() {
    say("answer", (await client.models.list()).data);
  },
  async abort({ body }) {
    const stream = await client.completions.create(body);
    for await (const chunk of stream) {
      say("chunk", chunk);
      stream.controller.abort();
    }
  },
};

for (const act of JSON.parse(readFileSync(0))) {
  try {
    await acts[act.act](act);
  } catch (error) {
    const { status, code, param, type, message } = error;
    say("error", { kind: error.constructor.name, status, code, param, type, message });
  }
}
say("end", null);
