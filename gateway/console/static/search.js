// One search for roles and variants, the same in every view.

import { freshId, h } from "./dom.js";

export function searchBox(state, changed) {
  const id = freshId();
  const input = h("input", { id, type: "search", placeholder: "Role or variant", autocomplete: "off", spellcheck: "false", value: state.search });
  input.addEventListener("input", () => { state.search = input.value.trim(); changed(); });
  return h("p", { class: "search" }, h("label", { for: id, class: "hidden" }, "Find a role or variant"), input);
}
