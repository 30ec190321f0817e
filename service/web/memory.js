// What the page remembers in this browser: fields marked `data-kept`, the tab, the model, sliders. Never a key or a picture.

import { on } from "./elements.js";

const NAME = "calmclip";

function stored() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {}; // the browser allows no storage, or another program wrote there
  }
}

const memory = stored();

export const recall = (name) => memory[name];

export function remember(name, value) {
  memory[name] = value;
  try {
    localStorage.setItem(NAME, JSON.stringify(memory));
  } catch {
    // no storage is allowed, or it is full: the page works without
  }
}

for (const field of document.querySelectorAll("[data-kept]")) {
  if (typeof recall(field.id) === "string") field.value = recall(field.id);
  field.addEventListener("input", () => remember(field.id, field.value));
}

on("forget", "click", () => {
  localStorage.removeItem(NAME);
  location.reload();
});
