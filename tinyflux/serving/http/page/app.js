// The page: asks POST /generate for server-sent events and shows them as they come.

const at = (id) => document.getElementById(id);
const PREVIEWS = 8; // per picture, at most
const KEPT = 60; // pictures in the gallery

let info = null;
let running = null; // AbortController of the picture that is being drawn

function headers() {
  const key = at("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function sentence(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}

function fail(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  at("error").textContent = /[.!?]$/.test(whole) ? whole : `${whole}.`;
  at("error").hidden = false;
}

function fill(select, values, chosen) {
  select.replaceChildren(
    ...values.map(([value, text]) => new Option(text, value, false, value === chosen)),
  );
}

// Squares, and a wide and a tall shape of about the default's area.
function sizes({ limits, defaults }) {
  const unit = limits.step;
  const fit = (side, most) => Math.min(Math.max(unit, Math.round(side / unit) * unit), most);
  const shapes = [
    [1, 1], [1.25, 0.8], [0.8, 1.25], [0.5, 0.5], [0.75, 0.75], [1.5, 1.5], [2, 2],
  ];
  const found = new Map();
  for (const [across, down] of shapes) {
    const width = fit(defaults.size * across, limits.max_width);
    const height = fit(defaults.size * down, limits.max_height);
    const shape = width === height ? "square" : width > height ? "wide" : "tall";
    found.set(`${width}x${height}`, `${width} × ${height}, ${shape}`);
  }
  return [...found].sort(([a], [b]) => parseInt(a, 10) - parseInt(b, 10));
}

async function learn(model) {
  const query = model ? `?model=${encodeURIComponent(model)}` : "";
  const answer = await fetch(`/info${query}`, { headers: headers() });
  if (answer.status === 401) {
    at("key-field").hidden = false;
    at("key").focus();
    throw new Error("This server needs an API key: type it below");
  }
  if (!answer.ok) throw new Error(await sentence(answer));
  info = await answer.json();
  const { limits, defaults } = info;
  fill(at("model"), info.models.map((name) => [name, name]), info.model);
  at("model-field").hidden = info.models.length < 2;
  fill(at("size"), sizes(info), `${defaults.size}x${defaults.size}`);
  fill(at("solver"), info.solvers.map((name) => [name, name]), at("solver").value || "euler");
  at("steps").max = limits.max_steps;
  if (!at("steps").value) at("steps").value = defaults.steps;
  if (!at("guidance").value) at("guidance").value = defaults.guidance;
}

// Server-sent events of a fetch: EventSource cannot POST.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const field = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      yield [field("event"), JSON.parse(field("data"))];
    }
  }
}

function blobUrl(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
}

// Few pixels are shown as they are, many are smoothed.
function show(image, url, width, alt) {
  image.src = url;
  image.alt = alt;
  image.classList.toggle("small", width <= 128);
  image.hidden = false;
}

function body() {
  const [width, height] = at("size").value.split("x").map(Number);
  const steps = Number(at("steps").value);
  const asked = {
    prompt: at("prompt").value.trim(),
    negative_prompt: at("negative").value.trim(),
    model: at("model").value,
    num_steps: steps,
    guidance_scale: Number(at("guidance").value),
    width,
    height,
    solver: at("solver").value,
    preview_every: Math.max(1, Math.ceil(steps / PREVIEWS)),
  };
  if (at("seed").value !== "") asked.seed = Number(at("seed").value);
  return asked;
}

function busy(is) {
  at("draw").disabled = is;
  at("stop").hidden = !is;
  at("idle").hidden = is;
  at("busy").hidden = !is;
  at("progress").hidden = !is;
  at("stage").setAttribute("aria-busy", String(is));
}

async function draw() {
  if (running) return;
  at("error").hidden = true;
  running = new AbortController();
  let preview = null;
  try {
    if (!info) await learn();
    const asked = body();
    if (!asked.prompt) throw new Error("The prompt is empty: say what the picture should show");
    busy(true);
    at("progress").value = 0;
    at("status").textContent = "Waiting for a place";
    const answer = await fetch("/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json", Accept: "text/event-stream", ...headers() },
      body: JSON.stringify(asked),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error(await sentence(answer));
    let seed = null;
    let finished = false;
    for await (const [event, data] of eventsOf(answer)) {
      if (event === "accepted") {
        seed = data.seed;
      } else if (event === "step") {
        at("progress").value = data.step / data.total;
        at("status").textContent = `Step ${data.step} of ${data.total}`;
        if (data.preview) {
          const old = preview;
          preview = blobUrl(data.preview);
          show(at("picture"), preview, asked.width, `Preview: ${asked.prompt}`);
          at("empty").hidden = true;
          if (old) URL.revokeObjectURL(old);
        }
      } else if (event === "finished") {
        finished = true;
        const cut = [];
        if (data.prompt_truncated) cut.push("prompt");
        if (data.negative_prompt_truncated) cut.push("negative prompt");
        const made = { ...asked, seed, url: blobUrl(data.image), seconds: data.seconds, cut };
        present(made);
        keep(made);
      } else if (event === "error") {
        throw new Error(data.error.message);
      }
    }
    if (!finished) throw new Error("The server ended before the picture was drawn: try again");
  } catch (error) {
    at("status").textContent = "";
    if (error.name === "AbortError") {
      at("status").textContent = "Stopped";
    } else if (error instanceof TypeError) {
      fail("The server cannot be reached: is it running?");
    } else {
      fail(error.message);
    }
  } finally {
    if (preview && at("picture").src !== preview) URL.revokeObjectURL(preview);
    running = null;
    busy(false);
  }
}

function present(made) {
  show(at("picture"), made.url, made.width, made.prompt);
  at("empty").hidden = true;
  at("status").textContent =
    `${made.width} × ${made.height}, ${made.num_steps} steps, seed ${made.seed}, ${made.seconds.toFixed(1)} s` +
    made.cut.map((text) => `; the end of the ${text} was too long to be read`).join("");
}

function keep(made) {
  const image = new Image();
  show(image, made.url, made.width, made.prompt);
  const caption = document.createElement("span");
  caption.textContent = made.prompt;
  const button = document.createElement("button");
  button.type = "button";
  button.title = `${made.prompt} (seed ${made.seed}): show it again`;
  button.append(image, caption);
  button.addEventListener("click", () => {
    if (!running) present(made);
  });
  const save = document.createElement("a");
  save.href = made.url;
  save.download = `tinyflux-${made.seed}.png`;
  save.textContent = "Save";
  const item = document.createElement("li");
  item.append(button, save);
  at("gallery").prepend(item);
  at("made").hidden = false;
  if (at("gallery").children.length > KEPT) {
    const last = at("gallery").lastElementChild;
    URL.revokeObjectURL(last.querySelector("img").src);
    last.remove();
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    draw();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("model").addEventListener("change", () => {
  learn(at("model").value).catch((error) => fail(error.message));
});
at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value.trim());
  at("error").hidden = true;
  learn().catch((error) => fail(error.message));
});
if (matchMedia("(max-width: 46rem)").matches) at("options").open = false;
learn().catch((error) => fail(error instanceof TypeError ? "The server cannot be reached" : error.message));
