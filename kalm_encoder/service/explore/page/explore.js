// The explore page: asks the service, and shows the first stage beside the reranking.
// Texts and ids reach the page as text nodes only. The address holds the state, so a link shows
// the same again. One question is under way at a time; of those that come meanwhile, only the last
// is asked.

const LISTS = {
  first: { name: "First stage", scale: "BM25", score: (x) => x.toFixed(2) },
  reranked: { name: "Reranked", scale: "P(yes)", score: (x) => x.toFixed(4) },
  fused: { name: "Fused", scale: "BM25 + margin, z-scores", score: (x) => signed(x) },
};
const NOTHING_FOUND = "No stored passage holds a word of this query.";
const NUM_AT_FIRST = 10; // results in each list before "Show all"
const wide = matchMedia("(min-width: 900px)");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let about; // what there is to choose from
// The address: query, table, ratio, cascade, number of candidates, list and instruction.
const state = { q: "", t: "", r: 0, c: "", k: 50, list: "reranked", i: "" };
let shown = null; // the answer on the page, with the question it belongs to
let showAll = false;

const $ = (id) => document.getElementById(id);
const results = (list) => [...$(list).querySelectorAll(".result")];
const table = () => about.tables.find(({ name }) => name === state.t) ?? about.tables[0];

function write(texts) {
  for (const [id, text] of Object.entries(texts)) $(id).textContent = text;
}

function make(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
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

let latest; // the last question
let pending = Promise.resolve(); // is settled when all questions so far are answered or dropped

function ask() {
  if (!state.q) return;
  writeAddress();
  const asked = question();
  latest = asked;
  $("lists").setAttribute("aria-busy", "true");
  pending = pending.then(async () => {
    if (asked !== latest) return;
    try {
      const answer = await call("explore/search", asked);
      if (asked === latest) show(asked, answer);
    } catch (error) {
      if (asked === latest) write({ problem: error.message });
    }
    $("lists").setAttribute("aria-busy", asked !== latest);
  });
}

function question() {
  const how = state.c ? { cascade: parseCascade(state.c) } : { ratio: state.r };
  return { query: state.q, k: state.k, table: state.t, instruction: state.i.trim() || null, ...how };
}

// ---- The state, in the address and in the controls

const parseCascade = (text) =>
  text.split(",").map((stage) => {
    const [ratio, keep = null] = stage.split(":").map(Number);
    return [ratio, keep];
  });

const writeCascade = (stages) => stages.map((stage) => stage.filter(Boolean).join(":")).join(",");

const nameCascade = (stages) =>
  stages.map(([ratio], n) => `${n ? `best ${stages[n - 1][1]}` : "all"} at ${ratio}`).join(", ");

function readAddress() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (name in state) state[name] = typeof state[name] === "number" ? Number(value) : value;
  }
  if (!/^\d+:\d+(,\d+:\d+)*,\d+$/.test(state.c)) state.c = "";
  if (!(Number.isInteger(state.k) && state.k > 0)) state.k = 50;
  if (!(state.list in LISTS)) state.list = "reranked";
}

function writeAddress() {
  const said = new URLSearchParams(Object.entries(state).filter(([, value]) => value !== ""));
  history.replaceState(null, "", `#${said}`);
}

function change(changes, then = ask) {
  Object.assign(state, changes);
  render();
  then();
}

function render() {
  showControls();
  if (shown) showLists();
}

function fill(select, choices, chosen) {
  select.replaceChildren(...choices.map(([value, text = value]) => new Option(text, value)));
  select.value = chosen;
}

function showControls() {
  const { name, ratios, stored, cascades } = table();
  state.t = name;
  if (!ratios.includes(state.r)) state.r = ratios[0];
  state.k = Math.min(state.k, about.max_k);
  if (wide.matches && state.list === "first") state.list = "reranked";
  const offered = [...new Set([...cascades.map(writeCascade), state.c])].filter(Boolean);
  const depths = new Set([10, 20, 50, 100, 200, state.k].filter((k) => k <= about.max_k));
  fill($("table"), about.tables.map((t) => [t.name]), name);
  fill($("cascade"), [["", "off"], ...offered.map((c) => [c, nameCascade(parseCascade(c))])], state.c);
  fill($("depth"), [...depths].sort((a, b) => a - b).map((k) => [k]), state.k);
  $("query").value = state.q;
  $("instruction").value = state.i;
  document.querySelector(`input[value="${state.list}"]`).checked = true;
  $("instruction").placeholder = about.instruction;
  $("ratio").max = ratios.length - 1;
  $("ratio").value = ratios.indexOf(state.r);
  const kind = stored.includes(state.r) ? "stored" : "made on read";
  const ratio = state.c ? "set by the cascade" : `${state.r} · ${kind}`;
  write({ "ratio-value": ratio });
  $("ratio").setAttribute("aria-valuetext", ratio);
  $("ratio").classList.toggle("idle", Boolean(state.c));
  $("ticks").replaceChildren(...ratios.map((r) => make(stored.includes(r) ? "b" : "span", r)));
}

