// The attribution graph of one logit: nodes and edges from interpret/graph.py.

import {drawing, faint, reachable, svgText} from './charts.js';
import {
  DEFAULTS,
  LIMITS,
  color,
  content,
  figure,
  fixed,
  h,
  maxAbs,
  percent,
  range,
  s,
  set,
  signed,
  state,
  sum,
  tableOf,
  watch
} from './core.js';
import {
  L,
  arrays,
  facts,
  headName,
  isOriginal,
  onlyWhenWritten,
  row,
  targetAt,
  tokenLabel,
  tokenQuoted
} from './model.js';

const OPENS_WITH = 30; // nodes at most, so that the picture can be read
Object.assign(DEFAULTS, {
  share: 0, // of the influence that the nodes shown have together, 0: OPENS_WITH nodes
  node: -1 // selected, its place in the order of influence, -1: none
});
Object.assign(LIMITS, {share: [0, 1], node: [-1, 1000]});
const LEAF = 0; // kinds of nodes
const HEAD = 1;
const LOGIT = 3;

// Nodes and edges ---------------------------------------------------------------------------------

/** The graph of the logit at the selected position, or null if there is none. */
function graphHere() {
  const g = (facts.graphs ?? []).findIndex(graph => graph.t === state.t);
  if (g < 0 || !arrays.graph_nodes) return null;
  const {t, logit, total, nodes: end, edges: lastEdge} = facts.graphs[g];
  const {nodes: start, edges: firstEdge} = facts.graphs[g - 1] ?? {nodes: 0, edges: 0};
  const logits = row('graph_logits');
  const influence = row('graph_influence');
  const nodes = range(end - start, i => {
    const [kind, layer, index, position, source] = row('graph_nodes', start + i);
    const amounts = {logits: logits[start + i], influence: influence[start + i]};
    return {id: i, kind, layer, index, position, source, ...amounts};
  });
  const root = {id: -1, kind: LOGIT, position: t, logits: logit, influence: 1};
  const amounts = row('graph_edge_logits');
  const edges = range(lastEdge - firstEdge, i => {
    const [writer, reader] = row('graph_edges', firstEdge + i);
    const to = reader ? nodes[reader - 1] : root;
    return {from: nodes[writer - 1], to, logits: amounts[firstEdge + i]};
  });
  return {root, total, nodes, edges};
}

/** The share of the influence that the first n nodes have, for n = 0, 1, ... */
function shares({nodes, total}) {
  const cumulative = [0];
  for (const node of nodes) cumulative.push(cumulative.at(-1) + node.influence / total);
  return cumulative;
}

/** The part of a graph that is shown: nodes by influence, without those that lead nowhere. */
function shownPart(graph) {
  const cumulative = shares(graph);
  const enough = cumulative.findIndex(share => share >= state.share - 1e-3);
  const n = state.share ? (enough < 0 ? graph.nodes.length : enough) : OPENS_WITH;
  const chosen = new Set([graph.root, ...graph.nodes.slice(0, n)]);
  const among = graph.edges.filter(({from, to}) => chosen.has(from) && chosen.has(to));
  const connected = new Set([graph.root]);
  for (let size = 0; size < connected.size; ) {
    size = connected.size;
    for (const {from, to} of among) if (connected.has(to)) connected.add(from);
  }
  return {
    share: cumulative[Math.min(n, graph.nodes.length)],
    nodes: graph.nodes.filter(node => connected.has(node)),
    edges: among.filter(({to}) => connected.has(to))
  };
}

const leafName = ({index}) => facts.embeddings[index] ?? 'biases';
const place = position => `${tokenQuoted(facts.ids[position])} (${position})`;

function nodeName(node) {
  const {kind, layer, index, position, source} = node;
  if (kind === LOGIT) return `logit of ${tokenQuoted(targetAt(position))}`;
  if (kind === LEAF) return `${leafName(node)} at ${place(position)}`;
  if (kind === HEAD) {
    return `${headName(layer, index)} at ${place(position)}, from ${place(source)}`;
  }
  return `L${layer} neuron ${index} at ${place(position)}`;
}

/** Selects a node; selecting it again deselects it. */
const toggled = node => () => set({node: state.node === node.id ? -1 : node.id});

// The panel ---------------------------------------------------------------------------------------

