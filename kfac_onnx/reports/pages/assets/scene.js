/* A model as a tree of boxes: nodes, inputs, outputs; functions, bodies and blocks of inserted nodes unfold.
 *
 * Each box has x, y within its parent and, after `arrange`, left and top in the drawing.
 */
"use strict";
const Scene = (() => {
  const HEAD = 30; // of an unfolded box
  const PAD = 14;
  const LETTER = 7.3; // of the canvas font, about
  const BLOCKS_FROM = 40; // inserted nodes: so many are folded into blocks at first

  const widthOf = (...texts) =>
    Math.min(280, Math.max(96, 28 + LETTER * Math.max(...texts.map((text) => text.length))));

  const phaseOf = (node) => node.phase || "gradients";

  class Box {
    constructor(scene, parent, kind, id, label, below) {
      Object.assign(this, { scene, parent, kind, id, label, below, level: null, x: 0, y: 0, left: 0, top: 0 });
      this.path = parent ? `${parent.path}\u0000${id}` : "";
      this.node = null;
      this.status = "";
      this.note = ""; // the third line: the cost, the state that is written
    }
    get foldable() { return this.kind === "block" || this.kind === "part" || Boolean(this.node && this.node.bodies.length); }
    get open() { return this.kind === "root" || this.scene.opened.has(this.path); }
    get children() { return this.open && this.level ? this.level.items : []; }
    fit() {
      const small = this.kind === "input" || this.kind === "output";
      this.h = small ? 26 : this.note ? 58 : this.below ? 42 : 28;
      this.w = widthOf(this.label + (this.foldable ? "  +" : ""), small ? "" : this.below, this.note);
    }
  }

  class Scene {
    constructor(view) {
      this.view = view;
      this.graphs = view.graphs;
      this.opened = new Set();
      this.homes = new Map(); // graph key -> [graph key, index] of the first node that holds it
      for (const [key, graph] of Object.entries(this.graphs)) {
        graph.nodes.forEach((node, i) => {
          for (const body of node.bodies) if (!this.homes.has(body.graph)) this.homes.set(body.graph, [key, i]);
        });
      }
      const inserted = this.graphs.main.nodes.filter((node) => node.pass).length;
      this.build(inserted >= BLOCKS_FROM);
    }

    /* Makes the boxes anew, with the inserted nodes in blocks or not. */
    build(blocks) {
      this.blocks = blocks;
      this.opened.clear();
      this.root = new Box(this, null, "root", "", "", "");
      this.arrange();
    }

    arrange() {
      this.size(this.root);
      this.place(this.root, 0, 0);
    }

    size(box) {
      box.fit();
      if (!box.open) return;
      box.level ||= box.kind === "root" ? this.top(box) : this.inside(box);
      box.level.items.forEach((item) => this.size(item));
      const { w, h } = Layout.layout(box.level);
      const head = box.kind === "root" ? 0 : HEAD, pad = box.kind === "root" ? 0 : PAD;
      box.level.dx = pad;
      box.level.dy = head + pad;
      const least = box.kind === "root" ? 0 : widthOf(box.label, "");
      box.level.dx += Math.max(0, least - w - 2 * pad) / 2;
      box.w = Math.max(least, w + 2 * pad);
      box.h = h + head + 2 * pad;
    }

    place(box, left, top) {
      box.left = left;
      box.top = top;
      for (const item of box.children) {
        this.place(item, left + box.level.dx + item.x, top + box.level.dy + item.y);
      }
    }

    inside(box) {
      if (box.kind === "block") return box.inner;
      if (box.kind === "part") return this.level(box, box.inner);
      if (box.node.bodies.length === 1) return this.level(box, box.node.bodies[0].graph);
      const items = box.node.bodies.map((body, i) => {
        const part = new Box(this, box, "part", `body ${i}`, body.label, "");
        part.inner = body.graph;
        this.opened.add(part.path);
        return part;
      });
      return { items, edges: [] };
    }

    /* Returns the boxes and edges of a graph. */
    level(parent, key) {
      const graph = this.graphs[key], items = [], from = new Map();
      const add = (kind, id, label, below) => {
        const box = new Box(this, parent, kind, id, label, below);
        box.index = items.length;
        box.graph = key;
        items.push(box);
        return box;
      };
      for (const name of graph.inputs) {
        const box = add("input", `input ${name}`, name, graph.types[name] || "");
        box.value = name;
        from.set(name, box);
      }
      graph.nodes.forEach((node, i) => {
        const type = graph.types[node.outputs[0]] || "";
        const box = add("node", `node ${i}`, node.op, [type, node.placement].filter(Boolean).join(" · "));
        const states = key === "main" ? node.outputs.map((name) => this.view.states[name]).filter(Boolean) : [];
        box.note = [node.cost, ...new Set(states)].filter(Boolean).join(" · ");
        box.node = node;
        box.at = i;
        box.status = node.status || "";
        for (const name of node.outputs) from.set(name, box);
      });
      const edges = new Map();
      const join = (name, to) => {
        const source = from.get(name);
        if (!source || source === to) return;
        const id = source.index * items.length + to.index;
        if (edges.has(id)) edges.get(id).values.push(name);
        else edges.set(id, { from: source.index, to: to.index, values: [name] });
      };
      items.filter((item) => item.kind === "node").forEach((box) => {
        for (const name of [...box.node.inputs, ...box.node.captured]) if (name) join(name, box);
      });
      for (const name of graph.outputs) {
        const box = add("output", `output ${name}`, name, graph.types[name] || "");
        box.value = name;
      }
      const width = items.length;
      const all = [...edges.values()];
      items.filter((item) => item.kind === "output").forEach((box) => {
        const source = from.get(box.value);
        if (source) all.push({ from: source.index, to: box.index, values: [box.value] });
      });
      return { items, edges: all, width };
    }

    top(root) {
      const flat = this.level(root, "main");
      if (!this.blocks) return flat;
      const groups = new Map();
      for (const item of flat.items) {
        if (!item.node || !item.node.pass) continue;
        const key = `${item.node.pass}\u0000${phaseOf(item.node)}\u0000${item.node.site || ""}`;
        if (!groups.has(key)) groups.set(key, []);
        groups.get(key).push(item);
      }
      const items = [], container = new Map(), within = new Map();
      const enter = (box) => { box.index = items.length; items.push(box); };
      for (const [key, members] of groups) {
        if (members.length < 2) continue;
        const [pass, phase, site] = key.split("\u0000");
        const block = new Box(this, root, "block", `block ${key}`, `${phase}${site ? " · " + site : ""}`,
          `${pass}, ${members.length} nodes`);
        Object.assign(block, { pass, phase, site, inner: { items: members, edges: [] } });
        enter(block);
        members.forEach((item, i) => {
          container.set(item, block);
          within.set(item, i);
          item.parent = block;
          item.path = `${block.path}\u0000${item.id}`;
        });
        const marks = new Set(members.map((item) => item.status));
        block.status = marks.size === 1 ? members[0].status : "changed";
      }
      const old = flat.items;
      old.filter((item) => !container.has(item)).forEach(enter);
      const edges = new Map();
      for (const edge of flat.edges) {
        const a = old[edge.from], b = old[edge.to], A = container.get(a) || a, B = container.get(b) || b;
        if (A === B) {
          A.inner.edges.push({ from: within.get(a), to: within.get(b), values: edge.values });
          continue;
        }
        const id = A.index * items.length + B.index;
        if (edges.has(id)) edges.get(id).values.push(...edge.values);
        else edges.set(id, { from: A.index, to: B.index, values: [...edge.values] });
      }
      return { items, edges: [...edges.values()] };
    }

    /* Unfolds whatever holds the node, and returns its box. */
    reveal(key, at) {
      const way = [[key, at]];
      const seen = new Set([key]);
      while (way[0][0] !== "main") {
        const home = this.homes.get(way[0][0]);
        if (!home || seen.has(home[0])) return null;
        seen.add(home[0]);
        way.unshift(home);
      }
      const boxOf = ([graph, index]) => this.find((item) => item.graph === graph && item.at === index);
      for (let depth = 0; depth < way.length; depth++) {
        let box = boxOf(way[depth]);
        if (box && box.parent.kind === "block" && !box.parent.open) {
          this.opened.add(box.parent.path);
          this.arrange();
          box = boxOf(way[depth]);
        }
        if (depth === way.length - 1) return box;
        if (box && !box.open) {
          this.opened.add(box.path);
          this.arrange();
        }
      }
      return null;
    }

    find(test, box = this.root) {
      const items = box.kind === "block" ? box.inner.items : box.children;
      for (const item of items) {
        if (test(item)) return item;
        const inner = this.find(test, item);
        if (inner) return inner;
      }
      return null;
    }

    /* Calls a function with each box that is drawn, outer ones first. */
    each(visit, box = this.root) {
      for (const item of box.children) {
        visit(item);
        if (item.open) this.each(visit, item);
      }
    }

    toggle(box) {
      if (this.opened.has(box.path)) this.opened.delete(box.path);
      else this.opened.add(box.path);
      this.arrange();
    }
  }

  Scene.phaseOf = phaseOf;
  return Scene;
})();
