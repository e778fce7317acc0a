// Reads arrays of a store with zarrita: node digests.js FOLDER... -> JSON on stdout, by folder.
// Per array: what zarrita says it is, and the sha256 of every row's bytes, those of missing rows (the fill value) too.
import { createHash } from "node:crypto";
import FileSystemStore from "@zarrita/storage/fs";
import * as zarr from "zarrita";

async function digests(folder) {
  const array = await zarr.open.v3(zarr.root(new FileSystemStore(folder)), { kind: "array" });
  const rest = array.shape.slice(1).map(() => null);
  const rows = [];
  for (let row = 0; row < array.shape[0]; row++) {
    const { data } = await zarr.get(array, [row, ...rest]);
    const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    rows.push(createHash("sha256").update(bytes).digest("hex"));
  }
  return { shape: array.shape, dtype: array.dtype, names: array.dimensionNames, attributes: array.attrs, rows };
}

const found = {};
for (const folder of process.argv.slice(2)) {
  try {
    found[folder] = await digests(folder);
  } catch (error) {
    found[folder] = { error: String(error) };
  }
}
console.log(JSON.stringify(found));
