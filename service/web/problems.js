// A problem as text, and the form for a key that is missing.

import { $, make, on, quietly } from "./elements.js";
import { KEY, key } from "./requests.js";

export function tell(error) {
  const { status, title, detail, type, known = [], errors = [], request_id } = error.body ?? { title: error.message };
  const closed = [401, 403].includes(status);
  if (closed) $("key").hidden = false;
  const linked = type && !closed && !key(); // a link sends no key
  const parts = [make("strong", {}, linked ? make("a", { href: type.replace(/^\//, "") }, title) : title)];
  if (detail) parts.push(make("p", {}, detail));
  if (errors.length > 1) parts.push(make("ul", {}, ...errors.map((e) => make("li", {}, `${e.where}: ${e.message}`))));
  if (known.length) parts.push(make("p", {}, `Known: ${known.join(", ")}`));
  if (request_id) parts.push(make("small", {}, `request ${request_id}`));
  $("problem").replaceChildren(...parts);
}

/** Load what the page needs. If a key is missing, the page asks for one and runs this again. */
export function start(load) {
  const begin = () => load().catch(tell);
  on("key", "submit", quietly(() => {
    sessionStorage.setItem(KEY, $("secret").value.trim());
    $("key").reset();
    $("key").hidden = true;
    $("problem").replaceChildren();
    begin();
  }));
  begin();
}
