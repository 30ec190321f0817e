// Masks and heat maps: layers under the boxes.

import { draw } from "./boxes.js";
import { $, colour, make, on, percent } from "./elements.js";

let layers = []; // [{path, index, label}] or [{image}], the best first
const hidden = new Set(); // labels whose masks are not drawn

/** Draw the layers, the first on top. `bright`: the layer that stands out. The slider fades all of them together. */
export function cover(next = layers, bright = -1) {
  layers = next;
  const { naturalWidth, naturalHeight } = $("picture");
  const canvas = $("masks");
  [canvas.width, canvas.height] = [naturalWidth, naturalHeight]; // also clears it
  const pen = canvas.getContext("2d");
  for (const [i, { path, index, label, image }] of [...layers.entries()].toReversed()) {
    if (hidden.has(label) && i !== bright) continue;
    pen.globalAlpha = bright < 0 || i === bright ? 1 : 0.25;
    pen.fillStyle = colour(index);
    path ? pen.fill(path) : pen.drawImage(image, 0, 0, naturalWidth, naturalHeight);
  }
  $("fade").hidden = !layers.length;
}

function fade() {
  $("masks").style.opacity = $("opacity").value;
  $("opacity").nextSibling.value = $("opacity").valueAsNumber.toFixed(2);
}

export function clear() {
  draw([]);
  cover([]);
}

/** A mask as COCO writes it -> a path. The run lengths go down the columns: outside, inside, outside and so on. A
 *  number has 5 bits in each character, the lowest first; from the fourth on it is the difference to the last but one. */
export function outline({ size: [height, width], counts }) {
  const columns = Array.from({ length: width }, () => []);
  const lengths = [];
  for (let at = 0, start = 0; at < counts.length; ) {
    let [value, shift, code] = [0, 0];
    do {
      code = counts.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value -= 2 ** shift;
    if (lengths.length > 2) value += lengths.at(-2);
    const end = start + value;
    if (lengths.length % 2)
      for (let x = Math.floor(start / height); x * height < end; x++)
        columns[x].push(Math.max(start - x * height, 0), Math.min(end - x * height, height));
    lengths.push(value);
    start = end;
  }
  const path = new Path2D();
  for (let x = 0, next; x < width; x = next) { // equal columns beside each other are one rectangle
    for (next = x + 1; next < width && String(columns[next]) === String(columns[x]); ) next++;
    for (let i = 0; i < columns[x].length; i += 2) path.rect(x, columns[x][i], next - x, columns[x][i + 1] - columns[x][i]);
  }
  return path;
}

/** The layers -> a list with a switch for each mask; the row under the pointer stands out in the picture. */
export function legend({ width, height }) {
  const rows = layers.map(({ label, index, score, area }, i) => {
    const shown = make("input", { type: "checkbox", checked: !hidden.has(label) });
    shown.onchange = () => {
      shown.checked ? hidden.delete(label) : hidden.add(label);
      cover();
    };
    const name = make("label", {}, shown, make("i"), make("span", {}, label));
    name.querySelector("i").style.background = colour(index);
    const row = make("li", {}, name, make("b", {}, score.toFixed(2)), make("small", {}, percent(area / (width * height))));
    row.onmouseenter = row.onfocusin = () => cover(layers, i);
    row.onmouseleave = row.onfocusout = () => cover();
    return row;
  });
  return make("ul", { className: "detections" }, ...rows);
}

on("opacity", "input", fade);
fade();
