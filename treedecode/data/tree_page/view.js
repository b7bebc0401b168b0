// Drawing the tree, of which only what the window shows is in the document, and moving about in it.
const cards = new Map(), lineTo = new Map(); // by node: a card and its fold button; the line from its parent
const view = { x: 0, y: 0, zoom: 1 };
let selected = -1, matches = [], matchSet = new Set(), match = -1, request = 0;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function svg(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
function mark(name) {
  const picture = svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", class: `mark tone-${name}`, "aria-hidden": "true" });
  const fill = FILLED.has(name) ? "currentColor" : "none";
  picture.append(svg("path", { d: MARKS[name], fill, stroke: "currentColor", "stroke-width": 1.6, "stroke-linecap": "round", "stroke-linejoin": "round" }));
  return picture;
}
const number = (value) => value.toLocaleString("en");
const plural = (value, word, words) => `${number(value)} ${value === 1 ? word : words || word + "s"}`;
function digits(value) {
  const size = Math.abs(value);
  if (size > 0 && size < 0.0005) return value.toExponential(0);
  return String(Number(size < 10 ? value.toFixed(3) : value.toPrecision(4)));
}
function label(i) {
  const node = nodes[i], parts = [NAMES[state(i)], oneLine(text(i)).slice(0, 200)];
  if (node.score !== null) parts.push(`score ${digits(node.score)}`);
  parts.push(plural(node.num_tokens, "token"), plural(branches[i], "branch", "branches"));
  return parts.join(", ");
}

function card(i) {
  const node = nodes[i], made = element("div", `node ${state(i)} ${node.kind}`);
  made.id = `node-${i}`;
  made.setAttribute("role", "treeitem");
  made.setAttribute("aria-level", depth[i] + 1);
  made.setAttribute("aria-label", label(i));
  if (children[i].length) made.setAttribute("aria-expanded", String(!folded[i]));
  Object.assign(made.style, {
    left: `${x(i)}px`, top: `${y[i] - height[i] / 2}px`, width: `${width(i)}px`, height: `${height[i]}px`,
  });
  made.classList.toggle("on-path", onPath.has(i));
  const words = element("div", "text", cardText(i));
  words.style.webkitLineClamp = lines[i];
  made.append(mark(state(i)), words);
  if (node.score !== null) {
    const bar = element("span", "bar"), inner = element("i");
    inner.style.width = `${(100 * (node.score - low)) / (high - low)}%`;
    bar.append(inner);
    made.append(element("div", "score", digits(node.score)), bar);
  }
  if (hasNumbers[i]) {
    const sharing = branches[i] > 1 ? `, ${number(branches[i])} branches` : "";
    made.append(element("div", "numbers", plural(node.num_tokens, "token") + sharing));
  }
  made.dataset.node = i;
  dress(i, made);
  return made;
}
function dress(i, made) {
  made.classList.toggle("selected", i === selected);
  made.classList.toggle("match", matchSet.has(i));
  made.setAttribute("aria-selected", String(i === selected));
}
function foldButton(i) {
  const made = element("button", "fold", folded[i] ? `+${number(below[i])}` : "−");
  made.type = "button";
  made.tabIndex = -1; // Space folds from the keyboard
  made.setAttribute("aria-label", folded[i] ? `Unfold ${plural(below[i], "step")}` : "Fold");
  made.style.left = `${x(i) + width(i) + 5}px`;
  made.style.top = `${y[i] - 10}px`;
  made.dataset.fold = i;
  return made;
}
function line(i) {
  const from = nodes[i].parent, x0 = x(from) + width(from), y0 = y[from], x1 = x(i), y1 = y[i];
  const middle = (x0 + x1) / 2, made = svg("path", { d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1} ${y1}` });
  made.setAttribute("class", `edge${onPath.has(i) ? " on-path" : ""}${state(i) === "pruned" && !children[i].length ? " pruned" : ""}`);
  made.style.strokeWidth = `${Math.min(16, 1 + Math.sqrt(branches[i]))}px`;
  return made;
}

function drawAll() {
  for (const parts of cards.values()) for (const part of parts) part.remove();
  for (const part of lineTo.values()) part.remove();
  cards.clear();
  lineTo.clear();
  draw();
}
function draw() {
  request = 0;
  world.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.zoom})`;
  world.classList.toggle("far", view.zoom < FAR);
  const margin = 80, left = (-view.x - margin) / view.zoom, top = (-view.y - margin) / view.zoom;
  const right = left + (stage.clientWidth + 2 * margin) / view.zoom, bottom = top + (stage.clientHeight + 2 * margin) / view.zoom;
  for (const i of shown) {
    const half = height[i] / 2;
    const inside = x(i) < right && x(i) + width(i) > left && y[i] - half < bottom && y[i] + half > top;
    if (inside && !cards.has(i)) {
      const parts = children[i].length ? [card(i), foldButton(i)] : [card(i)];
      world.append(...parts);
      cards.set(i, parts);
    } else if (!inside && cards.has(i)) {
      for (const part of cards.get(i)) part.remove();
      cards.delete(i);
    }
    const from = nodes[i].parent;
    if (from < 0) continue;
    const crosses = x(from) < right && x(i) > left && Math.min(y[from], y[i]) < bottom && Math.max(y[from], y[i]) > top;
    if (crosses && !lineTo.has(i)) {
      lineTo.set(i, line(i));
      if (onPath.has(i)) edges.append(lineTo.get(i)); else edges.prepend(lineTo.get(i));
    } else if (!crosses && lineTo.has(i)) {
      lineTo.get(i).remove();
      lineTo.delete(i);
    }
  }
  if (selected >= 0 && cards.has(selected)) stage.setAttribute("aria-activedescendant", `node-${selected}`);
  else stage.removeAttribute("aria-activedescendant");
}
function schedule() { request ||= requestAnimationFrame(draw); }
function redress() { for (const [i, parts] of cards) dress(i, parts[0]); }

// Moving about, in what the panel leaves free: it is at the right, or at the bottom of a narrow window.
const atRight = () => panel.offsetWidth < 0.7 * stage.clientWidth;
const freeWidth = () => stage.clientWidth - (!panel.hidden && atRight() ? panel.offsetWidth : 0);
const freeHeight = () => stage.clientHeight - (!panel.hidden && !atRight() ? panel.offsetHeight : 0);
function glide(change) {
  world.classList.add("gliding");
  change();
  draw();
  setTimeout(() => world.classList.remove("gliding"), 240);
}
function zoomAt(factor, cx, cy) {
  const zoom = Math.min(MAX_ZOOM, Math.max(MIN_ZOOM, view.zoom * factor));
  view.x = cx - ((cx - view.x) * zoom) / view.zoom;
  view.y = cy - ((cy - view.y) * zoom) / view.zoom;
  view.zoom = zoom;
  schedule();
}
const zoomCentre = (factor) => zoomAt(factor, freeWidth() / 2, freeHeight() / 2);
function fit(smallest = MIN_ZOOM) {
  const zoom = Math.min(1, (freeWidth() - 2 * MARGIN) / bounds.width, (freeHeight() - 2 * MARGIN) / bounds.height);
  view.zoom = Math.max(smallest, zoom);
  view.x = Math.max(MARGIN, (freeWidth() - bounds.width * view.zoom) / 2);
  view.y = (freeHeight() - bounds.height * view.zoom) / 2;
  schedule();
}
function begin() { // the whole tree where it can be read, else its root and, where it can be, the answer
  fit(READABLE);
  if (bounds.height * view.zoom <= freeHeight()) return;
  const root = roots[0], room = freeHeight() - 2 * MARGIN;
  const target = answer < 0 ? root : answer, together = Math.abs(y[target] - y[root]) * view.zoom + height[root] <= room;
  const middle = together ? (y[target] + y[root]) / 2 : y[root];
  const least = freeHeight() - MARGIN - bounds.height * view.zoom; // no empty space beyond the first and the last row
  view.y = Math.min(MARGIN, Math.max(least, freeHeight() / 2 - middle * view.zoom));
}
function reveal(i) {
  let changed = false;
  for (let j = nodes[i].parent; j >= 0; j = nodes[j].parent) if (folded[j]) { folded[j] = false; changed = true; }
  if (changed) layOut();
}
function bringIntoView(i) {
  const w = width(i) * view.zoom, h = height[i] * view.zoom, pad = 48;
  const sx = view.x + x(i) * view.zoom, sy = view.y + y[i] * view.zoom - h / 2;
  glide(() => {
    if (sx < pad) view.x += pad - sx;
    else if (sx + w > freeWidth() - pad) view.x -= sx + w - freeWidth() + pad;
    if (sy < pad) view.y += pad - sy;
    else if (sy + h > freeHeight() - pad) view.y -= sy + h - freeHeight() + pad;
  });
}
function select(i) {
  selected = i;
  reveal(i);
  showPanel(i);
  redress();
  bringIntoView(i);
}
function fold(i, value = !folded[i]) {
  if (!children[i].length) return;
  const before = y[i];
  folded[i] = value;
  layOut();
  view.y += (before - y[i]) * view.zoom; // what was clicked stays where it is
  draw();
}
function unfoldAll() { folded.fill(false); layOut(); }

// The panel of the chosen step.
function showPanel(i) {
  const node = nodes[i], title = element("h2"), close = element("button", "close", "×");
  title.append(mark(state(i)), node.kind === "prompt" ? "Prompt" : `Step ${i} · ${NAMES[state(i)]}`);
  close.type = "button";
  close.setAttribute("aria-label", "Close");
  close.addEventListener("click", closePanel);
  const facts = element("dl");
  const fact = (name, value) => facts.append(element("dt", "", name), element("dd", "", value));
  if (node.score !== null) fact("score", String(node.score));
  fact("tokens", number(node.num_tokens));
  if (node.kind === "given") fact("written by", "the search");
  if (node.kind === "generated") {
    fact("log-probability", `${node.logprob.toFixed(3)} nats`);
    if (node.num_tokens) fact("per token", `${(node.logprob / node.num_tokens).toFixed(3)} nats`);
  }
  fact("tokens from the beginning", number(tokensAbove[i]));
  fact("branches that share it", number(branches[i]));
  fact("steps below", number(below[i]));
  const path = pathTo(i), list = element("ol"), solution = path.slice(1).map((j) => nodes[j].text).join("");
  for (const j of path) {
    const item = element("li"), step = element("button", "", oneLine(text(j)));
    step.type = "button";
    if (j === i) step.setAttribute("aria-current", "step");
    step.addEventListener("click", () => { select(j); stage.focus(); });
    item.append(step);
    list.append(item);
  }
  panel.replaceChildren(title, close, element("pre", "step", text(i)), facts, element("h3", "", "From the prompt to here"), list);
  if (path.length > 1) panel.append(element("h3", "", "Solution so far"), element("pre", "", solution));
  if (asksQuestion(i)) panel.append(element("h3", "", "As the model reads it"), element("pre", "", node.text));
  panel.hidden = false;
  panel.scrollTop = 0;
}
function closePanel() { panel.hidden = true; selected = -1; redress(); draw(); stage.focus(); }

// Search.
const query = document.getElementById("query"), tallyOfMatches = document.getElementById("matches");
const haystack = nodes.map((node, i) => `${node.text.toLowerCase()}\n${NAMES[state(i)]}`);
function search() {
  const words = query.value.trim().toLowerCase();
  matches = words ? nodes.map((_, i) => i).filter((i) => haystack[i].includes(words)) : [];
  matchSet = new Set(matches);
  match = -1;
  world.classList.toggle("searching", words !== "");
  tallyOfMatches.textContent = words ? plural(matches.length, "match", "matches") : "";
  redress();
}
function toMatch(direction) {
  if (!matches.length) return;
  match = (match + direction + matches.length + (match < 0 && direction < 0 ? 1 : 0)) % matches.length;
  tallyOfMatches.textContent = `${number(match + 1)} of ${number(matches.length)}`;
  select(matches[match]);
}
query.addEventListener("input", search);
query.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { query.value = ""; search(); stage.focus(); }
  if (event.key === "Enter") { event.preventDefault(); toMatch(event.shiftKey ? -1 : 1); }
});
document.getElementById("search").addEventListener("submit", (event) => event.preventDefault());

