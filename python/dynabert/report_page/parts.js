// Pieces the page is built of. Text only ever enters as text nodes and attributes.

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

function section(id, title, ...children) {
  return element("section", { id, "aria-labelledby": `${id}-title` },
    element("h2", { id: `${id}-title` }, title), ...children);
}

// A select with a label; `options` are [value, text].
function selectBox(label, options, value, onchange) {
  const select = element("select", { onchange: (event) => onchange(event.target.value) });
  for (const [key, text] of options) {
    select.append(element("option", { value: key, selected: key === value }, text));
  }
  return element("label", { class: "field" }, element("span", {}, label), select);
}

function table(headings, rows, attributes = {}, above = null) {
  const head = headings.map((heading) =>
    heading instanceof Node ? heading : element("th", { scope: "col" }, heading));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": attributes.label },
    element("table", { class: attributes.class },
      element("thead", {}, above, element("tr", {}, head)),
      element("tbody", {}, rows)));
}

function codeBlock(text) {
  // Lines break between words only, and not at every hyphen of an option.
  const words = text.split(" ").flatMap((word, i) => [i ? " " : "", element("span", {}, word)]);
  const code = element("pre", { tabindex: "0" }, element("code", {}, words));
  const button = element("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no clipboard here: ready to be copied by hand
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return element("div", { class: "command" }, code, button);
}

// Marks differ in shape as well as in colour, for print and for colour-blind readers.
const MARKS = {
  circle: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  square: (r) => polygon(4, r * 1.25, 45),
  triangle: (r) => polygon(3, r * 1.35, 0),
  diamond: (r) => polygon(4, r * 1.35, 0),
  wedge: (r) => polygon(3, r * 1.35, 180),
  pentagon: (r) => polygon(5, r * 1.2, 0),
  star: (r) => star(r * 1.5),
};
const SHAPES = ["circle", "square", "triangle", "diamond", "wedge", "pentagon"];
const NUM_COLOURS = 6;

function polygon(corners, radius, turn) {
  return ring(corners, () => radius, turn);
}

function star(radius) {
  return ring(10, (i) => (i % 2 ? radius * 0.45 : radius), 0);
}

function ring(corners, radiusOf, turn) {
  const places = [];
  for (let i = 0; i < corners; i++) {
    const angle = (2 * Math.PI * i) / corners + (turn * Math.PI) / 180;
    places.push(`${(radiusOf(i) * Math.sin(angle)).toFixed(2)},${(-radiusOf(i) * Math.cos(angle)).toFixed(2)}`);
  }
  return `M${places.join("L")}Z`;
}

function mark(group, radius = 5.5) {
  return drawn("path", { d: MARKS[group.shape](radius), class: `mark c${group.colour}` });
}

function legendMark(group) {
  return drawn("svg", { width: 18, height: 16, viewBox: "-9 -8 18 16", "aria-hidden": "true" }, mark(group));
}

// The plot. `points` have x, y, low, high, group, label, text (for readers of the screen) and
// isFront; `axis` names both axes and writes their values; `events` hears of points.
function plot(width, points, { axis, isLog, budget, chosen, events, current }) {
  const height = Math.round(Math.min(460, Math.max(300, width * 0.56)));
  const frame = { left: 56, right: 16, top: 14, bottom: 52 };
  const inner = { width: width - frame.left - frame.right, height: height - frame.top - frame.bottom };
  const xs = points.flatMap((p) => [p.x, p.low ?? p.x, p.high ?? p.x]);
  const ys = points.map((p) => p.y);
  if (budget !== null && budget < 1.6 * Math.max(...xs) && budget > 0.5 * Math.min(...xs)) xs.push(budget);
  const toX = scale(padded(xs, 0.07, isLog, true), [frame.left, frame.left + inner.width], isLog);
  const toY = scale(padded(ys, 0.1, false, false), [frame.top + inner.height, frame.top], false);
  const root = drawn("svg", {
    viewBox: `0 0 ${width} ${height}`, class: "plot", role: "group",
    "aria-label": `${axis.y} against ${axis.x}. ${points.length} points: Tab to the plot, then the arrow keys.`,
  });
  drawAxes(root, toX, toY, frame, inner, width, height, axis, isLog);
  const reserved = budget === null ? [] : drawBudget(root, toX, frame, inner, budget);
  const front = points.filter((p) => p.isFront).sort((a, b) => a.x - b.x);
  if (front.length > 1) {
    root.append(drawn("polyline", { class: "front", points: front.map((p) => `${toX(p.x)},${toY(p.y)}`).join(" ") }));
  }
  for (const p of points) {
    if (p.low !== null && p.high !== null) {
      root.append(drawn("line", { class: `range c${p.group.colour}`, x1: toX(p.low), x2: toX(p.high), y1: toY(p.y), y2: toY(p.y) }));
    }
  }
  const places = points.map((p) => ({ x: toX(p.x), y: toY(p.y) }));
  if (chosen !== null) {
    root.append(drawn("circle", { class: "chosen", cx: places[chosen].x, cy: places[chosen].y, r: 11 }));
  }
  drawLabels(root, points, places, toX, frame, inner, reserved);
  const layer = drawn("g", {});
  const order = points.map((_, i) => i).sort((i, j) => points[i].x - points[j].x || i - j);
  const nodes = {};
  const stop = current !== null && current < points.length ? current : order[0];
  for (const i of order) {
    const node = drawn("g", {
      class: "point", role: "img", tabindex: i === stop ? 0 : -1, "aria-label": points[i].text, "data-point": i,
      transform: `translate(${places[i].x},${places[i].y})`,
    }, drawn("circle", { r: 12, class: "target" }), mark(points[i].group));
    node.addEventListener("pointerenter", () => events.show(i, places[i], width));
    node.addEventListener("pointerleave", () => events.hide());
    node.addEventListener("focus", () => {
      Object.values(nodes).forEach((other) => other.setAttribute("tabindex", other === node ? "0" : "-1"));
      events.show(i, places[i], width);
    });
    node.addEventListener("blur", () => events.hide());
    node.addEventListener("click", () => node.focus());
    node.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      const at = order.indexOf(i);
      const to = step ? at + step : { Home: 0, End: order.length - 1 }[event.key];
      if (event.key === "Escape") events.hide();
      if (to === undefined || !(to in order)) return;
      event.preventDefault();
      nodes[order[to]].focus();
    });
    nodes[i] = node;
    layer.append(node);
  }
  root.append(layer);
  return { root, places, nodes };
}