export function buildGraph() {
  const box = content('graph');
  if (!isOriginal()) return box.append(onlyWhenWritten());
  const note = h('p', {class: 'note'});
  const output = h('output');
  const slider = h('input', {
    type: 'range',
    class: 'short',
    min: 0.02,
    step: 0.01,
    'aria-label': 'Share of the influence that is shown',
    oninput: event => set({share: Number(event.target.value), node: -1})
  });
  const edgeRows = () => {
    const graph = graphHere();
    if (!graph) return [];
    const {edges} = shownPart(graph);
    const bySize = edges.toSorted((a, b) => Math.abs(b.logits) - Math.abs(a.logits));
    return bySize.map(({from, to, logits}) => [nodeName(from), nodeName(to), logits.toFixed(4)]);
  };
  const controls = h('div', {class: 'controls'}, h('span', {}, 'Share explained'), slider, output);
  const title = 'Paths to the logit';
  const picture = figure('graph', title, () => [['from', 'to', 'logits'], edgeRows()], controls);
  const list = figure(
    'graph-nodes',
    'Nodes with the most influence',
    () => {
      const graph = graphHere();
      const {nodes} = graph ? shownPart(graph) : {nodes: []};
      const cells = node => [nodeName(node), node.logits.toFixed(4), node.influence.toFixed(4)];
      return [['node', 'logits', 'influence'], nodes.map(cells)];
    },
    null,
    false
  );
  picture.readout.setAttribute('aria-live', 'polite');
  list.setReadout(
    'Logits: what a node adds over all its paths. Influence (Ameisen et al. 2025): the logit has ' +
      '1, and the edges into a node share its influence by their size.'
  );
  box.append(note, picture, list);
  let drawnAt; // the position of the last drawing
  watch(['t', 'share', 'node', 'theme'], () => {
    if (drawnAt !== undefined && drawnAt !== state.t) state.node = -1; // was of another graph
    drawnAt = state.t;
    const graph = graphHere();
    picture.hidden = list.hidden = !graph;
    note.hidden = Boolean(graph);
    note.textContent = whyNoGraph();
    if (!graph) return;
    const shown = shownPart(graph);
    slider.max = Math.max(0.02, shares(graph).at(-1));
    slider.value = shown.share;
    output.textContent = `${percent(shown.share)}, ${shown.nodes.length} nodes`;
    slider.setAttribute('aria-valuetext', output.textContent);
    picture.heading.textContent = `Paths to the ${nodeName(graph.root)} after ${place(state.t)}`;
    drawGraph(picture, graph, shown);
    describeGraph(picture, graph, shown);
    listNodes(list, shown);
  });
}

function whyNoGraph() {
  if (!facts.graphs?.length) return 'Graphs are computed when explain.py writes the page.';
  return `Graphs are computed for positions from ${facts.graphs[0].t} on: select one of them.`;
}

function describeGraph(picture, graph, {share, edges}) {
  const node = graph.nodes[state.node];
  const direct = sum(edges.filter(({to}) => to === graph.root).map(edge => edge.logits));
  const text =
    `These nodes have ${percent(share)} of the influence on the logit, ` +
    `${fixed(graph.root.logits)}. The edges into it shown here add up to ${signed(direct)}. ` +
    'The number of an edge: by how much the logit falls if only this edge is switched off. ' +
    'Blue raises, orange lowers the logit. Select a node to see its edges.';
  picture.setReadout(node ? describeNode(node, edges) : text);
}

function describeNode(node, edges) {
  const list = (all, end) =>
    all
      .toSorted((a, b) => Math.abs(b.logits) - Math.abs(a.logits))
      .slice(0, 4)
      .map(edge => `${nodeName(edge[end])} ${signed(edge.logits)}`)
      .join('; ');
  const from = edges.filter(({to}) => to === node);
  const to = edges.filter(edge => edge.from === node);
  const reads = from.length ? ` It reads ${list(from, 'from')}.` : '';
  const leads = to.length ? ` It leads to ${list(to, 'to')}.` : '';
  return `${nodeName(node)}: ${signed(node.logits)} logits over all paths.${reads}${leads}`;
}

function listNodes(list, {nodes}) {
  const button = node =>
    h(
      'button',
      {type: 'button', 'aria-pressed': String(state.node === node.id), onclick: toggled(node)},
      nodeName(node)
    );
  const rows = nodes
    .slice(0, 10)
    .map(node => [button(node), signed(node.logits), percent(node.influence)]);
  const attributes = {class: 'rows', 'aria-label': 'Nodes with the most influence'};
  const had = list.picture.contains(document.activeElement);
  list.picture.replaceChildren(tableOf(['node', 'logits', 'influence'], rows, attributes));
  if (had) list.picture.querySelector('[aria-pressed="true"]')?.focus();
  list.refresh();
}

// The picture -------------------------------------------------------------------------------------

const BOX = {width: 50, height: 18, gap: 5};
const LEVEL = 52; // pixels between levels
const LEFT = 62; // room for their names

/** Levels above the embeddings: heads, then MLP of each layer, then the logit. */
function levelOf({kind, layer}) {
  if (kind === LEAF) return 0;
  if (kind === LOGIT) return 2 * L + 1;
  return 2 * layer + kind;
}

function levelName(level) {
  if (level === 0) return 'tokens';
  if (level === 2 * L + 1) return 'logit';
  return `L${Math.floor((level - 1) / 2)} ${level % 2 ? 'heads' : 'MLP'}`;
}

