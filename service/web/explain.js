// The tab Explain: what each word of a caption contributes.

import { answer, show } from "./answers.js";
import { $, make, on, quietly } from "./elements.js";
import { asked, model } from "./models.js";
import { current, picture } from "./pictures.js";
import { ask, form, missing } from "./requests.js";
import { panel, submit } from "./tabs.js";

const LEAST_COLOURED = 0.05; // a caption of words that all contribute less stays pale

const explain = () =>
  answer(async (signal) => {
    const caption = $("caption").value.replace(/\s+/g, " ").trim(); // a form would send other line ends, and shift the words
    if (!caption) throw missing("Enter a caption first.");
    const body = { image: picture(), caption, ...asked(), ...($("explainer").value && { method: $("explainer").value }) };
    const result = await ask("POST", "v1/explain", form(body), signal);
    const { words, lowest, score, clip_score, f_score, threshold, method } = result.data;
    const most = Math.max(LEAST_COLOURED, ...words.map(({ contribution }) => Math.abs(contribution)));
    const scores = `cosine ${score.toFixed(3)} · CLIPScore ${clip_score.toFixed(3)} · F-CLIPScore ${f_score.toFixed(3)}`;
    show(result, coloured(caption, words, most), scale(most, threshold, method), make("p", {}, scores), contributions(words, lowest));
  });

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

/** The element with the colour of a contribution: stronger, the nearer it is to `most`. */
function tinted(element, contribution, most) {
  element.classList.add("tint", contribution < 0 ? "against" : "for");
  element.style.setProperty("--share", `${(100 * Math.abs(contribution)) / most}%`);
  return element;
}

/** The places of the words count code points, of which a JavaScript string may need two units. */
function coloured(caption, words, most) {
  const characters = [...caption];
  const between = (start, end) => characters.slice(start, end).join("");
  const parts = words.flatMap(({ text, start, contribution, flagged }, i) => [
    between(words[i - 1]?.end ?? 0, start),
    tinted(make(flagged ? "mark" : "span", { title: signed(contribution) }, text), contribution, most),
  ]);
  return make("p", { className: "caption" }, ...parts, between(words.at(-1).end));
}

/** The key of the colours. */
function scale(most, threshold, method) {
  const ends = [signed(-most), "0", signed(most)].map((text) => make("span", {}, text));
  const colours = "Blue words bring the caption nearer to the picture, orange ones take it away. ";
  const note = [colours, make("mark", {}, "Marked"), ` words fit less than expected: margin below ${signed(threshold)}, by ${method}.`];
  return make("div", { className: "scale" }, make("i", { ariaHidden: "true" }), make("div", {}, ...ends), make("small", {}, ...note));
}

function contributions(words, lowest) {
  const cells = (...texts) => texts.map((text) => make("td", {}, text));
  const rows = words.map(({ text, contribution, margin, flagged }, i) => {
    const note = flagged ? "flagged" : i === lowest ? "lowest" : "";
    return make("tr", {}, make("th", { scope: "row" }, text), ...cells(signed(contribution), signed(margin), note));
  });
  const head = make("tr", {}, ...["word", "contribution", "margin", "note"].map((text) => make("th", { scope: "col" }, text)));
  return make("div", { className: "table", tabIndex: 0, role: "region", ariaLabel: "Contributions" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

/** Show the model's methods. */
function reset() {
  const { methods = [] } = model().explanation ?? {};
  $("explainer").replaceChildren(...methods.map((name) => make("option", { value: name }, name)));
  $("explainers").hidden = methods.length < 2;
}

on("explain", "submit", quietly(explain));
on("explainer", "change", () => current >= 0 && submit());
panel("explain", { submit: () => $("caption").value.trim() && explain(), reset });
