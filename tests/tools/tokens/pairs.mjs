// Makes tests/fixtures/tokens/replay.jsonl: conversations, and the true number of input tokens after each turn.
//
//   npm install && node pairs.mjs > ../../fixtures/tokens/replay.jsonl
//
// The texts are this repository's files (as they are when it runs), our own sentences, and generated code and data
// (material.mjs). Each text is counted apart with `@anthropic-ai/tokenizer`. What the service puts around the texts is
// not in that tokenizer; it is assumed to be: 2 tokens for a request, 4 for a message, one for each mark that begins
// or ends a tool call (4), a parameter (2) or a result (2), and with tools the prompt of 346 that the documentation
// of tool use names; a tool is its JSON. Images cost their documented area / 750.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import * as m from "./material.mjs";
const { getTokenizer } = createRequire(import.meta.url)("@anthropic-ai/tokenizer");

const root = fileURLToPath(new URL("../../../", import.meta.url));
const tokenizer = getTokenizer();
const cache = new Map();
const count = (text) => {
  if (!cache.has(text)) cache.set(text, tokenizer.encode(text.normalize("NFKC"), "all").length);
  return cache.get(text);
};

function ofContent(content) {
  if (typeof content === "string") return count(content);
  return content.reduce((sum, block) => {
    switch (block.type) {
      case "text": return sum + count(block.text);
      case "tool_use":
        return Object.entries(block.input).reduce((sum, [name, value]) =>
          sum + 2 + count(name) + count(typeof value === "string" ? value : JSON.stringify(value)), sum + 4 + count(block.name));
      case "tool_result": return sum + 2 + ofContent(block.content);
      case "image": {
        const file = Buffer.from(block.source.data, "base64");
        return sum + Math.ceil((file.readUInt32BE(16) * file.readUInt32BE(20)) / 750);
      }
      default: throw new Error(block.type);
    }
  }, 0);
}
const ofTool = ({ name, description, input_schema }) => count(JSON.stringify({ description, name, parameters: input_schema }));
const ofRequest = ({ system, tools, messages }) =>
  2 + (system ? count(m.SYSTEM) : 0) + (tools.length ? 346 : 0) + tools.reduce((sum, at) => sum + ofTool(m.TOOLS[at]), 0) +
  messages.reduce((sum, message) => sum + 4 + ofContent(message.content), 0);

// Excerpts of this repository.
const excerpt = (rng, file, lines) => {
  const all = readFileSync(root + file, "utf8").split("\n");
  const from = rng.below(Math.max(1, all.length - lines));
  return all.slice(from, from + lines).join("\n");
};
const RUST = ["src/balancer/breaker.rs", "src/anthropic/json.rs", "src/front/watcher.rs", "src/messages/attempt.rs", "src/config/endpoint.rs",
  "src/http/head.rs", "src/relay/stream.rs", "src/upstream/transport.rs", "tests/it/cooling.rs", "src/demo/tour.rs"];
const ENGLISH_FILES = ["README.md", "docs/ROUTING.md", "docs/RELIABILITY.md", "docs/FUZZING.md", "ARCHITECTURE.md", "BENCHMARKS.md", "CHANGELOG.md"];
const OTHER_FILES = ["config.yaml.example", "Cargo.lock", ".ci/documents.py", "contrib/kubernetes.yaml", ".ci/run", "Dockerfile"];

const numbered = (text) => text.split("\n").map((line, at) => `${String(at + 1).padStart(6)}\t${line}`).join("\n");
const ALL = m.TOOLS.map((_, at) => at);

