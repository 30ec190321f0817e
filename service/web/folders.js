// Files with their paths: of a file input, of a folder input, and of a drop, which may hold folders.

const isHidden = (path) => path.split("/").some((name) => name.startsWith("."));

/** Of an input. A chosen folder gives paths that begin with its name. */
export const chosenFiles = (files) => ordered([...files].map((file) => ({ path: file.webkitRelativePath || file.name, file })));

/** Of a drop. Call it within the event: later the browser gives nothing. */
export function droppedFiles(transfer) {
  const entries = [...transfer.items].filter(({ kind }) => kind === "file").map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  return Promise.all(entries.map((entry) => walk(entry))).then((lists) => ordered(lists.flat()));
}

async function walk(entry, folder = "") {
  if (!entry) return [];
  if (entry instanceof File) return [{ path: entry.name, file: entry }];
  const path = folder + entry.name;
  if (entry.isFile) return [{ path, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) }];
  const reader = entry.createReader();
  const all = [];
  for (let some; (some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length; )
    for (const child of some) all.push(...(await walk(child, `${path}/`))); // a reader gives at most 100 entries at a time
  return all;
}

const ordered = (files) =>
  files.filter(({ path }) => !isHidden(path)).sort((one, other) => (one.path < other.path ? -1 : one.path > other.path ? 1 : 0));
