// One prompt to two variants, side by side, with what differs.

import { ApiError, send } from "./api.js";
import { differences, words } from "./diff.js";
import { freshId, h, setOptions, setText } from "./dom.js";
import { digits, NONE, percent, rate, seconds } from "./format.js";

const LONGEST_MS = 600_000, UNSURE = 0.5;

export class PlaygroundView {
  constructor(state) {
    this.state = state;
    this.role = h("select", { name: "role" });
    this.sides = [new Side("A"), new Side("B")];
    this.system = h("textarea", { rows: "1", name: "system" });
    this.prompt = h("textarea", { rows: "3", name: "prompt", required: true });
    this.most = h("input", { type: "number", min: "1", max: "100000", value: "200", required: true });
    this.temperature = h("input", { type: "number", min: "0", max: "2", step: "0.1", value: "0", required: true });
    this.stream = h("input", { type: "checkbox", checked: true });
    this.logprobs = h("input", { type: "checkbox", checked: true });
    this.together = h("input", { type: "checkbox", checked: true });
    this.ask = h("button", { class: "primary" }, "Ask both");
    this.stop = h("button", { type: "button", hidden: true, onclick: () => this.stopper.abort() }, "Stop");
    this.summary = h("p", { class: "summary", role: "status" });
    this.pair = h("div", { class: "pair", hidden: true }, this.sides.map((side) => side.element));
    const form = h("form", { class: "card playground", onsubmit: (event) => { event.preventDefault(); this.run(); } },
      field("Role", this.role), field("Variant A", this.sides[0].select), field("Variant B", this.sides[1].select),
      field("System message", this.system, "wide"), field("Prompt", this.prompt, "wide"),
      field("Most tokens", this.most), field("Temperature", this.temperature),
      h("p", { class: "checks" }, check("Streamed", this.stream), check("Log-probabilities", this.logprobs), check("Both at the same time", this.together)),
      h("p", { class: "buttons wide" }, this.ask, this.stop));
    this.element = h("div", {},
      h("p", { class: "note" }, "These are requests like any others: counted, watched, and held to the role's budget."),
      form, this.summary, this.pair);
  }

  update() {
    const { setup } = this.state;
    if (this.known === setup.id) return;
    this.known = setup.id;
    const widest = [...setup.roles].sort((a, b) => b.ladder.length - a.ladder.length)[0];
    setOptions(this.role, setup.roles.map((role) => role.name), widest.name);
    const variants = setup.variants.map((one) => one.variant);
    const last = widest.ladder.at(-1);
    setOptions(this.sides[0].select, variants, last);
    setOptions(this.sides[1].select, variants, widest.ladder[0] === last ? variants.at(-1) : widest.ladder[0]);
  }

  async run() {
    if (!this.stop.hidden) return;
    this.stopper = new AbortController();
    const signal = AbortSignal.any([this.stopper.signal, AbortSignal.timeout(LONGEST_MS)]);
    this.ask.disabled = true;
    this.stop.hidden = false;
    setText(this.summary, "Asking …");
    this.pair.hidden = false;
    for (const side of this.sides) side.clear();
    const jobs = this.sides.map((side) => () => side.ask(this.request(side.select.value), signal));
    if (this.together.checked) await Promise.all(jobs.map((job) => job()));
    else for (const job of jobs) await job();
    this.ask.disabled = false;
    this.stop.hidden = true;
    this.compare();
  }

  request(variant) {
    const role = this.role.value;
    const plain = /^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$/.test(role);
    const messages = [{ role: "user", content: this.prompt.value }];
    if (this.system.value.trim()) messages.unshift({ role: "system", content: this.system.value });
    return {
      headers: { "content-type": "application/json", ...(plain ? { "x-agent-role": role } : {}) },
      body: {
        model: variant, messages, max_tokens: Number(this.most.value), temperature: Number(this.temperature.value),
        ...(this.stream.checked ? { stream: true, stream_options: { include_usage: true } } : {}),
        ...(this.logprobs.checked ? { logprobs: true, top_logprobs: 3 } : {}),
        ...(plain ? {} : { metadata: { agent_role: role } }),
      },
    };
  }

  compare() {
    const [a, b] = this.sides;
    if (a.text === null || b.text === null) {
      setText(this.summary, "One of the two gave no answer: there is nothing to compare.");
      return;
    }
    const cut = a.tokens.length && b.tokens.length ? (side) => side.tokens.map((token) => token.token) : (side) => words(side.text);
    const lists = [cut(a), cut(b)];
    const found = differences(...lists);
    this.sides.forEach((side, i) => side.mark(lists[i], found[i]));
    const [wrongA, wrongB] = found.map((list) => list.filter(Boolean).length);
    const unit = a.tokens.length && b.tokens.length ? "tokens" : "words";
    const first = found[1].indexOf(true) >= 0 ? found[1].indexOf(true) : found[0].indexOf(true);
    setText(this.summary, wrongA + wrongB === 0 ? `Both say the same, in ${lists[0].length} ${unit}.`
      : `${wrongA} of ${lists[0].length} ${unit} of A are not in B, and ${wrongB} of ${lists[1].length} of B are not in A. They part at number ${first + 1}.`);
  }
}