// ---- An answer

const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
const whole = (x) => Math.round(x).toLocaleString("en");
const short = (x, limit) => (x < limit ? x.toFixed(1) : whole(x));
const formatMs = (ms) => `${short(ms, 10)} ms`;
const formatBytes = (n) => (n < 1e6 ? `${short(n / 1e3, 100)} kB` : `${short(n / 1e6, 100)} MB`);

function show(asked, answer) {
  shown = { asked, ...answer };
  const { bytes, ms } = answer;
  const share = bytes.finest ? bytes.read / bytes.finest : 0;
  write({
    problem: "",
    "ms-search": formatMs(ms.search),
    "ms-read": formatMs(ms.read),
    "ms-decode": formatMs(ms.decode),
    bytes: formatBytes(bytes.read),
    "bytes-share": `${whole(100 * share)} % of ${formatBytes(bytes.finest)} at ratio ${table().stored[0]}`,
    states: `· ${whole(answer.states)} states decoded`,
    status: summary(),
  });
  $("bytes-bar").style.width = `${100 * Math.min(share, 1)}%`;
  $("hint").hidden = true;
  $("answer").hidden = false;
  render();
}

function summary() {
  const { first, reranked, asked, ms } = shown;
  if (!first.length) return NOTHING_FOUND;
  const how = asked.cascade ? "by the cascade" : `at ratio ${asked.ratio}`;
  const took = formatMs(ms.search + ms.read + ms.decode);
  const { id, movement } = reranked.reduce((a, b) => (b.movement > a.movement ? b : a));
  const place = reranked.findIndex((entry) => entry.id === id) + 1;
  const climb = movement ? `${id} climbed most, from ${place + movement} to ${place}.` : "No passage moved.";
  return `${first.length} passages reranked ${how} in ${took}. ${climb}`;
}

function showLists() {
  const before = new Map(results("second").map((b) => [b.dataset.id, b.offsetTop]));
  const second = state.list === "fused" ? "fused" : "reranked";
  const { length } = shown.first;
  const rows = (list) =>
    shown[list].slice(0, showAll ? length : NUM_AT_FIRST).map((entry, n) => row(list, entry, n));
  const none = Object.assign(make("li", NOTHING_FOUND), { className: "hint" });
  $("first").replaceChildren(...(length ? rows("first") : [none]));
  $("second").replaceChildren(...rows(second));
  $("second").setAttribute("aria-label", LISTS[second].name);
  $("lists").dataset.list = state.list;
  $("more").hidden = length <= NUM_AT_FIRST;
  write({
    scale: LISTS[state.list].scale,
    more: showAll ? `Show the first ${NUM_AT_FIRST}` : `Show all ${length}`,
  });
  drawLines();
  glide(before);
}

function row(list, entry, index) {
  const { num_tokens, truncated, text } = shown.passages[entry.id];
  const node = $("row").content.cloneNode(true);
  const part = (name) => node.querySelector(`.${name}`);
  part("result").dataset.id = entry.id;
  part("number").textContent = index + 1;
  part("id").textContent = entry.id;
  part("text").append(...highlighted(text));
  part("points").textContent = LISTS[list].score(entry.score);
  const facts = [`${num_tokens} tokens`];
  if (truncated) facts.push("cut when encoded");
  if (list === "first") part("moved").remove();
  else setMovement(part("moved"), entry.movement, index);
  if (list === "reranked") {
    facts.push(`ratio ${entry.ratio}`);
    part("bar").firstChild.style.width = `${100 * entry.score}%`;
    part("margin").textContent = signed(entry.margin);
  } else {
    part("bar").remove();
    part("margin").remove();
  }
  part("meta").textContent = facts.join(" · ");
  return node;
}

const direction = (moved) => (moved > 0 ? "up" : moved < 0 ? "down" : "level");

function setMovement(node, moved, index) {
  const by = Math.abs(moved);
  const said = moved ? `${direction(moved)} ${by}, was ${index + 1 + moved}` : "same place";
  node.title = said;
  node.classList.add(direction(moved));
  node.firstChild.textContent = moved ? `${moved > 0 ? "▲" : "▼"} ${by}` : "=";
  node.lastChild.textContent = `, ${said}, `;
}

