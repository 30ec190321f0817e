// The tab Classify, and the labels that Detect and Segment share with it.

import { answer, bars, show } from "./answers.js";
import { $, make, on, percent, quietly } from "./elements.js";
import { clear } from "./masks.js";
import { asked } from "./models.js";
import { chosen, current, picture } from "./pictures.js";
import { ask, form } from "./requests.js";
import { panel, submit } from "./tabs.js";

/** The fields of all three: picture, labels or classifier, model. `image`: a file, or several. */
export function fields(image = picture()) {
  const body = { image, ...asked() };
  if ($("classifier").value) body.classifier = $("classifier").value;
  else body.labels = lines("labels");
  return body;
}

/** The distinct texts of a text area. */
export function lines(id) {
  const words = $(id).value.split(/[\n,]/).map((word) => word.trim());
  return [...new Set(words.filter(Boolean))];
}

const MOST = { files: 16, bytes: 32 * 2 ** 20 }; // of one request, so that answers come early and a body is not too large

/** The chosen pictures -> lists of those that are sent together. */
function batches() {
  const lists = [[]];
  let bytes = 0;
  for (const one of chosen) {
    const full = lists.at(-1).length === MOST.files || bytes + one.file.size > MOST.bytes;
    if (full && lists.at(-1).length) bytes = lists.push([]) && 0;
    lists.at(-1).push(one);
    bytes += one.file.size;
  }
  return lists;
}

/** The best label of each picture of a batch, or why there is none. */
function best(batch, results) {
  return [...results].sort((one, other) => one.index - other.index).map(({ index, answer, problem }) => {
    const { file, url } = batch[index];
    const [first] = answer?.labels ?? [];
    const said = first ? [make("b", {}, first.label), " ", percent(first.score)] : [make("span", { className: "wrong" }, problem?.detail ?? "no label fits")];
    return make("li", {}, make("img", { src: url, alt: "" }), make("small", {}, file.name || "pasted"), make("span", {}, ...said));
  });
}

/** Classify all chosen pictures. */
const all = () =>
  answer(async (signal) => {
    const list = make("ol", { className: "many" });
    const requests = [];
    for (const batch of batches()) {
      const body = form(fields(batch.map(({ file }) => file)));
      const { results, request } = await ask("POST", "v1/classify", body, signal).then(
        ({ data, request }) => ({ request, results: data.results ?? [{ index: 0, answer: data }] }), // a batch of one has no list
        (error) => {
          const results = error.body?.results ?? (batch.length === 1 && error.body && [{ index: 0, problem: error.body }]);
          if (!results) throw error;
          return { results }; // no picture of the batch has an answer
        },
      );
      requests.push(request);
      list.append(...best(batch, results));
      show({ stages: [], request: requests }, make("p", {}, `${list.children.length} of ${chosen.length} pictures`), list);
    }
    clear();
  });

export const classify = (body = fields) =>
  answer(async (signal) => {
    const result = await ask("POST", "v1/classify", form(body()), signal);
    clear();
    show(result, bars(result.data.labels.slice(0, 12).map(({ label, score }) => [label, score])));
  });

on("classify", "submit", quietly(() => classify()));
on("all", "click", all);
on("picture", "chosen", () => {
  $("all").hidden = chosen.length < 2;
  $("all").textContent = `Classify all ${chosen.length}`;
});
on("classifier", "change", () => current >= 0 && submit());
panel("classify", { submit: () => classify() });
