// The tree, what of it is folded, and where each step stands.
const COLUMN = 308, WIDTH = 232, ROW = 70, HEIGHT = 58; // a step's place and its card, in pixels at zoom 1
const FAR = 0.42; // below this zoom cards are blocks of colour
const UNFOLDED = 400; // steps shown at first; of a larger tree the deeper ones are folded
const MIN_ZOOM = 0.002, MAX_ZOOM = 3;

const NAMES = {
  prompt: "prompt", open: "left open", pruned: "pruned", merged: "merged into an equal one", final: "complete", answer: "the answer",
};
const MARKS = { // 14 x 14; each its own shape, so that colour is not needed to tell them apart
  prompt: "M2 3H12M2 7H12M2 11H8",
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

// The tree, once: parents come before children, so two passes are enough.
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
const look = (i) => (nodes[i].kind === "prompt" ? "prompt" : nodes[i].status);
const pathTo = (i) => { const path = []; for (; i >= 0; i = nodes[i].parent) path.push(i); return path.reverse(); };
const answer = nodes.findIndex((node) => node.status === "answer");
const onPath = new Set(answer >= 0 ? pathTo(answer) : []);

const scores = nodes.map((node) => node.score).filter((score) => score !== null);
let low = 0, high = 1;
for (const score of scores) { low = Math.min(low, score); high = Math.max(high, score); }

// Folding and layout: x by depth, y by the order of the leaves that are shown.
const folded = new Array(count).fill(false);
function foldDeep() {
  if (count <= UNFOLDED) return;
  for (let i = 0; i < count; i++) folded[i] = children[i].length > 0 && !onPath.has(i);
  let shown = roots.length + [...onPath].reduce((sum, i) => sum + children[i].length, 0);
  const queue = [...roots];
  for (let at = 0; at < queue.length && shown < UNFOLDED; at++) {
    const i = queue[at];
    if (folded[i]) {
      if (shown + children[i].length > UNFOLDED) break;
      folded[i] = false;
      shown += children[i].length;
    }
    for (const child of children[i]) queue.push(child);
  }
}
const x = (i) => depth[i] * COLUMN;
const y = new Array(count).fill(0);
let shown = [], bounds = { width: 0, height: 0 };
function layOut() {
  shown = [];
  const stack = [...roots].reverse();
  while (stack.length) {
    const i = stack.pop();
    shown.push(i);
    if (!folded[i]) for (let k = children[i].length - 1; k >= 0; k--) stack.push(children[i][k]);
  }
  let leaf = 0, deepest = 0;
  for (const i of shown) {
    if (folded[i] || !children[i].length) y[i] = leaf++ * ROW;
    deepest = Math.max(deepest, depth[i]);
  }
  for (let k = shown.length - 1; k >= 0; k--) {
    const i = shown[k];
    if (!folded[i] && children[i].length) y[i] = (y[children[i][0]] + y[children[i][children[i].length - 1]]) / 2;
  }
  bounds = { width: deepest * COLUMN + WIDTH, height: Math.max(0, leaf - 1) * ROW + HEIGHT };
  drawAll();
}
