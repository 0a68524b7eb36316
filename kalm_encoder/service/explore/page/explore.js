// The explore page: asks the service, shows first stage and reranking side by side.
// Texts and ids reach the page as text nodes only. The address holds the state, so a link shows
// the same. One question is under way at a time; of those that come meanwhile only the last is asked.

const $ = (id) => document.getElementById(id);
const wide = matchMedia("(min-width: 900px)");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const AT_FIRST = 10; // results of each list before "Show all"
const DEBOUNCE_MS = 150;

let about; // what there is to choose from
let state = { q: "", t: "", r: 0, c: "", k: 50, list: "reranked", i: "" };
let shown = null; // the answer on the page
let showAll = false;

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

// ---- The service

async function call(path, body) {
  const key = sessionStorage.getItem("kalm-key");
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = body ? "POST" : "GET";
  const reply = await fetch(path, { method, headers, body: body && JSON.stringify(body) }).catch(() => {
    throw new Error("the service does not answer: is `kalm explore` still running?");
  });
  const answer = await reply.json();
  if (reply.status === 401 && !$("locked").open) {
    $("refused").hidden = !key;
    $("locked").showModal();
  }
  if (!reply.ok) throw Object.assign(new Error(answer.message), { status: reply.status });
  return answer;
}

let wanted = null; // the last question not asked yet
let asking = false;

async function ask() {
  if (!state.q) return;
  wanted = question();
  writeAddress();
  if (asking) return;
  asking = true;
  $("lists").setAttribute("aria-busy", "true");
  while (wanted) {
    const asked = wanted;
    wanted = null;
    try {
      const answer = await call("explore/search", asked);
      if (!wanted) show(asked, answer);
    } catch (error) {
      if (!wanted) complain(error.message);
    }
  }
  asking = false;
  $("lists").setAttribute("aria-busy", "false");
}

function question() {
  const asked = { query: state.q, k: state.k, table: state.t };
  if (state.i.trim()) asked.instruction = state.i;
  if (state.c) asked.cascade = parseCascade(state.c);
  else asked.ratio = state.r;
  return asked;
}

let timer;
function askSoon() {
  clearTimeout(timer);
  timer = setTimeout(ask, DEBOUNCE_MS);
}

function complain(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

// ---- State, address and controls

function parseCascade(text) {
  return text.split(",").map((stage) => {
    const [ratio, keep] = stage.split(":").map(Number);
    return [ratio, keep ?? null];
  });
}

const writeCascade = (stages) =>
  stages.map(([ratio, keep]) => (keep === null ? ratio : `${ratio}:${keep}`)).join(",");

function nameCascade(text) {
  const stages = parseCascade(text);
  return stages
    .map(([ratio], n) => `${n ? `best ${stages[n - 1][1]}` : "all"} at ${ratio}`)
    .join(", ");
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(state)) {
    if (given.has(name)) {
      const value = given.get(name);
      state[name] = typeof state[name] === "number" ? Number(value) || state[name] : value;
    }
  }
  if (!/^\d+:\d+(,\d+:\d+)*,\d+$/.test(state.c)) state.c = "";
  if (!(Number.isInteger(state.k) && state.k > 0)) state.k = 50;
  if (!["first", "reranked", "fused"].includes(state.list)) state.list = "reranked";
}

function writeAddress() {
  const said = new URLSearchParams(Object.entries(state).filter(([, value]) => value !== ""));
  history.replaceState(null, "", `#${said}`);
}

const table = () => about.tables.find(({ name }) => name === state.t) ?? about.tables[0];

function fill(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, text]) => new Option(text, value)));
  select.value = chosen;
}

