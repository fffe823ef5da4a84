/* The page: its drawings, colours, search, and what is said of the box that was chosen. */
"use strict";
(() => {
  const begin = performance.now();
  const data = JSON.parse(document.getElementById("data").textContent);
  const PALETTE = ["#2f6fde", "#c2571a", "#7a4fd0", "#0f8b8d", "#b8357f", "#5f8a1b", "#9a6b00", "#4b5bb5", "#c23b3b"];
  const PHASES = ["gradients", "renormalize", "count", "refresh", "precondition", "commit", "undo", "select"];
  const RESULTS = 60;
  const by = (id) => document.getElementById(id);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  const every = data.views.flatMap((view) => Object.values(view.graphs).flatMap((graph) => graph.nodes));
  const distinct = (of) => [...new Set(every.map(of).filter(Boolean))].sort();
  const passes = distinct((node) => node.pass), providers = distinct((node) => node.placement);
  const statuses = distinct((node) => node.status);
  const keys = {
    pass: { words: passes, of: (item) => item.pass },
    phase: { words: PHASES.filter((phase) => every.some((node) => (node.phase || "gradients") === phase)),
      of: (item) => (item.pass ? Scene.phaseOf(item) : "") },
    placement: { words: providers, of: (item) => item.placement },
    change: { words: statuses.filter((word) => word in View.STATUS && data.marks === "change"), of: (item) => item.status },
    finding: { words: statuses.filter((word) => word in View.STATUS && data.marks === "finding"), of: (item) => item.status },
  };
  const marked = () => page.key === "change" || page.key === "finding";
  const page = {
    views: [],
    key: data.marks,
    hidden: new Set(),
    wordOf(box) {
      if (marked()) return box.status;
      const source = box.kind === "block" ? box : box.node || null;
      if (source) return keys[page.key].of(source) || "";
      return "";
    },
    colour(box) {
      const word = page.wordOf(box);
      if (!word) return null;
      return marked() ? View.STATUS[word] : PALETTE[keys[page.key].words.indexOf(word) % PALETTE.length];
    },
    dimmed(box) { return page.hidden.has(page.wordOf(box) || "") && (box.kind === "node" || box.kind === "block"); },
    select,
  };

  function draw() { page.views.forEach((view) => view.changed()); }

  // --- colours -----------------------------------------------------------------------------------------
  function legend() {
    const list = by("legend");
    list.replaceChildren();
    const words = keys[page.key].words.filter((word) => word);
    for (const word of words) {
      const entry = make("button", undefined, "key");
      const swatch = make("i");
      swatch.style.background = marked() ? View.STATUS[word] : PALETTE[words.indexOf(word) % PALETTE.length];
      entry.append(swatch, make("span", word));
      entry.title = "dim or show";
      entry.addEventListener("click", () => {
        if (page.hidden.has(word)) page.hidden.delete(word);
        else page.hidden.add(word);
        entry.classList.toggle("off", page.hidden.has(word));
        draw();
      });
      list.append(entry);
    }
    list.hidden = !words.length;
  }

  // --- one box -----------------------------------------------------------------------------------------
  function select(view, box) {
    page.views.forEach((other) => { other.selected = null; });
    view.selected = box;
    if (box) {
      show(view, box);
      for (const other of page.views) {
        if (other === view || !box.node) continue;
        const twin = other.scene.reveal("main", indexOf(other, box.node.key));
        if (twin) {
          other.selected = twin;
          other.center(twin);
        }
      }
    }
    draw();
  }

  const indexOf = (view, key) => view.scene.graphs.main.nodes.findIndex((node) => node.key === key);

  function row(table, name, ...parts) {
    const line = table.insertRow();
    line.append(make("th", name));
    const cell = line.insertCell();
    cell.append(...parts);
  }

  function show(view, box) {
    const panel = by("chosen"), scene = view.scene, node = box.node;
    panel.replaceChildren();
    tab("chosen");
    panel.append(make("h2", node ? (node.domain ? `${node.domain}::${node.op}` : node.op) : box.label));
    if (node && node.name) panel.append(make("p", node.name, "name"));
    if (box.foldable) {
      const button = make("button", box.open ? "Fold" : "Unfold", "wide");
      button.id = "unfold";
      button.addEventListener("click", () => {
        view.toggle(box);
        show(view, box);
      });
      panel.append(button);
    }
    const table = make("table", undefined, "facts");
    const fact = (name, text) => { if (text) row(table, name, text); };
    fact(data.marks === "finding" ? "finding" : "change", box.status);
    if (box.kind === "block") {
      fact("pass", box.pass);
      fact("phase", box.phase);
      fact("table", box.site);
      fact("nodes", String(box.inner.items.length));
    }
    if (box.value) {
      fact("type", scene.graphs[box.graph].types[box.value]);
      fact("state", scene.view.states[box.value]);
    }
    if (node) {
      fact("pass", node.pass || "came with the graph");
      fact("phase", Scene.phaseOf(node));
      fact("parameter", node.site);
      fact("what it does", node.meaning);
      fact("cost", node.cost);
      fact("writes", node.writes);
      fact("runs on", node.placement);
      fact("before", node.before);
    }
    panel.append(table);
    if (!node) return;
    const graph = scene.graphs[box.graph];
    const values = (title, names, pick) => {
      if (!names.some((name) => name)) return;
      panel.append(make("h3", title));
      const list = make("table", undefined, "facts");
      for (const name of names) {
        if (!name) continue;
        const link = make("button", name, "link");
        const other = pick(graph, name);
        if (other >= 0) link.addEventListener("click", () => go(view, box.graph, other));
        else link.disabled = true;
        const line = list.insertRow();
        line.insertCell().append(link);
        const note = [graph.types[name], scene.view.states[name]].filter(Boolean).join(", ");
        line.insertCell().append(make("span", note, "faint"));
      }
      panel.append(list);
    };
    const producer = (where, name) => where.nodes.findIndex((other) => other.outputs.includes(name));
    const reader = (where, name) => where.nodes.findIndex((other) => other.inputs.includes(name) || other.captured.includes(name));
    values("Inputs", [...node.inputs, ...node.captured], producer);
    values("Outputs", node.outputs, reader);
    const attributes = Object.entries(node.attributes);
    if (attributes.length) {
      panel.append(make("h3", "Attributes"));
      const list = make("table", undefined, "facts");
      attributes.forEach(([name, text]) => row(list, name, text));
      panel.append(list);
    }
  }

  function go(view, graph, at) {
    const box = view.scene.reveal(graph, at);
    if (!box) return null;
    view.center(box);
    select(view, box);
    return box;
  }

  // --- search ------------------------------------------------------------------------------------------
  const entries = [];
  data.views.forEach((view, side) => {
    for (const [key, graph] of Object.entries(view.graphs)) {
      graph.nodes.forEach((node, at) => {
        const text = [node.op, node.name, node.site || "", ...node.outputs].join(" ").toLowerCase();
        entries.push({ side, key, at, node, text });
      });
    }
  });

  function search() {
    const words = by("search").value.toLowerCase().split(/\s+/).filter(Boolean), list = by("results");
    list.replaceChildren();
    list.hidden = !words.length;
    if (!words.length) return;
    const matches = entries.filter((entry) => words.every((word) => entry.text.includes(word)));
    for (const entry of matches.slice(0, RESULTS)) {
      const button = make("button", undefined, "result");
      const where = entry.key === "main" ? "" : `in ${data.views[entry.side].graphs[entry.key].label}`;
      const side = data.views.length > 1 ? data.views[entry.side].caption : "";
      button.append(make("b", entry.node.op), make("span", entry.node.name || entry.node.outputs[0] || ""),
        make("i", [side, where].filter(Boolean).join(", ")));
      button.addEventListener("click", () => {
        list.hidden = true;
        go(page.views[entry.side], entry.key, entry.at);
      });
      list.append(button);
    }
    const count = matches.length > RESULTS ? `${RESULTS} of ${matches.length} nodes` : matches.length === 1 ? "1 node" : `${matches.length} nodes`;
    list.append(make("p", count, "faint"));
  }

  // --- the page ----------------------------------------------------------------------------------------
  function tab(name) {
    for (const section of document.querySelectorAll("aside > section")) section.hidden = section.id !== name;
    for (const button of document.querySelectorAll("nav.tabs button")) {
      button.classList.toggle("on", button.dataset.tab === name);
    }
  }

  data.views.forEach((view, side) => {
    const canvas = document.querySelectorAll("canvas")[side];
    page.views.push(new View(canvas, new Scene(view), page));
  });
  page.views.forEach((view) => view.start());

  const picker = by("colour");
  for (const name of Object.keys(keys)) {
    if (!keys[name].words.length) continue;
    const option = make("option", name);
    option.value = name;
    picker.append(option);
  }
  picker.parentElement.hidden = !picker.options.length;
  if (!keys[page.key].words.length && picker.options.length) page.key = picker.options[0].value;
  picker.value = page.key;
  picker.addEventListener("change", () => {
    page.key = picker.value;
    page.hidden.clear();
    legend();
    draw();
  });
  legend();
  by("search").addEventListener("input", search);
  by("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") by("results").querySelector("button")?.click();
    if (event.key === "Escape") by("results").hidden = true;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== by("search")) {
      event.preventDefault();
      by("search").focus();
    }
  });
  by("nearer").addEventListener("click", () => page.views.forEach((view) => view.zoom(1.25)));
  by("farther").addEventListener("click", () => page.views.forEach((view) => view.zoom(0.8)));
  by("whole").addEventListener("click", () => page.views.forEach((view) => view.home()));
  const fold = by("blocks");
  fold.parentElement.hidden = !passes.length;
  fold.checked = page.views.some((view) => view.scene.blocks);
  fold.addEventListener("change", () => {
    page.views.forEach((view) => {
      view.scene.build(fold.checked);
      view.selected = view.hover = null;
      view.start();
    });
  });
  for (const button of document.querySelectorAll("nav.tabs button")) {
    button.addEventListener("click", () => tab(button.dataset.tab));
  }
  tab(document.querySelector("nav.tabs button").dataset.tab);
  document.addEventListener("click", (event) => {
    const place = event.target.closest("[data-node]");
    if (!place) {
      if (!event.target.closest("header")) by("results").hidden = true;
      return;
    }
    const side = Number(place.dataset.side || page.views.length - 1), name = place.dataset.node;
    const nodes = page.views[side].scene.graphs.main.nodes;
    const at = nodes.findIndex((node) => node.key === name || node.name === name || node.outputs.includes(name));
    const near = at >= 0 ? at : nodes.findIndex((node) => node.inputs.includes(name) || node.captured.includes(name));
    if (near >= 0) go(page.views[side], "main", near);
  });
  page.views.forEach((view) => view.draw());
  document.documentElement.dataset.drawn = String(Math.round(performance.now() - begin));
  window.kfacPage = page;
})();
