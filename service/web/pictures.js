// The chosen pictures, the one on the stage, and lists of other files.

import { $, make } from "./elements.js";
import { clear } from "./masks.js";
import { missing } from "./requests.js";

export let chosen = []; // [{file, url}]
export let current = -1; // index of the picture on the stage

const SUFFIXES = $("files").accept.split(",").filter((kind) => kind.startsWith("."));

/** Files that may be pictures. A browser does not know the type of each format. */
export const pictures = (files) =>
  [...files].filter(({ type, name }) => type.startsWith("image/") || SUFFIXES.some((suffix) => name.toLowerCase().endsWith(suffix)));

export function choose(files) {
  if (!pictures(files).length) return;
  chosen.forEach(({ url }) => URL.revokeObjectURL(url));
  chosen = pictures(files).map((file) => ({ file, url: URL.createObjectURL(file) }));
  $("strip").replaceChildren(
    ...chosen.map(({ file, url }, index) => {
      const button = make("button", { type: "button", onclick: () => select(index) });
      button.append(make("img", { src: url, alt: file.name || `picture ${index + 1}` }));
      return button;
    }),
  );
  $("strip").hidden = chosen.length < 2;
  $("stage").hidden = false;
  select(0);
}

async function select(index) {
  current = index;
  [...$("strip").children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  clear();
  $("picture").src = chosen[index].url;
  $("picture").alt = chosen[index].file.name || "the pasted picture";
  $("unseen").hidden = await $("picture").decode().then(() => true, () => false);
  $("picture").dispatchEvent(new Event("chosen"));
}

export function picture() {
  if (current < 0) throw missing("Choose, drop or paste a picture first.");
  return chosen[current].file;
}

/** A row of a list for a chosen file; its last button removes it and calls `removed`. */
export function row(file, removed, ...more) {
  const url = URL.createObjectURL(file);
  const title = file.name || "the pasted picture";
  const remove = make("button", { type: "button", ariaLabel: `Remove ${title}` }, "×");
  const element = make("li", { file, url, title }, make("img", { src: url, alt: "" }), ...more, remove);
  remove.onclick = () => {
    URL.revokeObjectURL(url);
    element.remove();
    removed();
  };
  return element;
}

/** The picture on a canvas of at most `side` pixels a side. */
export async function shrunk(url, side) {
  const image = make("img", { src: url });
  await image.decode();
  const scale = Math.min(1, side / Math.max(image.naturalWidth, image.naturalHeight));
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale].map(Math.ceil);
  const canvas = make("canvas", { width, height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // under transparent pixels, as in the service
  pen.fillRect(0, 0, width, height);
  pen.drawImage(image, 0, 0, width, height);
  return canvas;
}
