/** node run_parity.mjs WEIGHTS VECTORS: print the worst differences as JSON. */

import { readFileSync } from "node:fs";
import { compare } from "./parity.mjs";

console.log(JSON.stringify(compare(...process.argv.slice(2).map((path) => readFileSync(path)))));