// Words of scripts without spaces match anywhere, long ones at the beginning of a word, short ones
// only whole words; a single letter is no help to a reader.
function highlighted(text) {
  const joined = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]/u;
  const patterns = [...new Set(shown.asked.query.match(/[\p{L}\p{M}\p{N}]+/gu))]
    .filter((word) => word.length > 1 || joined.test(word))
    .sort((a, b) => b.length - a.length)
    .map((word) => {
      if (joined.test(word)) return word;
      return `(?<![\\p{L}\\p{N}])${word}${word.length < 4 ? "(?![\\p{L}\\p{N}])" : ""}`;
    });
  if (!patterns.length) return [text];
  return text
    .split(new RegExp(`(${patterns.join("|")})`, "giu"))
    .map((part, n) => (n % 2 ? make("mark", part) : part));
}

// ---- Movement between the lists, and from one answer to the next

function drawLines() {
  const svg = $("lines");
  svg.replaceChildren();
  if (!wide.matches || !shown) return;
  const middle = (button) => button.offsetTop + button.offsetHeight / 2;
  const from = new Map(results("first").map((button) => [button.dataset.id, button]));
  const { clientWidth: width, clientHeight: height } = svg;
  for (const [n, button] of results("second").entries()) {
    const { id, movement } = shown[state.list][n];
    const left = from.get(id);
    const [y1, y2] = [left ? middle(left) : height, middle(button)];
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M4 ${y1}C${width / 2} ${y1} ${width / 2} ${y2} ${width - 4} ${y2}`);
    path.setAttribute("class", `${direction(movement)}${left ? "" : " below"}`);
    path.dataset.id = id;
    svg.append(path);
  }
}

function glide(before) {
  if (calm.matches) return;
  for (const button of results("second")) {
    const moved = (before.get(button.dataset.id) ?? button.offsetTop) - button.offsetTop;
    if (!moved) continue;
    const steps = { transform: [`translateY(${moved}px)`, "none"] };
    button.animate(steps, { duration: 260, easing: "ease-out" });
  }
}

function point(event) {
  const id = event.target.closest(".result")?.dataset.id;
  for (const node of document.querySelectorAll(".result, #lines path")) {
    node.classList.toggle("same", node.dataset.id === id);
  }
}

// ---- One passage

async function open(id) {
  const { num_tokens, truncated, text, whole: complete } = shown.passages[id];
  const { score, margin, ratio } = shown.reranked.find((entry) => entry.id === id);
  const cut = truncated ? ", cut when encoded" : "";
  write({
    "passage-id": id,
    "passage-facts":
      `${num_tokens} tokens${cut} · P(yes) ${score.toFixed(4)}, margin ${signed(margin)} at ratio ${ratio}`,
  });
  $("passage-text").replaceChildren(...highlighted(text));
  $("passage").showModal();
  if (complete) return;
  try {
    const passage = await call("explore/passage", { id, table: state.t });
    if ($("passage-id").textContent !== id) return; // another one was opened meanwhile
    $("passage-text").replaceChildren(...highlighted(passage.text));
  } catch (error) {
    $("passage").close();
    write({ problem: error.message });
  }
}

// ---- What the reader does

function step(event) {
  const item = event.target.closest("li");
  const beside = { ArrowDown: item?.nextElementSibling, ArrowUp: item?.previousElementSibling };
  const next = beside[event.key];
  if (!next) return;
  event.preventDefault();
  next.querySelector(".result").focus();
}

function listen() {
  const on = (id, kind, handle) => $(id).addEventListener(kind, handle);
  on("search", "submit", (event) => {
    event.preventDefault();
    showAll = false;
    change({ q: $("query").value.trim() });
  });
  on("ratio", "input", () => {
    change({ r: table().ratios[$("ratio").value], c: "" });
  });
  addEventListener("change", ({ target: { name, value } }) => {
    if (name in state) change({ [name]: value }, name === "list" ? writeAddress : ask);
  });
  on("more", "click", () => {
    showAll = !showAll;
    render();
  });
  on("lists", "click", (event) => {
    const button = event.target.closest(".result");
    if (button) open(button.dataset.id);
  });
  on("lists", "keydown", step);
  for (const kind of ["mouseover", "mouseleave", "focusin"]) on("lists", kind, point);
  on("close", "click", () => $("passage").close());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("#query, textarea, dialog *")) return;
    event.preventDefault();
    $("query").focus();
  });
  addEventListener("hashchange", () => location.reload());
  wide.addEventListener("change", () => change({}, writeAddress));
  new ResizeObserver(drawLines).observe($("lists"));
}

async function start() {
  try {
    about = await call("explore/about");
  } catch (error) {
    if (error.status === 401) return;
    write({ problem: `${error.message}; trying again` });
    setTimeout(start, 1000);
    return;
  }
  const { rows, version } = table();
  write({
    problem: "",
    note: about.note ?? "",
    facts: `model ${about.model} · ${rows.toLocaleString("en")} passages · version ${version}`,
  });
  readAddress();
  render();
  listen();
  if (state.q) ask();
  else $("query").focus();
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("kalm-key", $("key").value);
  location.reload();
});
start();
