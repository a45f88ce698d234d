// The page: what the reader has chosen, and what follows from it.

const report = JSON.parse(document.getElementById("document").textContent);
const { subnets, tables, metric } = report;
const hasScores = metric !== null && subnets.some((subnet) => subnet.score !== null);
const hasTimes = tables.length > 0;

const FACETS = [
  // key, name, name of the choice of all; without one a single value is shown at a time.
  ["device", "Device", "all devices"],
  ["batch_size", "Batch size", null],
  ["length", "Sequence length", null],
  ["dtype", "Number format", "all formats"],
  ["backend", "Backend", "all backends"],
  ["threads", "CPU threads", "all numbers"],
  ["versions", "Versions", null],
];
const PERCENTILES = [["median", "median"], ["p20", "20th percentile"], ["p80", "80th percentile"], ["p99", "99th percentile"]];
const NOTHING = "\u2013";

const state = {
  choice: firstChoice(),
  percentile: "p80",
  budget: "",
  margin: report.margin,
  isLog: false,
  sort: { key: "ms", down: false },
  current: null,
};

// A table of this machine, if there is one, of the most usual kind.
function firstChoice() {
  const table = tables.find((each) => each.foreign === null) || tables[0];
  return table ? Object.fromEntries(FACETS.map(([key]) => [key, table.facets[key]])) : {};
}

const scoreText = (score) => (score === null ? NOTHING : (score * metric.factor).toFixed(metric.decimals));
const scoreAndUnit = (score) => scoreText(score) + (metric.unit === "%" ? " %" : "");
const percent = (share) => (share === null ? NOTHING : `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`);
const millions = (count) => `${digits(count / 1e6)} M`;
const operations = (count) => `${digits(count / 1e9)} G`;
const time = (text) => `${text.slice(0, 16).replace("T", " ")} UTC`;
const plural = (count, word) => `${grouped(count)} ${word}${count === 1 ? "" : "s"}`;

function spread(layers, field) {
  const counts = layers.map((layer) => layer[field]);
  const [low, high] = [Math.min(...counts), Math.max(...counts)];
  return low === high ? grouped(low) : `${grouped(low)}\u2013${grouped(high)}`;
}

function titleOf(subnet) {
  return subnet.is_uniform ? `Width ${subnet.width}, depth ${subnet.depth}` : `${subnet.label}: each layer its own width`;
}

function sizesOf(subnet) {
  const of = (field, word) => `${spread(subnet.layers, field)} ${word}`;
  return `${plural(subnet.layers.length, "layer")}, ${of("num_heads", "heads")}, ${of("intermediate_size", "neurons")}`;
}

// ---- What is shown: every subnet of every table that is chosen, with its latency.

function shownTables() {
  return matching(tables, state.choice);
}

function shownPoints() {
  const shown = shownTables();
  if (!hasTimes) {
    return subnets.map((subnet, index) => ({ subnet, index, table: null, row: null, ms: null }));
  }
  return shown.flatMap((each) => each.rows.map((row) => ({
    subnet: subnets[row.subnet], index: row.subnet, table: each, row, ms: row[state.percentile],
  })));
}

function groupOf(point, shown) {
  const { subnet } = point;
  const depths = [...new Set(subnets.filter((s) => s.is_uniform).map((s) => s.layers.length))].sort((a, b) => b - a);
  const at = depths.indexOf(subnet.layers.length);
  const shape = subnet.is_uniform ? SHAPES[at % SHAPES.length] : "star";
  // With one table colour repeats what shape says; with several it tells the tables apart.
  if (shown.length > 1) return { shape, colour: shown.indexOf(point.table) % NUM_COLOURS };
  return { shape, colour: subnet.is_uniform ? at % NUM_COLOURS : NUM_COLOURS };
}

// What tells the shown tables apart, in words.
function differing(shown) {
  return FACETS.filter(([key]) => new Set(shown.map((each) => each.facets[key])).size > 1).map(([key]) => key);
}

function facetText(key, value) {
  if (key === "threads") return plural(Number(value), "thread");
  if (key === "batch_size") return `batch ${value}`;
  return value;
}

function tableName(each, shown) {
  const keys = differing(shown);
  return keys.map((key) => facetText(key, each.facets[key])).join(", ") || each.caption;
}

// ---- Sections that follow the choice are drawn again; the others once.

const places = {};
const tip = element("div", { class: "tip", hidden: true });
document.body.append(buildPage());
redraw();
let former = document.documentElement.clientWidth;
addEventListener("resize", () => {
  const now = document.documentElement.clientWidth; // a phone's bars come and go without a change of it
  if (now !== former) drawPlot(shownPoints());
  former = now;
});
addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