// Keyboard.
function step(key) {
  if (selected < 0) return answer >= 0 && key !== "ArrowRight" ? answer : roots[0];
  const kids = children[selected], at = shown.indexOf(selected);
  if (key === "ArrowLeft") return nodes[selected].parent >= 0 ? nodes[selected].parent : selected;
  if (key === "ArrowRight") {
    if (kids.length && folded[selected]) fold(selected, false);
    return kids.length ? kids[Math.floor((kids.length - 1) / 2)] : selected;
  }
  if (key === "Home") return roots[0];
  if (key === "End") return shown[shown.length - 1];
  // up and down within a column, where the eye goes
  const direction = key === "ArrowUp" ? -1 : 1;
  for (let k = at + direction; k >= 0 && k < shown.length; k += direction) if (depth[shown[k]] === depth[selected]) return shown[k];
  return selected;
}
stage.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key;
  if (!count && key !== "/") return;
  if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(key)) select(step(key));
  else if (key === "Enter" && selected >= 0) showPanel(selected);
  else if (key === " " && selected >= 0) fold(selected);
  else if (key === "+" || key === "=") zoomCentre(1.25);
  else if (key === "-") zoomCentre(0.8);
  else if (key === "0") glide(fit);
  else if (key.toLowerCase() === "e") unfoldAll();
  else if (key.toLowerCase() === "a" && answer >= 0) select(answer);
  else if (key === "Escape") closePanel();
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== query) { query.focus(); query.select(); event.preventDefault(); }
});

