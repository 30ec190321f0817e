// The tab Tag: words of the picture and of its regions.

import { answer, show } from "./answers.js";
import { boxed, unroll } from "./boxes.js";
import { lines } from "./classify.js";
import { make, on, quietly } from "./elements.js";
import { asked } from "./models.js";
import { picture } from "./pictures.js";
import { ask, form } from "./requests.js";
import { panel } from "./tabs.js";

const tag = () =>
  answer(async (signal) => {
    const body = { image: picture(), words: lines("vocabulary"), ...asked() };
    const result = await ask("POST", "v1/tag", form(body), signal);
    const { tags, regions, caption, captioned_by } = result.data;
    const detections = regions.map(({ word, ...rest }) => ({ ...rest, label: word }));
    unroll(detections);
    const words = tags.map(({ word, score }) => make("li", {}, word, " ", make("small", {}, score.toFixed(2))));
    const by = captioned_by === "template" ? "the best words in a fixed sentence" : "the model's captioner";
    show(
      result,
      make("p", {}, make("q", {}, caption), " ", make("small", {}, by)),
      make("ul", { className: "tags" }, ...words),
      boxed(detections, ({ score, cosine }) => (score === cosine ? "" : `cosine ${cosine.toFixed(2)}`)),
    );
  });

on("tag", "submit", quietly(tag));
panel("tag", { submit: tag });
