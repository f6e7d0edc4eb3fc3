// Fits the prices of src/anthropic/tokens/prices.rs to the real tokenizer.
//
//   node fit.mjs SAMPLES.json > ../../../src/anthropic/tokens/prices.rs
//
// SAMPLES.json is a list of {"g": kind, "t": text}: any texts will do, the more kinds the better (10 MB in 110 kinds made
// the committed file). Every text is cut as `text.rs` cuts it; each piece is counted by the tokenizer; the prices are the
// ridge regression of the counts on the features of the pieces. A piece costs one token at least, so pieces that are one
// token and priced below it are left out of the next round. Three tenths of the samples are held out; how far the
// prices are off on these goes to stderr.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
const { getTokenizer } = createRequire(import.meta.url)("@anthropic-ai/tokenizer");

const SLOTS = 4096;
const RIDGE = 0.6;
// What kinds weigh beside code and English, and the vocabulary beside all samples.
const LANGUAGE = 1.3, CHINESE = 4, BASE64 = 4, VOCABULARY = 0.15;
// Single bytes and the special tokens are no words.
const RANK_FIRST = 300, RANK_END = 64000;
const LENGTHS = 17, DIGITS = 9, SPACES = 18, TABS = 6, LINES = 5, SCRIPTS = 21;

// The tables, one behind the other.
const layout = {};
let features = 0;
for (const [name, size] of [
  ["WORD", 2], ["LENGTH", LENGTHS], ["LETTER_BEYOND", 1], ["CASE", 8], ["SCRIPT", SCRIPTS], ["MARKS", 2],
  ["NUMBER", 2 * DIGITS], ["DIGIT_BEYOND", 1], ["SPACE", SPACES], ["TAB", TABS], ["LINE", LINES], ["INDENT", SPACES],
  ["NGRAM", SLOTS],
]) {
  layout[name] = { at: features, size };
  features += size;
}

const SPACED = 27, GLUED = 28, END = 30, MARKS_START = 31, MARK = 0x80;
const slot = (a, b, c) => {
  let hash = (Math.imul(a, 0x9e3779b1) + Math.imul(b, 0x85ebca6b) + Math.imul(c, 0xc2b2ae35)) >>> 0;
  hash = Math.imul(hash ^ (hash >>> 15), 0x2c1b3c6d) >>> 0;
  return hash >>> 20;
};

const LIMITS = [0x250, 0x370, 0x400, 0x530, 0x600, 0x800, 0xe00, 0xf00, 0x1e00, 0x2000, 0x2c00, 0x3000, 0x3040, 0x3100,
  0x3400, 0xa000, 0xac00, 0xd800, 0xfe00, 0x10000];
const script = (code) => {
  const at = LIMITS.findIndex((limit) => code < limit);
  return at < 0 ? LIMITS.length : at;
};
const isWideMark = (code) => [10, 12, 19, 20].includes(script(code)) || (code >= 0xa0 && code < 0xc0);

const isBlank = (code) => code === 32 || (code >= 9 && code <= 13);
const isDigit = (code) => code >= 48 && code <= 57;
const isLetter = (code) => (code >= 65 && code <= 90) || (code >= 97 && code <= 122) || (code >= 128 && !isWideMark(code));
const kindOf = (code) => (isBlank(code) ? "blank" : isDigit(code) ? "number" : isLetter(code) ? "word" : "marks");
const CONTRACTION = /^'(?:s|t|re|ve|m|ll|d)/;

/** The pieces of a text, as strings: a single space belongs to what follows it. */
function pieces(text) {
  const chars = [...text], found = [];
  let at = 0;
  const run = (from, kind) => {
    let to = from;
    while (to < chars.length && kindOf(chars[to].codePointAt(0)) === kind) to++;
    return to;
  };
  while (at < chars.length) {
    const kind = kindOf(chars[at].codePointAt(0));
    if (kind === "blank") {
      const end = run(at, "blank");
      if (end === chars.length) {
        found.push(chars.slice(at).join(""));
        break;
      }
      if (end - at > 1) found.push(chars.slice(at, end - 1).join(""));
      if (chars[end - 1] === " ") {
        const next = run(end, kindOf(chars[end].codePointAt(0)));
        found.push(chars.slice(end - 1, next).join(""));
        at = next;
      } else {
        found.push(chars[end - 1]);
        at = end;
      }
      continue;
    }
    const short = chars[at] === "'" && CONTRACTION.exec(chars.slice(at, at + 3).join(""));
    const end = short ? at + short[0].length : run(at, kind);
    found.push(chars.slice(at, end).join(""));
    at = end;
  }
  return found;
}

