// What the page decides: fronts, picks, filters, ticks. No document, so that tests run it alone.

// Indices of the points that no other point beats, from the fastest to the best. A point is
// [latency, score]. The same as dynabert.picking.pareto_front.
function paretoFront(points) {
  const order = points.map((_, index) => index);
  order.sort((i, j) => points[i][0] - points[j][0] || points[j][1] - points[i][1] || i - j);
  const front = [];
  let best = -Infinity;
  for (const index of order) {
    if (points[index][1] > best) {
      front.push(index);
      best = points[index][1];
    }
  }
  return front;
}

// The most accurate candidate within the budget, of equally accurate ones the fastest; where none
// fits the fastest, and the least budget that fits. Candidates have `score` and `ms`; `margin` is
// the share of the latency to keep free. The same as dynabert.picking.pick.
function pick(candidates, budgetMs, margin) {
  const before = (isBetter, indices) =>
    indices.reduce((best, i) => (best === null || isBetter(candidates[i], candidates[best]) ? i : best), null);
  const all = candidates.map((_, index) => index);
  const within = all.filter((i) => candidates[i].ms * (1 + margin) <= budgetMs);
  if (within.length) {
    const isBetter = (a, b) => a.score > b.score || (a.score === b.score && a.ms < b.ms);
    return { index: before(isBetter, within), isWithin: true, leastMs: null };
  }
  const isFaster = (a, b) => a.ms < b.ms || (a.ms === b.ms && a.score > b.score);
  const index = before(isFaster, all);
  if (index === null) return { index: null, isWithin: false, leastMs: null };
  return { index, isWithin: false, leastMs: Math.ceil(candidates[index].ms * (1 + margin) * 100) / 100 };
}

// The budget a reader typed, in milliseconds: a positive number, with a point or a comma, and
// perhaps its unit; else null.
function readBudget(text) {
  const match = /^\s*\+?(\d+(?:[.,]\d*)?|[.,]\d+)(?:e([+-]?\d{1,3}))?\s*(ms|s|µs|us)?\s*$/i.exec(text);
  if (!match) return null;
  const unit = { s: 1e3, us: 1e-3, "µs": 1e-3 }[(match[3] || "ms").toLowerCase()] || 1;
  const value = Number(match[1].replace(",", ".") + (match[2] ? `e${match[2]}` : "")) * unit;
  return value > 0 && Number.isFinite(value) ? value : null;
}

const ANY = "";

// Tables that agree with every choice; ANY agrees with all.
function matching(tables, choice) {
  return tables.filter((table) =>
    Object.entries(choice).every(([key, value]) => value === ANY || table.facets[key] === value));
}

// The choice after one facet was set. Where no table has all of it, the other facets move to those
// of the table that agrees with most of them, so that the page is never empty.
function choose(tables, choice, key, value) {
  const next = { ...choice, [key]: value };
  if (matching(tables, next).length) return next;
  const agree = (table) => Object.keys(next).filter((k) => next[k] === ANY || table.facets[k] === next[k]).length;
  const nearest = tables
    .filter((table) => value === ANY || table.facets[key] === value)
    .reduce((best, table) => (best === null || agree(table) > agree(best) ? table : best), null);
  const moved = {};
  for (const k of Object.keys(next)) moved[k] = next[k] === ANY ? ANY : nearest.facets[k];
  return moved;
}

// Round numbers that cover low to high, about `count` of them; on a logarithmic axis 1, 2, 5 times
// powers of ten.
function ticks(low, high, count, isLog) {
  const found = [];
  if (isLog) {
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const digit of [1, 2, 5]) {
        const value = digit * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(Number(value.toPrecision(3)));
      }
    }
    if (found.length >= 3) return found;
    found.length = 0;
  }
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((digit) => digit * power).find((size) => size >= rough * 0.999);
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) {
    found.push(Number((n * step).toPrecision(12)));
  }
  return found;
}

// A number in as many digits as a reader needs: three, whole numbers in full.
function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return value.toFixed(size >= 99.95 ? 0 : size >= 9.995 ? 1 : size >= 0.9995 ? 2 : Math.min(6, 2 - Math.floor(Math.log10(size))));
}

// A number as it was typed or chosen, without noise in its last digits.
function plain(value) {
  return String(Number(value.toPrecision(6)));
}

function grouped(value) {
  return String(value).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
}
