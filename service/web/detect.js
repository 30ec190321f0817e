// The tab Detect: sliders of the suppression, which show the model's defaults until the user changes one.

import { answer, show, soon } from "./answers.js";
import { boxed, draw, unroll } from "./boxes.js";
import { fields } from "./classify.js";
import { $, make, on, quietly } from "./elements.js";
import { examples } from "./examples.js";
import { recall, remember } from "./memory.js";
import { model } from "./models.js";
import { ask, form } from "./requests.js";
import { again, panel } from "./tabs.js";

const controls = document.querySelector("#detect form").elements;
const changed = new Set(); // names of the settings that are sent

/** Show the model's defaults, and what the user changed the last time. */
function reset() {
  const { name, suppression, examples: most } = model();
  changed.clear();
  const before = recall(`detect ${name}`) ?? {};
  for (const [name, value] of Object.entries({ ...suppression, ...before })) {
    const control = controls[name];
    if (control?.type === "checkbox") control.checked = value;
    else if (control) control.value = value;
    if (control && name in before) changed.add(name);
  }
  $("examples").hidden = !most;
  $("most").textContent = most;
  settings();
}

function setting(name) {
  const control = controls[name];
  return { checkbox: control.checked, range: control.valueAsNumber }[control.type] ?? control.value;
}

/** Show the sliders' values. Disable the sliders that the method does not use. */
function settings() {
  $("sigma").disabled = setting("method") !== "gaussian";
  $("iou").disabled = setting("method") === "gaussian";
  $("defaults").hidden = !changed.size;
  for (const output of document.querySelectorAll("#detect output")) {
    const { name } = $(output.htmlFor.value);
    const value = (!changed.has(name) && model().suppression?.[name]) || setting(name); // the model's value may lie between the slider's steps
    output.value = value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 4 });
  }
}

const detect = (unrolled = true) =>
  answer(async (signal) => {
    const body = fields();
    for (const name of changed) body[name] = setting(name);
    const shown = examples(); // only JSON can carry their names and boxes
    const result = await ask("POST", "v1/detect", shown.length ? { ...body, examples: shown } : form(body), signal);
    const { detections, suppression: by } = result.data;
    unrolled && detections.length ? unroll(detections) : draw(detections);
    const kept = `${by.kept} of ${by.candidates} kept by ${by.method} soft-NMS`;
    show(result, make("p", {}, kept), boxed(detections, ({ raw_score }) => `raw ${raw_score.toFixed(2)}`));
  });

on("detect", "submit", quietly(() => detect()));
on("detect", "input", ({ target }) => {
  if (!target.name) return; // the name of an example
  changed.add(target.name);
  settings();
  remember(`detect ${model().name}`, Object.fromEntries([...changed].map((name) => [name, setting(name)])));
  soon(again);
});
on("defaults", "click", () => {
  remember(`detect ${model().name}`);
  reset();
  again();
  document.querySelector("[name=method]:checked").focus(); // the button is hidden now
});
panel("detect", { submit: () => detect(), again: () => detect(false), reset });
settings();
