/** node run_parity.mjs WEIGHTS VECTORS: print the worst differences as JSON. */

import { readFileSync } from "node:fs";
import { parity } from "./parity.mjs";

const [weights, vectors] = process.argv.slice(2).map((path) => readFileSync(path));
console.log(JSON.stringify(parity(weights, vectors)));
