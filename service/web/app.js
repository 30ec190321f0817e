// The page's whole client. It uses only the public routes. From top to bottom: requests, the picture and its boxes, masks
// over it, examples, settings, one function per task, fits, the stages, and at the end the event handlers.

const $ = (id) => document.getElementById(id);

/** An element with properties and children. A string child becomes text, never markup. */
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const percent = (score) => `${(100 * score).toFixed(1)} %`;
const colour = (index) => `oklch(52% 0.17 ${(index * 137.508 + 255) % 360})`; // neighbours differ most; white text is readable on each

// ---- requests

/** A problem document (RFC 9457). */
class Problem extends Error {
  constructor(body) {
    super(body.detail || body.title);
    this.body = body;
  }
}

const KEY = "calmclip-key"; // kept for this tab only
const key = () => sessionStorage.getItem(KEY);

/** -> {data, stages, ms}. `body`: a form, or a value that is sent as JSON. Throws `Problem`. */
async function ask(method, path, body, signal) {
  const form = body instanceof FormData;
  const headers = body && !form ? { "Content-Type": "application/json" } : {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const start = performance.now();
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && !form ? JSON.stringify(body) : body });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "No answer", detail: "The service cannot be reached. Is it still running?" });
  }
  const json = /json/.test(response.headers.get("Content-Type") ?? "");
  const data = json ? await response.json() : null;
  if (!response.ok) throw new Problem(data ?? { title: `Status ${response.status}`, detail: response.statusText });
  return { data, ms: performance.now() - start, stages: timing(response.headers.get("Server-Timing")) };
}

/** In the order of a request. */
const STAGES = ["read", "decode", "preprocess", "queue", "infer", "fit", "postprocess", "search", "write", "serialize"];

/** "infer;dur=18.9, decode;dur=1.4" -> [["decode", 1.4], ["infer", 18.9]] in milliseconds, in the order of STAGES. */
const timing = (header) =>
  [...(header ?? "").matchAll(/([\w-]+)(?:;[^,]*?)?;dur=([\d.]+)/g)]
    .map(([, name, duration]) => [name, Number(duration)])
    .filter(([name]) => STAGES.includes(name))
    .sort(([one], [other]) => STAGES.indexOf(one) - STAGES.indexOf(other));

let running = new AbortController();
let pause; // timer that waits until a slider stops moving

