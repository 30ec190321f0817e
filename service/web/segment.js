// The tab Segment.

import { answer, show, soon } from "./answers.js";
import { fields, lines } from "./classify.js";
import { $, make, on, quietly } from "./elements.js";
import { cover, legend, outline } from "./masks.js";
import { recall, remember } from "./memory.js";
import { model } from "./models.js";
import { ask, form } from "./requests.js";
import { again, panel } from "./tabs.js";

let moved = false; // whether the user moved the threshold of segment; else it is not sent

/** Show the model's defaults, and what the user changed the last time. */
function reset() {
  const { methods = [], background = [] } = model().segmentation ?? {};
  const { independent = false, method, threshold } = recall(`segment ${model().name}`) ?? {};
  $("segmenter").replaceChildren(...methods.map((name) => make("option", { value: name }, name)));
  $("background").placeholder = background.join(", ");
  if (methods.includes(method)) $("segmenter").value = method;
  $("independent").checked = independent;
  least();
  if (threshold !== undefined) move(threshold);
}

/** Show the threshold of a request that sets none. */
function least() {
  const { threshold = 0 } = model().segmentation ?? {};
  moved = false;
  $("threshold").value = $("independent").checked ? 0.5 : threshold;
  $("threshold").nextSibling.value = $("threshold").valueAsNumber.toFixed(2);
}

/** The user's own threshold. */
function move(value) {
  moved = true;
  $("threshold").value = value;
  $("threshold").nextSibling.value = $("threshold").valueAsNumber.toFixed(2);
}

const segment = () =>
  answer(async (signal) => {
    const body = { ...fields(), background: lines("background"), independent: $("independent").checked };
    if ($("segmenter").value) body.method = $("segmenter").value;
    if (moved) body.threshold = $("threshold").valueAsNumber;
    const result = await ask("POST", "v1/segment", form(body), signal);
    const { image, method, segments } = result.data;
    cover(segments.map(({ rle, ...rest }) => ({ ...rest, path: outline(rle) })));
    if (!segments.length) return show(result, make("p", {}, "No label fits a part of the picture."));
    show(result, make("p", {}, `score and part of the picture, by ${method}`), legend(image));
  });

on("segment", "submit", quietly(segment));
on("segment", "input", ({ target }) => {
  if (target.id === "background") return; // sent with the button
  if (target.id === "independent") least();
  if (target.id === "threshold") move(target.value);
  const threshold = moved ? $("threshold").value : undefined;
  remember(`segment ${model().name}`, { independent: $("independent").checked, method: $("segmenter").value, threshold });
  soon(again);
});
panel("segment", { submit: segment, again: segment, reset });