/** One of the two: which variant, what it says, and how long that takes. */
class Side {
  constructor(letter) {
    this.letter = letter;
    this.select = h("select", { name: `variant-${letter}` });
    this.title = h("h2", {}, letter);
    this.by = h("p", { class: "note" });
    this.facts = h("dl", { class: "facts" });
    this.answer = h("div", { class: "answer", tabindex: "0", role: "group", "aria-label": `Answer of ${letter}` });
    this.error = h("p", { class: "error", role: "alert" });
    this.list = h("tbody", {});
    this.details = h("details", { class: "figures", hidden: true }, h("summary", {}, "Tokens and their probabilities"),
      h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": `Tokens of ${letter}` }, h("table", { class: "plain" }, h("thead", {}, h("tr", {}, ["Token", "Probability", "Others"].map((head) => h("th", { scope: "col" }, head)))), this.list)));
    this.details.addEventListener("toggle", () => this.showTokens());
    this.element = h("section", { class: "card side" }, this.title, this.by, this.facts, this.error, this.answer, this.details);
    this.clear();
  }

  clear() {
    Object.assign(this, { text: null, tokens: [], first: null, total: null, usage: null, variant: null, why: null });
    this.answer.replaceChildren();
    this.list.replaceChildren();
    this.details.hidden = true;
    setText(this.error, "");
    this.showFacts();
  }

  async ask({ headers, body }, signal) {
    const began = performance.now();
    this.asked = body.model;
    setText(this.title, `${this.letter}: ${this.asked}`);
    try {
      const response = await send("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
      this.variant = response.headers.get("x-tiercel-variant");
      this.why = response.headers.get("x-tiercel-route-reason");
      this.text = "";
      if (body.stream) {
        for await (const event of events(response)) {
          if (event.error) throw new ApiError(event.error.message ?? "The stream broke off.", 502);
          this.take(event.choices?.[0]?.delta, event.choices?.[0]?.logprobs, event.usage, performance.now() - began);
        }
      } else {
        const answer = await response.json();
        this.take(answer.choices?.[0]?.message, answer.choices?.[0]?.logprobs, answer.usage, null);
      }
      this.total = (performance.now() - began) / 1000;
    } catch (error) {
      const broken = error instanceof ApiError ? error.message : error.name === "AbortError" ? "Stopped." : error.name === "TimeoutError" ? "It took too long." : `The answer broke off: ${error.message}`;
      setText(this.error, broken);
      if (!this.text) this.text = null;
    }
    this.details.hidden = !this.tokens.length;
    this.showTokens();
    this.showFacts();
  }

  take(said, logprobs, usage, tookMs) {
    const more = said?.content ?? "";
    if (more && tookMs !== null && this.first === null) this.first = tookMs / 1000;
    this.text += more;
    this.answer.append(more);
    this.tokens.push(...(logprobs?.content ?? []));
    if (usage) this.usage = usage;
    this.showFacts();
  }

  showFacts() {
    const tokens = this.usage?.completion_tokens ?? (this.tokens.length || null);
    const mean = this.tokens.length ? -this.tokens.reduce((sum, one) => sum + one.logprob, 0) / this.tokens.length : null;
    setText(this.by, this.variant ? `Answered by ${this.variant} (${(this.why ?? "").replaceAll("_", " ")})` : "");
    this.by.classList.toggle("other", this.variant !== null && this.variant !== this.asked);
    const facts = [["First token", seconds(this.first)], ["Total", seconds(this.total)], ["Tokens", tokens === null ? NONE : String(tokens)],
      ["Tokens/s", this.total && tokens ? rate(tokens / this.total) : NONE], ["Mean −log p", mean === null ? NONE : `${digits(mean)} nats`]];
    this.facts.replaceChildren(...facts.map(([term, text]) => h("div", {}, h("dt", {}, term), h("dd", {}, text))));
  }

  /** The answer again, token by token. */
  mark(tokens, differ) {
    this.answer.replaceChildren(...tokens.map((token, i) => {
      const p = this.tokens.length === tokens.length ? Math.exp(this.tokens[i].logprob) : 1;
      const unsure = p < UNSURE ? "unsure" : undefined;
      if (!differ[i]) return unsure ? h("span", { class: unsure, title: percent(p) }, token) : token;
      return h("mark", { class: unsure }, token);
    }));
  }

  showTokens() {
    if (!this.details.open) return;
    this.list.replaceChildren(...this.tokens.map((one) => h("tr", {},
      h("th", { scope: "row", class: "mono" }, JSON.stringify(one.token)), h("td", {}, percent(Math.exp(one.logprob))),
      h("td", {}, (one.top_logprobs ?? []).filter((other) => other.token !== one.token).map((other) => `${JSON.stringify(other.token)} ${percent(Math.exp(other.logprob))}`).join(", ") || NONE))));
  }
}

/** Events of a stream, as JSON. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function field(label, input, more = "") {
  input.id = freshId();
  return h("p", { class: `field ${more}` }, h("label", { for: input.id }, label), input);
}

function check(label, input) {
  return h("label", { class: "check" }, input, ` ${label}`);
}
