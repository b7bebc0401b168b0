// The tree: its shape, what of it is folded, and the place and size of every card.
const GAP = 52; // between columns, for the lines and the fold buttons
const LINE = 18, PADDING = 6, SPACE = 4; // height of a line of text, of a card's rim, and between two cards
const MIN_ROW = LINE + PADDING + SPACE, MAX_ROW = 4 * LINE + PADDING + SPACE; // height of a leaf's row
const MIN_CARD = 200, MAX_CARD = 1000, MAX_PROMPT = 300; // widths
const MARGIN = 24; // between the tree and the window
const FRAME = 50; // of a card, left and right of its text
const SCORE = 52; // width of a score beside the text
const FONT = "13px"; // of all text in cards, as in page.css
const READABLE = 12 / 13; // the zoom that shows that text at 12 pixels
const FAR = 0.42; // below this zoom cards are blocks of colour
const UNFOLDED = 400; // steps shown at first; of a larger tree the deeper ones are folded
const MIN_ZOOM = 0.002, MAX_ZOOM = 3;

const NAMES = {
  prompt: "prompt", continued: "continued", open: "left open", pruned: "pruned", merged: "merged into an equal one",
  final: "complete", answer: "the answer",
};
const MARKS = { // 14 x 14; each its own shape, so that colour is not needed to tell them apart
  prompt: "M2 3H12M2 7H12M2 11H8",
  continued: "M2 7H12M8 3L12 7L8 11",
  open: "M12 7A5 5 0 1 1 2 7A5 5 0 1 1 12 7Z",
  pruned: "M3 3L11 11M11 3L3 11",
  merged: "M2 3C8 3 6 7 12 7M2 11C8 11 6 7 12 7",
  final: "M2.5 2.5H11.5V11.5H2.5Z",
  answer: "M7 1L8.8 5.1L13.2 5.5L9.9 8.4L10.9 12.8L7 10.5L3.1 12.8L4.1 8.4L0.8 5.5L5.2 5.1Z",
};
const FILLED = new Set(["final", "answer"]);

const page = JSON.parse(document.getElementById("tree").textContent);
const nodes = page.nodes, count = nodes.length;
const stage = document.getElementById("stage"), world = document.getElementById("world");
const edges = document.getElementById("edges"), panel = document.getElementById("panel");

// Parents come before children, so two passes are enough.
const children = Array.from({ length: count }, () => []);
const depth = new Array(count).fill(0), branches = new Array(count).fill(0), below = new Array(count).fill(0);
const tokensAbove = new Array(count).fill(0);
const roots = [];
nodes.forEach((node, i) => {
  (node.parent < 0 ? roots : children[node.parent]).push(i);
  depth[i] = node.parent < 0 ? 0 : depth[node.parent] + 1;
  tokensAbove[i] = node.num_tokens + (node.parent < 0 ? 0 : tokensAbove[node.parent]);
});
let tokensHeld = 0, tokensApart = 0;
for (let i = count - 1; i >= 0; i--) {
  tokensHeld += nodes[i].num_tokens;
  if (!children[i].length) { branches[i] = 1; tokensApart += tokensAbove[i]; }
  if (nodes[i].parent >= 0) { branches[nodes[i].parent] += branches[i]; below[nodes[i].parent] += below[i] + 1; }
}
function state(i) {
  if (nodes[i].kind === "prompt") return "prompt";
  return nodes[i].status === "open" && children[i].length ? "continued" : nodes[i].status;
}
const pathTo = (i) => { const path = []; for (; i >= 0; i = nodes[i].parent) path.push(i); return path.reverse(); };
const answer = nodes.findIndex((node) => node.status === "answer");
const onPath = new Set(answer >= 0 ? pathTo(answer) : []);

const scores = nodes.map((node) => node.score).filter((score) => score !== null);
let low = 0, high = 1;
for (const score of scores) { low = Math.min(low, score); high = Math.max(high, score); }

// A prompt holds worked examples before its question; a card shows the question, the panel also the prompt.
const asksQuestion = (i) =>
  page.question !== null && nodes[i].kind === "prompt" && (i === roots[0] || nodes[i].text.includes(page.question));
const text = (i) => (asksQuestion(i) ? page.question : nodes[i].text);
const oneLine = (words, lineBreak = " ") => words.trim().replace(/\s*\n\s*/g, lineBreak).replace(/\s+/g, " ") || "(no text)";
const cardText = (i) => oneLine(text(i), " ↵ ");

