// What is known of the gateway: the newest answers, and the samples of the last quarter of an hour.

export const REQUESTS = 0, ERRORS = 1, TOKENS = 2, P50 = 3, P95 = 4, FIRST50 = 5, FIRST95 = 6;
const QUIET = [0, 0, 0, null, null, null, null];

const together = (role, variant) => `${role}\u0000${variant}`;

export class State {
  constructor() {
    this.setup = null;
    this.overview = null;
    this.samples = [];
    this.watch = null;
    this.watchError = "";
    this.search = "";
  }

  get newest() {
    return this.samples.at(-1)?.at ?? 0;
  }

  take(overview) {
    this.overview = overview;
    if (overview.time < this.newest - 30) this.samples = []; // the gateway's clock was ahead
    if (overview.setup) {
      this.setup = { ...overview.setup, id: overview.setup_id };
      this.variants = new Map(this.setup.variants.map((one) => [one.variant, one]));
      this.order = new Map(this.setup.roles.map((role, number) => [role.name, number]));
    }
    const after = this.newest;
    for (const sample of overview.samples) {
      if (sample.at <= after) continue;
      sample.by = new Map(sample.series.map(([role, variant, ...figures]) => [together(role, variant), figures]));
      this.samples.push(sample);
    }
    const oldest = this.newest - overview.kept * overview.interval_s;
    this.samples = this.samples.filter((sample) => sample.at > oldest);
    this.minute = overview.last_minute.series.map(([role, variant, ...figures]) => ({ role, variant, figures }));
  }

  /** Figures over time of a role and variant, of all traffic without them; silence where nobody looked. */
  history(role = "", variant = "") {
    const times = [], values = [];
    let before = null;
    for (const sample of this.samples) {
      if (before !== null && sample.at - before > 3 * this.overview.interval_s) {
        times.push(before + this.overview.interval_s);
        values.push(null);
      }
      times.push(sample.at);
      values.push(sample.by.get(together(role, variant)) ?? QUIET);
      before = sample.at;
    }
    return { times, figure: (number) => values.map((one) => one?.[number] ?? null) };
  }

  /** In flight, waiting, KV cache, memory of a replica over time. */
  engine(name, number) {
    return this.samples.map((sample) => sample.engines[name]?.[number] ?? null);
  }

  /** Whether a name is what is searched for. */
  wanted(...names) {
    const search = this.search.toLowerCase();
    return !search || names.some((name) => name.toLowerCase().includes(search));
  }

  /** Variants that may serve any role, the cheapest first. */
  columns() {
    return [...new Set(this.setup.roles.flatMap((role) => role.considered.map((step) => step.variant)))];
  }

  poolUp(variant) {
    return this.overview.replicas.some((one) => one.variant === variant && one.reachable && one.usable);
  }

  cell(variant, role) {
    return this.watch?.cells.find((cell) => cell.variant === variant && cell.role === role) ?? null;
  }

  /** The variant that a request of a role goes to now, canary aside; null when no pool can take it. */
  serving(role) {
    return role.ladder.find((variant) => this.poolUp(variant)) ?? null;
  }

  /** What a person should look at, the worst first. */
  troubles() {
    const found = [];
    for (const variant of this.setup.variants.map((one) => one.variant)) {
      const mine = this.overview.replicas.filter((one) => one.variant === variant);
      const down = mine.filter((one) => one.reachable === false || !one.usable);
      if (down.length === mine.length) found.push({ tone: "bad", view: "replicas", text: `No replica of ${variant} can be reached.` });
      else if (down.length) found.push({ tone: "warn", view: "replicas", text: `${down.length} of ${mine.length} replicas of ${variant} cannot be used.` });
    }
    for (const role of this.setup.roles) {
      for (const step of role.considered) {
        if (step.verdict === "demoted") found.push({ tone: "bad", view: "quality", text: `${step.variant} is out of service for ${role.name}: ${step.why.join("; ")}` });
      }
    }
    for (const cell of this.watch?.cells ?? []) {
      if (cell.serves && ["suspected", "not enough evidence"].includes(cell.verdict)) {
        found.push({ tone: "warn", view: "quality", text: `${cell.variant} for ${cell.role}: ${cell.verdict}` });
      }
    }
    const all = this.minute.find((one) => one.role === "" && one.variant === "")?.figures;
    if (all && all[REQUESTS] > 0 && all[ERRORS] / all[REQUESTS] >= 0.01) {
      found.push({ tone: "bad", view: "live", text: `${(100 * all[ERRORS] / all[REQUESTS]).toFixed(1)} % of the last minute's requests failed.` });
    }
    return found;
  }
}
