// What a person can do: every change is confirmed in a dialog first.

import { ApiError, getJson, postJson, send } from "./api.js";
import { freshId, h, setText } from "./dom.js";
import { bytes, digits, moment, percent } from "./format.js";
import { standing, VERDICTS } from "./verdicts.js";

const ORDERS = {
  demote: ["Demote", (v, r) => `Demote ${v} for ${r}?`, (v) => `Requests stop going to ${v} within a second. Probation may bring it back; a pin is taken off.`, "is demoted"],
  restore: ["Restore", (v, r) => `Restore ${v} for ${r}?`, (v) => `Requests go to ${v} again within a second. What checks have found so far is set back to zero; a pin is taken off.`, "is restored"],
  pin_serving: ["Pin: serving", (v, r) => `Keep ${v} in service for ${r}?`, (v) => `${v} stays in this role's choice, whatever the checks find, until somebody unpins it.`, "is pinned: serving"],
  pin_demoted: ["Pin: demoted", (v, r) => `Keep ${v} out of service for ${r}?`, (v) => `${v} stays out of this role's choice, without probation, until somebody unpins it.`, "is pinned: demoted"],
  unpin: ["Unpin", (v, r) => `Unpin ${v} for ${r}?`, () => "From now on the checks decide again.", "is unpinned"],
};

/** A modal dialog that is gone when it is closed; the focus goes back to where it was. */
function dialog(title, ...children) {
  const id = freshId();
  const element = h("dialog", { "aria-labelledby": id }, h("h2", { id }, title), ...children);
  const before = document.activeElement;
  element.addEventListener("close", () => {
    element.remove();
    if (before?.isConnected) before.focus();
  });
  document.body.append(element);
  element.showModal();
  return element;
}

/** Ask, then do. `run` gets the form's data; what it returns is said. Refusals are shown in the dialog. */
function confirm(console, { title, text, fields, verb, danger, run }) {
  const error = h("p", { class: "error", role: "alert" });
  const go = h("button", { class: danger ? "danger" : "primary" }, verb);
  const form = h("form", {}, text.map((one) => h("p", {}, one)), fields, error,
    h("p", { class: "buttons" }, h("button", { type: "button", onclick: () => box.close() }, "Cancel"), go));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (go.disabled) return;
    go.disabled = true;
    setText(error, "");
    try {
      const said = await run(new FormData(form));
      box.close();
      console.changed(said);
    } catch (failed) {
      if (!(failed instanceof ApiError)) throw failed;
      setText(error, failed.message);
      go.disabled = false;
    }
  });
  const box = dialog(title, form);
}

function field(label, input, note = "") {
  const id = freshId(), described = freshId();
  input.id = id;
  if (note) input.setAttribute("aria-describedby", described);
  return h("p", { class: "field" }, h("label", { for: id }, label), input, note ? h("small", { id: described }, note) : null);
}

function order(console, action, variant, role) {
  const [verb, title, text, done] = ORDERS[action];
  confirm(console, {
    title: title(variant, role), text: [text(variant)], verb, danger: action.includes("demote"),
    fields: field("Reason", h("input", { name: "why", required: true, maxlength: "500", autocomplete: "off", pattern: ".*\\S.*" }), "Kept with the event, for whoever reads it."),
    run: async (given) => {
      await postJson("admin/watch", { action, variant, role, why: given.get("why").trim() });
      return `${variant} ${done} for ${role}.`;
    },
  });
}

