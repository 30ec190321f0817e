// Files that are chosen, dropped or pasted.

import { $, on, quietly } from "./elements.js";
import { choose } from "./pictures.js";

/** A zone takes the files that are dropped or pasted in it, and the transfer, which may hold folders; outside of all zones
 *  they are the picture. */
$("pictures").take = choose;
const zone = (target) => target.closest?.(".zone") ?? $("pictures");
const over = (aim) => document.querySelectorAll(".drop").forEach((drop) => drop.classList.toggle("over", drop === aim));
addEventListener("paste", ({ target, clipboardData }) => zone(target).take(clipboardData.files));
addEventListener("dragover", quietly(({ target }) => over(zone(target).querySelector(".drop"))));
addEventListener("dragleave", () => over(null));
addEventListener("drop", quietly(({ target, dataTransfer }) => {
  over(null);
  zone(target).take(dataTransfer.files, dataTransfer);
}));
on("files", "change", ({ target }) => {
  choose(target.files);
  target.value = ""; // else the same file could not be chosen again
});
