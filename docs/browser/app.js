// The page: reads models.json, runs the chosen model's loop by onnxruntime-web, and draws the images.
//
// models.json is a list of {name, file, shape: [C, H, W], steps, labels: [{name, label}]}, as
// scripts/browser_page.py writes it. Image i starts from the noise of seed + i, as in `ddim sample`; or, between two
// seeds, from the points of the great circle between their noises.

import * as ort from "./ort/ort.wasm.min.mjs";
import { randn, slerp } from "./noise.js";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = crossOriginIsolated ? navigator.hardwareConcurrency : 1;

const element = (id) => document.getElementById(id);
const [form, model, label, seed, count, other, button, status, canvas] =
  ["form", "model", "label", "seed", "count", "other", "sample", "status", "images"].map(element);
const PADDING = 2;
const SCALED_WIDTH = 128;
const sessions = new Map();
let models = [];

// Loads the page again, once, with the headers that threads require (isolation.js). Where that is not possible, as in
// pages that are not secure, everything works with one thread.
async function isolate() {
  if (crossOriginIsolated || !navigator.serviceWorker || sessionStorage.getItem("isolation")) return;
  sessionStorage.setItem("isolation", "tried");
  try {
    await navigator.serviceWorker.register("isolation.js");
    await navigator.serviceWorker.ready;
  } catch {
    return;
  }
  location.reload();
  await new Promise(() => {}); // nothing more happens before the page is loaded again
}

function showLabels() {
  const { labels } = models[model.selectedIndex];
  label.replaceChildren(...labels.map(({ name, label }) => new Option(name, label)));
  label.parentElement.hidden = labels.length === 0;
}

// Returns the noises of all images, one after the other.
function makeNoises(size) {
  const [number, first] = [count.valueAsNumber, seed.valueAsNumber];
  const noises = new Float32Array(number * size);
  const ends = other.value === "" ? null : [randn(first, size), randn(other.valueAsNumber, size)];
  for (let i = 0; i < number; i++) {
    noises.set(ends ? slerp(...ends, number > 1 ? i / (number - 1) : 0) : randn(first + i, size), i * size);
  }
  return noises;
}

// Returns bytes (N, C, H, W), as the images of `ddim sample` are rounded.
async function sample({ file, shape, labels }) {
  if (!sessions.has(file)) sessions.set(file, await ort.InferenceSession.create(file));
  const number = count.valueAsNumber;
  const size = shape.reduce((a, b) => a * b);
  const inputs = { latents: new ort.Tensor("float32", makeNoises(size), [number, ...shape]) };
  if (labels.length) {
    const all = new BigInt64Array(number).fill(BigInt(label.value));
    inputs.class_labels = new ort.Tensor("int64", all, [number]);
  }
  const { images } = await sessions.get(file).run(inputs);
  return Uint8Array.from(images.data, (value) => Math.round(255 * value));
}

function draw(bytes, [channels, height, width]) {
  const number = count.valueAsNumber;
  const columns = Math.ceil(Math.sqrt(number));
  canvas.width = columns * (width + PADDING) + PADDING;
  canvas.height = Math.ceil(number / columns) * (height + PADDING) + PADDING;
  const context = canvas.getContext("2d");
  const area = height * width;
  for (let i = 0; i < number; i++) {
    const pixels = context.createImageData(width, height);
    for (let j = 0; j < area; j++) {
      for (let c = 0; c < 3; c++) pixels.data[4 * j + c] = bytes[(i * channels + Math.min(c, channels - 1)) * area + j];
      pixels.data[4 * j + 3] = 255;
    }
    const [row, column] = [Math.floor(i / columns), i % columns];
    context.putImageData(pixels, PADDING + column * (width + PADDING), PADDING + row * (height + PADDING));
  }
  canvas.style.width = `${canvas.width * Math.max(1, Math.round(SCALED_WIDTH / width / 1.5))}px`;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  button.disabled = true;
  const chosen = models[model.selectedIndex];
  status.textContent = `Sampling in ${chosen.steps} steps …`;
  try {
    await new Promise((resolve) => setTimeout(resolve)); // so that the status is shown before the page is busy
    const bytes = await sample(chosen);
    draw(bytes, chosen.shape);
    canvas.dataset.bytes = JSON.stringify(Array.from(bytes));
    status.textContent = `${count.value} images in ${chosen.steps} steps.`;
  } catch (error) {
    status.textContent = `Failed: ${error.message}`;
  }
  button.disabled = false;
});

await isolate();
models = await (await fetch("models.json")).json();
model.replaceChildren(...models.map(({ name }) => new Option(name)));
model.addEventListener("change", showLabels);
showLabels();
