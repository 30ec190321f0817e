// Examples of Detect: each row of the list holds a file, the box of the object in it, and a name.

import { $, make, on } from "./elements.js";
import { frame } from "./frames.js";
import { pictures, row } from "./pictures.js";
import { again } from "./tabs.js";

function addExamples(files) {
  if (!pictures(files).length) return;
  for (const file of pictures(files)) $("example-list").append(example(file));
  numberExamples();
}

function example(file) {
  const title = file.name || "the pasted example";
  const name = make("input", { type: "text", ariaLabel: `Name for ${title}`, autocomplete: "off", onchange: again });
  const draw = make("button", { type: "button", className: "draw" });
  const removed = () => {
    numberExamples();
    $("example-files").focus();
  };
  const element = row(file, removed, draw, name);
  const image = element.querySelector("img");
  const outline = make("i", { hidden: true });
  const thumb = make("span", { className: "thumb" }, outline);
  image.replaceWith(thumb);
  thumb.prepend(image);
  const show = (box) => {
    element.box = box;
    const [x0, y0, x1, y1] = box ?? [0, 0, 0, 0];
    const what = box ? `Box ${x1 - x0} by ${y1 - y0}` : "Draw a box";
    draw.textContent = what;
    draw.ariaLabel = `${what}: ${title}`;
    outline.hidden = !box;
    const { naturalWidth: width, naturalHeight: height } = image;
    const parts = { left: x0 / width, top: y0 / height, width: (x1 - x0) / width, height: (y1 - y0) / height };
    for (const [side, part] of Object.entries(parts)) outline.style[side] = `${100 * part}%`;
  };
  draw.onclick = async () => {
    const box = await frame(title, element.url, element.box);
    if (box === undefined) return;
    show(box);
    again();
  };
  image.decode().catch(() => (draw.disabled = true)); // the browser cannot show it; the service may read it
  show(null);
  return element;
}

/** A row without a name shows the name that the service gives it. */
function numberExamples() {
  [...$("example-list").children].forEach((row, index) => (row.querySelector("input").placeholder = `example ${index}`));
  again();
}

/** As fields of the request. */
export const examples = () =>
  [...($("examples").hidden ? [] : $("example-list").children)].map((row) => {
    const label = row.querySelector("input").value.trim();
    return { image: row.file, ...(row.box && { box: row.box }), ...(label && { label }) };
  });

on("example-files", "change", ({ target }) => {
  addExamples(target.files);
  target.value = ""; // else a removed file could not be added again
});
$("examples").take = addExamples;
