// Boxes over the picture, and their list.

import { $, colour, make } from "./elements.js";

let drawn = []; // the detections on the canvas
const MAX_TAGS = 12; // boxes with a name tag; more tags would hide the picture

/** Boxes are x0 y0 x1 y1 in pixels of the upright picture; the browser shows it upright too. */
export function draw(detections, bright = -1, count = detections.length) {
  drawn = detections;
  const { naturalWidth, naturalHeight, clientWidth } = $("picture");
  const canvas = $("boxes");
  const pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = [naturalWidth, naturalHeight]; // also clears it
  const unit = naturalWidth / Math.max(clientWidth, 1); // picture pixels per page pixel
  pen.font = `600 ${13 * unit}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  const all = [...detections.keys()].slice(0, count);
  const order = bright < 0 ? all : [bright, ...all.filter((i) => i !== bright)];
  const alpha = (i) => (bright < 0 || i === bright ? 1 : 0.25);
  for (const i of order.toReversed()) { // the best box on top
    const { box, index } = detections[i];
    pen.globalAlpha = alpha(i);
    pen.strokeStyle = colour(index);
    pen.lineWidth = (i === bright ? 4 : 2.5) * unit;
    pen.strokeRect(box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0);
  }
  const height = 18 * unit;
  const tags = []; // the best first; a tag that would hide another moves down
  for (const i of order.filter((i) => i === bright || i < MAX_TAGS)) {
    const { box, label, index, score } = detections[i];
    const text = `${label} ${score.toFixed(2)}`;
    const width = pen.measureText(text).width + 8 * unit;
    const left = Math.max(0, Math.min(box.x0, naturalWidth - width));
    let top = box.y0 >= height ? box.y0 - height : box.y0;
    const hides = (tag) => Math.abs(tag.top - top) < height && tag.left < left + width && left < tag.left + tag.width;
    for (let other; (other = tags.find(hides)); ) top = other.top + height + unit;
    tags.push({ left, top, width });
    pen.globalAlpha = alpha(i);
    pen.fillStyle = colour(index);
    pen.fillRect(left, top, width, height);
    pen.fillStyle = "#fff";
    pen.fillText(text, left + 4 * unit, top + 2.5 * unit);
  }
}

/** Draw the boxes one after the other, best first. */
export function unroll(detections) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return draw(detections);
  const start = performance.now();
  const step = (now) => {
    const count = Math.ceil(((now - start) / 400) * detections.length);
    if (drawn === detections) draw(detections, -1, Math.max(1, count));
    if (drawn === detections && count < detections.length) requestAnimationFrame(step);
  };
  draw(detections, -1, 0);
  requestAnimationFrame(step);
}

/** Detections -> a list; the row under the pointer or with the focus stands out in the picture. */
export function boxed(detections, note) {
  const rows = detections.map((detection, i) => {
    const { label, index, score } = detection;
    const row = make("li", { tabIndex: 0, onmouseenter: () => draw(detections, i), onmouseleave: () => draw(detections) });
    row.onfocus = row.onmouseenter;
    row.onblur = row.onmouseleave;
    row.append(make("i"), make("span", {}, label), make("b", {}, score.toFixed(2)), make("small", {}, note(detection)));
    row.firstChild.style.background = colour(index);
    return row;
  });
  return make("ul", { className: "detections" }, ...rows);
}

new ResizeObserver(() => draw(drawn)).observe($("picture"));
