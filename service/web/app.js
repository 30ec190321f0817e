// The page's whole client, over the public routes only. From top to bottom: asking the service, the picture
// and its boxes, examples, settings of detect, one function per answer, the stages, and at the end what listens to whom.

const $ = (id) => document.getElementById(id);

/** An element with properties and children; text is always text, never markup. */
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const percent = (score) => `${(100 * score).toFixed(1)} %`;
const colour = (index) => `oklch(52% 0.17 ${(index * 137.508 + 255) % 360})`; // neighbours differ most; white reads on all

// ---- asking the service

/** What went wrong, as RFC 9457 tells it. */
class Problem extends Error {
  constructor(body) {
    super(body.detail || body.title);
    this.body = body;
  }
}

const KEY = "calmclip-key"; // in this tab alone, and gone with it
const key = () => sessionStorage.getItem(KEY);

/** -> {data, stages, ms}. Body: a form, or a value that becomes JSON. Throws `Problem`. */
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

/** As a request walks through them. */
const STAGES = ["read", "decode", "preprocess", "queue", "infer", "postprocess", "search", "write", "serialize"];

/** "infer;dur=18.9, decode;dur=1.4" -> [["decode", 1.4], ["infer", 18.9]] in milliseconds, in the order above. */
const timing = (header) =>
  [...(header ?? "").matchAll(/([\w-]+)(?:;[^,]*?)?;dur=([\d.]+)/g)]
    .map(([, name, duration]) => [name, Number(duration)])
    .filter(([name]) => STAGES.includes(name))
    .sort(([one], [other]) => STAGES.indexOf(one) - STAGES.indexOf(other));

let running = new AbortController();
let pause; // until a slider rests

/** Run what fills the answer: a newer run replaces an older one, and a problem is shown in words. */
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
    draw([]);
    explain(error);
  } finally {
    if (!signal.aborted) $("work").removeAttribute("aria-busy");
  }
}

