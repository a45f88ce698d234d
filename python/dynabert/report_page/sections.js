// The sections below the plot: grid, shares of peak, list, commands, and what is known of the run.

function drawGrid() {
  const uniform = subnets.filter((subnet) => subnet.is_uniform);
  if (!uniform.length) {
    places.gridded.replaceChildren(element("p", { class: "hint" }, "No subnet has one width in all of its layers."));
    return;
  }
  const by = (key) => [...new Map(uniform.map((subnet) => [subnet[key], subnet])).entries()]
    .sort((a, b) => numeric(b[0]) - numeric(a[0]));
  const [widths, depths] = [by("width"), by("depth")];
  const scores = uniform.map((subnet) => subnet.score).filter((score) => score !== null);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const fastest = new Map();
  if (hasTimes) {
    for (const point of shownPoints()) {
      if (!fastest.has(point.index) || point.ms < fastest.get(point.index)) fastest.set(point.index, point.ms);
    }
  }
  const found = hasTimes && hasScores ? chosenPoint() : null;
  const rows = widths.map(([width, like]) => element("tr", {},
    element("th", { scope: "row" }, element("b", {}, width),
      element("small", {}, `${spread(like.layers, "num_heads")} heads, ${spread(like.layers, "intermediate_size")} neurons`)),
    depths.map(([depth]) => {
      const subnet = uniform.find((each) => each.width === width && each.depth === depth);
      if (!subnet) return element("td", {}, NOTHING);
      const index = subnets.indexOf(subnet);
      const level = subnet.score === null || high === low ? 0 : Math.round((4 * (subnet.score - low)) / (high - low));
      const isChosen = found !== null && found.point.index === index;
      return element("td", { class: `cell level${level}${isChosen ? " is-chosen" : ""}`, "data-subnet": index },
        hasScores ? element("b", {}, scoreText(subnet.score)) : null,
        fastest.has(index) ? element("small", {}, `${digits(fastest.get(index))} ms`) : null,
        isChosen ? element("span", { class: "chosen-name" }, found.isWithin ? "recommended" : "fastest") : null);
    })));
  const head = [element("th", { scope: "col", class: "axis-name" }, report.axes.width),
    ...depths.map(([depth, like]) => element("th", { scope: "col" }, element("b", {}, depth), element("small", {}, plural(like.layers.length, "layer"))))];
  const above = element("tr", {}, element("td"), element("th", { scope: "colgroup", colspan: depths.length, class: "axis-name" }, report.axes.depth));
  const about = [hasScores ? `${metric.label} on ${plural(metric.num_rows, "row")}, mean ${scoreText(metric.mean)}` : null,
    hasTimes ? `latency at the ${PERCENTILES.find(([key]) => key === state.percentile)[1]}${shownTables().length > 1 ? ", of the fastest table shown" : ""}` : null];
  places.gridded.replaceChildren(
    element("p", { class: "note" }, `Every cell is a prefix of the same weights. Shown: ${about.filter(Boolean).join("; ") || "the sizes"}.`),
    table(head, rows, { class: "matrix", label: "Score and latency by width and depth" }, above));
}

// "2/3" and "0.75" as numbers.
function numeric(text) {
  const [top, bottom] = text.split("/").map(Number);
  return bottom ? top / bottom : top;
}

function drawPeaks() {
  const scored = shownPoints().filter((point) => hasScores && point.subnet.score !== null);
  const front = new Set(paretoFront(scored.map((p) => [p.ms, p.subnet.score])).map((i) => scored[i].row));
  const blocks = shownTables().map((each) => {
    // Of hundreds of searched subnets the front says enough.
    const rows = each.rows.filter((row) => row.rate !== null && (subnets[row.subnet].is_uniform || front.has(row)));
    const { peak } = each;
    const isOver = [...rows, ...each.kernels].some((row) => row.share > 1.02);
    const caption = shownTables().length > 1 ? element("h3", {}, tableName(each, shownTables())) : null;
    if (!rows.length) return element("div", {}, caption, element("p", { class: "hint" }, "Sequences of several lengths: their operations are not on record."));
    const most = peak ? 1 : Math.max(...rows.map((row) => row.rate));
    const lines = rows.map((row) => barRow(subnets[row.subnet].label, row, peak, most, row.subnet));
    const kernels = each.kernels.map((kernel) =>
      barRow(`${kernel.op}, ${plural(kernel.size, kernel.op === "attention" ? "head" : "neuron")}`, kernel, peak,
        peak ? 1 : Math.max(...each.kernels.map((k) => k.rate)), null));
    return element("div", {}, caption,
      element("p", { class: "note" }, peak
        ? `Peak: ${digits(peak.flops_per_second / 1e9)} GFLOP/s in ${peak.dtype}, measured on the same machine (${peak.how}).`
        : `The peak of the machine was not measured${each.foreign === null ? "; dynabert report --measure-peak does" : ""}. Bars compare the subnets with each other.`),
      bars("the model, by subnet", lines),
      isOver ? element("p", { class: "warning" }, "A share above 100 % tells that the machine was busy while its peak was measured. Measure it again.") : null,
      kernels.length ? bars("the kernels of one layer, each called alone", kernels) : null);
  });
  places.peaked.replaceChildren(
    element("p", { class: "note" }, "Operations of the encoder (two per multiply-accumulate) over the median latency of the whole call, "
      + "which also pays for embeddings, LayerNorm, softmax and the head."),
    ...blocks);
}

