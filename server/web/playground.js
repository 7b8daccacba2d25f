// The playground: asks this server's own API and nothing else. No build step, no library, no external request.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "logprobs", "presence_penalty",
  "frequency_penalty", "repetition_penalty", "min_tokens"];
let running = null; // the AbortController of the request that streams now

// === Asking ===

function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const answer = await fetch(path, { ...options, headers: headers(), signal });
  if (answer.ok) return answer;
  if (answer.status === 401) $("key-dialog").showModal();
  const problem = await answer.json().catch(() => null);
  throw new Error(problem?.error?.message ?? `The server answered ${answer.status}.`);
}

async function* events(answer) {
  let rest = "";
  for await (const piece of pieces(answer.body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + piece).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function* pieces(stream) { // ReadableStream is not iterable everywhere yet
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    reader.releaseLock();
  }
}

// === The request ===

function requestBody() {
  const form = $("form");
  const body = { model: $("model").value, prompt: $("prompt").value };
  for (const name of NUMBERS) {
    const text = form.elements[name].value.trim();
    if (text !== "") body[name] = Number(text);
  }
  const stop = form.elements.stop.value.split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  const more = form.elements.more.value.trim();
  return more ? { ...body, ...JSON.parse(more) } : body;
}

function asCurl(body) {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = sessionStorage.getItem("key") ? ` -H "Authorization: Bearer $OPENAI_API_KEY"` : "";
  return `curl ${location.origin}/v1/completions${key} -d '${quoted}'`;
}

function asPython(body) {
  const own = ["model", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "logprobs", "presence_penalty",
    "frequency_penalty", "stop", "logit_bias", "best_of", "echo", "suffix", "user"];
  const entries = Object.entries(body);
  const lines = entries.filter(([name]) => own.includes(name)).map(([name, value]) => `    ${name}=${literal(value)},`);
  const extra = entries.filter(([name]) => !own.includes(name)).map(([name, value]) => `${literal(name)}: ${literal(value)}`);
  if (extra.length) lines.push(`    extra_body={${extra.join(", ")}},`);
  return [
    "from openai import OpenAI", "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key="anything")`,
    "answer = client.completions.create(", ...lines, ")", "print(answer.choices[0].text)",
  ].join("\n");
}

function literal(value) { // JSON is Python but for three words
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([key, item]) => `${literal(key)}: ${literal(item)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

async function copy(text) {
  $("snippet").textContent = text;
  $("snippet").hidden = false;
  await navigator.clipboard?.writeText(text).catch(() => {}); // not allowed everywhere; the text is shown all the same
}

// === Tokens ===

// A token whose bytes are half a character is joined with the next ones until they are a whole one.
class Tokens {
  constructor(place) {
    this.place = place;
    this.bytes = [];
    this.rows = [];
  }

  push(row) {
    const bytes = row.token.startsWith("bytes:")
      ? row.token.match(/\\x../g).map((byte) => parseInt(byte.slice(2), 16))
      : [...new TextEncoder().encode(row.token)];
    this.bytes.push(...bytes);
    this.rows.push(row);
    const text = new TextDecoder().decode(new Uint8Array(this.bytes));
    if (!text.endsWith("\ufffd") || this.bytes.length > 6) this.flush(text);
  }

  flush(text = new TextDecoder().decode(new Uint8Array(this.bytes))) {
    if (this.rows.length) {
      const span = tokenSpan(text, this.rows);
      span.tabIndex = this.place.childElementCount ? -1 : 0; // Tab reaches the first, arrows the others
      this.place.append(span);
    }
    this.bytes = [];
    this.rows = [];
  }
}

function tokenSpan(text, rows) {
  const span = document.createElement("span");
  span.className = "token";
  const scores = rows.map((row) => row.logprob).filter((value) => value !== null);
  if (scores.length) {
    const probability = Math.exp(Math.min(...scores));
    span.style.setProperty("--hue", Math.round(140 * Math.sqrt(probability)));
  } else {
    span.classList.add("unscored");
  }
  for (const part of text.split(/(\n)/)) {
    if (part === "\n") {
      const mark = document.createElement("span");
      mark.className = "break";
      mark.textContent = "⏎";
      span.append(mark, "\n");
    } else {
      span.append(part);
    }
  }
  span.rows = rows;
  return span;
}

function logprobRows(logprobs) {
  return logprobs.tokens.map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i],
    top: logprobs.top_logprobs?.[i] ?? null,
  }));
}

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return `${value >= 0.1 ? value.toFixed(1) : value.toPrecision(1)} %`;
};

function showTip(span) {
  const tip = $("tip");
  const table = document.createElement("table");
  for (const row of span.rows) {
    const entries = row.logprob === null ? [] : Object.entries({ ...row.top, [row.token]: row.logprob });
    if (!entries.length) table.append(tipRow(row.token, "first token: nothing before it", true));
    entries.sort((a, b) => b[1] - a[1]);
    for (const [token, logprob] of entries) table.append(tipRow(token, percent(logprob), token === row.token));
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const box = span.getClientRects()[0];
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${box.bottom + 6 + scrollY}px`;
}

function tipRow(token, text, own) {
  const row = document.createElement("tr");
  if (own) row.className = "own";
  for (const content of [token.startsWith("bytes:") ? token : JSON.stringify(token), text]) {
    row.insertCell().textContent = content;
  }
  return row;
}

function moveFocus(span, step) {
  const all = [...span.closest(".said").querySelectorAll(".token")];
  all[all.indexOf(span) + step]?.focus();
}

// === Completing ===

function answerCard(place, title) {
  const card = document.createElement("section");
  card.className = "answer";
  const head = document.createElement("h2");
  const [name, end] = [document.createElement("span"), document.createElement("span")];
  name.textContent = title;
  head.append(name, end);
  const said = document.createElement("div");
  said.className = "said";
  card.append(head, said);
  place.append(card);
  return { end, said, tokens: new Tokens(said) };
}

async function complete() {
  const body = requestBody();
  const cards = new Map();
  $("answers").replaceChildren();
  const card = (index) => {
    if (!cards.has(index)) cards.set(index, answerCard($("answers"), `answer ${index + 1}`));
    return cards.get(index);
  };
  const stream = { ...body, stream: true, stream_options: { include_usage: true } };
  const began = performance.now();
  let first = null;
  const answer = await ask("v1/completions", stream, running.signal);
  for await (const chunk of events(answer)) {
    for (const choice of chunk.choices) {
      first ??= performance.now();
      showChoice(card(choice.index), choice);
    }
    if (chunk.usage) showFigures(chunk.usage, first - began, performance.now() - first);
  }
}

function showChoice(card, choice) {
  if (choice.logprobs) logprobRows(choice.logprobs).forEach((row) => card.tokens.push(row));
  else card.said.append(choice.text);
  if (choice.finish_reason) {
    card.tokens.flush();
    card.end.textContent = choice.finish_reason;
  }
}

function showFigures(usage, toFirst, after) {
  const rate = after > 0 ? (usage.completion_tokens / (after / 1000)).toFixed(0) : "–";
  $("figures").textContent = `${usage.completion_tokens} tokens · first after ${toFirst.toFixed(0)} ms · ${rate} tokens/s`;
}

// === Scoring ===

async function score() {
  const body = { model: $("model").value, prompt: $("text").value, max_tokens: 0, echo: true, logprobs: 5 };
  const answer = await (await ask("v1/completions", body, running.signal)).json();
  const rows = logprobRows(answer.choices[0].logprobs);
  $("scored").replaceChildren();
  const card = answerCard($("scored"), "surprise of each token");
  rows.forEach((row) => card.tokens.push(row));
  card.tokens.flush();
  const scores = rows.map((row) => row.logprob).filter((value) => value !== null);
  if (!scores.length) {
    $("score-figures").textContent = "One token: there is nothing before it to predict it from.";
    return;
  }
  const mean = scores.reduce((sum, value) => sum + value, 0) / scores.length;
  $("score-figures").textContent =
    `${rows.length} tokens · perplexity ${Math.exp(-mean).toFixed(1)} · ${(-mean / Math.LN2).toFixed(2)} bits a token`;
}

// === The page ===

async function start(work) {
  running?.abort();
  running = new AbortController();
  const mine = running;
  $("error").hidden = true;
  $("stop").disabled = false;
  try {
    await work();
  } catch (problem) {
    if (problem.name !== "AbortError") showError(problem);
  } finally {
    if (running === mine) $("stop").disabled = true;
  }
}

function showError(problem) {
  $("error").textContent = problem.message;
  $("error").hidden = false;
}

async function loadModels() {
  const { data } = await (await ask("v1/models")).json();
  $("model").replaceChildren(...data.filter((model) => model.parent === null).map((model) => new Option(model.id)));
}

function choose(tab) {
  for (const name of ["complete", "score"]) {
    const chosen = name === tab;
    $(name).hidden = !chosen;
    $(`tab-${name}`).setAttribute("aria-selected", chosen);
    $(`tab-${name}`).tabIndex = chosen ? 0 : -1;
  }
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start($("score").hidden ? complete : score);
  } else if (event.key === "Escape") {
    running?.abort();
    $("tip").hidden = true;
  } else if (event.target.classList?.contains("token")) {
    if (event.key === "ArrowRight") moveFocus(event.target, 1);
    if (event.key === "ArrowLeft") moveFocus(event.target, -1);
  } else if (event.target.role === "tab" && event.key.startsWith("Arrow")) {
    const other = event.target.id === "tab-complete" ? "score" : "complete";
    choose(other);
    $(`tab-${other}`).focus();
  }
}

