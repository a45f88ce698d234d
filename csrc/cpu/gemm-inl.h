// Products of tokens with panels, compiled once per instruction set.
//
// One tile is kTileRows tokens x kTilePanels panels: its sums stay in registers for all of K. A
// panel is read from memory for the first tile of tokens and from L2 for the others, while the
// tiles of a round prefetch the panels of the next. Without that a core waits for memory for 13 %
// of the time (66 tokens, 56 MB of bfloat16 weights, Zen 5).

// Panels of one product. K may be cut into chunks that lie apart, as the heads of an output
// projection do; the sums run through them in order.
struct Panels {
  const std::byte* data;
  std::int64_t panel_bytes;  // from one panel to the next
  std::int64_t steps;        // units along K, per chunk
  std::int64_t chunks;
  std::int64_t chunk_bytes;
  Upcoming next;  // what the last round prefetches
};

// Sums of a tile, [kTileRows][kTilePanels * 16]; int8 leaves 32-bit integers in the same place.
struct alignas(64) Tile {
  float sums[kTileRows * kTilePanels * kLanes];
  const float* row(std::int64_t row, std::int64_t panel) const {
    return sums + (row * kTilePanels + panel) * kLanes;
  }
};

// Terms of a part of a float32 sum; the parts are added up in order. Rounding errors grow with the
// length of a chain, and libraries of matrix products cut theirs, too. Two parts at least from 256
// terms on, and few of them: each costs about as much as five terms.
inline std::int64_t part_steps(const Panels& b) {
  return smaller(256, larger(128, ceil_div(b.steps * b.chunks, 2)));
}

// What a tile fetches for the round to come: a line of each panel every `mask + 1` steps.
struct Prefetch {
  const std::byte* lines;
  std::int64_t panel_bytes;
  std::int64_t mask;
};

template <class Dot, int kRows, int kPanels>
[[gnu::noinline]] void multiply_tile(const std::uint32_t* tokens, std::int64_t stride,
                                     const Panels& b, const std::byte* panels, Prefetch prefetch,
                                     Tile& tile) {
  typename Dot::Sum sums[kRows][kPanels];
  const auto clear = [&] {
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) sums[r][p] = Dot::zero_sum();
    }
  };
  bool has_part = false;
  const auto put = [&] {
    for (int r = 0; r < kRows; ++r) {
      for (int p = 0; p < kPanels; ++p) {
        float* to = tile.sums + (r * kTilePanels + p) * kLanes;
        if constexpr (std::is_same_v<Dot, DotFloat32>) {
          if (has_part) sums[r][p] = add(load(to), sums[r][p]);
        }
        Dot::store(to, sums[r][p]);
      }
    }
    has_part = true;
  };
  clear();
  const std::int64_t part = part_steps(b);
  std::int64_t left = part;
  for (std::int64_t chunk = 0; chunk < b.chunks; ++chunk) {
    const std::byte* at = panels + chunk * b.chunk_bytes;
    const std::byte* line = prefetch.lines + chunk * b.chunk_bytes;
    for (std::int64_t begin = 0; begin < b.steps;) {
      std::int64_t end = b.steps;
      if constexpr (std::is_same_v<Dot, DotFloat32>) {
        if (left == 0) {
          put();
          clear();
          left = part;
        }
        end = smaller(end, begin + left);
        left -= end - begin;
      }
      for (std::int64_t step = begin; step < end; ++step) {
        typename Dot::Panel weights[kPanels];
        for (int p = 0; p < kPanels; ++p) weights[p] = Dot::load(at + p * b.panel_bytes);
        if ((step & prefetch.mask) == 0) {
          for (int p = 0; p < kTilePanels; ++p) {
            __builtin_prefetch(line + p * prefetch.panel_bytes, 0, 2);
          }
          line += kStepBytes;
        }
        for (int r = 0; r < kRows; ++r) {
          const typename Dot::Unit unit = Dot::broadcast(tokens[r * stride]);
          for (int p = 0; p < kPanels; ++p) sums[r][p] = Dot::step(sums[r][p], unit, weights[p]);
        }
        ++tokens;
        at += kStepBytes;
      }
      begin = end;
    }
  }
  put();
}

template <class Dot, int kPanels, int kRows = kTileRows>
void multiply_rows(std::int64_t rows, const std::uint32_t* tokens, std::int64_t stride,
                   const Panels& b, const std::byte* panels, Prefetch prefetch, Tile& tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return multiply_rows<Dot, kPanels, kRows - 1>(rows, tokens, stride, b, panels, prefetch,
                                                    tile);
    }
  }
  multiply_tile<Dot, kRows, kPanels>(tokens, stride, b, panels, prefetch, tile);
}

template <class Dot, int kPanels = kTilePanels>
void multiply_panels(std::int64_t count, std::int64_t rows, const std::uint32_t* tokens,
                     std::int64_t stride, const Panels& b, const std::byte* panels,
                     Prefetch prefetch, Tile& tile) {
  if constexpr (kPanels > 1) {
    if (count < kPanels) {
      return multiply_panels<Dot, kPanels - 1>(count, rows, tokens, stride, b, panels, prefetch,
                                               tile);
    }
  }
  multiply_rows<Dot, kPanels>(rows, tokens, stride, b, panels, prefetch, tile);
}

// Multiplies rows of units with panels [first, last) and hands each tile of sums to
// `epilogue(tile, first_row, rows, first_panel, panels)`.
//   tokens  [rows][stride] units
template <class Dot, class Epilogue>
void multiply(const std::uint32_t* tokens, std::int64_t stride, std::int64_t rows, const Panels& b,
              std::int64_t first_panel, std::int64_t last_panel, Epilogue&& epilogue) {
  Tile tile;
  const std::int64_t tiles = ceil_div(rows, kTileRows);
  // The tiles of a round fetch as many steps as its panels hold, each its share.
  std::int64_t interval = 1;
  while (interval * 2 <= tiles) interval *= 2;
  const std::int64_t share = ceil_div(b.steps, interval) * kStepBytes;
  for (std::int64_t panel = first_panel; panel < last_panel; panel += kTilePanels) {
    const std::int64_t panels = smaller(kTilePanels, last_panel - panel);
    const std::byte* at = b.data + panel * b.panel_bytes;
    const bool is_last = panel + kTilePanels >= last_panel;
    const Upcoming coming =
        is_last ? b.next : Upcoming{at + kTilePanels * b.panel_bytes, b.panel_bytes};
    for (std::int64_t t = 0, row = 0; t < tiles; ++t) {
      const std::int64_t next = rows * (t + 1) / tiles;
      multiply_panels<Dot>(panels, next - row, tokens + row * stride, stride, b, at,
                           {coming.panels + t * share, coming.panel_bytes, interval - 1}, tile);
      epilogue(static_cast<const Tile&>(tile), row, next - row, panel, panels);
      row = next;
    }
  }
}
