// Validates glTF files with the Khronos validator: node gltf_validate.mjs MODULE_FOLDER FILE...
// Prints a JSON list of the validator's reports. Knows nothing of what is in the files.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { resolve } from "node:path";

const [folder, ...files] = process.argv.slice(2);
const validator = createRequire(import.meta.url)(resolve(folder));
const reports = [];
for (const file of files) {
  reports.push(await validator.validateBytes(new Uint8Array(await readFile(file)), { uri: file, maxIssues: 0 }));
}
console.log(JSON.stringify(reports));