function bars(title, lines) {
  return element("div", { class: "bars" }, element("h3", {}, title), element("ul", {}, lines));
}

function barRow(name, row, peak, most, subnet) {
  const share = peak ? row.share : row.rate / most;
  const bar = drawn("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    drawn("rect", { class: "rest", x: 0, y: 0, width: 100, height: 10 }),
    drawn("rect", { class: "filled", x: 0, y: 0, width: Math.min(100, share * 100), height: 10 }));
  return element("li", { "data-subnet": subnet }, element("span", { class: "bar-name" }, name), bar,
    element("span", { class: "bar-value" }, `${peak ? `${percent(row.share)} \u00b7 ` : ""}${digits(row.rate / 1e9)} GFLOP/s`));
}

// ---- Every subnet, sortable.

function columns(shown) {
  const found = [{ key: "name", name: "subnet", of: (p) => p.subnet.label, by: (p) => p.index }];
  if (shown.length > 1) found.push({ key: "table", name: "measured", of: (p) => tableName(p.table, shown), by: (p) => shown.indexOf(p.table), isText: true });
  found.push(
    { key: "layers", name: "layers", by: (p) => p.subnet.layers.length },
    { key: "heads", name: "heads", of: (p) => spread(p.subnet.layers, "num_heads"), by: (p) => total(p, "num_heads") },
    { key: "neurons", name: "neurons", of: (p) => spread(p.subnet.layers, "intermediate_size"), by: (p) => total(p, "intermediate_size") });
  if (hasScores) {
    found.push({ key: "score", name: metric.label, of: (p) => scoreText(p.subnet.score), by: (p) => p.subnet.score });
    for (const other of report.other_metrics) {
      found.push({
        key: other.name, name: other.label, by: (p) => p.subnet.metrics[other.name] ?? null,
        of: (p) => (other.name in p.subnet.metrics ? (p.subnet.metrics[other.name] * other.factor).toFixed(other.decimals) : NOTHING),
      });
    }
  }
  if (hasTimes) {
    const largest = Math.max(...subnets.map((subnet) => subnet.parameters));
    const slow = new Map(shown.map((each) => [each, each.rows.find((row) => subnets[row.subnet].parameters === largest)]));
    const gain = (p) => (slow.get(p.table) ? slow.get(p.table).median / p.row.median : null);
    for (const [key, name] of [["p20", "p20 (ms)"], ["median", "median (ms)"], ["p80", "p80 (ms)"], ["p99", "p99 (ms)"]]) {
      found.push({ key: key === state.percentile ? "ms" : key, name, of: (p) => digits(p.row[key]), by: (p) => p.row[key] });
    }
    found.push(
      { key: "gain", name: "speed\u2011up", of: (p) => (gain(p) === null ? NOTHING : `${gain(p).toFixed(2)}x`), by: gain },
      { key: "throughput", name: "sequences/s", of: (p) => digits(p.row.throughput), by: (p) => p.row.throughput });
  }
  found.push(
    { key: "parameters", name: "parameters", of: (p) => millions(p.subnet.parameters), by: (p) => p.subnet.parameters },
    { key: "flops", name: "operations", of: (p) => operations(p.subnet.flops), by: (p) => p.subnet.flops });
  return found;
}

function total(point, field) {
  return point.subnet.layers.reduce((sum, layer) => sum + layer[field], 0);
}

