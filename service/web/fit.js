// The tab Fit: classifiers from pictures. A class holds its name and the rows of its pictures.

import { anomaly } from "./anomaly.js";
import { answer, bars, show } from "./answers.js";
import { classify } from "./classify.js";
import { $, make, on, quietly } from "./elements.js";
import { asked } from "./models.js";
import { picture, pictures, row, shrunk } from "./pictures.js";
import { ask, missing } from "./requests.js";
import { panel } from "./tabs.js";

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
  nameClasses();
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

/** The file, or a smaller one of the same name; the same if the browser cannot read it. */
async function light(file, url) {
  if (file.size <= LARGE) return file;
  const canvas = await shrunk(url, 1024).catch(() => null);
  const data = canvas && (await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92)));
  return data ? new File([data], file.name, { type: data.type }) : file;
}

/** The pictures of all classes, as items of the request. */
function items() {
  return [...$("classes").children].flatMap((element, index) => {
    const rows = [...element.querySelectorAll("li")];
    const label = element.querySelector("[type=text]").value.trim();
    if (rows.length && !label) throw missing(`Enter a name for class ${index + 1}.`);
    if (label && !rows.length && !element.querySelector("[type=text]").readOnly) throw missing(`Add a picture to the class ${label}.`);
    return rows.map(async ({ file, url }) => ({ label, image: await light(file, url) }));
  });
}

const fit = () =>
  answer(async (signal) => {
    const name = $("fit-name").value.trim();
    const body = { items: await Promise.all(items()), method: $("method").value, replace: name === fitted, ...asked() };
    if (!body.items.length) throw missing("Add some pictures to each class first.");
    const result = await ask("POST", `v1/classifiers/${encodeURIComponent(name)}/fit`, body, signal);
    decide(name);
    report(result.data, method().task);
    show(result, make("p", {}, "Fitted. Choose a picture or try the one that is shown. Then keep the classifier, or throw it away."));
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
  method().task === "anomaly" ? anomaly(fitted) : classify(() => ({ image: picture(), classifier: fitted, ...asked() }));

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

export async function classifiers() {
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
  nameClasses();
}

/** If the method takes some labels alone, they are the names of the classes. A later method has the user's names again. */
function nameClasses() {
  const { names = [] } = method();
  [...$("classes").children].forEach((element, index) => {
    const name = element.querySelector("[type=text]");
    if (!name.readOnly) name.dataset.own = name.value;
    name.readOnly = index < names.length;
    name.value = names[index] ?? name.dataset.own;
  });
}

on("teach", "submit", quietly(fit));
on("more", "click", () => addClass().focus());
on("method", "change", nameClasses);
on("try", "click", attempt);
on("keep", "click", keep);
on("discard", "click", discard);
panel("fit", { submit: () => fitted && attempt() });
addClass();
addClass();