function place(name) {
  places[name] = element("div", { class: name });
  return places[name];
}

function buildPage() {
  return element("main", {},
    buildHeader(),
    hasTimes ? section("choose", hasScores ? "Find a subnet for a budget" : "What is shown", place("filters"), place("picked")) : null,
    section("plot", hasScores ? (hasTimes ? "Score against latency" : "Score against work") : "Scores", place("plotted"), tip),
    section("grid", "The grid", place("gridded")),
    hasTimes ? section("peak", "Shares of the machine's peak", place("peaked")) : null,
    section("every", "Every subnet", place("listed")),
    section("again", "Reproduce", place("commands")),
    section("about", "About this run", buildFacts(), buildStages(), buildTables()),
    element("footer", {}, `Written by dynabert-kernels ${report.made.versions["dynabert-kernels"]} on ${time(report.made.at)}. `
      + "The page holds all of its data and loads nothing."));
}

function buildHeader() {
  const parts = [plural(subnets.length, "subnet") + " of one set of weights"];
  const scores = subnets.map((subnet) => subnet.score).filter((score) => score !== null);
  if (scores.length) {
    const [low, high] = [Math.min(...scores), Math.max(...scores)];
    parts.push(`${metric.name} ${low === high ? scoreAndUnit(high) : `${scoreText(low)} to ${scoreAndUnit(high)}`} on ${plural(metric.num_rows, "row")}`);
  }
  const sizes = subnets.map((subnet) => subnet.parameters);
  parts.push(`${millions(Math.min(...sizes))} to ${millions(Math.max(...sizes))} parameters`.replace(/^(.+) to \1 /, "$1 "));
  return element("header", {},
    element("p", { class: "kicker" }, report.task ? `Elastic encoder, task ${report.task}` : "Elastic encoder"),
    element("h1", {}, report.name),
    element("p", { class: "summary" }, parts.join(" \u00b7 ")));
}

function redraw() {
  if (hasTimes) {
    drawFilters();
    drawPicked();
    drawPeaks();
  }
  drawPlot(shownPoints());
  drawGrid();
  drawList();
  drawCommands();
}

function drawFilters() {
  const boxes = [];
  for (const [key, name, all] of FACETS) {
    const values = [...new Set(tables.map((each) => each.facets[key]))];
    if (values.length < 2) continue;
    values.sort((a, b) => parseFloat(a) - parseFloat(b) || 0);
    const options = values.map((value) => [value, value]);
    if (all) options.push([ANY, all]);
    boxes.push(selectBox(name, options, state.choice[key], (value) => {
      state.choice = choose(tables, state.choice, key, value);
      redraw();
    }));
  }
  boxes.push(selectBox("Latency at", PERCENTILES, state.percentile, (value) => {
    state.percentile = value;
    redraw();
  }));
  const focus = places.filters.contains(document.activeElement)
    ? [...places.filters.querySelectorAll("select")].indexOf(document.activeElement) : -1;
  const shown = shownTables();
  places.filters.replaceChildren(
    element("div", { class: "fields" }, boxes),
    element("ul", { class: "captions" }, shown.map((each) => element("li", {}, each.caption, foreignBadge(each)))),
    ...formatNote(shown));
  if (focus >= 0) places.filters.querySelectorAll("select")[focus]?.focus();
}

function foreignBadge(each) {
  if (each.foreign === null) return null;
  return element("span", { class: "badge" }, `not of this machine: ${each.foreign}`);
}

function formatNote(shown) {
  const others = shown.filter((each) => each.facets.dtype !== "float32").map((each) => each.facets.dtype);
  if (!hasScores || !others.length) return [];
  return [element("p", { class: "note" },
    `Scores are those of the evaluation; they were not measured again in ${[...new Set(others)].join(" and ")}.`)];
}

// ---- The budget.

function candidates() {
  return shownPoints().filter((point) => point.subnet.score !== null).map((point) => ({ ...point, score: point.subnet.score }));
}

function chosenPoint() {
  const budget = readBudget(state.budget);
  if (budget === null) return null;
  const all = candidates();
  const found = pick(all, budget, state.margin);
  return found.index === null ? null : { ...found, budget, point: all[found.index] };
}

