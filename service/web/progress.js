// The uploads of the page as rows with progress, in every tab.

import { tell } from "./problems.js";
import { chooseAgain } from "./collections.js";
import { $, make } from "./elements.js";
import { dismiss, forget, interrupted, isLive, onUpload, uploads } from "./uploads.js";

const QUIET = 10_000; // ms between two announcements to screen readers, at least
const number = (count) => count.toLocaleString("en");
const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

/** Seconds -> "about 2 minutes left". */
const remaining = (seconds) =>
  seconds === undefined ? "" : seconds < 60 ? "less than a minute left" : `about ${counted(Math.round(seconds / 60), "minute")} left`;

const HEADS = {
  queued: "Waits for the upload before it",
  running: "Adding",
  waiting: "Waiting",
  paused: "Paused",
  stopped: "Stopped",
  cancelled: "Cancelled",
  done: "Done",
};

/** The state as one sentence, for the row and for screen readers. */
function summary({ state, done, added, total, same, broken, others, left, note }) {
  const parts = [
    state === "done" ? `Done: ${number(added)} of ${counted(total, "picture")} added` : `${HEADS[state]}: ${number(done)} of ${counted(total, "picture")}`,
    same ? `${number(same)} stored already` : "",
    broken.length ? `${number(broken.length)} not added` : "",
    others ? `${counted(others, "other file")} left out` : "",
    remaining(left),
  ];
  return `${parts.filter(Boolean).join(", ")}. ${note}`;
}

/** A row keeps its elements, so that the focus stays on a button while the numbers change. */
function row(upload) {
  const text = make("p");
  const bar = make("progress", { max: upload.total || 1, ariaLabel: `Upload to ${upload.collection}` });
  const act = (name, run) => make("button", { type: "button", onclick: run, ariaLabel: `${name} the upload to ${upload.collection}` }, name);
  const [pause, resume, cancel] = [act("Pause", upload.pause), act("Resume", () => upload.resume()), act("Cancel", upload.cancel)];
  const close = act("Close", () => {
    dismiss(upload);
    element.remove();
    $("uploads").hidden = !$("upload-list").children.length;
    $("tab-search").focus();
  });
  const list = make("ul", { tabIndex: 0, ariaLabel: "Pictures that were not added", role: "list" });
  const broken = make("details", { hidden: true }, make("summary"), list);
  const head = make("p", {}, make("b", {}, upload.collection), ` from ${upload.name}`);
  const element = make("li", {}, head, text, bar, make("div", { className: "row" }, pause, resume, cancel, close), broken);
  let paints = 0; // at most one in a frame
  const paint = () => {
    paints = 0;
    const focused = element.querySelector("button:focus");
    text.textContent = summary(upload);
    bar.value = upload.done;
    const { state } = upload;
    pause.hidden = !isLive(upload);
    resume.hidden = !["paused", "stopped"].includes(state);
    cancel.hidden = !isLive(upload) && resume.hidden;
    close.hidden = !cancel.hidden;
    bar.hidden = !close.hidden;
    if (focused?.hidden) element.querySelector("button:not([hidden])").focus();
    broken.hidden = !upload.broken.length;
    broken.firstChild.textContent = `${counted(upload.broken.length, "picture")} not added`;
    list.append(...upload.broken.slice(list.children.length).map(({ path, why }) => make("li", {}, make("b", {}, path), ` ${why}`)));
  };
  element.update = () => (paints ||= requestAnimationFrame(paint));
  paint();
  return element;
}

const rows = new Map();
let announced = 0;

/** Say the state when it changes, and else now and then: each picture would be too much. */
function announce(upload, isNew) {
  if (!isNew && performance.now() - announced < QUIET) return;
  announced = performance.now();
  $("upload-status").textContent = `${upload.collection}: ${summary(upload)}`;
}

onUpload((upload) => {
  const before = rows.get(upload)?.state;
  if (!rows.has(upload)) {
    rows.set(upload, row(upload));
    $("upload-list").append(rows.get(upload));
    $("uploads").hidden = false;
  }
  const element = rows.get(upload);
  element.state = upload.state;
  element.update();
  announce(upload, before !== upload.state && upload.state !== "waiting");
  if (upload.state === "stopped" && before !== "stopped" && [401, 403].includes(upload.error.body?.status)) tell(upload.error);
});

/** After a reload the browser has no files any more: the user chooses them again. */
for (const entry of [...interrupted]) {
  const text = `The page was left after ${number(entry.done)} of ${counted(entry.total, "picture")}. Choose ${entry.name} again: what is stored is skipped.`;
  const again = make("button", { type: "button", onclick: () => chooseAgain(entry) }, "Choose again…");
  const close = make("button", { type: "button", ariaLabel: `Forget the upload to ${entry.collection}` }, "Forget it");
  const element = make("li", {}, make("p", {}, make("b", {}, entry.collection), ` from ${entry.name}`), make("p", {}, text), make("div", { className: "row" }, again, close));
  const remove = () => {
    element.remove();
    $("uploads").hidden = !$("upload-list").children.length;
  };
  close.onclick = () => {
    forget(entry);
    remove();
    $("tab-search").focus();
  };
  onUpload(() => interrupted.includes(entry) || remove()); // chosen again
  $("upload-list").append(element);
  $("uploads").hidden = false;
}
