// Dropout masks from counters, compiled once per instruction set: forward and backward draw the
// same mask, and none is stored.
//
// A seeded mask is that of dynabert_kernels/dropout.py, element for element: the first word of
// Philox-4x32-10 decides. Without a seed of the caller's, all four words decide, 16 bits for each
// element: an eighth of the work.

// The numbering of a counter's last word keeps the masks under one seed apart.
enum MaskKind : std::uint32_t {
  kHiddenSeeded = 0,
  kAttentionSeeded,
  kHiddenDrawn,
  kAttentionDrawn
};

struct PhiloxWords {
  I32x16 word[4];
};

inline PhiloxWords philox(std::uint64_t seed, PhiloxWords c) {
  auto key_a = static_cast<std::uint32_t>(seed), key_b = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    I32x16 high_a, high_b;
    const I32x16 low_b = multiply_wide(c.word[2], 0xCD9E8D57u, &high_b);
    const I32x16 low_a = multiply_wide(c.word[0], 0xD2511F53u, &high_a);
    c = {{exclusive_or(exclusive_or(high_b, c.word[1]), set1_word(key_a)), low_b,
          exclusive_or(exclusive_or(high_a, c.word[3]), set1_word(key_b)), low_a}};
    key_a += 0x9E3779B9u;
    key_b += 0xBB67AE85u;
  }
  return c;
}

// What 16 elements are multiplied with.
inline F32x16 keep_from(F32x16 numbers, const Dropout& dropout) {
  return select_within(numbers, dropout.bound, zero(), set1(dropout.scale));
}

inline void keep_drawn(const Dropout& dropout, std::uint32_t second, std::uint32_t third,
                       std::uint32_t kind, std::int64_t first, std::int64_t count, float* keep) {
  // Numbers of a group: half h of word w in lane l decides about element (2 * w + h) * 16 + l.
  constexpr std::int64_t kGroup = 8 * kLanes;
  for (std::int64_t at = 0; at < count; at += kGroup) {
    const auto group = static_cast<std::uint32_t>((first + at) / kGroup * kLanes);
    const PhiloxWords words =
        philox(dropout.seed, {{add_words(word_lanes(), set1_word(group)), set1_word(second),
                               set1_word(third), set1_word(kind)}});
    for (std::int64_t w = 0; w < 4 && at + 2 * w * kLanes < count; ++w) {
      float* to = keep + at + 2 * w * kLanes;
      store(to, keep_from(to_float(low_halves(words.word[w])), dropout));
      store(to + kLanes, keep_from(to_float(high_halves(words.word[w])), dropout));
    }
  }
}

inline F32x16 keep_seeded(const Dropout& dropout, const PhiloxWords& counter) {
  const I32x16 word = philox(dropout.seed, counter).word[0];
  return keep_from(mul(to_float(exclusive_or(word, spread_sign(word))), set1(4.6566127342e-10f)),
                   dropout);
}

// Floats that a row of `count` factors needs: masks are written by whole groups.
constexpr std::int64_t keep_size(std::int64_t count) { return round_up(count, 2 * kLanes); }

// keep[i] for the first `count` channels of a token; lanes past them are undefined.
inline void keep_hidden(const Dropout& dropout, std::int64_t token, std::int64_t count,
                        float* keep) {
  if (dropout.is_drawn) {
    return keep_drawn(dropout, static_cast<std::uint32_t>(token), 0, kHiddenDrawn, 0, count, keep);
  }
  for (std::int64_t c = 0; c < count; c += kLanes) {
    const auto offset = static_cast<std::uint64_t>(token * count + c);
    std::uint32_t low[kLanes], high[kLanes];
    for (std::uint64_t i = 0; i < kLanes; ++i) {
      low[i] = static_cast<std::uint32_t>(offset + i);
      high[i] = static_cast<std::uint32_t>((offset + i) >> 32);
    }
    store(keep + c, keep_seeded(dropout, {{load_int32(reinterpret_cast<const std::int32_t*>(low)),
                                           load_int32(reinterpret_cast<const std::int32_t*>(high)),
                                           set1_word(0), set1_word(kHiddenSeeded)}}));
  }
}

// keep[i] for keys [first, first + count) of a query counted over the batch; `first` is a multiple
// of 128.
inline void keep_attention(const Dropout& dropout, std::int64_t head, std::int64_t query,
                           std::int64_t first, std::int64_t count, float* keep) {
  const auto second = static_cast<std::uint32_t>(query), third = static_cast<std::uint32_t>(head);
  if (dropout.is_drawn) {
    return keep_drawn(dropout, second, third, kAttentionDrawn, first, count, keep);
  }
  for (std::int64_t key = 0; key < count; key += kLanes) {
    const I32x16 keys = add_words(word_lanes(), set1_word(static_cast<std::uint32_t>(first + key)));
    store(keep + key, keep_seeded(dropout, {{keys, set1_word(second), set1_word(third),
                                             set1_word(kAttentionSeeded)}}));
  }
}
