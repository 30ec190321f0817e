// Short names for what every module does with elements.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children. A string child becomes text, never markup. */
export const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

export const percent = (score) => `${(100 * score).toFixed(1)} %`;
export const colour = (index) => `oklch(52% 0.17 ${(index * 137.508 + 255) % 360})`; // neighbours differ most; white text is readable on each

export const on = (id, event, act) => $(id).addEventListener(event, act);
export const quietly = (act) => (event) => {
  event.preventDefault();
  act(event);
};