/** The features of a piece: pairs of index and amount; null for what always is one token. */
function featuresOf(piece) {
  const list = [];
  const add = (name, index, amount = 1) => list.push([layout[name].at + index, amount]);
  let codes = [...piece].map((char) => char.codePointAt(0));
  const spaced = codes[0] === 32 && codes.length > 1 && !isBlank(codes[1]) ? 1 : 0;
  if (!spaced && CONTRACTION.test(piece) && isLetter(codes[1])) return null;
  if (spaced) codes = codes.slice(1);
  switch (kindOf(codes[0])) {
    case "blank": {
      const lines = codes.filter((code) => code === 10).length;
      const tabs = codes.filter((code) => code !== 10 && code !== 32).length;
      const spaces = codes.length - lines - tabs;
      if (lines > 0) {
        add("LINE", Math.min(lines, LINES - 1));
        add("INDENT", Math.min(spaces + tabs, SPACES - 1));
      } else if (tabs > 0) {
        add("TAB", Math.min(tabs, TABS - 1));
      } else {
        add("SPACE", Math.min(spaces, SPACES - 1));
      }
      break;
    }
    case "number":
      add("NUMBER", spaced * DIGITS + Math.min(codes.length, DIGITS - 1));
      if (codes.length >= DIGITS) add("DIGIT_BEYOND", 0, codes.length - DIGITS + 1);
      break;
    case "word": {
      add("WORD", spaced);
      add("LENGTH", Math.min(codes.length, LENGTHS - 1));
      if (codes.length >= LENGTHS) add("LETTER_BEYOND", 0, codes.length - LENGTHS + 1);
      let [before, last, shape] = [0, spaced ? SPACED : GLUED, 0];
      for (const code of codes) {
        if (code < 128) {
          const upper = code < 97 ? 1 : 0, letter = code & 31;
          add("CASE", shape * 2 + upper);
          shape = 1 + upper;
          add("NGRAM", slot(0, last, letter));
          add("NGRAM", slot(before, last, letter));
          [before, last] = [last, letter];
        } else {
          shape = 3;
          add("SCRIPT", script(code));
          add("NGRAM", slot(0, 0, code));
          add("NGRAM", slot(0, last, code));
          [before, last] = [last, code];
        }
      }
      add("NGRAM", slot(0, last, END));
      add("NGRAM", slot(before, last, END));
      break;
    }
    default: {
      add("MARKS", spaced);
      let [before, last] = [0, MARKS_START];
      for (const code of codes) {
        if (code < 128) {
          add("NGRAM", slot(0, last, code | MARK));
          add("NGRAM", slot(before, last, code | MARK));
          [before, last] = [last, code | MARK];
        } else {
          add("SCRIPT", script(code));
          add("NGRAM", slot(0, 0, code));
          [before, last] = [last, code];
        }
      }
    }
  }
  return list;
}

/** Everyday Chinese and plain base64 are what the samples have too little of. */
const weightOf = (kind) => (/zh_cn/i.test(kind) ? CHINESE : kind === "base64" ? BASE64 : /^(mo|man)_/.test(kind) ? LANGUAGE : 1);

const tokenizer = getTokenizer();
const samples = JSON.parse(readFileSync(process.argv[2], "utf8"));
const sizes = new Map();
samples.forEach((sample) => sizes.set(sample.g, (sizes.get(sample.g) ?? 0) + 1));
const known = new Map();
samples.forEach((sample, at) => {
  sample.held = (Math.imul(at, 0x9e3779b1) >>> 16) % 10 < 3;
  sample.pieces = pieces(sample.t).map((piece) => {
    let row = known.get(piece);
    if (!row) {
      row = { y: tokenizer.encode(piece.normalize("NFKC"), "all").length, x: featuresOf(piece), w: 0 };
      known.set(piece, row);
    }
    return row;
  });
  sample.n = tokenizer.encode(sample.t.normalize("NFKC"), "all").length;
  if (!sample.held) {
    const weight = 1 / Math.sqrt(sizes.get(sample.g)) / sample.n * weightOf(sample.g);
    sample.pieces.forEach((row) => (row.w += weight));
  }
});
// The vocabulary knows everyday words that technical samples hardly have: each of its pieces is one token, and the later
// it stands there, the rarer it is.
const total = [...known.values()].reduce((sum, row) => sum + row.w, 0);
const vocabulary = [];
for (let rank = RANK_FIRST; rank < RANK_END; rank++) {
  const piece = new TextDecoder().decode(tokenizer.decode_single_token_bytes(rank));
  if (!piece.includes("\ufffd") && pieces(piece).length === 1) vocabulary.push([piece, 1 / rank]);
}
const share = vocabulary.reduce((sum, [, weight]) => sum + weight, 0);
for (const [piece, weight] of vocabulary) {
  const row = known.get(piece) ?? { y: 1, x: featuresOf(piece), w: 0 };
  row.w += (weight / share) * total * VOCABULARY;
  known.set(piece, row);
}
const rows = [...known.values()].filter((row) => row.w > 0 && row.x);
const mean = rows.reduce((sum, row) => sum + row.w, 0) / rows.length;
rows.forEach((row) => (row.w /= mean));

