// A question before something is deleted.

import { $ } from "./elements.js";

/** Whether the user agrees. `verb`: the name of the button that does it. The focus returns to where it was. */
export function sure(question, verb) {
  const dialog = $("sure");
  $("sure-question").textContent = question;
  $("sure-go").textContent = verb;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}