function padded(values, share, isLog, fromZero) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (isLog) {
    const more = (high / low) ** share * (high === low ? 1.3 : 1);
    return [low / more, high * more];
  }
  const more = (high - low) * share || Math.abs(high) * 0.1 || 1;
  return [fromZero ? Math.max(0, low - more) : low - more, high + more];
}

function scale([low, high], [from, to], isLog) {
  const at = isLog ? Math.log : (value) => value;
  const place = (value) => from + ((at(value) - at(low)) / (at(high) - at(low))) * (to - from);
  place.domain = [low, high];
  return place;
}

function drawAxes(root, toX, toY, frame, inner, width, height, axis, isLog) {
  const bottom = frame.top + inner.height;
  for (const value of ticks(...toX.domain, Math.max(3, inner.width / 90), isLog)) {
    const x = toX(value);
    root.append(
      drawn("line", { class: "gridline", x1: x, x2: x, y1: frame.top, y2: bottom }),
      drawn("text", { class: "tick", x, y: bottom + 18, "text-anchor": "middle" }, axis.writeX(value)));
  }
  for (const value of ticks(...toY.domain, Math.max(3, inner.height / 60), false)) {
    const y = toY(value);
    root.append(
      drawn("line", { class: "gridline", x1: frame.left, x2: frame.left + inner.width, y1: y, y2: y }),
      drawn("text", { class: "tick", x: frame.left - 8, y: y + 4, "text-anchor": "end" }, axis.writeY(value)));
  }
  root.append(
    drawn("line", { class: "axis", x1: frame.left, x2: frame.left + inner.width, y1: bottom, y2: bottom }),
    drawn("text", { class: "name", x: frame.left + inner.width / 2, y: height - 10, "text-anchor": "middle" }, axis.x),
    drawn("text", { class: "name", transform: `translate(14,${frame.top + inner.height / 2}) rotate(-90)`, "text-anchor": "middle" }, axis.y));
}

// Returns what it covers with text.
function drawBudget(root, toX, frame, inner, budget) {
  const right = frame.left + inner.width;
  const x = Math.min(right, Math.max(frame.left, toX(budget)));
  if (x >= right) return [];
  const name = `budget ${plain(budget)} ms`;
  const wide = name.length * 7 + 8;
  const isLeft = x - wide > frame.left; // where the fast and good would be, and seldom are
  root.append(
    drawn("rect", { class: "beyond", x, y: frame.top, width: right - x, height: inner.height }),
    drawn("line", { class: "budget", x1: x, x2: x, y1: frame.top, y2: frame.top + inner.height }),
    drawn("text", { class: "budget-name", x: x + (isLeft ? -6 : 6), y: frame.top + 14, "text-anchor": isLeft ? "end" : "start" }, name));
  const left = isLeft ? x - wide : x;
  return [[left, frame.top, left + wide, frame.top + 20]];
}

// Names beside the points, those of the front first, each where nothing else is; one that fits
// nowhere is left out, since the point tells its name when asked.
function drawLabels(root, points, places, toX, frame, inner, reserved) {
  const taken = [...reserved, ...places.map(({ x, y }) => [x - 7, y - 7, x + 7, y + 7])];
  points.forEach((p, i) => { if (p.low !== null) taken.push([toX(p.low), places[i].y - 1, toX(p.high), places[i].y + 1]); });
  const covers = ([l, t, r, b]) =>
    l < frame.left || r > frame.left + inner.width || t < frame.top - 8 || b > frame.top + inner.height
    || taken.some(([l2, t2, r2, b2]) => l < r2 && r > l2 && t < b2 && b > t2);
  const first = (i) => (points[i].isFront ? 0 : 1);
  points.map((_, i) => i).sort((i, j) => first(i) - first(j) || i - j).forEach((i) => {
    const p = points[i];
    const wide = p.label.length * 6.4 + 4;
    const { x, y } = places[i];
    for (const [left, top] of [[-wide - 8, -18], [-wide / 2, -24], [-wide - 10, -7], [10, -7], [8, 6], [-wide / 2, 10], [8, -20]]) {
      const box = [x + left, y + top, x + left + wide, y + top + 14];
      if (covers(box)) continue;
      taken.push(box);
      root.append(drawn("text", { class: p.isFront ? "label on-front" : "label", x: box[0] + 2, y: box[1] + 11 }, p.label));
      return;
    }
  });
}