const dot = (x, v) => x.reduce((sum, [at, amount]) => sum + v[at] * amount, 0);
/** Conjugate gradients on (X'WX + ridge) v = X'Wy over the rows that count. */
function solve(active, v) {
  const times = (p) => {
    const out = p.map((value) => value * RIDGE);
    for (const row of active) {
      const d = dot(row.x, p) * row.w;
      for (const [at, amount] of row.x) out[at] += d * amount;
    }
    return out;
  };
  const b = new Float64Array(features);
  for (const row of active) for (const [at, amount] of row.x) b[at] += row.w * row.y * amount;
  const first = times(v);
  let r = b.map((value, at) => value - first[at]), p = r.slice(), rr = r.reduce((s, x) => s + x * x, 0);
  for (let round = 0; round < 80 && rr > 1e-3; round++) {
    const ap = times(p);
    const step = rr / p.reduce((s, x, at) => s + x * ap[at], 0);
    v = v.map((x, at) => x + step * p[at]);
    r = r.map((x, at) => x - step * ap[at]);
    const next = r.reduce((s, x) => s + x * x, 0);
    p = r.map((x, at) => x + (next / rr) * p[at]);
    rr = next;
  }
  return v;
}

let prices = new Float64Array(features);
let active = rows;
for (let round = 0; round < 6; round++) {
  prices = solve(active, prices);
  active = rows.filter((row) => row.y > 1 || dot(row.x, prices) > 1);
}
const clamp = (value, most) => Math.max(-most, Math.min(most, Math.round(value * 100)));
const rounded = prices.map((value, at) => clamp(value, at >= layout.NGRAM.at ? 127 : 30000) / 100);

const report = new Map();
for (const sample of samples.filter((sample) => sample.held)) {
  const ours = sample.pieces.reduce((sum, row) => sum + (row.x ? Math.max(1, dot(row.x, rounded)) : row.y), 0);
  const off = Math.log(ours / sample.n);
  for (const kind of [sample.g, /^(mo|man)_/.test(sample.g) && sample.g !== "man_en" ? "ALL LANGUAGES" : "ALL OTHERS", "ALL"])
    report.set(kind, [...(report.get(kind) ?? []), off]);
}
for (const [kind, list] of [...report].sort()) {
  const middle = list.reduce((a, b) => a + b, 0) / list.length;
  const spread = Math.sqrt(list.reduce((a, b) => a + (b - middle) ** 2, 0) / list.length);
  const sorted = list.slice().sort((a, b) => a - b);
  const f = (x) => (x >= 0 ? "+" : "") + x.toFixed(3);
  console.error(kind.padEnd(14), String(list.length).padStart(4), f(middle), "sd", spread.toFixed(3), f(sorted[0]), f(sorted.at(-1)));
}

// The Rust file.
const values = (name) => [...rounded.slice(layout[name].at, layout[name].at + layout[name].size)].map((x) => Math.round(x * 100));
const docs = {
  WORD: "A word, by whether a space leads it.", LENGTH: "By its letters.", LETTER_BEYOND: "Each letter more.",
  CASE: "A letter, by the shape of the one before (none, small, capital, beyond ASCII) and whether it is a capital.",
  SCRIPT: "A character beyond ASCII, by its script.", MARKS: "A run of marks, by whether a space leads it.",
  NUMBER: "A run of digits, by whether a space leads it and by its length.", DIGIT_BEYOND: "Each digit more.",
  SPACE: "Blanks that are spaces only, by their number.", TAB: "Blanks with tabs, by their number.",
  LINE: "Blanks with line ends, by their number.", INDENT: "The spaces and tabs beside line ends, by their number.",
  NGRAM: "What a letter or mark adds after the one or two before it, by hash.",
};
let out = `//! Prices of the pieces of a text, in hundredths of a token: written by \`tests/tools/tokens/fit.mjs\`, not by hand.\n`;
for (const name of Object.keys(layout)) {
  const list = values(name);
  const doc = `\n/// ${docs[name]}\n`;
  if (list.length === 1) out += `${doc}pub(super) const ${name}: i32 = ${list[0]};\n`;
  else out += `${doc}pub(super) static ${name}: [${name === "NGRAM" ? "i8" : "i16"}; ${list.length}] = [${list.join(", ")}];\n`;
}
process.stdout.write(out);
