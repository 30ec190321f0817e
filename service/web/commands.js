// Requests as commands of a shell: a key stays a variable, and a picture stays the file that was chosen.

import { key } from "./requests.js";

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** The path of a chosen file, as seen from the folder that the user runs the command in. */
const place = ({ webkitRelativePath, name, type }) => webkitRelativePath || name || `pasted.${type.split("/")[1]}`;

/** A value as JSON for a here-document, in which the shell puts the files itself: an argument may be too short for them. */
function json(value) {
  const list = (parts, [open, close]) => `${open}${parts.join(", ")}${close}`;
  if (value instanceof File) return `{"b64": "$(base64 < ${quoted(place(value))} | tr -d '\\n')"}`;
  if (Array.isArray(value)) return list(value.map(json), "[]");
  if (value && typeof value === "object")
    return list(Object.entries(value).filter(([, part]) => part !== undefined).map(([name, part]) => `${json(name)}: ${json(part)}`), "{}");
  return JSON.stringify(value).replace(/[\\$`]/g, "\\$&");
}

/** A field of a form. In double quotes, curl takes a file's name as it is. */
const field = ([name, value]) =>
  value instanceof File
    ? `-F ${quoted(`${name}=@"${place(value).replace(/[\\"]/g, "\\$&")}";type=${value.type || "application/octet-stream"}`)}`
    : `--form-string ${quoted(`${name}=${value}`)}`;

/** A request -> the command that sends the same. `secured`: whether it needs a key. */
export function curl({ method, path, body }, secured = Boolean(key())) {
  const verb = method === (body ? "POST" : "GET") ? "" : `-X ${method} `; // curl's own choice
  const parts = [`curl ${verb}${quoted(new URL(path, document.baseURI).href)}`];
  if (secured) parts.push('-H "Authorization: Bearer $CALMCLIP_API_KEY"');
  if (body instanceof FormData) parts.push(...[...body].map(field));
  else if (body instanceof File) parts.push(`-H ${quoted(`Content-Type: ${body.type}`)}`, `--data-binary ${quoted(`@${place(body)}`)}`);
  else if (body) parts.push("-H 'Content-Type: application/json'", `--data-binary @- <<JSON\n${json(body)}\nJSON`);
  return parts.join(" \\\n  ");
}

/** Write it to the clipboard. A page without TLS has none, except on this host: then select the text for the user. */
export async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return "Copied.";
  } catch {
    const hidden = element.closest("details");
    if (hidden) hidden.open = true;
    getSelection().selectAllChildren(element);
    return document.execCommand("copy") ? "Copied." : "Select and copy the command.";
  }
}
