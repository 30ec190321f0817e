// The tab Search: a query of words, pictures and words to leave out, and its hits.

import { answer, show, soon } from "./answers.js";
import { collection, collections, path } from "./collections.js";
import { $, make, on, quietly } from "./elements.js";
import { open, thumbnail, titled } from "./hit.js";
import { picture } from "./pictures.js";
import "./progress.js";
import { relevant } from "./relevance.js";
import { ask, missing } from "./requests.js";
import { panel } from "./tabs.js";

const HITS = 24; // at first; more on request
const LESS = -1.25; // the weight of words to leave out, as in `calmclip search`

let parts = []; // pictures of the query: {file}, or {id, title, thumbnail} of an item
let least; // the least relevance that the user chose; undefined: the service's default

const words = (id) => $(id).value.split(",").map((text) => text.trim()).filter(Boolean);

/** The parts of the query as the service reads them. */
function query() {
  const text = $("sentence").value.trim();
  const wanted = parts.map(({ file, id }) => (file ? { image: file } : { id }));
  if (text) wanted.unshift({ text });
  if (!wanted.length) throw missing("Enter words, or search with a picture.");
  const all = [...wanted, ...words("without").map((text) => ({ text, weight: LESS }))];
  return all.length === 1 ? all[0] : all;
}

/** `top`: the number of hits; `threshold`: for this search alone. */
const search = (top = HITS, threshold = least) =>
  answer(async (signal) => {
    const where = collection();
    const body = { query: query(), top_k: top, ...(threshold === undefined ? {} : { min_relevance: threshold }) };
    const result = await ask("POST", path(where.name, "/search"), body, signal);
    const { hits, below, min_relevance, uncalibrated } = result.data;
    if (threshold === undefined) level(min_relevance);
    const lower = hits.length ? `Show ${below} more that are less relevant` : `Show the nearest ${below} anyway`;
    const offers = [
      ...(uncalibrated ? [offer("Search again", () => search(top, threshold))] : []),
      ...(below ? [offer(lower, () => search(top, 0))] : []),
      ...(hits.length === top ? [offer("Show more", () => search(4 * top, threshold))] : []),
    ];
    show(result, said(where, result.data), cards(where, hits), make("div", { className: "row" }, ...offers));
  });

/** How many hits there are, and why. */
function said({ items, name }, { hits: { length }, below, min_relevance, uncalibrated }) {
  const least = min_relevance && !uncalibrated ? ` with a relevance of at least ${min_relevance.toFixed(2)}` : "";
  const why = uncalibrated ? `. Their relevance is not known: ${uncalibrated}.` : "";
  if (length) return make("p", {}, `${length} hit${length === 1 ? "" : "s"}${least}${why}`);
  if (below) return make("p", {}, `Nothing in ${name} has a relevance of at least ${min_relevance.toFixed(2)}: the nearest items are no nearer than to a query without an answer.`);
  return make("p", {}, items ? "No items match." : `${name} is empty. Add pictures first.`);
}

const offer = (text, act) => make("button", { type: "button", onclick: act }, text);

/** All items by id, some at a time. */
const browse = (after, before = []) =>
  answer(async (signal) => {
    const where = collection();
    const part = new URLSearchParams({ limit: 2 * HITS, ...(after === undefined ? {} : { after }) });
    const result = await ask("GET", path(where.name, `/items?${part}`), undefined, signal);
    const { items, next } = result.data;
    const all = [...before, ...items];
    const more = next === null ? [] : [offer("Show more", () => browse(next, all))];
    const text = all.length ? `The first ${all.length} of ${where.items} items, by id` : `${where.name} is empty. Add pictures first.`;
    show(result, make("p", {}, text), cards(where, all), make("div", { className: "row" }, ...more));
  });

/** Hits -> a list of buttons; each opens its hit large. */
function cards(where, hits) {
  const list = make("ol", { className: "hits" });
  const acts = {
    alike(hit) {
      parts = [{ id: hit.id, title: titled(hit), thumbnail: thumbnail(hit) }];
      $("sentence").value = $("without").value = "";
      drawParts();
      $("sentence").focus();
      search();
    },
    removed(hit) {
      [...list.children].find((row) => row.hit === hit)?.remove();
      if (!$("hit").open) (list.querySelector("button") ?? $("sentence")).focus();
      collections();
    },
  };
  list.append(
    ...hits.map((hit) => {
      const src = thumbnail(hit);
      const image = src ? make("img", { src, alt: "" }) : make("span", { className: "blank", ariaHidden: "true" });
      const fits = relevant(hit);
      const text = [make("span", {}, titled(hit)), ...(fits ? [make("small", {}, fits)] : [])];
      const button = make("button", { type: "button", title: hit.id, onclick: () => open(where, hits, hits.indexOf(hit), acts) }, image, ...text);
      return make("li", { hit }, button);
    }),
  );
  return list;
}

/** The pictures of the query as a list; each has a button that takes it out. */
function drawParts() {
  $("parts").replaceChildren(
    ...parts.map((part) => {
      const title = part.title ?? (part.file.name || "the pasted picture");
      const src = part.file ? URL.createObjectURL(part.file) : part.thumbnail;
      const remove = make("button", { type: "button", ariaLabel: `Leave ${title} out of the query` }, "×");
      remove.onclick = () => {
        parts = parts.filter((other) => other !== part);
        drawParts();
        $("sentence").focus();
        if (parts.length || $("sentence").value.trim()) search();
      };
      const image = src ? [make("img", { src, alt: "", onload: () => part.file && URL.revokeObjectURL(src) })] : [];
      return make("li", {}, ...image, make("span", {}, `like ${title}`), remove);
    }),
  );
  $("parts").hidden = !parts.length;
}

/** Show the threshold. */
function level(value) {
  $("least").value = value;
  $("least").nextSibling.value = Number(value).toFixed(2);
  $("usual").hidden = least === undefined;
}

/** Another threshold; undefined for the service's default. */
function choose(value) {
  least = value;
  if (value !== undefined) level(value);
  $("usual").hidden = value === undefined;
  search();
}

on("query", "submit", quietly(() => search()));
on("alike", "click", () =>
  answer(async () => {
    const file = picture();
    parts = [...parts.filter((part) => part.file !== file), { file }];
    drawParts();
    await search();
  }),
);
on("browse", "click", () => browse());
on("least", "input", ({ target }) => {
  least = target.valueAsNumber;
  level(least);
  soon(() => (parts.length || $("sentence").value.trim()) && search());
});
on("usual", "click", () => {
  choose(undefined);
  $("least").focus(); // the button is hidden now
});
panel("search", { ready: () => collections(), open: () => collections().catch(() => {}) }); // others may change them