/** All that is known of a variant in a role, and what can be done about it. */
export function showCell(console, state, name, variant) {
  const role = state.setup.roles.find((one) => one.name === name);
  const step = role.considered.find((one) => one.variant === variant);
  const card = state.variants.get(variant), measured = card.roles[name], cell = state.cell(variant, name);
  const { words, tags } = standing(state, role, step);
  const facts = [
    ["Now", [words, ...tags].join(", ")],
    ...(step.verdict === "demoted" ? [] : [["Gate", VERDICTS[step.verdict]]]),
    ["Memory with a busy KV cache", bytes(step.memory_bytes)],
    ...(step.tokens_per_s ? [["Speed when it was measured", `${Math.round(step.tokens_per_s)} tokens/s`]] : []),
  ];
  if (measured) {
    facts.push(["Accuracy", `${percent(measured.accuracy)} (reference ${percent(measured.reference_accuracy)}, ${measured.items} items)`]);
    facts.push(["Same answer as the reference", percent(measured.agreement)]);
    facts.push(["KL, nats per token", digits(measured.kl)]);
  }
  if (cell) {
    const since = cell.since ? `${cell.status} since ${moment(cell.since)}` : "";
    facts.push(["Watch", [...new Set([cell.verdict === cell.status ? "" : cell.verdict, since || cell.verdict])].filter(Boolean).join(", ")]);
    if (cell.why) facts.push(["Last decision", cell.why]);
    if (cell.pinned) facts.push(["Pinned", cell.pinned]);
  }
  const actions = step.verdict === "reference" ? ["The reference always may serve."]
    : !state.setup.watch ? ["The watch is off (watch.enabled), so nothing can be demoted."]
    : offered(cell).map((action) => h("button", { type: "button", class: action.includes("demote") ? "danger" : undefined,
      onclick: () => { box.close(); order(console, action, variant, name); } }, ORDERS[action][0]));
  const box = dialog(`${variant} for ${name}`,
    h("dl", {}, facts.map(([term, text]) => h("div", {}, h("dt", {}, term), h("dd", {}, text)))),
    step.why.length && step.verdict !== "demoted" ? h("ul", { class: "reasons" }, step.why.map((why) => h("li", {}, why))) : null,
    h("p", { class: "buttons" }, actions, h("button", { type: "button", onclick: () => box.close() }, "Close")));
}

function offered(cell) {
  const serves = cell?.serves ?? true;
  return [serves ? "demote" : "restore", ...(cell?.pinned ? ["unpin"] : []),
    ...(cell?.pinned === "serving" ? [] : ["pin_serving"]), ...(cell?.pinned === "demoted" ? [] : ["pin_demoted"])];
}

/** Change the share of a role's sessions that another variant serves. */
export function askCanary(console, state, name) {
  const role = state.setup.roles.find((one) => one.name === name);
  const variants = state.setup.variants.filter((one) => role.models.includes(one.model)).map((one) => one.variant);
  const select = h("select", { name: "variant" }, variants.map((variant) => h("option", { value: variant }, variant)));
  select.value = role.canary?.variant ?? variants.find((variant) => variant !== role.ladder[0]) ?? variants[0];
  const share = h("input", { name: "percent", type: "number", min: "0", max: "100", step: "any", required: true, value: role.canary?.percent ?? 5 });
  confirm(console, {
    title: `Canary of ${name}`, verb: "Apply", danger: false,
    text: ["A share of this role's sessions goes to another variant and stays there. It is not held to the budget.",
      "This lasts until the gateway's next start or reload: the configuration file is left alone."],
    fields: [field("Variant", select), field("Share of sessions, %", share, "0 ends it.")],
    run: async (given) => {
      const config = await getJson("admin/config");
      const percentage = Number(given.get("percent"));
      const own = Object.hasOwn(config.roles, name) ? config.roles[name] : null;
      if (!own) throw new ApiError(`The gateway has no role ${name} any more.`, 404);
      own.canary = percentage > 0 ? { variant: given.get("variant"), percent: percentage } : null;
      await send("admin/config", { method: "PUT", headers: { "content-type": "application/yaml" }, body: yaml(config) });
      return percentage > 0 ? `${percentage} % of ${name}'s sessions go to ${given.get("variant")}.` : `${name} has no canary.`;
    },
  });
}

/** JSON is YAML, once line ends that only YAML knows are escaped. */
function yaml(value) {
  return JSON.stringify(value).replace(/[\u007f-\u00a0\u2028\u2029\ufeff]/g, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
