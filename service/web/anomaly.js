// The tab Anomaly: whether a picture looks damaged, and where.

import { answer, bars, show } from "./answers.js";
import { $, make, on, quietly } from "./elements.js";
import { cover } from "./masks.js";
import { asked } from "./models.js";
import { current, picture } from "./pictures.js";
import { ask, form } from "./requests.js";
import { panel, submit, tab } from "./tabs.js";

const VERDICTS = new Map([[true, "Damaged"], [false, "Normal"], [null, "No verdict, because no threshold is known"]]);

export const anomaly = (classifier = $("memory").value) =>
  answer(async (signal) => {
    const body = { image: picture(), ...(classifier ? { classifier } : { thing: $("thing").value.trim() }), ...asked() };
    const result = await ask("POST", "v1/anomaly", form(body), signal);
    const { score, threshold, damaged, heat, method } = result.data;
    const image = make("img", { src: `data:image/png;base64,${heat}` });
    await image.decode();
    cover([{ image }]);
    const limit = threshold === null ? "" : ` by a threshold of ${threshold.toFixed(3)}`;
    const parts = [bars([["anomaly score", score]]), make("p", {}, `${VERDICTS.get(damaged)}${limit}. Method: ${method}.`)];
    if (threshold === null) parts.push(make("button", { type: "button", onclick: learn }, "Fit some normal pictures, for a verdict"));
    show(result, ...parts);
  });

/** Open the tab Fit with the method that remembers normal pictures. */
function learn() {
  $("method").value = "memory";
  $("method").dispatchEvent(new Event("change"));
  tab($("tab-fit"));
  $("tab-fit").focus();
}

on("anomaly", "submit", quietly(() => anomaly()));
on("memory", "change", () => current >= 0 && submit());
panel("anomaly", { submit: () => anomaly() });