function setControls() {
  const { name, ratios, stored, cascades } = table();
  state.t = name;
  if (!ratios.includes(state.r)) state.r = ratios[0];
  state.k = Math.min(state.k, about.max_k);
  const depths = [10, 20, 50, 100, 200, state.k].filter((k) => k <= about.max_k);
  const presets = [...new Set([...cascades.map(writeCascade), state.c])].filter(Boolean);
  fill($("table"), about.tables.map((t) => [t.name, t.name]), name);
  fill($("cascade"), [["", "off"], ...presets.map((c) => [c, nameCascade(c)])], state.c);
  fill($("depth"), [...new Set(depths)].sort((a, b) => a - b).map((k) => [k, k]), state.k);
  $("query").value = state.q;
  $("instruction").value = state.i;
  $("instruction").placeholder = about.instruction;
  $("ratio").max = ratios.length - 1;
  $("ratio").value = ratios.indexOf(state.r);
  const kind = stored.includes(state.r) ? "stored" : "made on read";
  $("ratio-value").textContent = state.c ? "set by the cascade" : `${state.r} · ${kind}`;
  $("ratio").setAttribute("aria-valuetext", $("ratio-value").textContent);
  $("ratio").closest(".ratio").classList.toggle("idle", Boolean(state.c));
  $("ticks").replaceChildren(
    ...ratios.map((r) => make("span", stored.includes(r) ? "stored" : "", String(r))),
  );
  if (wide.matches && state.list === "first") state.list = "reranked";
  for (const radio of document.getElementsByName("list")) radio.checked = radio.value === state.list;
}

function change(changes, then = ask) {
  Object.assign(state, changes);
  setControls();
  then();
}

// ---- Showing an answer

const formatMs = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en")} ms`;
const signed = (x, digits) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);

function formatBytes(bytes) {
  const [size, unit] = bytes < 1e6 ? [bytes / 1e3, "kB"] : [bytes / 1e6, "MB"];
  return `${size < 100 ? size.toFixed(1) : Math.round(size)} ${unit}`;
}

function show(asked, answer) {
  shown = { asked, ...answer };
  complain("");
  $("hint").hidden = true;
  $("answer").hidden = false;
  for (const step of ["search", "read", "decode"]) {
    $(`ms-${step}`).textContent = formatMs(answer.ms[step]);
  }
  const { read, finest } = answer.bytes;
  const share = finest ? read / finest : 0;
  $("bytes").textContent = formatBytes(read);
  $("bytes-share").textContent =
    `${Math.round(100 * share)} % of ${formatBytes(finest)} at ratio ${table().stored[0]}`;
  $("states").textContent = `· ${answer.states.toLocaleString("en")} states decoded`;
  $("bytes-bar").style.width = `${100 * Math.min(share, 1)}%`;
  $("status").textContent = summary();
  render();
}

function summary() {
  const { first, reranked, asked, ms } = shown;
  if (!first.length) return "No stored passage holds a word of this query.";
  const how = asked.cascade ? "by the cascade" : `at ratio ${asked.ratio}`;
  const best = reranked.reduce((a, b) => (b.movement > a.movement ? b : a));
  const place = reranked.indexOf(best) + 1;
  const climb = best.movement
    ? ` ${best.id} climbed most, from ${place + best.movement} to ${place}.`
    : " None moved.";
  const took = formatMs(ms.search + ms.read + ms.decode);
  return `${first.length} passages reranked ${how} in ${took}.${climb}`;
}

function render() {
  const second = state.list === "fused" ? "fused" : "reranked";
  const count = showAll ? Infinity : AT_FIRST;
  const before = places();
  const none = make("li", "hint", "No stored passage holds a word of this query.");
  $("first").replaceChildren(
    ...(shown.first.length ? shown.first.slice(0, count).map((e, n) => row("first", e, n)) : [none]),
  );
  $("second").replaceChildren(...shown[second].slice(0, count).map((e, n) => row(second, e, n)));
  $("second").setAttribute("aria-label", second === "fused" ? "Fused" : "Reranked");
  $("lists").dataset.list = state.list;
  $("scale").textContent = { first: "BM25", reranked: "P(yes)", fused: "BM25 + margin, z-scores" }[state.list];
  $("more").hidden = shown.first.length <= AT_FIRST;
  $("more").textContent = showAll ? `Show the first ${AT_FIRST}` : `Show all ${shown.first.length}`;
  drawLines();
  glide(before);
}

