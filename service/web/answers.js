// What a request answers: a list, bars, a problem, and the stages under it.

import { copy, curl } from "./commands.js";
import { $, colour, make, on, percent } from "./elements.js";
import { clear } from "./masks.js";
import { tell } from "./problems.js";
import { STAGES } from "./requests.js";

let running = new AbortController();
let pause; // timer that waits until a slider stops moving

/** Do it once the user has stopped changing a setting. */
export function soon(act) {
  clearTimeout(pause);
  pause = setTimeout(act, 120);
}

/** Forget the answer, and cancel the request for it. */
export function leave() {
  clearTimeout(pause);
  running.abort();
  $("work").removeAttribute("aria-busy");
  forget();
}

function forget() {
  for (const id of ["problem", "answer"]) $(id).replaceChildren();
  $("timing").hidden = true;
  offer();
  clear();
}

/** Run `work`, which fills the answer. A newer run cancels an older one; a problem is shown as text. */
export async function answer(work) {
  clearTimeout(pause);
  running.abort();
  const { signal } = (running = new AbortController());
  $("problem").replaceChildren();
  $("work").setAttribute("aria-busy", "true");
  try {
    await work(signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    forget();
    tell(error);
  } finally {
    if (!signal.aborted) $("work").removeAttribute("aria-busy");
  }
}

/** Show an answer, and under it the stages of the request. */
export function show({ stages, ms, request }, ...parts) {
  $("answer").replaceChildren(...parts);
  offer(request);
  $("timing").hidden = !stages.length;
  if (!stages.length) return;
  const total = stages.reduce((sum, [, duration]) => sum + duration, 0);
  const slices = stages.map(([name, duration]) => {
    const slice = make("i", { title: `${name} ${duration.toFixed(1)} ms` });
    slice.style.flexGrow = duration;
    slice.style.background = colour(STAGES.indexOf(name));
    return slice;
  });
  const names = stages.map(([name, duration]) => {
    const key = make("span", {}, make("i"), `${name} ${duration.toFixed(1)}`);
    key.firstChild.style.background = colour(STAGES.indexOf(name));
    return key;
  });
  $("bar").replaceChildren(...slices);
  $("stages").replaceChildren(`${total.toFixed(1)} ms in the service, ${ms.toFixed(0)} ms round trip`, ...names);
}

/** [[text, part of 1]] -> a list with a bar for each. */
export function bars(parts) {
  const rows = parts.map(([text, part]) => {
    const fill = make("i");
    fill.style.width = `${100 * part}%`;
    return make("li", {}, make("span", {}, text), make("b", {}, percent(part)), fill);
  });
  return make("ol", { className: "bars" }, ...rows);
}

/** Offer the command of a request, or of several; nothing without one. */
function offer(request) {
  const requests = [request].flat().filter(Boolean);
  $("repeat").hidden = !requests.length;
  $("copied").value = "";
  $("command").textContent = requests.map((one) => curl(one)).join("\n\n");
}

on("copy", "click", async () => ($("copied").value = await copy($("command"))));
