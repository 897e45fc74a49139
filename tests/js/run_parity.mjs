/** node run_parity.mjs WEIGHTS VECTORS: print the worst differences as JSON. */

import { readFileSync } from "node:fs";
import { readWeights } from "../../book/_kit/js/weights.mjs";
import { mixtureParity, parity } from "./parity.mjs";

const [weights, vectors] = process.argv.slice(2).map((path) => readFileSync(path));
const { head } = readWeights(weights).settings;
console.log(JSON.stringify((["flow", "score"].includes(head) ? mixtureParity : parity)(weights, vectors)));
