// A worker that reads pictures, so that the page stays quick: a file -> its hash, or its item as JSON.

import { sha256 } from "./sha256.js";

const SIDE = 128; // pixels of a thumbnail, as `calmclip index` makes them
const QUALITY = 0.6;

const data = (blob) => new FileReaderSync().readAsDataURL(blob);

/** A small upright JPEG as a data URL. Undefined if the browser cannot read the picture; the service then judges it. */
async function thumbnail(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
    const canvas = new OffscreenCanvas(width, height);
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#fff"; // under transparent pixels, as in the service
    pen.fillRect(0, 0, width, height);
    pen.imageSmoothingQuality = "high";
    pen.drawImage(bitmap, 0, 0, width, height);
    return data(await canvas.convertToBlob({ type: "image/jpeg", quality: QUALITY }));
  } catch {
    return undefined;
  } finally {
    bitmap?.close();
  }
}

const acts = {
  hash: async ({ file }) => sha256(new Uint8Array(await file.arrayBuffer())),

  /** A Blob: the browser keeps it outside of the page's memory. */
  async item({ file, id, title, sha256 }) {
    const meta = JSON.stringify({ file: title, title, sha256, thumbnail: await thumbnail(file) });
    const base64 = data(file).replace(/^[^,]*,/, "");
    return new Blob([`{"id":${JSON.stringify(id)},"meta":${meta},"image":{"b64":"`, base64, '"}}']);
  },
};

onmessage = async ({ data: { number, act, ...asked } }) => {
  try {
    postMessage({ number, result: await acts[act](asked) });
  } catch (error) {
    postMessage({ number, why: String(error.message ?? error) });
  }
};
