// Segments an image in the browser, as predict.py does. The script resizes the image to the size at
// which the network was validated, and resizes the network's scores to the size of the image. The class
// of a pixel is the class with the highest score. onnxruntime-web runs the network, on the GPU if the
// browser supports WebGPU.

const element = (id) => document.getElementById(id);
const about = await (await fetch("network.json")).json(); // written by extras/sharing/web.py
let segmented = null; // the last segmented image: {name, width, height, classes}
let network = null; // {run, backend}
let busy = true;
let waiting = null; // the newest image chosen while another is segmented: [blob, name]

// ------------------------------------------------------------------------------------- the network

async function openNetwork() {
  const model = await download(about.model);
  const gpu = await navigator.gpu?.requestAdapter().catch(() => null);
  if (gpu) {
    try {
      return await openSession("webgpu", model);
    } catch (error) {
      console.warn("WebGPU cannot run this network:", error);
    }
  }
  return openSession("wasm", model);
}

async function openSession(backend, model) {
  const ort = await import(`./ort.${backend}.bundle.min.js`);
  ort.env.wasm.proxy = backend === "wasm"; // a worker keeps the page responsive
  const session = await ort.InferenceSession.create(model, { executionProviders: [backend] });
  const run = async (pixels, height, width) => {
    const image = new ort.Tensor("uint8", pixels, [1, 3, height, width]);
    const { logits } = await session.run({ image });
    return { data: logits.data, dims: logits.dims };
  };
  await run(new Uint8Array(3 * 64 * 64), 64, 64); // test the backend and compile its shaders
  const threads = ort.env.wasm.numThreads; // 1, unless the server's headers allow more
  return { run, backend: backend === "webgpu" ? "WebGPU" : `WebAssembly, threads: ${threads}` };
}