function drawPicked() {
  if (!hasScores) return;
  if (!places.answer) {
    const input = element("input", {
      type: "text", inputmode: "decimal", id: "budget", autocomplete: "off", spellcheck: "false", placeholder: "for instance 10",
      "aria-describedby": "margin-note",
    });
    input.addEventListener("input", () => {
      state.budget = input.value;
      drawPicked();
      drawPlot(shownPoints());
      drawGrid();
      drawList();
    });
    places.answer = element("div", { class: "answer", role: "status", "aria-live": "polite" });
    places.picked.append(
      element("div", { class: "ask" },
        element("label", { for: "budget" }, "Latency budget of one batch"),
        element("span", { class: "unit" }, input, " ms"),
        element("span", { class: "note", id: "margin-note" },
          `${plain(state.margin * 100)} % of the latency is kept free, as dynabert pick does.`)),
      places.answer);
  }
  places.answer.replaceChildren(...answer());
  places.answer.dataset.subnet = chosenPoint()?.point.subnet.name ?? "";
}

function answer() {
  const text = state.budget.trim();
  if (!text) return [element("p", { class: "hint on-screen" }, "Type a budget: the most accurate subnet that keeps it is recommended here.")];
  if (readBudget(text) === null) return [element("p", { class: "warning" }, "Not a positive number of milliseconds.")];
  const found = chosenPoint();
  if (found === null) return [element("p", { class: "warning" }, "No subnet that is shown has both a score and a latency.")];
  const { point, budget } = found;
  const shown = shownTables();
  const heading = found.isWithin ? titleOf(point.subnet) : `Nothing fits ${plain(budget)} ms`;
  const facts = `${metric.name} ${scoreAndUnit(point.score)}, ${digits(point.ms)} ms (${state.percentile})`
    + (shown.length > 1 ? `, ${tableName(point.table, shown)}` : "");
  return [
    element("p", { class: found.isWithin ? "found" : "found warning" }, heading),
    element("p", {}, found.isWithin
      ? `${sizesOf(point.subnet)}; ${facts}.`
      : `The fastest is ${point.subnet.label}: ${facts}. It needs a budget of ${found.leastMs} ms.`),
    codeBlock(`model(..., subnet=${point.subnet.call})`),
    point.table.pick_command && found.isWithin
      ? codeBlock(`${point.table.pick_command} --percentile ${state.percentile} --budget-ms ${plain(budget)}`) : null,
  ].filter(Boolean);
}

// ---- The plot.

function drawPlot(all) {
  tip.hidden = true;
  if (!hasScores) {
    places.plotted.replaceChildren(element("p", { class: "hint" },
      "No subnet has a score yet. dynabert evaluate scores them; then this page shows score against latency."));
    return;
  }
  const shown = shownTables();
  const scored = all.filter((point) => point.subnet.score !== null);
  const across = (point) => (hasTimes ? point.ms : point.subnet.flops / 1e9);
  const front = new Set(paretoFront(scored.map((point) => [across(point), point.subnet.score])));
  const found = hasTimes ? chosenPoint() : null;
  const points = scored.map((point, i) => ({
    x: across(point),
    y: point.subnet.score * metric.factor,
    low: point.row ? point.row.p20 : null,
    high: point.row ? point.row.p80 : null,
    label: point.subnet.label,
    text: spoken(point, front.has(i), shown),
    isFront: front.has(i),
    group: groupOf(point, shown),
    source: point,
  }));
  if (!points.length) {
    places.plotted.replaceChildren(element("p", { class: "hint" }, "No subnet with a score was timed in this setting."));
    return;
  }
  const isSame = (a, b) => a.index === b.index && a.table === b.table;
  const chosen = found ? points.findIndex((p) => isSame(p.source, found.point)) : -1;
  const sizes = hasTimes ? `${PERCENTILES.find(([key]) => key === state.percentile)[1]}` : "";
  const { root, places: spots, nodes } = plot(Math.max(300, places.plotted.clientWidth || 900), points, {
    axis: {
      x: hasTimes ? `latency of one batch (ms), ${sizes}` : `operations of one sequence of ${report.seq_len} tokens (G)`,
      y: metric.label,
      writeX: plain,
      writeY: plain,
    },
    isLog: state.isLog,
    budget: hasTimes ? readBudget(state.budget) : null,
    chosen: chosen < 0 ? null : chosen,
    current: state.current,
    events: {
      show: (i, spot, width) => { state.current = i; showTip(points[i], spot, width); mirror(points[i].source.index, true); },
      hide: () => { tip.hidden = true; mirror(null, false); },
    },
  });
  places.spots = { points, spots, nodes };
  const caption = element("p", { class: "note" }, hasTimes
    ? "The line joins the Pareto front: nothing faster is as good. Bars reach from the 20th to the 80th percentile. In brackets: (width, depth)."
    : "Nothing was timed yet, so the work of the encoder stands in for latency; dynabert latency measures it. The line joins the Pareto front.");
  const toggle = element("label", { class: "check" },
    element("input", { type: "checkbox", checked: state.isLog, onchange: (event) => { state.isLog = event.target.checked; drawPlot(shownPoints()); } }),
    " logarithmic axis");
  places.plotted.replaceChildren(root, element("div", { class: "below" }, legend(points, shown), toggle), caption);
}