// Wheel, drag and pinch.
stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = stage.getBoundingClientRect();
  if (event.shiftKey) { view.x -= event.deltaY || event.deltaX; schedule(); return; }
  const pixels = event.deltaMode === 1 ? 16 : 1;
  zoomAt(Math.exp(-event.deltaY * pixels * 0.0016), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });
const fingers = new Map();
let moved = 0;
stage.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || event.target.closest(".fold")) return;
  fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  if (fingers.size === 1) moved = 0;
});
stage.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const dx = event.clientX - before.x, dy = event.clientY - before.y;
  moved += Math.abs(dx) + Math.abs(dy);
  if (moved > 4 && !stage.hasPointerCapture(event.pointerId)) { stage.setPointerCapture(event.pointerId); stage.classList.add("dragging"); }
  const now = { x: event.clientX, y: event.clientY }, other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
  if (other) {
    const box = stage.getBoundingClientRect(), size = (a) => Math.hypot(a.x - other.x, a.y - other.y);
    zoomAt(size(now) / Math.max(1, size(before)), (now.x + other.x) / 2 - box.left, (now.y + other.y) / 2 - box.top);
    view.x += dx / 2;
    view.y += dy / 2;
  } else { view.x += dx; view.y += dy; }
  fingers.set(event.pointerId, now);
  schedule();
});
for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, (event) => {
  fingers.delete(event.pointerId);
  if (!fingers.size) stage.classList.remove("dragging");
});
stage.addEventListener("click", (event) => {
  if (moved > 4) return; // the end of a drag
  const button = event.target.closest(".fold"), chosen = event.target.closest(".node");
  if (button) fold(Number(button.dataset.fold));
  else if (chosen) select(Number(chosen.dataset.node));
});
stage.addEventListener("dblclick", (event) => {
  const chosen = event.target.closest(".node");
  if (chosen) fold(Number(chosen.dataset.node));
});
const press = (id, action) => document.getElementById(id).addEventListener("click", action);
press("zoom-in", () => glide(() => zoomCentre(1.25)));
press("zoom-out", () => glide(() => zoomCentre(0.8)));
press("fit", () => glide(fit));
press("unfold", unfoldAll);
press("to-answer", () => { select(answer); stage.focus(); });
document.getElementById("to-answer").hidden = answer < 0;
new ResizeObserver(schedule).observe(stage);

// Head and legend.
const summary = document.getElementById("summary");
if (page.answer !== null) summary.append(element("b", "", `★ ${page.answer}`), " · ");
const numBranches = roots.reduce((sum, i) => sum + branches[i], 0);
const facts = [plural(numBranches, "branch", "branches"), plural(count - roots.length, "step")];
facts.push(`${plural(tokensHeld, "token")} held once, ${number(tokensApart)} in branches kept apart`);
for (const [name, value] of page.spending) facts.push(`${name} ${value}`);
summary.append(facts.join(" · "));
summary.title = summary.textContent;
const counts = {};
nodes.forEach((_, i) => { counts[state(i)] = (counts[state(i)] || 0) + 1; });
for (const name of Object.keys(NAMES).filter((name) => counts[name])) {
  const item = element("li");
  item.append(mark(name), element("span", "", name === "merged" ? "merged" : NAMES[name]), element("b", "", number(counts[name])));
  document.getElementById("statuses").append(item);
}
document.getElementById("scale").textContent = `${digits(low)} to ${digits(high)}`;

foldDeep();
layOutColumns();
layOut();
begin();
draw();
