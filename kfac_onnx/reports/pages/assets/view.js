/* A scene on a canvas: what is in sight is drawn, with as much text as its size allows. */
"use strict";
const View = (() => {
  const INK = "#1d2733", FAINT = "#69788a", LINE = "#9aa8b8", ACCENT = "#2456d6";
  const STATUS = {
    added: "#1d9a5b", removed: "#d23f4b", changed: "#d98a00", // of a node between two models
    error: "#d23f4b", warning: "#d98a00", note: "#2f6fde", // of the worst finding about a node
  };
  const PLAIN = "#ffffff";
  const FONT = "ui-sans-serif, system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

  class View {
    constructor(canvas, scene, page) {
      Object.assign(this, { canvas, scene, page, scale: 1, x: 0, y: 0, selected: null, hover: null });
      this.context = canvas.getContext("2d");
      this.listen();
      new ResizeObserver(() => this.resize()).observe(canvas);
      this.resize();
      this.home();
    }

    resize() {
      const { clientWidth: w, clientHeight: h } = this.canvas, dots = window.devicePixelRatio || 1;
      if (this.w === w && this.h === h) return;
      Object.assign(this, { w, h, dots });
      this.canvas.width = Math.max(1, w * dots);
      this.canvas.height = Math.max(1, h * dots);
      this.draw();
    }

    /* Shows the whole drawing, or its top where the whole would be too small to read. */
    home() {
      const { w, h } = this.scene.root, margin = 24;
      this.scale = Math.min(1.1, (this.w - 2 * margin) / w, (this.h - 2 * margin) / h);
      this.x = (this.w - w * this.scale) / 2;
      this.y = (this.h - h * this.scale) / 2;
      this.changed();
    }

    start() {
      this.home();
      const least = 0.62, { children } = this.scene.root;
      if (this.scale >= least || !children.length) return;
      const first = children.find((item) => item.status) || children.find((item) => item.kind === "block");
      this.scale = least;
      const middle = first ? first.left + first.w / 2 : this.scene.root.w / 2;
      this.x = this.w / 2 - middle * least;
      this.y = first && first.top > 600 ? this.h / 3 - first.top * least : 64;
      this.changed();
    }

    center(box) {
      this.scale = Math.min(1.2, Math.max(0.75, this.scale), Math.max(0.2, (this.w - 60) / box.w));
      this.x = this.w / 2 - (box.left + box.w / 2) * this.scale;
      this.y = this.h / 2 - (box.top + Math.min(box.h, this.h / this.scale) / 2) * this.scale;
      this.changed();
    }

    zoom(factor, px = this.w / 2, py = this.h / 2) {
      const scale = Math.min(3, Math.max(0.01, this.scale * factor)), by = scale / this.scale;
      this.x = px - (px - this.x) * by;
      this.y = py - (py - this.y) * by;
      this.scale = scale;
      this.changed();
    }

    toggle(box) {
      const [px, py] = [box.left * this.scale + this.x, box.top * this.scale + this.y];
      this.scene.toggle(box);
      this.x = px - box.left * this.scale; // the box stays where the hand is
      this.y = py - box.top * this.scale;
      this.changed();
    }

    changed() {
      if (this.waiting) return;
      this.waiting = true;
      requestAnimationFrame(() => {
        this.waiting = false;
        this.draw();
      });
    }

    /* Returns the innermost box at a point of the canvas. */
    at(px, py) {
      const x = (px - this.x) / this.scale, y = (py - this.y) / this.scale;
      let inmost = null;
      this.scene.each((box) => {
        if (x >= box.left && x <= box.left + box.w && y >= box.top && y <= box.top + box.h) inmost = box;
      });
      return inmost;
    }

    listen() {
      const canvas = this.canvas;
      const pointers = new Map();
      let moved = 0, apart = 0;
      const spread = () => {
        const [a, b] = [...pointers.values()];
        return Math.hypot(a.x - b.x, a.y - b.y);
      };
      canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
        moved = 0;
        apart = pointers.size === 2 ? spread() : 0;
      });
      canvas.addEventListener("pointermove", (event) => {
        const last = pointers.get(event.pointerId), point = { x: event.offsetX, y: event.offsetY };
        if (!last) {
          const hover = this.at(point.x, point.y);
          canvas.style.cursor = hover ? "pointer" : "grab";
          if (hover !== this.hover) {
            this.hover = hover;
            this.changed();
          }
          return;
        }
        pointers.set(event.pointerId, point);
        if (pointers.size === 2) {
          const now = spread();
          this.zoom(now / apart, point.x, point.y);
          apart = now;
          return;
        }
        moved += Math.abs(point.x - last.x) + Math.abs(point.y - last.y);
        this.x += point.x - last.x;
        this.y += point.y - last.y;
        this.changed();
      });
      const up = (event) => {
        pointers.delete(event.pointerId);
        if (event.type === "pointerup" && moved < 5) this.click(event.offsetX, event.offsetY);
      };
      canvas.addEventListener("pointerup", up);
      canvas.addEventListener("pointercancel", up);
      canvas.addEventListener("wheel", (event) => {
        event.preventDefault();
        this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.offsetX, event.offsetY);
      }, { passive: false });
      canvas.addEventListener("dblclick", (event) => {
        const box = this.at(event.offsetX, event.offsetY);
        if (box && box.foldable) this.toggle(box);
      });
      canvas.addEventListener("keydown", (event) => {
        const step = 60;
        const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
        if (moves[event.key]) {
          this.x += moves[event.key][0];
          this.y += moves[event.key][1];
          this.changed();
        } else if (event.key === "+" || event.key === "=") this.zoom(1.25);
        else if (event.key === "-") this.zoom(0.8);
        else if (event.key === "0") this.home();
        else if (event.key === "Enter" && this.selected && this.selected.foldable) this.toggle(this.selected);
        else return;
        event.preventDefault();
      });
    }

    click(px, py) {
      const box = this.at(px, py);
      if (box && box.foldable) { // the sign in the upper right corner
        const x = (px - this.x) / this.scale, y = (py - this.y) / this.scale;
        if (x > box.left + box.w - 24 && y < box.top + 24) {
          this.toggle(box);
          return;
        }
      }
      this.page.select(this, box);
    }

    draw() {
      const c = this.context, begin = performance.now();
      c.setTransform(this.dots, 0, 0, this.dots, 0, 0);
      c.clearRect(0, 0, this.w, this.h);
      c.setTransform(this.dots * this.scale, 0, 0, this.dots * this.scale, this.dots * this.x, this.dots * this.y);
      this.sight = {
        left: -this.x / this.scale, top: -this.y / this.scale,
        right: (this.w - this.x) / this.scale, bottom: (this.h - this.y) / this.scale,
      };
      c.lineJoin = "round";
      this.level(this.scene.root);
      this.lastDraw = performance.now() - begin;
    }

    visible(left, top, right, bottom) {
      const s = this.sight;
      return right >= s.left && left <= s.right && bottom >= s.top && top <= s.bottom;
    }

    level(parent) {
      this.edges(parent);
      for (const box of parent.children) {
        if (this.visible(box.left, box.top, box.left + box.w, box.top + box.h)) this.box(box);
      }
    }

    edges(parent) {
      const c = this.context, level = parent.level;
      if (!level) return;
      const ox = parent.left + level.dx, oy = parent.top + level.dy, far = this.scale < 0.18;
      const special = [];
      c.beginPath();
      for (const edge of level.edges) {
        const a = level.items[edge.from], b = level.items[edge.to];
        const x1 = a.left + a.w / 2, y1 = a.top + a.h, x2 = b.left + b.w / 2, y2 = b.top;
        if (!this.visible(Math.min(x1, x2) - 40, Math.min(y1, y2), Math.max(x1, x2) + 40, Math.max(y1, y2))) continue;
        if (a === this.selected || b === this.selected || a === this.hover || b === this.hover) {
          special.push([edge, x1, y1, x2, y2]);
          continue;
        }
        this.curve(edge, x1, y1, x2, y2, ox, oy, far);
      }
      c.strokeStyle = LINE;
      c.globalAlpha = level.edges.length > 600 ? 0.45 : 0.8;
      c.lineWidth = Math.max(1, 0.7 / this.scale);
      c.stroke();
      c.globalAlpha = 1;
      if (!special.length) return;
      c.beginPath();
      for (const [edge, ...ends] of special) this.curve(edge, ...ends, ox, oy, far);
      c.strokeStyle = ACCENT;
      c.lineWidth = Math.max(1.8, 1.4 / this.scale);
      c.stroke();
    }

    curve(edge, x1, y1, x2, y2, ox, oy, far) {
      const c = this.context;
      c.moveTo(x1, y1);
      if (far) {
        c.lineTo(x2, y2);
        return;
      }
      if (edge.points && edge.points.length > 2) {
        const points = edge.points.map((point) => [point.x + ox, point.y + oy]);
        let [px, py] = [x1, y1];
        for (const [x, y] of points.slice(1, -1)) {
          c.bezierCurveTo(px, (py + y) / 2, x, (py + y) / 2, x, y);
          [px, py] = [x, y];
        }
        c.bezierCurveTo(px, (py + y2) / 2, x2, (py + y2) / 2, x2, y2);
      } else {
        const bend = Math.min(60, Math.abs(y2 - y1) / 2);
        c.bezierCurveTo(x1, y1 + bend, x2, y2 - bend, x2, y2);
      }
      if (this.scale > 0.5) {
        c.moveTo(x2 - 3.5, y2 - 6);
        c.lineTo(x2, y2);
        c.lineTo(x2 + 3.5, y2 - 6);
      }
    }

    box(box) {
      const c = this.context, colour = this.page.colour(box), status = STATUS[box.status];
      const small = box.kind === "input" || box.kind === "output";
      const dimmed = this.page.dimmed(box);
      c.globalAlpha = dimmed ? 0.25 : 1;
      c.beginPath();
      if (this.scale < 0.2) c.rect(box.left, box.top, box.w, box.h);
      else c.roundRect(box.left, box.top, box.w, box.h, small ? box.h / 2 : 7);
      c.fillStyle = box.open ? "#f6f8fb" : small ? (box.kind === "input" ? "#e9eef6" : "#dfe7f2") : PLAIN;
      c.fill();
      if (colour && !small) {
        c.fillStyle = colour;
        c.globalAlpha = dimmed ? 0.1 : box.open ? 0.08 : 0.2;
        c.fill();
        c.globalAlpha = dimmed ? 0.25 : 1;
        if (!box.open) {
          c.save();
          c.clip();
          c.fillRect(box.left, box.top, 6, box.h);
          c.restore();
        }
      }
      const chosen = box === this.selected;
      c.strokeStyle = chosen ? ACCENT : status || (box === this.hover ? ACCENT : colour || "#b8c4d2");
      c.lineWidth = chosen ? 3 : status ? 2.6 : 1;
      if (box.status === "removed") c.setLineDash([6, 4]);
      c.beginPath();
      c.roundRect(box.left, box.top, box.w, box.h, small ? box.h / 2 : 7);
      c.stroke();
      c.setLineDash([]);
      if (this.scale > 0.3) this.text(box, small);
      c.globalAlpha = 1;
      if (box.open) this.level(box);
    }

    text(box, small) {
      const c = this.context, left = box.left + (small ? 13 : 14);
      c.textBaseline = "middle";
      c.fillStyle = INK;
      c.font = `${small ? "" : "600 "}12px ${FONT}`;
      const room = box.w - (small ? 24 : 22) - (box.foldable ? 16 : 0);
      c.fillText(this.cut(box.label, room), left, box.top + (small ? box.h / 2 : 14));
      if (box.foldable) {
        c.fillStyle = ACCENT;
        c.textAlign = "center";
        c.font = `600 15px ${FONT}`;
        c.fillText(box.open ? "−" : "+", box.left + box.w - 13, box.top + 13);
        c.textAlign = "left";
      }
      if (small || box.open) return;
      c.font = `11px ${FONT}`;
      c.fillStyle = FAINT;
      c.fillText(this.cut(box.below, box.w - 22), left, box.top + 30);
      if (box.note) c.fillText(this.cut(box.note, box.w - 22), left, box.top + 46);
    }

    cut(text, room) {
      const c = this.context;
      if (c.measureText(text).width <= room) return text;
      let length = Math.max(1, Math.floor(room / 6));
      while (length > 1 && c.measureText(`${text.slice(0, length)}…`).width > room) length--;
      return `${text.slice(0, length)}…`;
    }
  }

  View.STATUS = STATUS;
  return View;
})();
