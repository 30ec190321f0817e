// The tabs: each module of a task enters what its tab does.

import { leave } from "./answers.js";
import { $ } from "./elements.js";
import { remember } from "./memory.js";
import { current } from "./pictures.js";

const panels = new Map(); // id of the panel -> what its tab does

/** `acts`: functions, each optional. `submit` asks about the picture; it also runs if another picture is chosen, or the
 *  tab is opened. `again`: the same with a changed setting. `reset`: shows the defaults of another model. `ready`: all
 *  bundles are loaded. `open`: the tab is opened. */
export const panel = (id, acts) => panels.set(id, acts);

export const task = () => document.querySelector("[role=tab][aria-selected=true]").getAttribute("aria-controls");

/** Send the request again, because a setting or an example has changed. */
export const again = () => current >= 0 && panels.get(task()).again?.();

export const submit = () => panels.get(task()).submit?.();

/** Call this act of every tab that has it. */
export const each = (act) => Promise.all([...panels.values()].map((acts) => acts[act]?.()));

/** Open the tab of this button. */
export function tab(button) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const on = other === button;
    other.setAttribute("aria-selected", String(on));
    other.tabIndex = on ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !on;
  }
  $("work").dataset.tab = task(); // the layout depends on it
  $("words").hidden = !["classify", "detect", "segment"].includes(task());
  remember("tab", task());
  leave();
  panels.get(task()).open?.();
  if (current >= 0) submit();
}

export const tabs = [...document.querySelectorAll("[role=tab]")];
for (const [index, button] of tabs.entries()) {
  button.onclick = () => tab(button);
  button.onkeydown = ({ key }) => {
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[key];
    if (next === undefined) return;
    tab(tabs.at(next % tabs.length));
    tabs.at(next % tabs.length).focus();
  };
}

$("picture").addEventListener("chosen", submit);
