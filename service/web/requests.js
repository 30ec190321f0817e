// Requests to the service: they use only the public routes.

/** A problem document (RFC 9457). */
export class Problem extends Error {
  /** `retry`: seconds after which the service may have time. */
  constructor(body, retry) {
    super(body.detail || body.title);
    this.body = body;
    this.retry = retry;
  }
}

export const missing = (detail) => new Problem({ title: "Input is missing", detail });

export const KEY = "calmclip-key"; // kept for this tab only
export const key = () => sessionStorage.getItem(KEY);

/** -> {data, stages, ms, request}. `body`: a form, JSON as a `Blob`, or a value that is sent as JSON, with a picture for each
 *  file in it. `data`: JSON, or the `Blob` of a file. Throws `Problem`. */
export async function ask(method, path, body, signal) {
  const ready = body instanceof FormData || body instanceof Blob;
  const headers = body && !ready ? { "Content-Type": "application/json" } : {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const content = body && !ready ? JSON.stringify(await encoded(body)) : body;
  const start = performance.now();
  let response, data;
  try {
    response = await fetch(path, { method, headers, signal, body: content });
    data = await (/json/.test(response.headers.get("Content-Type") ?? "") ? response.json() : response.blob());
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "No answer", detail: "The service cannot be reached. Is it still running?" });
  }
  if (!response.ok) {
    const { status, statusText, headers } = response;
    const retry = Number(headers.get("Retry-After")) || undefined;
    throw new Problem(data instanceof Blob ? { status, title: `Status ${status}`, detail: statusText } : data, retry);
  }
  return { data, request: { method, path, body }, ms: performance.now() - start, stages: timing(response.headers.get("Server-Timing")) };
}

/** In the order of a request. */
export const STAGES = ["read", "decode", "preprocess", "queue", "infer", "fit", "postprocess", "search", "write", "serialize"];

/** "infer;dur=18.9, decode;dur=1.4" -> [["decode", 1.4], ["infer", 18.9]] in milliseconds, in the order of STAGES. */
const timing = (header) =>
  [...(header ?? "").matchAll(/([\w-]+)(?:;[^,]*?)?;dur=([\d.]+)/g)]
    .map(([, name, duration]) => [name, Number(duration)])
    .filter(([name]) => STAGES.includes(name))
    .sort(([one], [other]) => STAGES.indexOf(one) - STAGES.indexOf(other));

/** Fields -> a form. A list repeats its field. */
export function form(body) {
  const data = new FormData();
  for (const [name, values] of Object.entries(body)) [values].flat().forEach((value) => data.append(name, value));
  return data;
}

/** A value with each file in it as a picture of a JSON body. */
async function encoded(value) {
  if (value instanceof File) return { b64: await base64(value) };
  if (Array.isArray(value)) return Promise.all(value.map(encoded));
  if (!value || typeof value !== "object") return value;
  const parts = Object.entries(value).map(async ([name, part]) => [name, await encoded(part)]);
  return Object.fromEntries(await Promise.all(parts));
}

export const base64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(missing(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
