// The page: images and an instruction go to the API, whose events come back as steps, previews and results.

const INPUTS_MAX = 3;
const HISTORY_MAX = 20;
const TYPES = ["image/png", "image/jpeg", "image/webp"];
const SHAPES_ALIKE = 1.25;  // the image before is stretched to the shape of a result that differs by less

const at = (id) => document.getElementById(id);
const urls = new Map();    // image element -> {blob, url}: a URL lives as long as an element shows it

let inputs = [];           // {name, blob}
let shown = null;          // what is compared: {before, after, done, prompt, seed, type, notes}
let running = null;        // AbortController of the edit that runs

/** Show `blob`, or nothing, in `image`, and give back what it showed. */
function put(image, blob) {
  const held = urls.get(image);
  if (held?.blob === blob) return;
  if (held) URL.revokeObjectURL(held.url);
  urls.delete(image);
  if (blob) {
    const url = URL.createObjectURL(blob);
    urls.set(image, { blob, url });
    image.src = url;
  } else {
    image.removeAttribute("src");
  }
}

/** Replace the children of `list`, whose images are given back. */
function fill(list, items) {
  for (const image of list.querySelectorAll("img")) {
    if (!items.some((item) => item.contains(image))) put(image, null);
  }
  list.replaceChildren(...items);
}

function made(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function fail(text) {
  at("problem").textContent = text;
}

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function addFiles(files) {
  fail("");
  for (const file of files) {
    if (!TYPES.includes(file.type)) {
      fail(`${file.name} is no PNG, JPEG or WebP file; choose another one`);
    } else if (inputs.length === INPUTS_MAX) {
      fail(`at most ${INPUTS_MAX} images are edited together; remove one first`);
    } else {
      inputs.push({ name: file.name || "image", blob: file });
    }
  }
  showInputs();
}

function showInputs() {
  fill(at("inputs"), inputs.map((input) => {
    const image = made("img", { alt: input.name, title: input.name });
    put(image, input.blob);
    const remove = made("button", { type: "button", textContent: "×", title: "Remove" });
    remove.setAttribute("aria-label", `Remove ${input.name}`);
    remove.addEventListener("click", () => {
      inputs = inputs.filter((other) => other !== input);
      showInputs();
      at("files").focus();
    });
    return made("li", {}, image, remove);
  }));
}

function body() {
  const form = new FormData();
  for (const input of inputs) form.append("image[]", input.blob, input.name);
  form.append("prompt", at("prompt").value);
  form.append("stream", "true");
  form.append("partial_images", "3");
  for (const name of ["n", "seed", "steps", "guidance", "size"]) {
    const value = at(name).value.trim();
    if (value) form.append(name, value);
  }
  return form;
}

/** The events of a stream; comments are left out. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

/** What the server says about a refusal. */
async function sentence(response) {
  if (response.status === 401) {
    at("more").open = true;
    at("key").focus();
    return "the server wants an API key; enter it under Options";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}; try again`;
  }
}

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format}` });
}

class Refusal extends Error {}

async function edit(event) {
  event.preventDefault();
  if (running) return;
  fail("");
  if (!inputs.length) {
    fail("there is no image; choose one first");
    at("files").focus();
    return;
  }
  const earlier = shown;
  const view = { before: inputs.at(-1).blob, after: null, done: false, prompt: at("prompt").value, notes: [] };
  running = new AbortController();
  busy(true);
  show(view);
  at("work").scrollIntoView({ block: "nearest" });
  let results = [];
  let state = "";
  try {
    results = await followed(view, running.signal);
    if (!results.length) throw new Refusal("the server ended before the edit was done; try again");
    state = results.length === 1 ? `Done, seed ${results[0].seed}` : `Done, ${results.length} results`;
  } catch (problem) {
    if (problem.name === "AbortError") state = "Stopped";
    else fail(problem instanceof Refusal ? problem.message : "the server cannot be reached; is it still running?");
    if (shown === view) show(earlier);
  } finally {
    running = null;
    busy(false);
    at("state").textContent = state;
  }
}

