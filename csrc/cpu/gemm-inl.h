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

// Products of a tile, [kTileRows][kTilePanels * 16].
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
  std::int64_t chunk_bytes;  // from a chunk's first line to that of the next
  std::int64_t mask;
};

// The loops over a tile are unrolled early: only then are its sums registers from the beginning.
template <class Dot, int kRows, int kPanels>
[[gnu::noinline]] void multiply_tile(const Tokens& rows, const Panels& b, const std::byte* panels,
                                     const Prefetch& prefetch, Tile& tile) {
  constexpr bool kIsInt8 = std::is_same_v<Dot, DotInt8>;
  const std::uint32_t* tokens = rows.units;
  const std::int64_t stride = rows.stride;
  typename Dot::Sum sums[kRows][kPanels];
  const auto clear = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        if constexpr (kIsInt8) {
          sums[r][p] = set1_word(static_cast<std::uint32_t>(-rows.offsets[r]));
        } else {
          sums[r][p] = Dot::zero_sum();
        }
      }
    }
  };
  bool has_part = false;
  const auto put = [&] {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        float* to = tile.sums + (r * kTilePanels + p) * kLanes;
        if constexpr (kIsInt8) {
          store(to, mul(to_float(sums[r][p]), set1(rows.scales[r])));
        } else {
          if constexpr (std::is_same_v<Dot, DotFloat32>) {
            if (has_part) sums[r][p] = add(load(to), sums[r][p]);
          }
          Dot::store(to, sums[r][p]);
        }
      }
    }
    has_part = true;
  };
  clear();
  const std::int64_t part = part_steps(b);
  std::int64_t left = part;
  for (std::int64_t chunk = 0; chunk < b.chunks; ++chunk) {
    const std::byte* at = panels + chunk * b.chunk_bytes;
    const std::byte* line = prefetch.lines + chunk * prefetch.chunk_bytes;
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
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) weights[p] = Dot::load(at + p * b.panel_bytes);
        if ((step & prefetch.mask) == 0) {
          for (int p = 0; p < kTilePanels; ++p) {
            __builtin_prefetch(line + p * prefetch.panel_bytes, 0, 2);
          }
          line += kStepBytes;
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const typename Dot::Unit unit = Dot::broadcast(tokens[r * stride]);
#pragma GCC unroll 4
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
inline void multiply_rows(std::int64_t count, const Tokens& rows, const Panels& b,
                          const std::byte* panels, const Prefetch& prefetch, Tile& tile) {
  if constexpr (kRows > 1) {
    if (count < kRows) {
      return multiply_rows<Dot, kPanels, kRows - 1>(count, rows, b, panels, prefetch, tile);
    }
  }
  multiply_tile<Dot, kRows, kPanels>(rows, b, panels, prefetch, tile);
}

template <class Dot, int kPanels = kTilePanels>
inline void multiply_panels(std::int64_t width, std::int64_t count, const Tokens& rows,
                            const Panels& b, const std::byte* panels, const Prefetch& prefetch,
                            Tile& tile) {
  if constexpr (kPanels > 1) {
    if (width < kPanels) {
      return multiply_panels<Dot, kPanels - 1>(width, count, rows, b, panels, prefetch, tile);
    }
  }
  multiply_rows<Dot, kPanels>(count, rows, b, panels, prefetch, tile);
}

// Multiplies rows of units with panels [first, last) and hands each tile of products to
// `epilogue(tile, first_row, rows, first_panel, panels)`.
template <class Dot, class Epilogue>
void multiply(const Tokens& tokens, std::int64_t rows, const Panels& b, std::int64_t first_panel,
              std::int64_t last_panel, Epilogue&& epilogue) {
  Tile tile;
  const std::int64_t tiles = ceil_div(rows, kTileRows);
  // The tiles of a round fetch as many steps as the panels to come hold, each its share.
  std::int64_t interval = 1;
  while (interval * 2 <= tiles) interval *= 2;
  for (std::int64_t panel = first_panel; panel < last_panel; panel += kTilePanels) {
    const std::int64_t panels = smaller(kTilePanels, last_panel - panel);
    const std::byte* at = b.data + panel * b.panel_bytes;
    const bool is_last = panel + kTilePanels >= last_panel;
    const auto lines = [&] { return ceil_div(b.steps, interval); };  // of a panel, a tile and chunk
    if (is_last) {
      const std::int64_t coming = b.next.panel_bytes / kStepBytes;
      while (interval > 1 && tiles * b.chunks * lines() < coming) interval /= 2;
    }
    const std::int64_t share = lines() * kStepBytes;
    // What comes after the product has no chunks: each fetches on where the one before ended.
    Prefetch prefetch = is_last ? Prefetch{b.next.panels, b.next.panel_bytes, share, interval - 1}
                                : Prefetch{at + kTilePanels * b.panel_bytes, b.panel_bytes,
                                           b.chunk_bytes, interval - 1};
    const std::int64_t forward = is_last ? share * b.chunks : share;
    for (std::int64_t t = 0, row = 0; t < tiles; ++t) {
      const std::int64_t next = rows * (t + 1) / tiles;
      multiply_panels<Dot>(panels, next - row, tokens.from(row), b, at, prefetch, tile);
      epilogue(static_cast<const Tile&>(tile), row, next - row, panel, panels);
      prefetch.lines += forward;
      row = next;
    }
  }
}
