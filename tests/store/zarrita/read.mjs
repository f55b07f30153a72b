// Reads parts of Zarr arrays as a web page would.
// In, on standard input: {"url": "http://host:port/zarr", "headers": {}, "wanted": [["path/of/array", begin, end], ...]}
// Out: [{"dtype": "int8", "shape": [2, 3], "bytes": "<base64, little-endian>"}, ...]
import { FetchStore, get, open, root, slice } from "zarrita";

let input = "";
for await (const part of process.stdin) input += part;
const { url, headers, wanted } = JSON.parse(input);

const top = root(new FetchStore(url, { overrides: { headers } }));
const found = [];
for (const [path, begin, end] of wanted) {
  const array = await open.v3(top.resolve(path), { kind: "array" });
  const selection = array.shape.map((_, axis) => (axis === 0 ? slice(begin, end) : null));
  const { data, shape } = await get(array, selection);
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64");
  found.push({ dtype: array.dtype, shape, bytes });
}
process.stdout.write(JSON.stringify(found));