function row(list, entry, index) {
  const passage = shown.passages[entry.id];
  const text = make("span", "text");
  text.dir = "auto";
  text.append(...highlighted(passage.text));
  const id = make("span", "id", entry.id);
  id.dir = "auto";
  const facts = [`${passage.num_tokens} tokens`];
  if (passage.truncated) facts.push("cut when encoded");
  if (list === "reranked") facts.push(`ratio ${entry.ratio}`);
  const place = make("span", "place", String(index + 1));
  if (list !== "first") place.append(movement(entry.movement, index));
  const button = make(
    "button", "result", place,
    make("span", "", make("span", "head", id, make("span", "meta", facts.join(" · "))), text),
    score(list, entry),
  );
  button.type = "button";
  button.dataset.id = entry.id;
  return make("li", "", button);
}

const direction = (moved) => (moved > 0 ? "up" : moved < 0 ? "down" : "level");

function movement(moved, index) {
  const arrow = make("span", "", moved ? `${moved > 0 ? "▲" : "▼"} ${Math.abs(moved)}` : "=");
  arrow.setAttribute("aria-hidden", "true");
  const said = moved ? `${direction(moved)} ${Math.abs(moved)}, was ${index + 1 + moved}` : "same place";
  const node = make("span", `moved ${direction(moved)}`, arrow, make("span", "hidden", `, ${said}, `));
  node.title = said;
  return node;
}

function score(list, entry) {
  if (list === "first") return make("span", "score", entry.score.toFixed(2));
  if (list === "fused") return make("span", "score", signed(entry.score, 2));
  const fill = make("span", "");
  fill.style.width = `${100 * entry.score}%`;
  const margin = make("small", "", signed(entry.margin, 2));
  margin.title = "margin: logit of yes minus logit of no";
  return make("span", "score", entry.score.toFixed(4), make("span", "bar", fill), margin);
}

// Words of scripts without spaces match anywhere, long ones at the beginning of a word, short ones
// whole; a single letter is no help to a reader.
function highlighted(text) {
  const joined = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]/u;
  const words = new Set(shown.asked.query.match(/[\p{L}\p{M}\p{N}]+/gu));
  const parts = [...words]
    .filter((word) => word.length > 1 || joined.test(word))
    .sort((a, b) => b.length - a.length)
    .map((word) => {
      if (joined.test(word)) return word;
      return `(?<![\\p{L}\\p{N}])${word}${word.length < 4 ? "(?![\\p{L}\\p{N}])" : ""}`;
    });
  if (!parts.length) return [text];
  return text
    .split(new RegExp(`(${parts.join("|")})`, "giu"))
    .map((part, n) => (n % 2 ? make("mark", "", part) : part));
}

// ---- Movement between the lists, and from one answer to the next

