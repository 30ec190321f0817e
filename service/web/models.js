// The menu of models.

import { $, make, on } from "./elements.js";
import { recall, remember } from "./memory.js";
import { current } from "./pictures.js";
import { tell } from "./problems.js";
import { ask } from "./requests.js";
import { each, submit, tab, tabs } from "./tabs.js";

let catalogue = new Map(); // name -> the model in /v1/models

export const model = () => catalogue.get($("model").value) ?? {};

/** The field `model` of a request: nothing while none is loaded. */
export const asked = () => ($("model").value ? { model: $("model").value } : {});

/** Repeated every second until all bundles are loaded. The menu changes only if the list does. */
export async function models() {
  const { ready, loaded } = await ask("GET", "readyz").then(({ data }) => data, ({ body }) => body ?? {});
  const known = [...$("model").options].map(({ value }) => value);
  if (loaded && loaded.join() !== known.join()) {
    const { data } = await ask("GET", "v1/models");
    const options = loaded.map((name) => make("option", { value: name }, name));
    $("model").replaceChildren(...(options.length ? options : [make("option", { value: "" }, "none loaded yet")]));
    $("model").disabled = options.length < 2;
    if (loaded.includes(recall("model"))) $("model").value = recall("model");
    catalogue = new Map(data.models.map((model) => [model.name, model]));
    change();
  }
  if (ready) await each("ready");
  else setTimeout(() => models().catch(tell), 1000);
}

/** Another model: show its settings, and open a tab that it serves. */
function change() {
  each("reset");
  const served = (button) => !model().tasks || model().tasks.includes(button.dataset.task);
  const open = tabs.find((button) => button.ariaSelected === "true");
  if (!served(open) && tabs.some(served)) tab(tabs.find(served));
  else if (current >= 0) submit();
}

on("model", "change", () => {
  remember("model", $("model").value);
  change();
});
