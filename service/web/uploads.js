// Uploads to collections, in the background: nothing that the rest of the page does ends them. One upload runs at a time,
// with two requests: one is prepared while the service answers the other. What is stored already is not sent again.

import { ask, Problem } from "./requests.js";

const BATCH_PICTURES = 16; // per request, and at most
const BATCH_BYTES = 16 << 20; // of files; one picture more may follow
const REQUESTS = 2;
const TRIES = 20; // of a request that is answered 503
const SILENT_TRIES = 5; // of a request without an answer
const PAGE = 500; // items of one page
const LARGEST = 256 << 20; // bytes of a file that is read at all
const REFUSED = [413, 415, 422, 504]; // a smaller batch may succeed
const BUSY = [429, 503];
const MEMORY = "calmclip-uploads"; // in this tab: uploads that a reload ended

export const uploads = []; // of this page, the oldest first
const news = new EventTarget(); // "change" with the upload as `detail`

export const onUpload = (act) => news.addEventListener("change", ({ detail }) => act(detail));

/** The uploads that a reload ended: [{collection, name, folder, total, done}]. */
export const interrupted = JSON.parse(sessionStorage.getItem(MEMORY) ?? "[]");

export function forget(entry) {
  interrupted.splice(interrupted.indexOf(entry), 1);
  remember();
}

const LIVE = ["queued", "running", "waiting"];
export const isLive = ({ state }) => LIVE.includes(state);
const isUnfinished = (upload) => isLive(upload) || ["paused", "stopped"].includes(upload.state);

function remember() {
  const open = uploads.filter(isUnfinished).map(({ collection, name, folder, total, done }) => ({ collection, name, folder, total, done }));
  const all = [...interrupted, ...open];
  if (all.length) sessionStorage.setItem(MEMORY, JSON.stringify(all));
  else sessionStorage.removeItem(MEMORY);
}

