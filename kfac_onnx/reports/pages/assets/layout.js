/* Where the boxes of one level stand: dagre for small levels, ranks and barycentres for large ones.
 *
 * A level is {items: [{w, h}], edges: [{from, to}]} with indices; `layout` sets x, y of each item, `points` of
 * edges that have bends, and returns the size {w, h}.
 */
"use strict";
const Layout = (() => {
  const GAP = 18; // between neighbours in a rank
  const RISE = 38; // between ranks
  const MOST_IN_ROW = 28; // a wider rank is wrapped into several rows
  const DAGRE_NODES = 90; // above this dagre takes seconds
  const DAGRE_EDGES = 160;
  const SWEEPS = 6;

  function layout(level) {
    if (level.items.length === 0) return { w: 0, h: 0 };
    const small = level.items.length <= DAGRE_NODES && level.edges.length <= DAGRE_EDGES;
    return small ? byDagre(level) : byRanks(level);
  }

  function byDagre({ items, edges }) {
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: GAP, ranksep: RISE, edgesep: 8 });
    graph.setDefaultEdgeLabel(() => ({}));
    items.forEach((item, i) => graph.setNode(String(i), { width: item.w, height: item.h }));
    edges.forEach((edge) => graph.setEdge(String(edge.from), String(edge.to), {}));
    dagre.layout(graph);
    items.forEach((item, i) => {
      const place = graph.node(String(i));
      item.x = place.x - item.w / 2;
      item.y = place.y - item.h / 2;
    });
    edges.forEach((edge) => {
      edge.points = graph.edge(String(edge.from), String(edge.to)).points;
    });
    return normalized(items, edges);
  }

  /* Returns the ranks of longest paths; edges that close a cycle are left out of account. */
  function ranksOf(count, edges) {
    const next = Array.from({ length: count }, () => []);
    edges.forEach((edge) => next[edge.from].push(edge.to));
    const state = new Uint8Array(count), order = [], forward = Array.from({ length: count }, () => []);
    for (let root = 0; root < count; root++) {
      if (state[root]) continue;
      const stack = [[root, 0]];
      state[root] = 1;
      while (stack.length) {
        const top = stack[stack.length - 1];
        if (top[1] === next[top[0]].length) {
          state[top[0]] = 2;
          order.push(top[0]);
          stack.pop();
          continue;
        }
        const to = next[top[0]][top[1]++];
        if (state[to] === 1) continue;
        forward[top[0]].push(to);
        if (state[to] === 0) {
          state[to] = 1;
          stack.push([to, 0]);
        }
      }
    }
    order.reverse();
    const rank = new Int32Array(count), fed = new Uint8Array(count);
    for (const node of order) for (const to of forward[node]) {
      rank[to] = Math.max(rank[to], rank[node] + 1);
      fed[to] = 1;
    }
    for (const node of order) { // what nothing feeds stands just above its first reader
      if (fed[node] || forward[node].length === 0) continue;
      rank[node] = Math.max(0, Math.min(...forward[node].map((to) => rank[to])) - 1);
    }
    return { rank, order };
  }

  function byRanks({ items, edges }) {
    const { rank, order } = ranksOf(items.length, edges);
    const above = items.map(() => []), below = items.map(() => []);
    for (const edge of edges) {
      if (rank[edge.from] < rank[edge.to]) {
        below[edge.from].push(edge.to);
        above[edge.to].push(edge.from);
      }
    }
    let rows = [];
    for (const node of order) (rows[rank[node]] ||= []).push(node);
    rows = rows.filter((row) => row);
    const spot = new Float64Array(items.length);
    const number = (row) => row.forEach((node, i) => { spot[node] = (i + 0.5) / row.length; });
    rows.forEach(number);
    for (let sweep = 0; sweep < SWEEPS; sweep++) {
      const near = sweep % 2 ? below : above;
      const turns = sweep % 2 ? [...rows].reverse() : rows;
      for (const row of turns) {
        const wish = new Map(row.map((node) => [node, mean(near[node], spot, spot[node])]));
        row.sort((a, b) => wish.get(a) - wish.get(b));
        number(row);
      }
    }
    rows = rows.flatMap(wrapped);
    let y = 0;
    for (const row of rows) {
      const height = Math.max(...row.map((node) => items[node].h));
      let x = 0;
      for (const node of row) {
        items[node].x = x;
        items[node].y = y + (height - items[node].h) / 2;
        x += items[node].w + GAP;
      }
      row.forEach((node) => { items[node].x -= x / 2; });
      y += height + RISE;
    }
    const middle = new Float64Array(items.length);
    items.forEach((item, i) => { middle[i] = item.x + item.w / 2; });
    for (let sweep = 0; sweep < 2 * SWEEPS; sweep++) {
      const near = sweep % 2 ? below : above;
      for (const row of sweep % 2 ? [...rows].reverse() : rows) straighten(row, items, near, middle);
    }
    edges.forEach((edge) => { edge.points = null; });
    return normalized(items, edges);
  }

  function wrapped(row) {
    if (row.length <= MOST_IN_ROW) return [row];
    const parts = Math.ceil(row.length / MOST_IN_ROW);
    return Array.from({ length: parts }, (_, part) => row.filter((_, i) => i % parts === part));
  }

  function mean(nodes, values, otherwise) {
    if (nodes.length === 0) return otherwise;
    let sum = 0;
    for (const node of nodes) sum += values[node];
    return sum / nodes.length;
  }

  /* Moves a row towards the neighbours' middles without overlaps: the mean of the leftmost and the rightmost
   * placement that keep the order keeps it too. */
  function straighten(row, items, near, middle) {
    const wish = row.map((node) => mean(near[node], middle, middle[node]));
    const right = [...wish], left = [...wish];
    const apart = (i) => (items[row[i - 1]].w + items[row[i]].w) / 2 + GAP;
    for (let i = 1; i < row.length; i++) right[i] = Math.max(right[i], right[i - 1] + apart(i));
    for (let i = row.length - 1; i > 0; i--) left[i - 1] = Math.min(left[i - 1], left[i] - apart(i));
    row.forEach((node, i) => {
      middle[node] = (left[i] + right[i]) / 2;
      items[node].x = middle[node] - items[node].w / 2;
    });
  }

  function normalized(items, edges) {
    let left = Infinity, top = Infinity, w = 0, h = 0;
    for (const item of items) {
      left = Math.min(left, item.x);
      top = Math.min(top, item.y);
    }
    for (const edge of edges) for (const point of edge.points || []) left = Math.min(left, point.x);
    for (const item of items) {
      item.x -= left;
      item.y -= top;
      w = Math.max(w, item.x + item.w);
      h = Math.max(h, item.y + item.h);
    }
    for (const edge of edges) {
      edge.points = edge.points && edge.points.map((point) => ({ x: point.x - left, y: point.y - top }));
      for (const point of edge.points || []) w = Math.max(w, point.x);
    }
    return { w, h };
  }

  return { layout };
})();