function explain(error) {
  const { status, title, detail, type, known = [], errors = [], request_id } = error.body ?? { title: error.message };
  const closed = [401, 403].includes(status);
  if (closed) $("key").hidden = false;
  const linked = type && !closed && !key(); // a link brings no key
  const parts = [make("strong", {}, linked ? make("a", { href: type.replace(/^\//, "") }, title) : title)];
  if (detail) parts.push(make("p", {}, detail));
  if (errors.length > 1) parts.push(make("ul", {}, ...errors.map((e) => make("li", {}, `${e.where}: ${e.message}`))));
  if (known.length) parts.push(make("p", {}, `Known: ${known.join(", ")}`));
  if (request_id) parts.push(make("small", {}, `request ${request_id}`));
  $("problem").replaceChildren(...parts);
}

const asked = (detail) => new Problem({ title: "Something is missing", detail });

// ---- the picture and its boxes

let chosen = []; // [{file, url}]
let current = -1; // which of them is on the stage
let shown = []; // the detections on the canvas
const MOST_TAGS = 12; // boxes with a name on them; more would hide the picture

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
  draw([]);
  $("picture").src = chosen[index].url;
  $("picture").alt = chosen[index].file.name || "the pasted picture";
  await $("picture").decode().catch(() => {}); // not one the browser reads: the service says so in words
  if (task() !== "search") submit();
}

function picture() {
  if (current < 0) throw asked("Choose, drop or paste a picture first.");
  return chosen[current].file;
}

/** Boxes are x0 y0 x1 y1 in pixels of the upright picture, which is how the browser shows it. */
function draw(detections, bright = -1, count = detections.length) {
  shown = detections;
  const { naturalWidth, naturalHeight, clientWidth } = $("picture");
  const canvas = $("boxes");
  const pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = [naturalWidth, naturalHeight]; // also wipes it
  const unit = naturalWidth / Math.max(clientWidth, 1); // picture pixels per page pixel
  pen.font = `600 ${13 * unit}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  const all = [...detections.keys()].slice(0, count);
  const order = bright < 0 ? all : [bright, ...all.filter((i) => i !== bright)];
  const alpha = (i) => (bright < 0 || i === bright ? 1 : 0.25);
  for (const i of order.toReversed()) { // the best on top
    const { box, index } = detections[i];
    pen.globalAlpha = alpha(i);
    pen.strokeStyle = colour(index);
    pen.lineWidth = (i === bright ? 4 : 2.5) * unit;
    pen.strokeRect(box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0);
  }
  const height = 18 * unit;
  const tags = []; // the best first; one that would hide another moves down
  for (const i of order.filter((i) => i === bright || i < MOST_TAGS)) {
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

/** One box after the other, best first, as they were kept. */
function unroll(detections) {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return draw(detections);
  const start = performance.now();
  const step = (now) => {
    const count = Math.ceil(((now - start) / 400) * detections.length);
    if (shown === detections) draw(detections, -1, Math.max(1, count));
    if (shown === detections && count < detections.length) requestAnimationFrame(step);
  };
  draw(detections, -1, 0);
  requestAnimationFrame(step);
}

// ---- examples: each row of the list holds its file, and the name for what is found by it

function exemplify(files) {
  if (!pictures(files).length) return;
  for (const file of pictures(files)) {
    const url = URL.createObjectURL(file);
    const title = file.name || "the pasted example";
    const name = make("input", { type: "text", ariaLabel: `Name for ${title}`, autocomplete: "off", onchange: again });
    const remove = make("button", { type: "button", ariaLabel: `Remove ${title}` }, "×");
    const row = make("li", { file, title }, make("img", { src: url, alt: "" }), name, remove);
    remove.onclick = () => {
      URL.revokeObjectURL(url);
      row.remove();
      count();
      $("example-files").focus();
    };
    $("shown").append(row);
  }
  count();
}

/** Rows are called as the service calls them where they have no name. */
function count() {
  [...$("shown").children].forEach((row, index) => (row.querySelector("input").placeholder = `example ${index}`));
  again();
}

const examples = () =>
  $("examples").hidden
    ? []
    : [...$("shown").children].map((row) => ({ file: row.file, label: row.querySelector("input").value.trim() }));

// ---- settings of detect: the model's own, until somebody moves one

let catalogue = new Map(); // name -> what the service says of the model
const moved = new Set(); // names of the settings that are sent

const model = () => catalogue.get($("model").value) ?? {};

/** What was moved is forgotten: the form shows what the model does with a request that says nothing. */
function adopt() {
  const { suppression, examples: most } = model();
  moved.clear();
  for (const [name, value] of Object.entries(suppression ?? {})) {
    const control = $("detect").elements[name];
    if (control?.type === "checkbox") control.checked = value;
    else if (control) control.value = value;
  }
  $("examples").hidden = !most;
  $("most").textContent = most;
  settings();
}

function setting(name) {
  const control = $("detect").elements[name];
  return { checkbox: control.checked, range: control.valueAsNumber }[control.type] ?? control.value;
}

/** The sliders' values beside them; those that the method does not use are off. */
function settings() {
  $("sigma").disabled = setting("method") !== "gaussian";
  $("iou").disabled = setting("method") === "gaussian";
  $("untouched").hidden = !moved.size;
  for (const output of document.querySelectorAll("#detect output")) {
    const { name } = $(output.htmlFor.value);
    const value = (!moved.has(name) && model().suppression?.[name]) || setting(name); // which may lie off the slider's steps
    output.value = value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 4 });
  }
}

// ---- answers

const task = () => document.querySelector("[role=tab][aria-selected=true]").getAttribute("aria-controls");

/** What classify and detect are both asked: picture, labels, model. */
function question() {
  const asking = { image: picture() };
  if ($("model").value) asking.model = $("model").value;
  if ($("classifier").value) asking.classifier = $("classifier").value;
  else asking.labels = labels();
  return asking;
}

/** Fields as a form, a list by repeating its field. */
function form(fields) {
  const data = new FormData();
  for (const [name, values] of Object.entries(fields)) [values].flat().forEach((value) => data.append(name, value));
  return data;
}

function labels() {
  const words = $("labels").value.split(/[\n,]/).map((word) => word.trim());
  return [...new Set(words.filter(Boolean))];
}

const classify = () =>
  answer(async (signal) => {
    const found = await ask("POST", "v1/classify", form(question()), signal);
    draw([]);
    const rows = found.data.labels.slice(0, 12).map(({ label, score }) => {
      const fill = make("i");
      fill.style.width = `${100 * score}%`;
      return make("li", {}, make("span", {}, label), make("b", {}, percent(score)), fill);
    });
    show(found, make("ol", { className: "bars" }, ...rows));
  });

const detect = (unrolled = true) =>
  answer(async (signal) => {
    const asking = question();
    for (const name of moved) asking[name] = setting(name);
    const shown = examples(); // only JSON can name them
    const found = await ask("POST", "v1/detect", shown.length ? await exemplified(asking, shown) : form(asking), signal);
    const { detections, suppression: by } = found.data;
    unrolled && detections.length ? unroll(detections) : draw(detections);
    const rows = detections.map(({ label, index, score, raw_score }, i) => {
      const row = make("li", { tabIndex: 0, onmouseenter: () => draw(detections, i), onmouseleave: () => draw(detections) });
      row.onfocus = row.onmouseenter;
      row.onblur = row.onmouseleave;
      row.append(make("i"), make("span", {}, label), make("b", {}, score.toFixed(2)), make("small", {}, `raw ${raw_score.toFixed(2)}`));
      row.firstChild.style.background = colour(index);
      return row;
    });
    const kept = `${by.kept} of ${by.candidates} kept by ${by.method} soft-NMS`;
    show(found, make("p", {}, kept), make("ul", { className: "found" }, ...rows));
  });

async function exemplified(asking, shown) {
  const picture = async (file) => ({ b64: await base64(file) });
  const one = async ({ file, label }) => ({ image: await picture(file), ...(label && { label }) });
  return { ...asking, image: await picture(asking.image), examples: await Promise.all(shown.map(one)) };
}

const search = (query) =>
  answer(async (signal) => {
    const name = collection();
    const asking = { query: await query(), top_k: 12 };
    const found = await ask("POST", `v1/collections/${name}/search`, asking, signal);
    const cards = found.data.hits.map(({ id, score, meta }) => {
      const title = meta?.title ?? id;
      const known = /^data:image\/jpeg;base64,/.test(meta?.thumbnail ?? "");
      const image = known ? make("img", { src: meta.thumbnail, alt: "" }) : make("div", { className: "blank" });
      return make("li", { title: id }, image, make("span", {}, title), make("b", {}, score.toFixed(3)));
    });
    show(found, cards.length ? make("ol", { className: "hits" }, ...cards) : make("p", {}, "Nothing was found."));
  });

function collection() {
  const name = $("collection").value.trim();
  if (!name) throw asked("Name a collection first.");
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
        const meta = { title: file.name || "pasted", thumbnail: await thumbnail(url).catch(() => undefined) };
        const item = { id: identity(file), image: { b64: await base64(file) }, meta };
        try {
          await ask("POST", `v1/collections/${name}/items`, { items: [item] }, signal);
        } catch (error) {
          if (!(error instanceof Problem)) throw error;
          failed.push(`${meta.title}: ${error.message}`);
        }
      }
      const told = make("p", {}, `${chosen.length - failed.length} of ${chosen.length} added`);
      show({ stages: [] }, told, make("ul", {}, ...failed.map((text) => make("li", {}, text))));
    } finally {
      $("adding").hidden = true;
      collections();
    }
  });

const base64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(asked(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });

/** Name and size stand for the picture: adding it twice leaves one. */
const identity = (file) => `${(file.name || "pasted").replace(/[^\w.-]+/g, "_")}-${file.size}`;

/** A picture of at most 128 pixels a side as a data URL, kept in the item's metadata for later answers. */
async function thumbnail(url) {
  const image = make("img", { src: url });
  await image.decode();
  const scale = 128 / Math.max(image.naturalWidth, image.naturalHeight);
  const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale].map(Math.ceil);
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, 0, 0, width, height);
  return canvas.toDataURL("image/jpeg", 0.7);
}

/** Put an answer on the page, and under it the stages it took. */
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
  $("stages").replaceChildren(`${total.toFixed(1)} ms in the service, ${ms.toFixed(0)} ms there and back`, ...names);
}

// ---- what listens to whom

/** Where detect is what is looked at: once more, for something of what it is asked was changed. */
const again = () => current >= 0 && task() === "detect" && detect(false);

const submit = () => ({ classify, detect, search: () => {} })[task()]();

function tab(button) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const on = other === button;
    other.setAttribute("aria-selected", String(on));
    other.tabIndex = on ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !on;
  }
  $("words").hidden = task() === "search";
  running.abort();
  $("work").removeAttribute("aria-busy");
  for (const id of ["problem", "answer"]) $(id).replaceChildren();
  $("timing").hidden = true;
  draw([]);
  if (current >= 0) submit();
}

/** Asked again every second until all is loaded; the menu stays untouched where nothing changed. */
async function models() {
  const { ready, loaded } = await ask("GET", "readyz").then(({ data }) => data, ({ body }) => body ?? {});
  const known = [...$("model").options].map(({ value }) => value);
  if (loaded && loaded.join() !== known.join()) {
    const { data } = await ask("GET", "v1/models");
    const options = loaded.map((name) => make("option", { value: name }, name));
    $("model").replaceChildren(...(options.length ? options : [make("option", { value: "" }, "none loaded yet")]));
    $("model").disabled = options.length < 2;
    catalogue = new Map(data.models.map((one) => [one.name, one]));
    change();
  }
  if (ready) await collections();
  else setTimeout(() => models().catch(explain), 1000);
}

/** Another model: its own settings, and of the tabs one that it serves. */
function change() {
  adopt();
  const served = (button) => !model().tasks || model().tasks.includes(button.dataset.task);
  const open = tabs.find((button) => button.ariaSelected === "true");
  if (!served(open) && tabs.some(served)) tab(tabs.find(served));
  else if (current >= 0 && task() !== "search") submit();
}

async function collections() {
  const { data } = await ask("GET", "v1/collections");
  $("collections").replaceChildren(...data.collections.map(({ name }) => make("option", { value: name })));
  if (!$("collection").value && data.collections.length) $("collection").value = data.collections[0].name;
}

async function sets() {
  const { data } = await ask("GET", "v1/classifiers");
  $("classifier").replaceChildren($("classifier").options[0], ...data.classifiers.map(({ name }) => make("option", { value: name }, name)));
  $("registered").hidden = !data.classifiers.length;
}

const on = (id, event, act) => $(id).addEventListener(event, act);
const quietly = (act) => (event) => {
  event.preventDefault();
  act(event);
};

on("classify", "submit", quietly(classify));
on("detect", "submit", quietly(() => detect()));
on("detect", "input", ({ target }) => {
  if (!target.name) return; // an example's
  moved.add(target.name);
  settings();
  clearTimeout(pause);
  pause = setTimeout(again, 120);
});
on("untouched", "click", () => {
  adopt();
  again();
  document.querySelector("[name=method]:checked").focus(); // the button is gone
});
on("example-files", "change", ({ target }) => {
  exemplify(target.files);
  target.value = ""; // or the same file, taken out, could not be added again
});
on("collect", "submit", quietly(add));
on("query", "submit", quietly(() => search(() => {
  const text = $("sentence").value.trim();
  if (!text) throw asked("Write a sentence first.");
  return { text };
})));
on("alike", "click", () => search(async () => ({ image: { b64: await base64(picture()) } })));
on("files", "change", ({ target }) => choose(target.files));
on("labels", "keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) quietly(submit)(event);
});
on("classifier", "change", () => current >= 0 && submit());
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

const zone = (target) => target.closest?.("#examples")?.querySelector(".drop") ?? $("drop");
const take = (target, files) => (zone(target) === $("drop") ? choose : exemplify)(files);
const over = (aim) => document.querySelectorAll(".drop").forEach((one) => one.classList.toggle("over", one === aim));
addEventListener("paste", ({ target, clipboardData }) => take(target, clipboardData.files));
addEventListener("dragover", quietly(({ target }) => over(zone(target))));
addEventListener("dragleave", () => over(null));
addEventListener("drop", quietly(({ target, dataTransfer }) => {
  over(null);
  take(target, dataTransfer.files);
}));
new ResizeObserver(() => draw(shown)).observe($("picture"));

/** What every answer needs; where a key is missing it is asked for, and this runs again. */
const begin = () => Promise.all([models(), sets()]).catch(explain);

on("key", "submit", quietly(() => {
  sessionStorage.setItem(KEY, $("secret").value.trim());
  $("key").reset();
  $("key").hidden = true;
  $("problem").replaceChildren();
  begin();
}));

settings();
begin();
