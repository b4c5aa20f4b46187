// Asks the gateway every two seconds while somebody looks, and hands what it says to the view that is open.

import { ApiError, getJson, key } from "./api.js";
import { h, setText } from "./dom.js";
import { span } from "./format.js";
import { LiveView } from "./live.js";
import { PlaygroundView } from "./playground.js";
import { PrecisionView } from "./precision.js";
import { LONG_S, QualityView } from "./quality.js";
import { ReplicasView } from "./replicas.js";
import { signIn } from "./signin.js";
import { State } from "./state.js";
import { UsageView } from "./usage.js";
import { VariantsView } from "./variants.js";

const EVERY_MS = 2000, LONGEST_MS = 30_000, WATCH_EVERY_MS = 6000;
const TITLES = {
  live: ["Live", LiveView], precision: ["Precision", PrecisionView], variants: ["Variants", VariantsView],
  quality: ["Quality", QualityView], replicas: ["Replicas", ReplicasView], usage: ["Usage", UsageView],
  playground: ["Playground", PlaygroundView],
};
const find = (id) => document.getElementById(id);

class Console {
  constructor() {
    this.state = new State();
    this.views = new Map();
    this.failures = 0;
    this.asking = false;
    this.heardAt = 0;
    this.watchAt = 0;
    this.timer = 0;
    addEventListener("hashchange", () => this.open(true));
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.ask(); });
    find("again").addEventListener("click", () => this.ask());
    find("sign-out").addEventListener("click", () => { key.forget(); this.stop(""); });
    setInterval(() => this.showAge(), 1000);
    this.ask();
  }

  async ask() {
    clearTimeout(this.timer);
    if (this.asking || document.hidden || this.stopped) return;
    this.asking = true;
    try {
      const { state } = this;
      state.take(await getJson(`admin/overview?since=${state.newest}&known=${state.setup?.id ?? ""}`));
      await this.askWatch();
      this.failures = 0;
      this.heardAt = Date.now();
      this.show();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 401 || error.status === 403) {
        this.stop(error.status === 401 && !key.get() ? "" : error.message);
        key.forget();
      } else this.failed(error);
    } finally {
      this.asking = false;
      this.showAge();
      this.wait = this.failures ? Math.min(LONGEST_MS, EVERY_MS * 2 ** this.failures) : EVERY_MS;
      this.nextAt = Date.now() + this.wait;
      if (!this.stopped) this.timer = setTimeout(() => this.ask(), this.wait);
    }
  }

  async askWatch() {
    const { state } = this;
    if (!state.setup.watch) return;
    const since = this.current?.since ?? (location.hash === "#quality" ? LONG_S : 60);
    if (Date.now() - this.watchAt < WATCH_EVERY_MS && since === this.watchSince) return;
    try {
      state.watch = { ...await getJson(`admin/watch?since_s=${since}&events=200`), since };
      state.watchError = "";
      this.watchAt = Date.now();
      this.watchSince = since;
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 503) throw error;
      state.watchError = error.message;
    }
  }

  /** Something has been changed: what follows from it is shown at once. */
  changed(words) {
    setText(find("said"), words);
    clearTimeout(this.quiet);
    this.quiet = setTimeout(() => setText(find("said"), ""), 8000);
    this.watchAt = 0;
    this.ask();
  }

  failed(error) {
    this.failures += 1;
    setText(find("banner-text"), error.status ? `The gateway says: ${error.message}` : error.message);
    find("banner").hidden = false;
    document.body.classList.add("stale");
    if (!this.state.setup) find("main").replaceChildren(h("p", { class: "empty" }, "There is nothing to show yet."));
  }

  showAge() {
    if (this.stopped) return;
    const old = (Date.now() - this.heardAt) / 1000;
    if (this.heardAt) setText(find("age"), this.failures ? `${span(old)} old` : old < 5 ? "Live" : `${span(old)} ago`);
    find("age").classList.toggle("old", this.failures > 0);
    if (this.failures) {
      const next = Math.max(0, (this.nextAt - Date.now()) / 1000);
      setText(find("banner-age"), `${this.heardAt ? `What you see is ${span(old)} old. ` : ""}Next try in ${span(next)}.`);
    }
  }

  show() {
    find("banner").hidden = true;
    document.body.classList.remove("stale");
    find("views").hidden = false;
    find("sign-out").hidden = !key.get();
    setText(find("model"), this.state.setup.models.map((one) => one.name).join(", "));
    this.open(false);
  }

  open(moved) {
    if (!this.state.setup || this.stopped) return;
    const name = TITLES[location.hash.slice(1)] ? location.hash.slice(1) : "live";
    const [title, View] = TITLES[name];
    let view = this.views.get(name);
    if (!view) {
      view = new View(this.state, this);
      this.views.set(name, view);
    }
    if (this.current !== view) {
      this.current = view;
      document.title = `${title} · Tiercel`;
      find("main").replaceChildren(h("h1", { tabindex: "-1", id: "title" }, title), view.element);
      for (const link of find("views").children) {
        if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
      find("views").querySelector("[aria-current]").scrollIntoView({ block: "nearest", inline: "nearest" });
      if (moved) { find("title").focus(); scrollTo(0, 0); }
      if (view.since && view.since !== this.watchSince) this.ask();
    }
    view.update();
  }

  /** Ask for a key. `why`: what the gateway said of the one that was tried. */
  stop(why) {
    this.stopped = true;
    clearTimeout(this.timer);
    this.state = new State();
    this.views.clear();
    this.current = null;
    this.heardAt = this.failures = this.watchAt = 0;
    find("banner").hidden = find("views").hidden = find("sign-out").hidden = true;
    setText(find("age"), "");
    setText(find("model"), "");
    document.title = "Sign in · Tiercel";
    signIn(find("main"), why, (given) => {
      key.set(given);
      this.stopped = false;
      this.ask();
    });
  }
}

new Console();