const sleep = (seconds, signal) =>
  new Promise((resolve, reject) => {
    signal.throwIfAborted();
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

let worker;
let messages = 0; // sent to it
const asked = new Map(); // number of a message to the worker -> what waits for its answer

/** Ask the worker in prepare.js. Rejects if the file cannot be read. */
function work(message) {
  if (!worker) {
    worker = new Worker("prepare.js", { type: "module" });
    worker.onmessage = ({ data: { number, result, why } }) => {
      const { resolve, reject } = asked.get(number);
      asked.delete(number);
      if (why === undefined) resolve(result);
      else reject(new Error(why));
    };
    worker.onerror = () => {
      for (const { reject } of asked.values()) reject(new Error("The browser does not run the worker prepare.js."));
      asked.clear();
    };
  }
  const number = ++messages;
  return new Promise((resolve, reject) => {
    asked.set(number, { resolve, reject });
    worker.postMessage({ number, ...message });
  });
}

class Upload {
  /** `files`: [{path, file}]. `name`: what the user chose, for people. */
  constructor(collection, name, files, others) {
    Object.assign(this, { collection, name, files, others, total: files.length, state: "queued", note: "" });
    Object.assign(this, { added: 0, same: 0, broken: [], taken: 0, seconds: 0, stored: undefined });
    this.again = []; // to take before the rest: a stop interrupted them
    this.pending = new Set(); // taken, and neither added nor refused
    this.folder = files.some(({ path }) => path.includes("/"));
    this.paths = new Set(files.map(({ path }) => path));
    this.claims = new Map(); // path -> hash of the first file of this path
  }

  get done() {
    return this.added + this.same + this.broken.length;
  }

  /** Seconds until the end, at the speed so far; undefined at the start. */
  get left() {
    const seconds = this.seconds + (this.since ? (performance.now() - this.since) / 1000 : 0);
    const sent = this.done - this.same; // what is only compared is quick
    return sent >= BATCH_PICTURES && isLive(this) ? (seconds / sent) * (this.total - this.done) : undefined;
  }

  change(state = this.state, note = this.note) {
    Object.assign(this, { state, note });
    remember();
    news.dispatchEvent(new CustomEvent("change", { detail: this }));
  }

  pause = () => this.stop("paused");
  cancel = () => this.stop("cancelled");

  resume() {
    this.change("queued", "");
    advance();
  }

  stop(state) {
    this.change(state, "");
    this.abort?.abort();
    advance();
  }

  async run() {
    const abort = (this.abort = new AbortController());
    this.again.unshift(...this.pending);
    this.pending.clear();
    this.since = performance.now();
    this.change("running", "");
    let failure;
    const fail = (error) => {
      failure ??= error;
      abort.abort(); // a lane that stops stops the other
    };
    try {
      this.stored ??= await this.hashes(abort.signal);
      await Promise.all(Array.from({ length: REQUESTS }, () => this.lane(abort.signal).catch(fail)));
    } catch (error) {
      fail(error);
    }
    this.seconds += (performance.now() - this.since) / 1000;
    this.since = undefined;
    if (!failure) this.change("done", "");
    else if (failure.name !== "AbortError") Object.assign(this, { error: failure }).change("stopped", failure.message);
  }

  /** Send batches until no file is left. */
  async lane(signal) {
    for (let batch; (batch = await this.batch(signal)).length; ) await this.send(batch, signal);
  }

  async batch(signal) {
    const batch = [];
    for (let bytes = 0; batch.length < BATCH_PICTURES && bytes < BATCH_BYTES; ) {
      signal.throwIfAborted();
      const entry = this.again.shift() ?? this.files[this.taken++];
      if (!entry) break;
      this.pending.add(entry);
      const item = await this.prepare(entry).catch((error) => this.refuse(entry, error.message));
      if (!item) continue;
      batch.push(item);
      bytes += entry.file.size;
    }
    return batch;
  }

  /** -> {entry, item}; undefined if the file is stored or broken. */
  async prepare(entry) {
    const { path, file } = entry;
    if (!file.size) return this.refuse(entry, "The file is empty.");
    if (file.size > LARGEST) return this.refuse(entry, `The file has ${Math.round(file.size / 2 ** 20)} MiB; at most ${LARGEST >> 20} MiB are read.`);
    const sha256 = await work({ act: "hash", file });
    if (this.isStored(path, sha256)) {
      this.same++;
      this.finish(entry);
      return undefined;
    }
    const title = path.split("/").at(-1);
    return { entry, item: await work({ act: "item", file, id: this.free(path, sha256), title, sha256 }) };
  }

  /** Under its path, or under an id that this upload does not replace: `calmclip index` leaves the folder's name out. */
  isStored(path, sha256) {
    const id = this.contents.get(sha256);
    return this.stored.get(path) === sha256 || (id !== undefined && !this.paths.has(id));
  }

  /** The id of a file: its path. A changed file in a folder replaces its item; of single files only the name is known, and
   *  cameras repeat names, so another content gets another id. */
  free(path, sha256) {
    const holder = this.stored.get(path) ?? this.claims.get(path) ?? sha256;
    this.claims.set(path, holder);
    return holder === sha256 || path.includes("/") ? path : path.replace(/(\.[^.]*)?$/, `-${sha256.slice(0, 8)}$1`);
  }

  async send(batch, signal) {
    const body = new Blob(['{"items":[', ...batch.flatMap(({ item }, i) => (i ? [",", item] : [item])), "]}"], { type: "application/json" });
    try {
      const { data } = await this.persist(() => ask("POST", `v1/collections/${encodeURIComponent(this.collection)}/items`, body, signal), signal);
      this.added += batch.length;
      this.items = data.items; // of the collection
      batch.forEach(({ entry }) => this.finish(entry));
    } catch (error) {
      if (!(error instanceof Problem) || !REFUSED.includes(error.body.status)) throw error;
      if (batch.length === 1) return this.refuse(batch[0].entry, error.message);
      const half = batch.length >> 1; // halves find the broken ones in few requests
      await this.send(batch.slice(0, half), signal);
      await this.send(batch.slice(half), signal);
    }
  }

  /** The result of `act`, which is tried again while the service is busy or cannot be reached. */
  async persist(act, signal) {
    for (let tries = 1; ; tries++) {
      try {
        const result = await act();
        if (this.state === "waiting") this.change("running", "");
        return result;
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        const silent = error.body.status === undefined;
        if (!silent && !BUSY.includes(error.body.status)) throw error;
        if (tries >= (silent ? SILENT_TRIES : TRIES)) throw error;
        const seconds = silent ? 2 ** (tries - 1) : (error.retry ?? 1);
        this.change("waiting", `${silent ? "The service does not answer" : "The service is busy"}; the next try is in ${seconds} s.`);
        await sleep(seconds, signal);
      }
    }
  }

  refuse(entry, why) {
    this.broken.push({ path: entry.path, why });
    this.finish(entry);
  }

  finish(entry) {
    this.pending.delete(entry);
    this.change();
  }

  /** Id -> hash of every stored item. */
  async hashes(signal) {
    const hashes = new Map();
    for (let after; ; ) {
      const query = new URLSearchParams({ limit: PAGE, fields: "sha256", ...(after === undefined ? {} : { after }) });
      const path = `v1/collections/${encodeURIComponent(this.collection)}/items?${query}`;
      const { data } = await this.persist(() => ask("GET", path, undefined, signal), signal);
      for (const { id, meta } of data.items) hashes.set(id, meta.sha256 ?? "");
      if (data.next === null) break;
      after = data.next;
    }
    this.contents = new Map([...hashes].map(([id, hash]) => [hash, id]));
    return hashes;
  }
}

/** Run the next upload, unless one is running. */
function advance() {
  if (uploads.some(({ state, since }) => since !== undefined || state === "running" || state === "waiting")) return;
  uploads.find(({ state }) => state === "queued")?.run().finally(advance);
}

/** Add `files` ([{path, file}]) to a collection. `others`: the number of files that were left out as no pictures. */
export function upload(collection, name, files, others = 0) {
  for (const entry of interrupted.filter((entry) => entry.collection === collection && entry.name === name)) forget(entry);
  const next = new Upload(collection, name, files, others);
  uploads.push(next);
  next.change();
  advance();
  return next;
}

export function dismiss(entry) {
  uploads.splice(uploads.indexOf(entry), 1);
  remember();
}

addEventListener("beforeunload", (event) => {
  if (uploads.some(isUnfinished)) event.preventDefault();
});