function switchTheme() {
  const dark = document.documentElement.dataset.theme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
}

function attempt(work) { // a mistake in the JSON field is the reader's, and is said
  try {
    return work();
  } catch (problem) {
    return showError(problem);
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); start(complete); });
$("score-form").addEventListener("submit", (event) => { event.preventDefault(); start(score); });
$("stop").addEventListener("click", () => running?.abort());
$("copy-curl").addEventListener("click", () => attempt(() => copy(asCurl(requestBody()))));
$("copy-python").addEventListener("click", () => attempt(() => copy(asPython(requestBody()))));
$("tab-complete").addEventListener("click", () => choose("complete"));
$("tab-score").addEventListener("click", () => choose("score"));
$("theme").addEventListener("click", switchTheme);
$("set-key").addEventListener("click", () => $("key-dialog").showModal());
$("key-dialog").addEventListener("close", () => {
  const key = $("key").value.trim();
  if (!key) return;
  sessionStorage.setItem("key", key);
  $("error").hidden = true;
  loadModels().catch(showError);
});
document.addEventListener("keydown", onKey);
document.addEventListener("focusin", ({ target }) => { if (target.classList.contains("token")) showTip(target); });
document.addEventListener("focusout", () => { $("tip").hidden = true; });
document.addEventListener("mouseover", ({ target }) => {
  const token = target.closest?.(".token");
  if (token) showTip(token);
  else $("tip").hidden = true;
});

const theme = localStorage.getItem("theme");
if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
loadModels().catch(showError);