/** A conversation as the client makes it: the user asks, the model calls tools, results come back. */
function agent(rng, words, joint, results) {
  const messages = [{ role: "user", content: [{ type: "text", text: m.prose(rng, words, rng.between(1, 4), joint) }] }];
  results.forEach(({ name, input, output }, at) => {
    const id = `toolu_${String(rng.below(10 ** 9)).padStart(12, "0")}`;
    const said = rng.below(3) ? [{ type: "text", text: m.prose(rng, words, rng.between(1, 3), joint) }] : [];
    messages.push({ role: "assistant", content: [...said, { type: "tool_use", id, name, input }] });
    messages.push({ role: "user", content: [{ type: "tool_result", tool_use_id: id, content: output },
      ...(at % 3 === 2 ? [{ type: "text", text: m.prose(rng, words, 2, joint) }] : [])] });
  });
  return { system: true, tools: ALL, messages };
}
const read = (name, text) => ({ name: "Read", input: { file_path: `/srv/project/${name}` }, output: numbered(text) });
const write = (name, content) => ({ name: "Write", input: { file_path: `/srv/project/${name}`, content }, output: `The file /srv/project/${name} has been written.` });
const bash = (command, description, output) => ({ name: "Bash", input: { command, description, timeout: 120000 }, output });
const edit = (name, text, rng) => {
  const lines = text.split("\n"), from = rng.below(Math.max(1, lines.length - 8)), old = lines.slice(from, from + rng.between(2, 8)).join("\n");
  return { name: "Edit", input: { file_path: `/srv/project/${name}`, old_string: old, new_string: old.replace(/(\w+)/, "$1_next") + "\n" }, output: `The file /srv/project/${name} has been updated.` };
};
const source = (rng, make, name, size) => {
  const text = make(rng, size);
  return [read(name, text), edit(name, text, rng), bash(`git diff -- ${name}`, "Show the change", m.diff(rng, name, text.slice(0, 900)))];
};
/** A conversation without tool calls, but with the client's system prompt and tools. */
const talk = (rng, words, joint) => ({
  system: true, tools: ALL,
  messages: Array.from({ length: 7 }, (_, at) => ({ role: at % 2 ? "assistant" : "user", content: m.prose(rng, words, rng.between(at % 2 ? 8 : 3, at % 2 ? 20 : 8), joint) })),
});
/** Words and nothing else, as no client sends them: the hardest case for prices that are to fit all texts. */
const bare = (rng, words, joint) => ({ system: false, tools: [], messages: talk(rng, words, joint).messages.slice(0, 3) });
const handed = (rng, make) => ({
  system: true, tools: ALL,
  messages: [
    { role: "user", content: [{ type: "text", text: m.prose(rng, m.ENGLISH, 2) + "\n\n" + make() }] },
    { role: "assistant", content: m.prose(rng, m.ENGLISH, 4) },
    { role: "user", content: make() },
  ],
});

