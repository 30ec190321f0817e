// The dialog in which a box is drawn on a picture: with a pointer, with arrow keys, or as numbers.

import { $, on } from "./elements.js";

const STEP = 0.02; // of the picture's longer side, for an arrow key
const NEAR = 14; // page pixels around a corner that take hold of it
const SIDES = ["left", "top", "wide", "high"];

let box = null; // [x0, y0, x1, y1] in pixels of the upright picture
let held; // {fixed}: the corner that stays while another is pulled; {start, box}: where the pointer took hold of the box
let finish; // ends the dialog

const size = () => [$("frame-picture").naturalWidth, $("frame-picture").naturalHeight];
const within = (value, most) => Math.round(Math.min(Math.max(value, 0), most));

/** Two opposite corners -> a box in the picture, at least a pixel wide and high. */
function span([ax, ay], [bx, by]) {
  const [width, height] = size();
  const [x0, x1] = [within(Math.min(ax, bx), width - 1), within(Math.max(ax, bx), width)];
  const [y0, y1] = [within(Math.min(ay, by), height - 1), within(Math.max(ay, by), height)];
  return [x0, y0, Math.max(x1, x0 + 1), Math.max(y1, y0 + 1)];
}

/** A box that is moved, as far as the picture goes. */
function moved([x0, y0, x1, y1], [dx, dy]) {
  const [width, height] = size();
  const [x, y] = [within(x0 + dx, width - (x1 - x0)), within(y0 + dy, height - (y1 - y0))];
  return [x, y, x + x1 - x0, y + y1 - y0];
}

function show(next) {
  box = next;
  const [width, height] = size();
  const [x0, y0, x1, y1] = box ?? [0, 0, 0, 0];
  $("box").hidden = !box;
  const shares = { left: x0 / width, top: y0 / height, width: (x1 - x0) / width, height: (y1 - y0) / height };
  for (const [side, share] of Object.entries(shares)) $("box").style[side] = `${100 * share}%`;
  SIDES.forEach((id, i) => ($(id).value = box ? [x0, y0, x1 - x0, y1 - y0][i] : ""));
  $("use").disabled = !box;
}

/** A place on the page -> pixels of the picture. */
function point({ clientX, clientY }) {
  const { left, top, width, height } = $("frame-picture").getBoundingClientRect();
  const [wide, high] = size();
  return [((clientX - left) / width) * wide, ((clientY - top) / height) * high];
}

/** What the pointer takes hold of: a corner, else the whole box, else nothing. */
function grip([x, y]) {
  if (!box) return null;
  const near = (NEAR * size()[0]) / $("frame-picture").clientWidth;
  const [x0, y0, x1, y1] = box;
  const corners = [[x0, y0, x1, y1], [x1, y0, x0, y1], [x0, y1, x1, y0], [x1, y1, x0, y0]]; // each with the opposite one
  const corner = corners.find(([cx, cy]) => Math.hypot(cx - x, cy - y) < near);
  if (corner) return { fixed: corner.slice(2) };
  return x > x0 && x < x1 && y > y0 && y < y1 ? { start: [x, y], box } : null;
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

on("frame", "pointerdown", (event) => {
  event.preventDefault();
  $("frame").focus();
  $("frame").setPointerCapture(event.pointerId);
  held = grip(point(event)) ?? { fixed: point(event) };
});
on("frame", "pointermove", (event) => {
  if (!held) return;
  const [x, y] = point(event);
  if (held.fixed) return show(span(held.fixed, [x, y]));
  show(moved(held.box, [x - held.start[0], y - held.start[1]]));
});
for (const event of ["pointerup", "pointercancel"]) on("frame", event, () => (held = undefined));

on("frame", "keydown", (event) => {
  if (event.key === "Delete" || event.key === "Backspace") show(null);
  if (event.key === "Enter") {
    event.preventDefault(); // else the button that gets the focus back is pressed
    if (box) finish(box);
  }
  if (!ARROWS[event.key]) return;
  event.preventDefault(); // else the dialog scrolls
  const [width, height] = size();
  const step = Math.max(1, Math.round(STEP * Math.max(width, height)));
  const [dx, dy] = ARROWS[event.key].map((part) => part * step);
  if (!box) return show(span([width / 4, height / 4], [(3 * width) / 4, (3 * height) / 4]));
  const [x0, y0, x1, y1] = box;
  show(event.shiftKey ? span([x0, y0], [Math.max(x1 + dx, x0 + 1), Math.max(y1 + dy, y0 + 1)]) : moved(box, [dx, dy]));
});

for (const id of SIDES)
  on(id, "change", () => {
    const [x, y, width, height] = SIDES.map((side) => $(side).valueAsNumber);
    if ([x, y, width, height].every(Number.isFinite)) show(span([x, y], [x + Math.max(width, 1), y + Math.max(height, 1)]));
  });
on("use", "click", () => finish(box));
on("whole", "click", () => finish(null));
on("cancel", "click", () => finish());
on("framing", "cancel", () => finish());

/** Ask for a box on the picture of this url -> the box, null for none, undefined if the user leaves the dialog. */
export async function frame(title, url, before) {
  $("framed").textContent = `The object in ${title}`;
  $("frame-picture").src = url;
  await $("frame-picture").decode();
  const result = new Promise((resolve) => (finish = resolve));
  $("framing").showModal();
  show(before);
  $("frame").focus();
  const chosen = await result;
  $("framing").close(); // the focus goes back to the button
  return chosen;
}