function spoken(point, isFront, shown) {
  const parts = [titleOf(point.subnet), sizesOf(point.subnet), `${metric.name} ${scoreAndUnit(point.subnet.score)}`];
  if (point.row) parts.push(`${digits(point.ms)} milliseconds, ${state.percentile}`);
  if (shown.length > 1 && point.table) parts.push(tableName(point.table, shown));
  if (isFront) parts.push("on the Pareto front");
  return parts.join(". ");
}

function legend(points, shown) {
  const [entries, colours] = [new Map(), new Map()];
  for (const { group, source } of points) {
    const { subnet } = source;
    const depth = subnet.is_uniform ? `depth ${subnet.depth} (${plural(subnet.layers.length, "layer")})` : "each layer its own width";
    entries.set(shown.length > 1 ? `shape ${group.shape}` : depth, [shown.length > 1 ? { shape: group.shape, colour: "plain" } : group, depth]);
    if (shown.length > 1) colours.set(`colour ${group.colour}`, [{ shape: "circle", colour: group.colour }, tableName(source.table, shown)]);
  }
  return element("ul", { class: "legend" }, [...entries.values(), ...colours.values()].map(([group, text]) =>
    element("li", {}, legendMark(group), text)));
}

function showTip({ source, isFront }, spot, width) {
  const { subnet, row, table: of } = source;
  const shown = shownTables();
  const facts = [[metric.label, scoreText(subnet.score)]];
  for (const other of report.other_metrics) {
    if (other.name in subnet.metrics) facts.push([other.label, (subnet.metrics[other.name] * other.factor).toFixed(other.decimals)]);
  }
  if (row) {
    facts.push(["median", `${digits(row.median)} ms`], ["p20 to p80", `${digits(row.p20)} to ${digits(row.p80)} ms`],
      ["p99", `${digits(row.p99)} ms`], ["throughput", `${digits(row.throughput)} sequences/s`]);
    if (row.share !== null) facts.push(["share of peak", percent(row.share)]);
    if (row.peak_memory_mib !== null) facts.push(["memory of a call", `${digits(row.peak_memory_mib)} MiB`]);
  }
  facts.push(["parameters", millions(subnet.parameters)], [`operations, ${report.seq_len} tokens`, operations(subnet.flops)]);
  tip.replaceChildren(
    element("strong", {}, titleOf(subnet)),
    element("p", {}, sizesOf(subnet) + (isFront ? " \u00b7 Pareto front" : "")),
    subnet.is_uniform ? "" : element("p", {}, subnet.layers.map((layer) =>
      `layer ${layer.index + 1}: ${layer.num_heads} / ${grouped(layer.intermediate_size)}`).join(", ")),
    shown.length > 1 && of ? element("p", {}, tableName(of, shown)) : "",
    element("dl", {}, facts.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
  tip.hidden = false;
  // Beside the point, on the side with more room; below the plot where that would hide it.
  const svg = places.plotted.querySelector("svg");
  const factor = svg.clientWidth / width || 1;
  const [x, y] = [spot.x * factor, spot.y * factor];
  const room = svg.clientWidth;
  const left = x < room / 2 ? x + 16 : x - 16 - tip.offsetWidth;
  tip.style.left = `${places.plotted.offsetLeft + Math.max(0, Math.min(room - tip.offsetWidth, left))}px`;
  const top = room < 560 ? svg.clientHeight + 4 : Math.max(0, y - tip.offsetHeight / 2);
  tip.style.top = `${places.plotted.offsetTop + top}px`;
}

// The same subnet in grid and list lights up with its point.
function mirror(index, isOn) {
  for (const node of document.querySelectorAll("[data-subnet].lit")) node.classList.remove("lit");
  if (!isOn) return;
  for (const node of document.querySelectorAll(`[data-subnet="${index}"]`)) node.classList.add("lit");
}