const KINDS = {
  "agent: Rust": (rng) => {
    const file = rng.pick(RUST), text = excerpt(rng, file, 90);
    return agent(rng, m.ENGLISH, " ", [read(file, text), edit(file, text, rng), bash("cargo test --lib", "Run the unit tests", m.testOutput(rng, 25)),
      read(rng.pick(RUST), excerpt(rng, rng.pick(RUST), 60))]);
  },
  "agent: Python": (rng) => agent(rng, m.ENGLISH, " ", [...source(rng, m.python, "app/store.py", 8), write("app/next.py", m.python(rng, 6))]),
  "agent: TypeScript": (rng) => agent(rng, m.ENGLISH, " ", [...source(rng, m.typescript, "web/src/view.tsx", 9), write("web/src/next.ts", m.typescript(rng, 5))]),
  "agent: Go and SQL": (rng) => agent(rng, m.ENGLISH, " ", [...source(rng, m.go, "store/store.go", 9), write("db/next.sql", m.sql(rng, 6))]),
  "agent: documents": (rng) => agent(rng, m.ENGLISH, " ", [read("README.md", excerpt(rng, rng.pick(ENGLISH_FILES), 40)),
    read("config.yaml", excerpt(rng, rng.pick(OTHER_FILES), 60)), write("NOTES.md", m.prose(rng, m.ENGLISH, 25))]),
  "agent: logs and lists": (rng) => agent(rng, m.ENGLISH, " ", [bash("ls -la src", "List the sources", m.listing(rng, 25)),
    bash("tail -n 40 service.log", "Show the log", m.logs(rng, 40)), bash("cat report.csv", "Show the table", m.csv(rng, 40)),
    bash("curl -s localhost:8080/api/orders", "Ask for the orders", m.json(rng, 6))]),
  "agent: in Chinese": (rng) => agent(rng, m.CHINESE, "", [...source(rng, m.python, "app/tasks.py", 5), read("README.zh-CN.md", excerpt(rng, "README.zh-CN.md", 30))]),
  "agent: in German": (rng) => agent(rng, m.GERMAN, " ", [...source(rng, m.typescript, "src/fenster.ts", 6), write("NOTIZEN.md", m.prose(rng, m.GERMAN, 12))]),
  "agent: with pictures": (rng) => {
    const made = agent(rng, m.ENGLISH, " ", source(rng, m.python, "app/plot.py", 5));
    made.messages.at(-1).content.push({ type: "image", source: { type: "base64", media_type: "image/png", data: m.png(rng.between(300, 1100), rng.between(200, 1000)) } });
    return made;
  },
  "talk: English": (rng) => talk(rng, m.ENGLISH, " "),
  "talk: German": (rng) => talk(rng, m.GERMAN, " "),
  "talk: French": (rng) => talk(rng, m.FRENCH, " "),
  "talk: Chinese": (rng) => talk(rng, m.CHINESE, ""),
  "talk: Japanese": (rng) => talk(rng, m.JAPANESE, ""),
  "pasted: Markdown": (rng) => handed(rng, () => excerpt(rng, rng.pick(ENGLISH_FILES), 30)),
  "pasted: JSON": (rng) => handed(rng, () => m.json(rng, 7, rng.pick([0, 2]))),
  "pasted: logs": (rng) => handed(rng, () => m.logs(rng, 25)),
  "pasted: CSV": (rng) => handed(rng, () => m.csv(rng, 35)),
  "pasted: diffs": (rng) => handed(rng, () => m.diff(rng, rng.pick(RUST), excerpt(rng, rng.pick(RUST), 45))),
  "pasted: base64 and hex": (rng) => handed(rng, () => (rng.below(2) ? m.base64(rng, 1200) : m.dump(rng, 30))),
  "bare: English": (rng) => bare(rng, m.ENGLISH, " "),
  "bare: German": (rng) => bare(rng, m.GERMAN, " "),
  "bare: French": (rng) => bare(rng, m.FRENCH, " "),
  "bare: Chinese": (rng) => bare(rng, m.CHINESE, ""),
  "bare: Japanese": (rng) => bare(rng, m.JAPANESE, ""),
  "bare: JSON": (rng) => ({ system: false, tools: [], messages: [{ role: "user", content: m.json(rng, 9, rng.pick([0, 2])) }] }),
  "bare: logs": (rng) => ({ system: false, tools: [], messages: [{ role: "user", content: m.logs(rng, 30) }] }),
  "bare: base64": (rng) => ({ system: false, tools: [], messages: [{ role: "user", content: m.base64(rng, 1500) }] }),
  "bare: short questions": (rng) => ({ system: false, tools: [], messages: [
    { role: "user", content: m.prose(rng, m.ENGLISH, 1) }, { role: "assistant", content: m.prose(rng, m.ENGLISH, 2) }, { role: "user", content: m.prose(rng, m.ENGLISH, 1) }] }),
  "bare: tools": (rng) => ({ system: false, tools: ALL.filter((at) => at === 0 || rng.below(2)), messages: [{ role: "user", content: "foo" }] }),
};

console.log(JSON.stringify({ system: m.SYSTEM, tools: m.TOOLS }));
let seed = 1;
for (const [kind, make] of Object.entries(KINDS)) {
  const conversations = kind.startsWith("agent") ? 5 : kind.startsWith("bare") ? 2 : 4;
  for (let at = 0; at < conversations; at++) {
    const made = make(m.random(seed++));
    const counts = [];
    made.messages.forEach((message, index) => {
      if (message.role !== "user") return;
      const length = index + 1;
      counts.push([length, ofRequest({ ...made, messages: made.messages.slice(0, length) })]);
    });
    console.log(JSON.stringify({ kind, ...made, counts }));
  }
}
