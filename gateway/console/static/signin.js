// The form that asks for an admin's key.

import { freshId, h, setText } from "./dom.js";

/** Show it in `place`; `done` gets the key. `why`: what was wrong with the last one. */
export function signIn(place, why, done) {
  const id = freshId(), said = freshId();
  const input = h("input", { id, type: "password", autocomplete: "off", spellcheck: "false", required: true, "aria-describedby": said });
  const error = h("p", { id: said, class: "error", role: "alert" });
  const submit = (event) => {
    event.preventDefault();
    const given = input.value.trim();
    if (!/^[\x21-\x7e]+$/.test(given)) setText(error, "A key has no spaces and only letters, digits and signs of ASCII.");
    else done(given);
  };
  place.replaceChildren(h("form", { class: "signin card", onsubmit: submit },
    h("h1", {}, "Sign in"),
    h("p", {}, "This gateway has keys. Give one with ", h("code", {}, "admin: true"), "."),
    h("label", { for: id }, "Admin key"), input, error,
    h("button", { class: "primary" }, "Sign in"),
    h("p", { class: "note" }, "It is kept in this tab only, until you close it.")));
  setText(error, why);
  input.focus();
}