// What is folded at first.
const folded = new Array(count).fill(false);
function foldDeep() {
  if (count <= UNFOLDED) return;
  for (let i = 0; i < count; i++) folded[i] = children[i].length > 0 && !onPath.has(i);
  let numShown = roots.length + [...onPath].reduce((sum, i) => sum + children[i].length, 0);
  const queue = [...roots];
  for (let next = 0; next < queue.length && numShown < UNFOLDED; next++) {
    const i = queue[next];
    if (folded[i]) {
      if (numShown + children[i].length > UNFOLDED) break;
      folded[i] = false;
      numShown += children[i].length;
    }
    for (const child of children[i]) queue.push(child);
  }
}

// Columns are as wide as their texts ask for and the window allows; x by depth, y (a card's middle) by the order of leaves.
const pen = document.createElement("canvas").getContext("2d");
pen.font = `${FONT} ${getComputedStyle(document.body).fontFamily}`;
const textWidth = nodes.map((_, i) => pen.measureText(cardText(i).slice(0, 600)).width);
const frame = (i) => FRAME + (nodes[i].score === null ? 0 : SCORE);
const columnWidth = [], columnLeft = [];
function layOutColumns() {
  const wanted = [];
  for (let i = 0; i < count; i++) wanted[depth[i]] = Math.max(wanted[depth[i]] || MIN_CARD, textWidth[i] + frame(i));
  if (wanted.length) wanted[0] = Math.min(wanted[0], MAX_PROMPT);
  const total = (limit) => wanted.reduce((sum, width) => sum + Math.min(width, limit) + GAP, 2 * MARGIN - GAP);
  const room = total(MAX_CARD) <= stage.clientWidth ? stage.clientWidth : stage.clientWidth / READABLE;
  let limit = MAX_CARD;
  while (limit > MIN_CARD && total(limit) > room) limit -= 4;
  let left = 0;
  wanted.forEach((width, column) => {
    columnWidth[column] = Math.ceil(Math.min(width, limit));
    columnLeft[column] = left;
    left += columnWidth[column] + GAP;
  });
}
const x = (i) => columnLeft[depth[i]], width = (i) => columnWidth[depth[i]];
const y = new Array(count).fill(0), height = new Array(count).fill(0), lines = new Array(count).fill(1);
const hasNumbers = new Array(count).fill(false); // a line below the text, where there is room for it
let shown = [], bounds = { width: 0, height: 0 }, row = 0;
function layOut() {
  shown = [];
  const stack = [...roots].reverse();
  while (stack.length) {
    const i = stack.pop();
    shown.push(i);
    if (!folded[i]) for (let k = children[i].length - 1; k >= 0; k--) stack.push(children[i][k]);
  }
  const isLeaf = (i) => folded[i] || !children[i].length;
  const numLeaves = shown.filter(isLeaf).length;
  row ||= Math.max(MIN_ROW, Math.min(MAX_ROW, Math.floor((stage.clientHeight - 2 * MARGIN) / Math.max(1, numLeaves))));
  const top = [], bottom = []; // of the rows of the leaves below
  let leaf = 0, deepest = -1;
  for (const i of shown) {
    if (isLeaf(i)) { top[i] = leaf * row; bottom[i] = ++leaf * row; y[i] = (top[i] + bottom[i]) / 2; }
    deepest = Math.max(deepest, depth[i]);
  }
  for (let k = shown.length - 1; k >= 0; k--) {
    const i = shown[k], first = children[i][0], last = children[i][children[i].length - 1];
    if (!isLeaf(i)) { top[i] = top[first]; bottom[i] = bottom[last]; y[i] = (y[first] + y[last]) / 2; }
    size(i, 2 * Math.min(y[i] - top[i], bottom[i] - y[i]) - SPACE);
  }
  bounds = { width: deepest < 0 ? 0 : columnLeft[deepest] + columnWidth[deepest], height: numLeaves * row };
  drawAll();
}
function size(i, room) { // as many lines as the text takes and the room has, within a limit
  const fit = Math.floor((room - PADDING) / LINE), limit = nodes[i].kind === "prompt" ? 8 : 3;
  hasNumbers[i] = fit > 1;
  const needed = Math.ceil((1.06 * textWidth[i]) / (width(i) - frame(i)));
  lines[i] = Math.max(1, Math.min(needed, limit, fit - hasNumbers[i]));
  height[i] = (lines[i] + hasNumbers[i]) * LINE + PADDING;
}
