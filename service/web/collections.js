// The collections: choose, create and delete one, and add pictures to it.

import { answer, show } from "./answers.js";
import { $, make, on, quietly } from "./elements.js";
import { chosenFiles, droppedFiles } from "./folders.js";
import { recall, remember } from "./memory.js";
import { asked } from "./models.js";
import { chosen, picture, pictures } from "./pictures.js";
import { tell } from "./problems.js";
import { ask, missing } from "./requests.js";
import { sure } from "./sure.js";
import { tab } from "./tabs.js";
import { onUpload, upload, uploads } from "./uploads.js";

let known = new Map(); // name -> the collection in /v1/collections

export const path = (name, rest = "") => `v1/collections/${encodeURIComponent(name)}${rest}`;

/** The chosen collection, as the service describes it. */
export function collection() {
  const name = $("collection").value;
  if (!name) throw missing("Create a collection first.");
  return known.get(name);
}

/** Read the list again. `name`: the collection to choose. */
export async function collections(name = $("collection").value || recall("collection")) {
  const { data } = await ask("GET", "v1/collections");
  known = new Map(data.collections.map((one) => [one.name, one]));
  $("collection").replaceChildren(...[...known.keys()].map((value) => make("option", { value }, value)));
  if (known.has(name)) $("collection").value = name;
  $("chosen-collection").hidden = !known.size;
  creating(!known.size || !$("create").hidden);
  describe();
}

function describe() {
  const { items, model, originals } = known.get($("collection").value) ?? {};
  const keeps = originals ? "keeps the pictures" : "keeps thumbnails only";
  $("described").textContent = items === undefined ? "" : `${items.toLocaleString("en")} item${items === 1 ? "" : "s"} · ${model} · ${keeps}`;
}

/** Show or hide the form that creates a collection. The first one has no way back. */
function creating(open) {
  $("create").hidden = !open;
  $("new").setAttribute("aria-expanded", String(open));
  $("leave-create").hidden = !known.size;
}

async function create() {
  const name = $("name").value.trim();
  await ask("PUT", path(name), { ...asked(), keep_originals: $("originals").checked });
  $("name").value = "";
  remember("collection", name);
  await collections(name);
  creating(false);
}

const drop = () =>
  answer(async () => {
    const { name, items } = collection();
    if (!(await sure(`Delete the collection ${name} with its ${items.toLocaleString("en")} items? There is no way back.`, "Delete"))) return;
    uploads.filter((one) => one.collection === name && one.state !== "done").forEach((one) => one.cancel());
    await ask("DELETE", path(name));
    await collections("");
    show({ stages: [] }, make("p", {}, `${name} was deleted.`));
    (known.size ? $("collection") : $("name")).focus();
  });

/** Start an upload of `files` ([{path, file}]). Problems are told; nothing else of the page waits for it. */
async function add(files, name) {
  try {
    const wanted = files.filter(({ file }) => pictures([file]).length);
    if (!wanted.length) throw missing(files.length ? `None of the ${files.length} files is a picture.` : "There is no file in it.");
    if (!$("create").hidden && !$("collection").value) {
      if (!$("create").reportValidity()) return;
      await create();
    }
    $("problem").replaceChildren();
    upload(collection().name, name, wanted, files.length - wanted.length);
  } catch (error) {
    tell(error);
  }
}

/** What the user chose, for people: a folder, or some files. */
function called(files) {
  const roots = new Set(files.map(({ path }) => (path.includes("/") ? path.split("/")[0] : "")));
  const [root] = roots;
  return roots.size === 1 && root ? `the folder ${root}` : `${files.length.toLocaleString("en")} file${files.length === 1 ? "" : "s"}`;
}

const taken = async (files) => {
  const all = await files;
  await add(all, called(all));
};

for (const id of ["upload-files", "upload-folder"])
  on(id, "change", ({ target }) => {
    taken(chosenFiles(target.files));
    target.value = ""; // else the same folder could not be chosen again
  });
on("choose-folder", "click", () => $("upload-folder").click());
on("upload-chosen", "click", () => {
  try {
    picture();
    add(chosen.map(({ file }) => ({ path: file.name || "pasted", file })), `${chosen.length} chosen picture${chosen.length === 1 ? "" : "s"}`);
  } catch (error) {
    tell(error);
  }
});
$("search").take = (files, transfer) => {
  if (files.length) taken(transfer ? droppedFiles(transfer) : chosenFiles(files)).catch(tell); // else text was pasted
};

on("new", "click", () => {
  creating($("create").hidden);
  if (!$("create").hidden) $("name").focus();
});
on("leave-create", "click", () => {
  creating(false);
  $("new").focus();
});
on("create", "submit", quietly(() => answer(async () => {
  await create();
  show({ stages: [] }, make("p", {}, `${$("collection").value} was created. Add pictures to it.`));
  $("upload-files").focus();
})));
on("drop-collection", "click", drop);
on("collection", "change", () => {
  remember("collection", $("collection").value);
  describe();
});

/** Choose again what a reload interrupted. */
export function chooseAgain({ collection, folder }) {
  if (known.has(collection)) $("collection").value = collection;
  describe();
  tab($("tab-search"));
  $(folder ? "upload-folder" : "upload-files").click();
}

onUpload(({ collection, items }) => {
  if (items === undefined || !known.has(collection)) return;
  known.get(collection).items = items;
  describe();
});