async function download(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: the server answered with status ${response.status}`);
  const parts = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    say(`Loading the network: ${megabytes(length)} of ${megabytes(about.bytes)} MB`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(0);

// ---------------------------------------------------------------------------------------- resizing

// Returns the bilinear resize of one side, as in PyTorch's `interpolate`. Each of the `to` entries contains
// the first source pixel and the weights of the source pixels. With `antialias`, a reduction is
// antialiased.
function taps(from, to, antialias = false) {
  const scale = from / to;
  const reach = antialias ? Math.max(scale, 1) : 1;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const last = Math.min(Math.trunc(centre + reach + 0.5), from);
    const weights = [];
    for (let j = first; j < last; j++) weights.push(Math.max(0, 1 - Math.abs(j + 0.5 - centre) / reach));
    return normalised(first, weights);
  });
}

function normalised(first, weights) {
  while (weights.length > 1 && weights[0] === 0) {
    weights.shift();
    first++;
  }
  while (weights.length > 1 && weights.at(-1) === 0) weights.pop();
  const sum = weights.reduce((a, b) => a + b);
  return { first, weights: weights.map((weight) => weight / sum) };
}

// Combines two successive resizes into one.
function composed(one, other) {
  return other.map(({ first, weights }) => {
    const from = one[first].first;
    const sum = [];
    weights.forEach((weight, i) => {
      const tap = one[first + i];
      tap.weights.forEach((w, j) => {
        const at = tap.first - from + j;
        sum[at] = (sum[at] ?? 0) + weight * w;
      });
    });
    return normalised(from, sum);
  });
}

// Returns the height and width of the network's input, as `Segmenter.network_sizes` in predict.py does.
function networkSize(height, width) {
  const shorter = Math.min(height, width), longer = Math.max(height, width);
  const factor = Math.min((4 * about.size) / longer, about.size / shorter);
  return [height, width].map((side) => Math.max(Math.trunc(side * factor + 0.5), 1));
}

// Resizes RGBA pixels (row by row) to RGB planes of another size, with the same rounding as predict.py.
// If a side shrinks, predict.py uses PyTorch, which rounds between columns and rows. Otherwise it uses
// OpenCV, whose weights are 11-bit integers.
function resized(rgba, height, width, newHeight, newWidth) {
  const shrinks = newHeight < height || newWidth < width;
  const rows = taps(height, newHeight, true), columns = taps(width, newWidth, true);
  if (!shrinks) {
    for (const tap of [...rows, ...columns]) tap.weights = tap.weights.map((w) => Math.round(2048 * w));
  }
  const narrow = new Float32Array(height * newWidth);
  const planes = new Uint8Array(3 * newHeight * newWidth);
  for (let channel = 0; channel < 3; channel++) {
    for (let y = 0; y < height; y++) {
      columns.forEach(({ first, weights }, x) => {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) {
          sum += weights[i] * rgba[4 * (y * width + first + i) + channel];
        }
        narrow[y * newWidth + x] = shrinks ? Math.round(sum) : sum;
      });
    }
    rows.forEach(({ first, weights }, y) => {
      for (let x = 0; x < newWidth; x++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) {
          const value = narrow[(first + i) * newWidth + x];
          sum += shrinks ? weights[i] * value : (weights[i] * (value >> 4)) >> 16;
        }
        planes[(channel * newHeight + y) * newWidth + x] = shrinks ? Math.round(sum) : (sum + 2) >> 2;
      }
    });
  }
  return planes;
}

// ------------------------------------------------------------------------------------- the classes

// Returns the class with the highest score at each pixel of the image, as `highest_class` does for predict.py.
// The scores are resized to the size of the network's input and from there to the size of the image.
// All pixels of a cell are weighted means of the same few scores. In a cell, most classes score too low
// to be the highest anywhere, so they are skipped.
function highestClass({ data, dims }, seen, image) {
  const [, count, height, width] = dims;
  const rows = composed(taps(height, seen[0]), taps(seen[0], image[0]));
  const columns = composed(taps(width, seen[1]), taps(seen[1], image[1]));
  const classes = new Uint8Array(image[0] * image[1]);
  rows.forEach((row, y) => {
    const newRow = !sameCell(row, rows[y - 1]);
    let possible;
    columns.forEach((column, x) => {
      if (newRow && !sameCell(column, columns[x - 1])) {
        column.possible = possibleClasses(data, count, height, width, row, column);
      }
      possible = column.possible ?? possible;
      const [only] = possible;
      classes[y * image[1] + x] =
        possible.length === 1 ? only : highest(data, possible, height, width, row, column);
    });
  });
  return classes;
}

const sameCell = (one, other) =>
  one.first === other?.first && one.weights.length === other.weights.length;

// Returns the classes that can be the highest in a cell: their maximum there reaches the minimum of every
// other class.
function possibleClasses(data, count, height, width, row, column) {
  const peaks = [];
  let enough = -Infinity;
  for (let c = 0; c < count; c++) {
    let least = Infinity, most = -Infinity;
    for (let i = 0; i < row.weights.length; i++) {
      const from = (c * height + row.first + i) * width + column.first;
      for (let j = 0; j < column.weights.length; j++) {
        least = Math.min(least, data[from + j]);
        most = Math.max(most, data[from + j]);
      }
    }
    peaks.push(most);
    enough = Math.max(enough, least);
  }
  return peaks.map((_, c) => c).filter((c) => peaks[c] >= enough);
}

function highest(data, possible, height, width, row, column) {
  let found = 0, most = -Infinity;
  for (const c of possible) {
    let score = 0;
    for (let i = 0; i < row.weights.length; i++) {
      const from = (c * height + row.first + i) * width + column.first;
      for (let j = 0; j < column.weights.length; j++) {
        score += row.weights[i] * column.weights[j] * data[from + j];
      }
    }
    if (score > most) [found, most] = [c, score];
  }
  return found;
}

// ---------------------------------------------------------------------------------------- an image

async function segment(blob, name) {
  if (busy) {
    waiting = [blob, name];
    return;
  }
  busy = true;
  say(`Segmenting ${name} …`);
  await new Promise((resolve) => setTimeout(resolve, 30)); // let the browser show the status line first
  try {
    const began = performance.now();
    const image = await decode(blob);
    const seen = networkSize(image.height, image.width);
    const pixels = resized(image.data, image.height, image.width, ...seen);
    const logits = await network.run(pixels, ...seen);
    const classes = highestClass(logits, seen, [image.height, image.width]);
    const seconds = (performance.now() - began) / 1000;
    segmented = { name, width: image.width, height: image.height, classes };
    show(image, seconds, seen);
    say(`${name}: ${image.width} × ${image.height} pixels`);
  } catch (error) {
    say(error.isImageError ? `${name}: ${error.message}` : `${name} cannot be segmented: ${error.message}`, true);
  } finally {
    segmentNext();
  }
}

function segmentNext() {
  busy = false;
  const next = waiting;
  waiting = null;
  if (next) segment(...next);
}

// Decodes an image. It ignores colour profiles, as OpenCV does, and applies the EXIF orientation.
async function decode(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw Object.assign(new Error("this browser cannot read the file as an image"), { isImageError: true });
  }
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

function show(image, seconds, seen) {
  const { width, height, classes } = segmented;
  const tinted = new ImageData(width, height);
  const pixels = new Uint32Array(tinted.data.buffer); // browsers run on little-endian machines
  const palette = about.classes.map(({ color: [r, g, b] }) => (255 << 24) | (b << 16) | (g << 8) | r);
  const counts = new Array(about.classes.length).fill(0);
  classes.forEach((c, at) => {
    pixels[at] = palette[c];
    counts[c]++;
  });
  for (const [id, data] of [["image", image], ["overlay", tinted]]) {
    const canvas = element(id);
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").putImageData(data, 0, 0);
  }
  element("picture").style.setProperty("--ratio", width / height);
  hidePointer();
  element("result").hidden = false;
  showLegend(counts, width * height);
  element("time").textContent =
    `${seconds.toFixed(2)} s, at ${seen[1]} × ${seen[0]} pixels (${network.backend})`;
}

// Shows the legend as predict.py does: largest class first, and one line for all classes under 0.1%.
function showLegend(counts, total) {
  const order = counts.map((_, c) => c).filter((c) => counts[c]).sort((a, b) => counts[b] - counts[a]);
  const large = order.filter((c) => counts[c] >= total / 1000);
  const share = (c) => `${((100 * counts[c]) / total).toFixed(1)}%`;
  const rows = large.map((c) => legendRow(about.classes[c].name, share(c), about.classes[c].color));
  const small = order.length - large.length;
  if (small) rows.push(legendRow(`${small} more`, "< 0.1% each"));
  element("legend").replaceChildren(...rows);
}

function legendRow(name, share, color) {
  const row = document.createElement("tr");
  const cells = [name, share].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  });
  if (color) {
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `rgb(${color})`;
    cells[0].prepend(swatch);
  }
  row.append(...cells);
  return row;
}

// -------------------------------------------------------------------------------------- the pointer

let pointer = [0, 0]; // distance from the left and the top, 0 to 1

function point(left, top) {
  pointer = [left, top].map((share) => Math.min(Math.max(share, 0), 1));
  const { width, height, classes } = segmented;
  const x = Math.min(Math.floor(pointer[0] * width), width - 1);
  const y = Math.min(Math.floor(pointer[1] * height), height - 1);
  const label = element("pointed");
  label.textContent = about.classes[classes[y * width + x]].name;
  // The label opens towards the middle, so that it stays within the picture.
  label.dataset.side = `${pointer[1] > 0.5 ? "above" : "below"} ${pointer[0] > 0.5 ? "left" : "right"}`;
  for (const part of [label, element("ring")]) {
    part.style.left = `${100 * pointer[0]}%`;
    part.style.top = `${100 * pointer[1]}%`;
    part.hidden = false;
  }
}

function hidePointer() {
  element("pointed").hidden = element("ring").hidden = true;
}

element("picture").addEventListener("pointermove", (event) => {
  const box = element("picture").getBoundingClientRect();
  point((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
});
element("picture").addEventListener("pointerleave", hidePointer);
element("picture").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const length = event.shiftKey ? 0.1 : 0.02;
  point(pointer[0] + step[0] * length, pointer[1] + step[1] * length);
});
element("picture").addEventListener("focus", () => {
  if (element("picture").matches(":focus-visible")) point(0.5, 0.5);
});
element("picture").addEventListener("blur", hidePointer);

// ------------------------------------------------------------------------------------- the download

// Returns an 8-bit PNG of the class indices, with the colours of the classes as its palette.
async function maskPng({ width, height, classes }) {
  const rows = new Uint8Array((width + 1) * height); // the first byte of a row is its filter: 0 for none
  for (let y = 0; y < height; y++) {
    rows.set(classes.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint16(8, 0x0803); // 8 bits, palette
  const zipped = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const chunks = [
    chunk("IHDR", new Uint8Array(header.buffer)),
    chunk("PLTE", Uint8Array.from(about.classes.flatMap((c) => c.color))),
    chunk("IDAT", new Uint8Array(await new Response(zipped).arrayBuffer())),
    chunk("IEND", new Uint8Array()),
  ];
  return new Blob([Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10), ...chunks], { type: "image/png" });
}

function chunk(type, content) {
  const bytes = new Uint8Array(content.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(content, 8);
  view.setUint32(content.length + 8, crc32(bytes.subarray(4, content.length + 8)));
  return bytes;
}

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return ~crc >>> 0;
}

element("download").addEventListener("click", async () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await maskPng(segmented));
  link.download = `${segmented.name.replace(/\.[^.]*$/, "")}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
});