function boxText(node) {
  if (node.kind === LOGIT) return 'logit';
  if (node.kind === LEAF) return leafName(node);
  return node.kind === HEAD ? `H${node.index}←${node.source}` : String(node.index);
}

/** Where each node stands: a column for each position, a row for each level; empty ones are cut. */
function graphLayout(nodes) {
  const ascending = values => [...new Set(values)].sort((a, b) => a - b);
  const levels = ascending(nodes.map(levelOf));
  const columns = ascending(nodes.map(node => node.position));
  const cells = {};
  for (const node of nodes) (cells[`${levelOf(node)},${node.position}`] ??= []).push(node);
  let x = LEFT;
  const middles = new Map();
  const at = new Map(); // node -> {x, y} of its middle
  const y = level => 16 + (levels.length - 1 - levels.indexOf(level)) * LEVEL;
  for (const position of columns) {
    const here = levels.map(level => cells[`${level},${position}`] ?? []);
    const widest = Math.max(...here.map(cell => cell.length));
    const width = Math.max(64, widest * (BOX.width + BOX.gap) + 14);
    here.forEach((cell, i) =>
      cell.forEach((node, j) => {
        const shift = (j - (cell.length - 1) / 2) * (BOX.width + BOX.gap);
        at.set(node, {x: x + width / 2 + shift, y: y(levels[i])});
      })
    );
    middles.set(position, x + width / 2);
    x += width;
  }
  return {levels, middles, at, y, width: x + 4, height: y(levels[0]) + 46};
}

function drawGraph(picture, graph, {nodes, edges}) {
  const all = [graph.root, ...nodes];
  const {levels, middles, at, y, width, height} = graphLayout(all);
  const selected = graph.nodes[state.node];
  const largest = maxAbs(edges.map(edge => edge.logits));
  const isFaint = ({from, to}) => selected && from !== selected && to !== selected;
  const drawEdge = edge => {
    const [a, b] = [at.get(edge.from), at.get(edge.to)];
    const [top, bottom] = [b.y + BOX.height / 2, a.y - BOX.height / 2];
    const bend = (bottom - top) / 2;
    return s(
      'path',
      {
        d: `M${a.x},${bottom} C${a.x},${bottom - bend} ${b.x},${top + bend} ${b.x},${top}`,
        fill: 'none',
        stroke: color(edge.logits < 0 ? 'warm' : 'accent'),
        'stroke-width': 0.5 + (5 * Math.abs(edge.logits)) / largest,
        'stroke-opacity': isFaint(edge) ? 0.08 : 0.55
      },
      s('title', {}, `${nodeName(edge.from)} → ${nodeName(edge.to)}: ${signed(edge.logits, 3)}`)
    );
  };
  const drawNode = node => {
    const {x, y: middle} = at.get(node);
    const isChosen = node === selected;
    const tone = node.logits < 0 ? 'warm' : 'accent';
    return s(
      'g',
      {},
      s('rect', {
        x: x - BOX.width / 2,
        y: middle - BOX.height / 2,
        width: BOX.width,
        height: BOX.height,
        rx: node.kind === HEAD ? 9 : 3,
        fill: color(isChosen ? 'ink' : 'panel'),
        stroke: color(isChosen ? 'ink' : tone),
        'stroke-width': 1.5
      }),
      svgText(x, middle, boxText(node), {
        'text-anchor': 'middle',
        'font-size': 10.5,
        fill: color(isChosen ? 'paper' : 'ink')
      })
    );
  };
  const names = Array.from(middles, ([position, x]) => [
    svgText(x, height - 22, tokenLabel(facts.ids[position], 8), {
      'text-anchor': 'middle',
      class: 'mono'
    }),
    svgText(x, height - 7, String(position), faint('middle'))
  ]);
  const ordered = all.toSorted((a, b) => levelOf(b) - levelOf(a) || at.get(a).x - at.get(b).x);
  const drawn = ordered.map(drawNode);
  const bySize = edges.toSorted((a, b) => Math.abs(a.logits) - Math.abs(b.logits));
  const svg = drawing(
    picture,
    width,
    height,
    'Attribution graph: layers from bottom to top, positions from left to right',
    levels.map(level => svgText(LEFT - 8, y(level), levelName(level), faint('end'))),
    names,
    bySize.map(drawEdge), // the largest on top
    drawn
  );
  const view = `${state.t} ${state.share}`;
  if (picture.view !== view) {
    picture.view = view; // a narrow screen shows a part: begin at the logit
    picture.picture.scrollLeft = at.get(graph.root).x - picture.picture.clientWidth / 2;
  }
  const items = ordered.map((node, i) => ({
    element: drawn[i],
    name: boxText(node),
    tip: `${nodeName(node)}: ${signed(node.logits, 3)}`,
    onClick: node === graph.root ? undefined : toggled(node)
  }));
  reachable(picture, svg, items);
}