/** Run `work`, which fills the answer. A newer run cancels an older one; a problem is shown as text. */
async function answer(work) {
  clearTimeout(pause);
  running.abort();
  const { signal } = (running = new AbortController());
  $("problem").replaceChildren();
  $("work").setAttribute("aria-busy", "true");
  try {
    await work(signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("answer").replaceChildren();
    $("timing").hidden = true;
    clear();
    explain(error);
  } finally {
    if (!signal.aborted) $("work").removeAttribute("aria-busy");
  }
}

function explain(error) {
  const { status, title, detail, type, known = [], errors = [], request_id } = error.body ?? { title: error.message };
  const closed = [401, 403].includes(status);
  if (closed) $("key").hidden = false;
  const linked = type && !closed && !key(); // a link sends no key
  const parts = [make("strong", {}, linked ? make("a", { href: type.replace(/^\//, "") }, title) : title)];
  if (detail) parts.push(make("p", {}, detail));
  if (errors.length > 1) parts.push(make("ul", {}, ...errors.map((e) => make("li", {}, `${e.where}: ${e.message}`))));
  if (known.length) parts.push(make("p", {}, `Known: ${known.join(", ")}`));
  if (request_id) parts.push(make("small", {}, `request ${request_id}`));
  $("problem").replaceChildren(...parts);
}

const missing = (detail) => new Problem({ title: "Input is missing", detail });

// ---- the picture and its boxes

let chosen = []; // [{file, url}]
let current = -1; // index of the picture on the stage
let drawn = []; // the detections on the canvas
const MAX_TAGS = 12; // boxes with a name tag; more tags would hide the picture

const pictures = (files) => [...files].filter((file) => file.type.startsWith("image/"));

function choose(files) {
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
  await $("picture").decode().catch(() => {}); // the browser cannot read it: the service reports the error
  submit();
}

function picture() {
  if (current < 0) throw missing("Choose, drop or paste a picture first.");
  return chosen[current].file;
}

/** Boxes are x0 y0 x1 y1 in pixels of the upright picture; the browser shows it upright too. */
function draw(detections, bright = -1, count = detections.length) {
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
function unroll(detections) {
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

// ---- masks and heat maps: layers under the boxes

let layers = []; // [{path, index, label}] or [{image}], the best first
const hidden = new Set(); // labels whose masks are not drawn

/** Draw the layers, the first on top. `bright`: the layer that stands out. The slider fades all of them together. */
function cover(next = layers, bright = -1) {
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

function clear() {
  draw([]);
  cover([]);
}

/** A mask as COCO writes it -> a path. The run lengths go down the columns: outside, inside, outside and so on. A
 *  number has 5 bits in each character, the lowest first; from the fourth on it is the difference to the last but one. */
function outline({ size: [height, width], counts }) {
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

/** A row of a list for a chosen file; its last button removes it and calls `removed`. */
function row(file, removed, ...more) {
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

// ---- examples: each row of the list holds a file and the name of its boxes

function addExamples(files) {
  if (!pictures(files).length) return;
  for (const file of pictures(files)) {
    const ariaLabel = `Name for ${file.name || "the pasted example"}`;
    const name = make("input", { type: "text", ariaLabel, autocomplete: "off", onchange: again });
    const removed = () => {
      numberExamples();
      $("example-files").focus();
    };
    $("example-list").append(row(file, removed, name));
  }
  numberExamples();
}

/** A row without a name shows the name that the service gives it. */
function numberExamples() {
  [...$("example-list").children].forEach((row, index) => (row.querySelector("input").placeholder = `example ${index}`));
  again();
}

const examples = () =>
  $("examples").hidden
    ? []
    : [...$("example-list").children].map((row) => ({ file: row.file, label: row.querySelector("input").value.trim() }));

// ---- settings of detect and segment: the model's defaults, until the user changes one

let catalogue = new Map(); // name -> the model in /v1/models
const changed = new Set(); // names of the settings that are sent

const model = () => catalogue.get($("model").value) ?? {};

/** Reset the forms to the model's defaults. */
function reset() {
  const { suppression, examples: most } = model();
  changed.clear();
  for (const [name, value] of Object.entries(suppression ?? {})) {
    const control = $("detect").elements[name];
    if (control?.type === "checkbox") control.checked = value;
    else if (control) control.value = value;
  }
  $("examples").hidden = !most;
  $("most").textContent = most;
  settings();
  const { methods = [], background = [] } = model().segmentation ?? {};
  $("segmenter").replaceChildren(...methods.map((name) => make("option", { value: name }, name)));
  $("background").placeholder = background.join(", ");
  $("independent").checked = false;
  const { methods: explainers = [] } = model().explanation ?? {};
  $("explainer").replaceChildren(...explainers.map((name) => make("option", { value: name }, name)));
  $("explainers").hidden = explainers.length < 2;
  least();
}

let moved = false; // whether the user moved the threshold of segment; else it is not sent

/** Show the threshold of a request that sets none. */
function least() {
  const { threshold = 0 } = model().segmentation ?? {};
  moved = false;
  $("threshold").value = $("independent").checked ? 0.5 : threshold;
  $("threshold").nextSibling.value = $("threshold").valueAsNumber.toFixed(2);
}

function setting(name) {
  const control = $("detect").elements[name];
  return { checkbox: control.checked, range: control.valueAsNumber }[control.type] ?? control.value;
}

/** Show the sliders' values. Disable the sliders that the method does not use. */
function settings() {
  $("sigma").disabled = setting("method") !== "gaussian";
  $("iou").disabled = setting("method") === "gaussian";
  $("defaults").hidden = !changed.size;
  for (const output of document.querySelectorAll("#detect output")) {
    const { name } = $(output.htmlFor.value);
    const value = (!changed.has(name) && model().suppression?.[name]) || setting(name); // the model's value may lie between the slider's steps
    output.value = value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 4 });
  }
}

// ---- answers

const task = () => document.querySelector("[role=tab][aria-selected=true]").getAttribute("aria-controls");

/** The fields of both classify and detect: picture, labels, model. */
function fields() {
  const body = { image: picture() };
  if ($("model").value) body.model = $("model").value;
  if ($("classifier").value) body.classifier = $("classifier").value;
  else body.labels = lines("labels");
  return body;
}

/** Fields -> a form. A list repeats its field. */
function form(body) {
  const data = new FormData();
  for (const [name, values] of Object.entries(body)) [values].flat().forEach((value) => data.append(name, value));
  return data;
}

/** The distinct texts of a text area. */
function lines(id) {
  const words = $(id).value.split(/[\n,]/).map((word) => word.trim());
  return [...new Set(words.filter(Boolean))];
}

const classify = (body = fields) =>
  answer(async (signal) => {
    const result = await ask("POST", "v1/classify", form(body()), signal);
    clear();
    show(result, bars(result.data.labels.slice(0, 12).map(({ label, score }) => [label, score])));
  });

/** [[text, part of 1]] -> a list with a bar for each. */
function bars(parts) {
  const rows = parts.map(([text, part]) => {
    const fill = make("i");
    fill.style.width = `${100 * part}%`;
    return make("li", {}, make("span", {}, text), make("b", {}, percent(part)), fill);
  });
  return make("ol", { className: "bars" }, ...rows);
}

const detect = (unrolled = true) =>
  answer(async (signal) => {
    const body = fields();
    for (const name of changed) body[name] = setting(name);
    const pictures = examples(); // only JSON can carry their names
    const result = await ask("POST", "v1/detect", pictures.length ? await withExamples(body, pictures) : form(body), signal);
    const { detections, suppression: by } = result.data;
    unrolled && detections.length ? unroll(detections) : draw(detections);
    const kept = `${by.kept} of ${by.candidates} kept by ${by.method} soft-NMS`;
    show(result, make("p", {}, kept), boxed(detections, ({ raw_score }) => `raw ${raw_score.toFixed(2)}`));
  });

/** Detections -> a list; the row under the pointer or with the focus stands out in the picture. */
function boxed(detections, note) {
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

const segment = () =>
  answer(async (signal) => {
    const body = { ...fields(), background: lines("background"), independent: $("independent").checked };
    if ($("segmenter").value) body.method = $("segmenter").value;
    if (moved) body.threshold = $("threshold").valueAsNumber;
    const result = await ask("POST", "v1/segment", form(body), signal);
    const { image, method, segments } = result.data;
    cover(segments.map(({ rle, ...rest }) => ({ ...rest, path: outline(rle) })));
    if (!segments.length) return show(result, make("p", {}, "No label fits a part of the picture."));
    show(result, make("p", {}, `score and part of the picture, by ${method}`), legend(image));
  });

/** The layers -> a list with a switch for each mask; the row under the pointer stands out in the picture. */
function legend({ width, height }) {
  const rows = layers.map(({ label, index, score, area }, i) => {
    const shown = make("input", { type: "checkbox", checked: !hidden.has(label) });
    shown.onchange = () => {
      shown.checked ? hidden.delete(label) : hidden.add(label);
      cover();
    };
    const name = make("label", {}, shown, make("i"), make("span", {}, label));
    name.querySelector("i").style.background = colour(index);
    const row = make("li", {}, name, make("b", {}, score.toFixed(2)), make("small", {}, percent(area / (width * height))));
    row.onmouseenter = () => cover(layers, i);
    row.onmouseleave = () => cover();
    return row;
  });
  return make("ul", { className: "detections" }, ...rows);
}

const tag = () =>
  answer(async (signal) => {
    const body = { image: picture(), words: lines("vocabulary"), ...($("model").value && { model: $("model").value }) };
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

const LEAST_COLOURED = 0.05; // a caption of words that all contribute less stays pale

const weigh = () =>
  answer(async (signal) => {
    const caption = $("caption").value.replace(/\s+/g, " ").trim(); // a form would send other line ends, and shift the words
    if (!caption) throw missing("Enter a caption first.");
    const body = { image: picture(), caption, ...($("explainer").value && { method: $("explainer").value }) };
    if ($("model").value) body.model = $("model").value;
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

const VERDICTS = new Map([[true, "Damaged"], [false, "Normal"], [null, "No verdict, because no threshold is known"]]);

const anomaly = (classifier = $("memory").value) =>
  answer(async (signal) => {
    const body = { image: picture(), ...(classifier ? { classifier } : { thing: $("thing").value.trim() }) };
    if ($("model").value) body.model = $("model").value;
    const result = await ask("POST", "v1/anomaly", form(body), signal);
    const { score, threshold, damaged, heat, method } = result.data;
    const image = make("img", { src: `data:image/png;base64,${heat}` });
    await image.decode();
    cover([{ image }]);
    const limit = threshold === null ? "" : ` by a threshold of ${threshold.toFixed(3)}`;
    show(result, bars([["anomaly score", score]]), make("p", {}, `${VERDICTS.get(damaged)}${limit}. Method: ${method}.`));
  });

async function withExamples(body, pictures) {
  const picture = async (file) => ({ b64: await base64(file) });
  const example = async ({ file, label }) => ({ image: await picture(file), ...(label && { label }) });
  return { ...body, image: await picture(body.image), examples: await Promise.all(pictures.map(example)) };
}

const search = (query) =>
  answer(async (signal) => {
    const name = collection();
    const body = { query: await query(), top_k: 12 };
    const result = await ask("POST", `v1/collections/${name}/search`, body, signal);
    const cards = result.data.hits.map(({ id, score, meta }) => {
      const title = meta?.title ?? id;
      const known = /^data:image\/jpeg;base64,/.test(meta?.thumbnail ?? "");
      const image = known ? make("img", { src: meta.thumbnail, alt: "" }) : make("div", { className: "blank" });
      return make("li", { title: id }, image, make("span", {}, title), make("b", {}, score.toFixed(3)));
    });
    show(result, cards.length ? make("ol", { className: "hits" }, ...cards) : make("p", {}, "No items match."));
  });

function collection() {
  const name = $("collection").value.trim();
  if (!name) throw missing("Enter the name of a collection first.");
  return encodeURIComponent(name);
}

const add = () =>
  answer(async (signal) => {
    const name = collection();
    picture();
    await ask("PUT", `v1/collections/${name}`, $("model").value ? { model: $("model").value } : {}, signal);
    $("adding").hidden = false;
    const failed = [];
    try {
      for (const [done, { file, url }] of chosen.entries()) {
        $("adding").value = done / chosen.length;
        const meta = { title: file.name || "pasted", thumbnail: await scaled(url, 128, 0.7).catch(() => undefined) };
        const item = { id: identity(file), image: { b64: await base64(file) }, meta };
        try {
          await ask("POST", `v1/collections/${name}/items`, { items: [item] }, signal);
        } catch (error) {
          if (!(error instanceof Problem)) throw error;
          failed.push(`${meta.title}: ${error.message}`);
        }
      }
      const summary = make("p", {}, `${chosen.length - failed.length} of ${chosen.length} added`);
      show({ stages: [] }, summary, make("ul", {}, ...failed.map((text) => make("li", {}, text))));
    } finally {
      $("adding").hidden = true;
      collections();
    }
  });

const base64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(missing(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });

/** The id is made of name and size, so a picture that is added twice is one item. */
const identity = (file) => `${(file.name || "pasted").replace(/[^\w.-]+/g, "_")}-${file.size}`;

/** A data URL of the picture as a JPEG of at most `side` pixels a side. The item of a collection stores a small one. */
async function scaled(url, side, quality) {
  const image = make("img", { src: url });
  await image.decode();
  const scale = Math.min(1, side / Math.max(image.naturalWidth, image.naturalHeight));
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale].map(Math.ceil);
  const canvas = make("canvas", { width, height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; // under transparent pixels, as in the service
  pen.fillRect(0, 0, width, height);
  pen.drawImage(image, 0, 0, width, height);
  return canvas.toDataURL("image/jpeg", quality);
}

// ---- fits: a class holds its name and the rows of its pictures

const LARGE = 512 * 1024; // bytes; a larger picture of a class is sent smaller, so that many fit into one request
const BEST = "gda"; // of the methods, for few pictures
let fitted; // name of the classifier that was fitted and neither kept nor thrown away
let methods = new Map(); // name -> the method in /v1/classifiers

const method = () => methods.get($("method").value) ?? {};

function addClass() {
  const name = make("input", { type: "text", autocomplete: "off", placeholder: "what its pictures show" });
  const list = make("ul", { className: "thumbs" });
  const files = make("input", { type: "file", accept: $("files").accept, multiple: true });
  const remove = make("button", { type: "button" }, "×");
  const label = make("label", { className: "drop" }, files, make("span", {}, make("b", {}, "Add pictures"), ", or drop them here"));
  const element = make("fieldset", { className: "class zone" }, make("legend"), make("div", { className: "row" }, name, remove), list, label);
  const removed = () => {
    numberClasses();
    files.focus();
  };
  element.take = (chosen) => {
    list.append(...pictures(chosen).map((file) => row(file, removed)));
    numberClasses();
  };
  files.onchange = () => {
    element.take(files.files);
    files.value = ""; // else a removed file could not be added again
  };
  remove.onclick = () => {
    [...list.children].forEach(({ url }) => URL.revokeObjectURL(url));
    element.remove();
    numberClasses();
    $("more").focus();
  };
  $("classes").append(element);
  numberClasses();
  return name;
}

/** Names for screen readers, and the number of pictures. */
function numberClasses() {
  [...$("classes").children].forEach((element, index) => {
    const count = element.querySelectorAll("li").length;
    const [name, remove] = element.querySelector(".row").children;
    element.querySelector("legend").textContent = `Class ${index + 1}: ${count} picture${count === 1 ? "" : "s"}`;
    name.ariaLabel = `Name of class ${index + 1}`;
    remove.ariaLabel = `Remove class ${index + 1}`;
    element.querySelector("input[type=file]").ariaLabel = `Add pictures to class ${index + 1}`;
  });
}

/** The pictures of all classes, as items of the request. */
function items() {
  return [...$("classes").children].flatMap((element, index) => {
    const rows = [...element.querySelectorAll("li")];
    const label = element.querySelector("[type=text]").value.trim();
    if (rows.length && !label) throw missing(`Enter a name for class ${index + 1}.`);
    if (label && !rows.length) throw missing(`Add a picture to the class ${label}.`);
    return rows.map(async ({ file, url }) => {
      const small = file.size > LARGE && (await scaled(url, 1024, 0.92).catch(() => "")); // "": the browser cannot read it
      return { label, image: { b64: small ? small.slice(small.indexOf(",") + 1) : await base64(file) } };
    });
  });
}

const fit = () =>
  answer(async (signal) => {
    const name = $("fit-name").value.trim();
    const body = { items: await Promise.all(items()), method: $("method").value, replace: name === fitted };
    if (!body.items.length) throw missing("Add some pictures to each class first.");
    if ($("model").value) body.model = $("model").value;
    const result = await ask("POST", `v1/classifiers/${encodeURIComponent(name)}/fit`, body, signal);
    decide(name);
    report(result.data, method().task);
    show(result);
  });

/** Show the accuracy before and after the fit, and what else the method says. */
function report({ name, report: { before, after, measured, pictures, labels, params, seconds, notes } }, kind) {
  const facts = Object.entries(params).map(([key, value]) => `${key} ${Number.isInteger(value) || typeof value !== "number" ? value : Number(value.toPrecision(3))}`);
  const how = kind === "anomaly" ? [] : [`measured by ${measured}`];
  const accuracy =
    kind === "anomaly"
      ? "" // its notes have the threshold
      : before === null
      ? make("p", {}, "No picture could be left out of the fit, so the accuracy is not known. Add pictures.")
      : bars([["accuracy before, by the words alone", before], ["accuracy after the fit", after]]);
  $("report").replaceChildren(
    make("h2", {}, `${name}: ${pictures} pictures of ${labels} classes`),
    accuracy,
    make("p", {}, make("small", {}, [...how, ...facts, `fitted in ${seconds.toFixed(2)} s`].join(" · "))),
    make("ul", {}, ...notes.map((note) => make("li", {}, note))),
  );
}

/** `name`: the classifier that waits for a decision; until then a fit replaces it. None: it was made. */
function decide(name) {
  fitted = name;
  $("fitted").hidden = !name;
  $("fit-name").readOnly = Boolean(name);
}

/** Use the fitted classifier on the picture. */
const attempt = () =>
  method().task === "anomaly" ? anomaly(fitted) : classify(() => ({ image: picture(), classifier: fitted, ...($("model").value && { model: $("model").value }) }));

const keep = () =>
  answer(async () => {
    const name = fitted;
    decide();
    await classifiers();
    const [list, user] = method().task === "anomaly" ? ["memory", "tab-anomaly"] : ["classifier", "tab-classify"];
    $(list).value = name;
    $("fit-name").value = "";
    show({ stages: [] }, make("p", {}, `${name} is kept. The tab ${$(user).textContent} uses it now.`));
    $(user).focus();
  });

const discard = () =>
  answer(async (signal) => {
    await ask("DELETE", `v1/classifiers/${encodeURIComponent(fitted)}`, undefined, signal);
    show({ stages: [] }, make("p", {}, `${fitted} was thrown away.`));
    decide();
    $("fit-name").focus();
  });

/** Show an answer, and under it the stages of the request. */
function show({ stages, ms }, ...parts) {
  $("answer").replaceChildren(...parts);
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

// ---- event handlers

/** Send the request of the tabs Detect and Segment again, because a setting or an example has changed. */
const again = () => current >= 0 && ({ detect: () => detect(false), segment })[task()]?.();

const submit = () => ({ classify: () => classify(), detect: () => detect(), segment, tag, explain: () => $("caption").value.trim() && weigh(), anomaly: () => anomaly(), search: () => {}, fit: () => fitted && attempt() })[task()]();

function tab(button) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const on = other === button;
    other.setAttribute("aria-selected", String(on));
    other.tabIndex = on ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !on;
  }
  $("words").hidden = !["classify", "detect", "segment"].includes(task());
  running.abort();
  $("work").removeAttribute("aria-busy");
  for (const id of ["problem", "answer"]) $(id).replaceChildren();
  $("timing").hidden = true;
  clear();
  if (current >= 0) submit();
}

/** Repeated every second until all bundles are loaded. The menu changes only if the list does. */
async function models() {
  const { ready, loaded } = await ask("GET", "readyz").then(({ data }) => data, ({ body }) => body ?? {});
  const known = [...$("model").options].map(({ value }) => value);
  if (loaded && loaded.join() !== known.join()) {
    const { data } = await ask("GET", "v1/models");
    const options = loaded.map((name) => make("option", { value: name }, name));
    $("model").replaceChildren(...(options.length ? options : [make("option", { value: "" }, "none loaded yet")]));
    $("model").disabled = options.length < 2;
    catalogue = new Map(data.models.map((model) => [model.name, model]));
    change();
  }
  if (ready) await collections();
  else setTimeout(() => models().catch(explain), 1000);
}

/** Another model: show its settings, and open a tab that it serves. */
function change() {
  reset();
  const served = (button) => !model().tasks || model().tasks.includes(button.dataset.task);
  const open = tabs.find((button) => button.ariaSelected === "true");
  if (!served(open) && tabs.some(served)) tab(tabs.find(served));
  else if (current >= 0) submit();
}

async function collections() {
  const { data } = await ask("GET", "v1/collections");
  $("collections").replaceChildren(...data.collections.map(({ name }) => make("option", { value: name })));
  if (!$("collection").value && data.collections.length) $("collection").value = data.collections[0].name;
}

async function classifiers() {
  const { data } = await ask("GET", "v1/classifiers");
  methods = new Map(data.methods.map((method) => [method.name, method]));
  const use = ({ head }) => methods.get(head)?.task ?? "classify";
  for (const [list, row, kind] of [["classifier", "registered", "classify"], ["memory", "remembered", "anomaly"]]) {
    const names = data.classifiers.filter((classifier) => use(classifier) === kind).map(({ name }) => name);
    $(list).replaceChildren($(list).options[0], ...names.map((name) => make("option", { value: name }, name)));
    $(row).hidden = !names.length;
  }
  const before = $("method").value || BEST;
  const classes = ({ labels, names }) => names.join(", ") || (labels ? `${labels} classes` : "");
  const text = (method) => (classes(method) ? `${method.name} (${classes(method)})` : method.name);
  $("method").replaceChildren(...data.methods.map((method) => make("option", { value: method.name }, text(method))));
  if (methods.has(before)) $("method").value = before;
}

/** If the method takes some labels alone, the first class, which needs pictures, gets its name. */
function nameClass() {
  const name = document.querySelector("#classes [type=text]");
  if (name && !name.value) name.value = method().names?.[0] ?? "";
}

const on = (id, event, act) => $(id).addEventListener(event, act);
const quietly = (act) => (event) => {
  event.preventDefault();
  act(event);
};

on("classify", "submit", quietly(() => classify()));
on("detect", "submit", quietly(() => detect()));
on("detect", "input", ({ target }) => {
  if (!target.name) return; // the name of an example
  changed.add(target.name);
  settings();
  clearTimeout(pause);
  pause = setTimeout(again, 120);
});
on("segment", "submit", quietly(segment));
on("segment", "input", ({ target }) => {
  if (target.id === "background") return; // sent with the button
  if (target.id === "independent") least();
  if (target.id === "threshold") {
    moved = true;
    $("threshold").nextSibling.value = target.valueAsNumber.toFixed(2);
  }
  clearTimeout(pause);
  pause = setTimeout(again, 120);
});
on("opacity", "input", fade);
on("defaults", "click", () => {
  reset();
  again();
  document.querySelector("[name=method]:checked").focus(); // the button is hidden now
});
on("example-files", "change", ({ target }) => {
  addExamples(target.files);
  target.value = ""; // else a removed file could not be added again
});
on("collect", "submit", quietly(add));
on("query", "submit", quietly(() => search(() => {
  const text = $("sentence").value.trim();
  if (!text) throw missing("Enter a sentence first.");
  return { text };
})));
on("alike", "click", () => search(async () => ({ image: { b64: await base64(picture()) } })));
on("teach", "submit", quietly(fit));
on("more", "click", () => addClass().focus());
on("method", "change", nameClass);
on("try", "click", attempt);
on("keep", "click", keep);
on("discard", "click", discard);
on("files", "change", ({ target }) => choose(target.files));
on("tag", "submit", quietly(tag));
on("explain", "submit", quietly(weigh));
on("explainer", "change", () => current >= 0 && submit());
on("anomaly", "submit", quietly(() => anomaly()));
for (const id of ["labels", "vocabulary", "background", "caption"])
  on(id, "keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) quietly(submit)(event);
  });
on("classifier", "change", () => current >= 0 && submit());
on("memory", "change", () => current >= 0 && submit());
on("model", "change", change);

const tabs = [...document.querySelectorAll("[role=tab]")];
for (const [index, button] of tabs.entries()) {
  button.onclick = () => tab(button);
  button.onkeydown = ({ key }) => {
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: -1 }[key];
    if (next === undefined) return;
    tab(tabs.at(next % tabs.length));
    tabs.at(next % tabs.length).focus();
  };
}

/** A zone takes the files that are dropped or pasted in it; outside of all zones they are the picture. */
$("examples").take = addExamples;
$("pictures").take = choose;
const zone = (target) => target.closest?.(".zone") ?? $("pictures");
const over = (aim) => document.querySelectorAll(".drop").forEach((drop) => drop.classList.toggle("over", drop === aim));
addEventListener("paste", ({ target, clipboardData }) => zone(target).take(clipboardData.files));
addEventListener("dragover", quietly(({ target }) => over(zone(target).querySelector(".drop"))));
addEventListener("dragleave", () => over(null));
addEventListener("drop", quietly(({ target, dataTransfer }) => {
  over(null);
  zone(target).take(dataTransfer.files);
}));
new ResizeObserver(() => draw(drawn)).observe($("picture"));

/** Load what every request needs. If a key is missing, the page asks for one and runs this again. */
const begin = () => Promise.all([models(), classifiers()]).catch(explain);

on("key", "submit", quietly(() => {
  sessionStorage.setItem(KEY, $("secret").value.trim());
  $("key").reset();
  $("key").hidden = true;
  $("problem").replaceChildren();
  begin();
}));

settings();
fade();
addClass();
addClass();
begin();