function drawLines() {
  const svg = $("lines");
  svg.replaceChildren();
  if (!wide.matches || !shown) return;
  const middle = (button) => button.offsetTop + button.offsetHeight / 2;
  const from = new Map([...$("first").querySelectorAll(".result")].map((b) => [b.dataset.id, b]));
  const { clientWidth: width, clientHeight: height } = svg;
  for (const [n, button] of [...$("second").querySelectorAll(".result")].entries()) {
    const entry = shown[state.list][n];
    const left = from.get(entry.id);
    const [y1, y2] = [left ? middle(left) : height, middle(button)];
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M4 ${y1}C${width / 2} ${y1} ${width / 2} ${y2} ${width - 4} ${y2}`);
    path.setAttribute("class", `${direction(entry.movement)}${left ? "" : " below"}`);
    path.dataset.id = entry.id;
    svg.append(path);
  }
}

const places = () =>
  new Map([...$("second").querySelectorAll(".result")].map((b) => [b.dataset.id, b.offsetTop]));

function glide(before) {
  if (calm.matches) return;
  for (const button of $("second").querySelectorAll(".result")) {
    const moved = (before.get(button.dataset.id) ?? button.offsetTop) - button.offsetTop;
    if (moved) {
      const steps = [{ transform: `translateY(${moved}px)` }, { transform: "none" }];
      button.animate(steps, { duration: 260, easing: "ease-out" });
    }
  }
}

function point(id) {
  for (const node of document.querySelectorAll(".result, #lines path")) {
    node.classList.toggle("same", node.dataset.id === id);
  }
}

// ---- One passage

async function open(id) {
  const passage = shown.passages[id];
  const scored = shown.reranked.find((r) => r.id === id);
  $("passage-id").textContent = id;
  $("passage-facts").textContent =
    `${passage.num_tokens} tokens${passage.truncated ? ", cut when encoded" : ""} · P(yes) ` +
    `${scored.score.toFixed(4)}, margin ${signed(scored.margin, 2)} at ratio ${scored.ratio}`;
  $("passage-text").replaceChildren(...highlighted(passage.text));
  $("passage").showModal();
  if (passage.whole) return;
  try {
    const { text } = await call("explore/passage", { id, table: state.t });
    if ($("passage-id").textContent === id) $("passage-text").replaceChildren(...highlighted(text));
  } catch (error) {
    $("passage").close();
    complain(error.message);
  }
}

// ---- What the reader does

function step(event) {
  const button = event.target.closest(".result");
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const across = { ArrowLeft: "first", ArrowRight: "second" }[event.key];
  if (!button || !(by || across)) return;
  const here = [...button.closest("ol").querySelectorAll(".result")];
  const there = across && [...$(across).querySelectorAll(".result")];
  const next = by
    ? here[here.indexOf(button) + by]
    : there.find((b) => b.dataset.id === button.dataset.id);
  if (!next?.offsetParent) return;
  event.preventDefault();
  next.focus();
}

function listen() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    showAll = false;
    change({ q: $("query").value.trim() });
  });
  $("ratio").addEventListener("input", () => {
    change({ r: table().ratios[$("ratio").value], c: "" }, askSoon);
  });
  $("table").addEventListener("change", () => change({ t: $("table").value }));
  $("cascade").addEventListener("change", () => change({ c: $("cascade").value }));
  $("depth").addEventListener("change", () => change({ k: Number($("depth").value) }));
  $("instruction").addEventListener("change", () => change({ i: $("instruction").value }));
  for (const radio of document.getElementsByName("list")) {
    radio.addEventListener("change", () => change({ list: radio.value }, relist));
  }
  $("more").addEventListener("click", () => {
    showAll = !showAll;
    render();
  });
  $("lists").addEventListener("click", (event) => {
    const button = event.target.closest(".result");
    if (button) open(button.dataset.id);
  });
  $("lists").addEventListener("keydown", step);
  for (const kind of ["mouseover", "focusin"]) {
    $("lists").addEventListener(kind, (e) => point(e.target.closest(".result")?.dataset.id));
  }
  $("lists").addEventListener("mouseleave", () => point(null));
  $("close").addEventListener("click", () => $("passage").close());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input:not([type=range], [type=radio]), textarea, dialog")) return;
    event.preventDefault();
    $("query").focus();
  });
  addEventListener("hashchange", () => {
    readAddress();
    change({});
  });
  wide.addEventListener("change", () => change({}, relist));
  new ResizeObserver(drawLines).observe($("lists"));
}

function relist() {
  writeAddress();
  if (shown) render();
}

function unlock(event) {
  event.preventDefault();
  sessionStorage.setItem("kalm-key", $("key").value);
  location.reload();
}

async function start() {
  try {
    about = await call("explore/about");
  } catch (error) {
    if (error.status !== 401) complain(`${error.message}; trying again`);
    if (error.status !== 401) setTimeout(start, 1000);
    return;
  }
  complain("");
  const rows = table().rows.toLocaleString("en");
  $("facts").textContent = `model ${about.model} · ${rows} passages · version ${table().version}`;
  $("note").textContent = about.note ?? "";
  $("note").hidden = !about.note;
  readAddress();
  setControls();
  listen();
  if (state.q) ask();
  else $("query").focus();
}

$("unlock").addEventListener("submit", unlock);
start();
