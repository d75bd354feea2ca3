// SPDX-License-Identifier: Apache-2.0
// Log-probabilities by llama.cpp, through node-llama-cpp: node llama_cpp.mjs PACKAGE JOB.json ANSWER.json
// The job: {model, adapter or null, sequences: token ids, text}. The answer: {scores, tokens}.
import fs from "fs";
import path from "path";
import {pathToFileURL} from "url";

const [, , folder, job, answer] = process.argv;
const {getLlama} = await import(pathToFileURL(path.join(folder, "dist", "index.js")).href);
const {model: modelPath, adapter, sequences, text} = JSON.parse(fs.readFileSync(job));
const llama = await getLlama({
    gpu: false, build: "never", logLevel: "error", maxThreads: 1, usePrebuiltBinaries: true, skipDownload: true
});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const lora = adapter ? {adapters: [{filePath: adapter, scale: 1}]} : undefined;
const longest = Math.max(...sequences.map((ids) => ids.length));
const context = await model.createContext({contextSize: Math.max(512, longest + 64), threads: 1, lora});
const sequence = context.getSequence();
const scores = [];
for (const ids of sequences) {
    await sequence.clearHistory();
    const asked = ids.map((id) => [id, {generateNext: {probabilities: true, options: {temperature: 0}}}]);
    const told = await sequence.controlledEvaluate(asked);
    scores.push(ids.slice(1).map((id, i) => Math.log(told[i].next.probabilities.get(id) ?? Number.MIN_VALUE)));
}
fs.writeFileSync(answer, JSON.stringify({scores, tokens: model.tokenize(text ?? "", false)}));
await context.dispose();
process.exit(0);