// ----------------------------------------------------------------------------------------- choosing

function say(text, wrong = false) {
  element("status").textContent = text;
  element("status").classList.toggle("wrong", wrong);
}

const setOpacity = () => {
  element("overlay").style.opacity = element("opacity").value / 100;
};
element("opacity").addEventListener("input", setOpacity);
setOpacity();

element("file").addEventListener("change", ({ target }) => {
  if (target.files.length) segment(target.files[0], target.files[0].name);
  target.value = ""; // the user may choose the same file again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  element("drop").classList.add("over");
});
addEventListener("dragleave", () => element("drop").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  element("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) segment(file, file.name);
});

const examplePath = (name) => `examples/${encodeURIComponent(name)}`;
const fetchExample = async (name) => (await fetch(examplePath(name))).blob();

for (const name of about.examples) {
  const image = new Image();
  image.src = examplePath(name);
  image.alt = `Example: ${name}`;
  const button = document.createElement("button");
  button.type = "button";
  button.append(image);
  button.addEventListener("click", async () => segment(await fetchExample(name), name));
  element("examples").append(button);
}

document.title = element("title").textContent = about.title;
try {
  network = await openNetwork();
  say("Ready.");
  const [first] = about.examples;
  const example = first && !waiting && (await fetchExample(first).catch(() => null));
  if (example) waiting ??= [example, first]; // an image that the visitor has chosen comes first
  segmentNext();
} catch (error) {
  say(`The network cannot be loaded: ${error.message}`, true);
}
