// node onnxruntime_web.mjs JOB: runs graphs in onnxruntime-web, in one thread of WebAssembly.
//
// JOB/job.json: [{"file", "data": [files of weights], "runs": [{"feeds": {name: {"dtype", "shape", "file"}}, "out"}]}].
// Numbers lie in files as the machine stores them. Outputs go to OUT.NAME, their types and shapes to JOB/answers.json.
import { readFile, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import * as ort from "onnxruntime-web";

const folder = process.argv[2];
ort.env.wasm.numThreads = 1;
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };
const bytes = async (file) => new Uint8Array(await readFile(file)); // not in Node's shared pool

async function tensor({ dtype, shape, file }) {
  return new ort.Tensor(dtype, new ARRAYS[dtype]((await bytes(join(folder, file))).buffer), shape);
}

const answers = {};
for (const { file, data, runs } of JSON.parse(await readFile(join(folder, "job.json"), "utf8"))) {
  const externalData = await Promise.all(data.map(async (path) => ({ path: basename(path), data: await bytes(path) })));
  const session = await ort.InferenceSession.create(await bytes(file), { externalData, executionProviders: ["wasm"] });
  for (const { feeds, out } of runs) {
    const pairs = Object.entries(feeds).map(async ([name, feed]) => [name, await tensor(feed)]);
    const outputs = await session.run(Object.fromEntries(await Promise.all(pairs)));
    for (const [name, { type, dims, data: numbers }] of Object.entries(outputs)) {
      const raw = new Uint8Array(numbers.buffer, numbers.byteOffset, numbers.byteLength);
      await writeFile(join(folder, `${out}.${name}`), raw);
      (answers[out] ??= {})[name] = { dtype: type, shape: dims };
    }
  }
  await session.release();
}
await writeFile(join(folder, "answers.json"), JSON.stringify(answers));