/** Ask for the edit of `view` and follow its events: the results. */
async function followed(view, signal) {
  const steps = new Map();  // sample -> steps taken
  const results = [];
  const count = Number(at("n").value) || 1;
  const request = { method: "POST", body: body(), headers: headers(), signal };
  const response = await fetch("v1/images/edits", request);
  if (!response.ok) throw new Refusal(await sentence(response));
  for await (const happened of eventsOf(response)) {
    if (happened.type === "error") throw new Refusal(happened.error.message);
    if (happened.type === "image_edit.step") {
      steps.set(happened.sample, happened.step);
      const taken = [...steps.values()].reduce((sum, step) => sum + step, 0);
      at("state").textContent = "Editing";
      at("step").textContent = `step ${taken} of ${count * happened.steps}`;
      at("progress").max = count * happened.steps;
      at("progress").value = taken;
    } else if (happened.type === "image_edit.partial_image") {
      view.after = blobOf(happened);
      if (shown === view) show(view);
    } else if (happened.type === "image_edit.completed") {
      const result = {
        ...view, after: blobOf(happened), done: true,
        seed: happened.seed, type: happened.output_format, notes: happened.notes ?? [],
      };
      results.push(result);
      remember(result);
      if (shown === view) show(result);
    }
  }
  return results;
}

function busy(is) {
  at("start").setAttribute("aria-disabled", String(is));
  if (!is && document.activeElement === at("stop")) at("start").focus();
  at("stop").hidden = !is;
  at("progress").hidden = !is;
  at("progress").removeAttribute("value");
  at("state").textContent = is ? "Waiting" : "";
  at("step").textContent = "";
}

/** Compare what `view` has; null for nothing. */
function show(view) {
  shown = view;
  at("work").classList.toggle("empty", !view);
  at("none").hidden = Boolean(view);
  at("compare").hidden = !view;
  at("compare").classList.toggle("alone", !view?.after);
  put(at("before"), view?.before);
  put(at("after"), view?.after);
  at("after").alt = view ? `After: ${view.prompt}` : "After";
  at("notes").textContent = view?.notes.join("; ") ?? "";
  at("actions").hidden = !view?.done;
  if (view?.done) {
    at("save").href = at("after").src;
    at("save").download = `edited-${view.seed}.${view.type}`;
  } else {
    at("save").removeAttribute("href");
  }
  for (const button of at("history").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.result === view));
  }
}

/** Give the box the shape of the result, or of the image before. */
function shape() {
  const of = (image) => image.naturalWidth / image.naturalHeight || 0;
  const [before, after] = [of(at("before")), of(at("after"))];
  const ratio = before && after ? before / after : 1;
  at("compare").style.setProperty("--shape", after || before || 1);
  at("compare").classList.toggle("apart", ratio > SHAPES_ALIKE || ratio < 1 / SHAPES_ALIKE);
}

function slide() {
  const value = at("slider").value;
  at("compare").style.setProperty("--part", `${value}%`);
  at("slider").setAttribute("aria-valuetext", `${value} percent before, ${100 - value} percent after`);
}

function remember(result) {
  at("empty").hidden = true;
  const image = made("img", { alt: "" });
  put(image, result.after);
  const text = made("span", { textContent: result.prompt, title: result.prompt });
  const button = made("button", { type: "button", result }, image, text, made("small", {
    textContent: `seed ${result.seed}`,
  }));
  button.addEventListener("click", () => {
    show(result);
    if (!running) at("state").textContent = `Seed ${result.seed}`;
    at("work").scrollIntoView({ block: "nearest" });
  });
  fill(at("history"), [made("li", {}, button), ...at("history").children].slice(0, HISTORY_MAX));
}

/** Name the model in the header. */
async function greet() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.ok) at("model").textContent = (await response.json()).data.map((model) => model.id).join(", ");
  } catch {
    // the first edit says that the server cannot be reached
  }
}

at("form").addEventListener("submit", edit);
at("form").addEventListener("invalid", (event) => {
  if (at("more").contains(event.target)) at("more").open = true;
}, true);
at("stop").addEventListener("click", () => running?.abort());
at("slider").addEventListener("input", slide);
for (const id of ["before", "after"]) at(id).addEventListener("load", shape);
at("key").addEventListener("change", greet);
at("files").addEventListener("change", (event) => {
  addFiles(event.target.files);
  event.target.value = "";
});
at("again").addEventListener("click", () => {
  inputs = [{ name: at("save").download, blob: shown.after }];
  showInputs();
  at("prompt").focus();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
});
slide();
greet();