function drawList() {
  const shown = shownTables();
  const all = columns(shown);
  const sorted = all.find((column) => column.key === state.sort.key) || all[0];
  const points = shownPoints();
  const scored = points.filter((point) => hasScores && point.subnet.score !== null);
  const front = new Set(paretoFront(scored.map((p) => [hasTimes ? p.ms : p.subnet.flops, p.subnet.score])).map((i) => scored[i]));
  const sign = state.sort.down ? -1 : 1;
  points.sort((a, b) => {
    const [x, y] = [sorted.by(a), sorted.by(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  });
  const found = hasTimes && hasScores ? chosenPoint() : null;
  const head = all.map((column) => {
    const isSorted = column === sorted;
    const arrow = isSorted ? (state.sort.down ? "\u00a0\u25be" : "\u00a0\u25b4") : "";
    return element("th", { scope: "col", "aria-sort": isSorted ? (state.sort.down ? "descending" : "ascending") : null },
      element("button", { type: "button", onclick: () => {
        state.sort = { key: column.key, down: isSorted ? !state.sort.down : false };
        drawList();
        places.listed.querySelector("[aria-sort] button")?.focus();
      } }, column.name + arrow));
  });
  const rows = points.map((point) => {
    const isChosen = found !== null && found.point.index === point.index && found.point.table === point.table;
    return element("tr", { "data-subnet": point.index, class: isChosen ? "is-chosen" : null }, all.map((column, i) => {
      const text = column.of ? column.of(point) : String(column.by(point));
      return i === 0
        ? element("th", { scope: "row", title: point.subnet.name }, text, front.has(point) ? element("span", { class: "star", title: "on the Pareto front" }, " \u2605") : null)
        : element("td", { class: column.isText ? "words" : null }, text);
    }));
  });
  places.listed.replaceChildren(
    element("p", { class: "note" }, `\u2605 marks the Pareto front. Operations are the encoder's for one sequence of ${report.seq_len} tokens, two per multiply-accumulate.`
      + (hasTimes ? " Speed-up is over the largest subnet." : "")),
    table(head, rows, { class: "list", label: "Every subnet" }));
}

// ---- What made the run, and how to repeat it.

function drawCommands() {
  const measured = shownTables().filter((each) => each.latency_command)
    .map((each) => ({ title: `Latency: ${each.caption}`, text: each.latency_command, notes: each.setting.lengths ? [`FILE stands for the texts that the lengths are of: ${each.setting.lengths}.`] : [] }));
  const all = [...report.commands, ...measured];
  places.commands.replaceChildren(...(all.length
    ? all.map(({ title, text, notes }) => element("div", {}, element("h3", {}, title), codeBlock(text),
      notes.map((note) => element("p", { class: "note" }, note))))
    : [element("p", { class: "hint" }, "A model alone does not tell how it was made.")]));
}

function buildFacts() {
  return element("dl", { class: "facts" }, report.facts.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function buildStages() {
  if (!report.stages.length) return null;
  const rewired = report.stages.flatMap((stage) => stage.rewiring);
  const rows = report.stages.map((stage) => element("tr", {},
    element("th", { scope: "row" }, stage.name),
    element("td", { class: "words" }, stage.teacher ? `the ${stage.teacher} network` : "labels"),
    element("td", {}, stage.num_subnets),
    element("td", {}, stage.steps === null ? NOTHING : grouped(stage.steps)),
    element("td", {}, stage.seconds === null ? NOTHING : `${digits(stage.seconds / 60)} min`),
    element("td", {}, metric && stage.grid_mean !== null ? scoreText(stage.grid_mean) : NOTHING)));
  return element("div", {}, element("h3", {}, "Stages of training"),
    table(["stage", element("th", { scope: "col", class: "words" }, "learned from"), "subnets", "steps", "time", metric ? `mean ${metric.label}` : "mean"], rows, { class: "list", label: "Stages of training" }),
    metric ? rewired.map(({ subnet, before, after }) => element("p", { class: "note" },
      `Sorting heads and neurons by importance took ${subnet}, untrained, from ${scoreText(before)} to ${scoreText(after)}.`)) : null);
}

function buildTables() {
  if (!tables.length && !report.left_out.length) return null;
  return element("div", {}, element("h3", {}, "Latency tables"),
    element("ul", { class: "captions" },
      tables.map((each) => element("li", {}, `${each.caption}: ${plural(each.rows.length, "subnet")}, ${each.rows.length ? time(each.rows[0].measured_at) : ""}`, foreignBadge(each))),
      report.left_out.map((text) => element("li", {}, text, element("span", { class: "badge" }, "left out")))));
}
