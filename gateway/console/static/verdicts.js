// What a variant is to a role, in words.

export const VERDICTS = {
  reference: "reference", passed: "passed", failed: "failed its gate",
  not_enough_evidence: "not enough evidence", demoted: "demoted",
};

/** What a variant is to a role: words, and a tone that says the same. */
export function standing(state, role, step) {
  const cell = state.cell(step.variant, role.name);
  const tags = [];
  if (cell?.pinned) tags.push("pinned");
  if (cell?.status === "probation") tags.push("on probation");
  if (!state.poolUp(step.variant)) tags.push("down");
  if (role.canary?.variant === step.variant && role.canary.percent > 0) tags.push(`canary ${role.canary.percent} %`);
  if (cell?.serves && ["suspected", "not enough evidence"].includes(cell.verdict)) tags.push(cell.verdict);
  const place = role.ladder.indexOf(step.variant);
  if (step.verdict === "demoted") return { words: cell?.pinned ? "kept out" : "demoted", tone: "bad", tags };
  if (step.variant === state.serving(role)) return { words: "serves", tone: "on", tags };
  if (place >= 0) return { words: state.poolUp(step.variant) ? "may serve" : "down", tone: state.poolUp(step.variant) ? "may" : "bad", tags: tags.filter((tag) => tag !== "down") };
  if (step.verdict === "passed") return { words: "no cheaper", tone: "off", tags };
  return { words: VERDICTS[step.verdict], tone: "off", tags };
}
