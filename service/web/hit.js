// One hit in a dialog: large, with its neighbours and what can be done with it.

import { $, make, on } from "./elements.js";
import { path } from "./collections.js";
import { relevant } from "./relevance.js";
import { ask } from "./requests.js";
import { sure } from "./sure.js";

export const titled = ({ id, meta }) => (typeof meta?.title === "string" && meta.title) || id;

const THUMBNAIL = /^data:image\/(jpeg|png|webp);base64,/;

/** The address of an item's small picture; undefined if it has none. */
export const thumbnail = ({ meta }) => (THUMBNAIL.test(meta?.thumbnail ?? "") ? meta.thumbnail : undefined);

let shown; // {collection, hits, at, alike, removed}
let large; // the address of the original on the screen
let loading = new AbortController();

/** `hits`: the list to step through; `alike` is called with a hit, `removed` after one was deleted. */
export function open(collection, hits, at, { alike, removed }) {
  shown = { collection, hits, at, alike, removed };
  draw();
  $("hit").showModal();
}

function step(by) {
  const at = shown.at + by;
  if (at < 0 || at >= shown.hits.length) return;
  shown.at = at;
  draw();
}

function draw() {
  const { collection, hits, at } = shown;
  const hit = hits[at];
  $("hit-title").textContent = titled(hit);
  $("hit-place").textContent = `${at + 1} of ${hits.length}`;
  $("hit-relevance").textContent = relevant(hit);
  $("hit-before").ariaDisabled = at === 0; // not `disabled`: the focus would leave it
  $("hit-after").ariaDisabled = at === hits.length - 1;
  $("hit-problem").textContent = "";
  const facts = [["id", hit.id], ...(hit.score === undefined ? [] : [["cosine", hit.score.toFixed(4)]]), ...Object.entries(hit.meta ?? {}).filter(([name]) => name !== "thumbnail")];
  $("hit-meta").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, typeof value === "string" ? value : JSON.stringify(value))]));
  picture(collection, hit);
}

/** The thumbnail at once, then the original, if the collection keeps it. */
async function picture({ name, originals }, hit) {
  loading.abort();
  const { signal } = (loading = new AbortController());
  URL.revokeObjectURL(large);
  const small = thumbnail(hit);
  const text = !small && typeof hit.meta?.title !== "string" ? "This item has no picture." : "No thumbnail is stored.";
  const image = make("img", { alt: titled(hit), ...(small ? { src: small } : { hidden: true }) });
  const note = make("p", { hidden: Boolean(small) }, text);
  $("hit-view").replaceChildren(image, note);
  $("hit-file").hidden = true;
  $("hit-note").textContent = originals ? "" : "The collection keeps no originals: this is the thumbnail.";
  if (!originals) return;
  try {
    const { data } = await ask("GET", path(name, `/originals/${hit.id.split("/").map(encodeURIComponent).join("/")}`), undefined, signal);
    large = URL.createObjectURL(data);
    Object.assign($("hit-file"), { href: large, download: hit.id.split("/").at(-1), hidden: false });
    if (data.type.startsWith("text/")) {
      note.textContent = await data.text();
      note.hidden = false;
      return;
    }
    const original = make("img", { src: large });
    await original.decode();
    if (signal.aborted) return;
    Object.assign(image, { src: large, hidden: false });
    note.hidden = true;
  } catch (error) {
    if (signal.aborted) return;
    $("hit-note").textContent = error.body ? error.message : "The browser cannot show this format. Download the original to see it.";
  }
}

async function remove() {
  const { collection, hits, at, removed } = shown;
  const hit = hits[at];
  if (!(await sure(`Delete ${titled(hit)} from ${collection.name}? There is no way back.`, "Delete"))) return;
  try {
    await ask("DELETE", path(collection.name, "/items"), { ids: [hit.id] });
  } catch (error) {
    $("hit-problem").textContent = error.message;
    return;
  }
  hits.splice(at, 1);
  if (!hits.length) $("hit").close();
  else {
    shown.at = Math.min(at, hits.length - 1);
    draw();
    $("hit-delete").focus();
  }
  removed(hit);
}

on("hit-before", "click", () => step(-1));
on("hit-after", "click", () => step(1));
on("hit-close", "click", () => $("hit").close());
on("hit-delete", "click", remove);
on("hit-alike", "click", () => {
  const { hits, at, alike } = shown;
  $("hit").close();
  alike(hits[at]);
});
on("hit", "keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault(); // else it also scrolls
  step(by);
});
on("hit", "click", ({ target }) => target === $("hit") && $("hit").close()); // beside the dialog
on("hit", "close", () => {
  loading.abort();
  $("hit-view").replaceChildren();
  URL.revokeObjectURL(large);
});
