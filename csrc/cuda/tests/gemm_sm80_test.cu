// Compares gemm_sm80.h and row_tiles.h with double precision on the CPU, on random prefixes and
// token counts. On a card, also under compute-sanitizer, or emulated.
//
// Sources: gemm_sm80_test.cu, ../gemm_sm80*.cu, ../row_tiles.cu.
//   nvcc -std=c++20 -O3 -gencode=arch=compute_80,code=sm_80 SOURCES -o gemm_sm80_test
//   g++ -std=c++20 -O1 -x c++ -I/usr/local/cuda/include SOURCES -o gemm_sm80_test
// gemm_sm80_test [cases] [seed]

#include "../gemm_sm80.h"
#include "../gemm_sm80_schedule.h"
#include "../launch.cuh"
#include "../row_tiles.h"
#include "device_tensor.h"

namespace {

using namespace dynabert;
using namespace dynabert::testing;

// A card has room for more tiles than the emulation has time.
#ifdef __CUDACC__
constexpr int kLargest = 1500;
#else
constexpr int kLargest = 220;
#endif

int tiles_used[kGemmTileCount];

double truth_of(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x *
             (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x > 0.0 ? x : 0.0;
    default:
      return x;
  }
}

// The widths of a case: one, on the host or the device, or one for each sequence.
struct CaseWidths {
  int limit;  // heads or neurons
  int tokens;
  std::vector<std::int32_t> offsets, each;
  std::vector<int> width_of_row;  // -1 past the last sequence

  CaseWidths(int limit, bool mixed) : limit(limit) {
    const int batch = mixed ? uniform(2, 9) : 1;
    offsets = random_offsets(batch, 2 * kLargest / batch);
    if (!mixed && offsets[1] == 0) offsets[1] = 1;
    for (int i = 0; i < batch; ++i) {
      each.push_back(i > 0 && uniform(0, 1) ? each.back() : uniform(mixed ? 0 : 1, limit));
      width_of_row.insert(width_of_row.end(), offsets[i + 1] - offsets[i], each[i]);
    }
    if (mixed) width_of_row.insert(width_of_row.end(), uniform(1, 9), -1);
    tokens = static_cast<int>(width_of_row.size());
  }
  int widest() const { return *std::max_element(each.begin(), each.end()); }
};

// A product, and the double computation of one of its elements.
struct Product {
  bool rows_form;
  Tensor x, weight, bias;
  int x_stride, hidden, unit;
  Activation activation;

  // Also a bound of what rounding the sum may cost.
  double element(int t, int column, int width, double* bound) const {
    const int depth = rows_form ? hidden : width * unit;
    double sum = bias.host[column], magnitude = std::fabs(sum);
    for (int k = 0; k < depth; ++k) {
      const std::size_t index =
          rows_form ? std::size_t(column) * hidden + k : std::size_t(k) * hidden + column;
      const double product = double(x.host[std::size_t(t) * x_stride + k]) * weight.host[index];
      sum += product;
      magnitude += std::fabs(product);
    }
    const double truth = truth_of(activation, sum);
    *bound = 1.01 * x.element.unit() * std::fabs(truth) + 1e-6 * (magnitude + 1.0);
    return truth;
  }
};

std::vector<int> sample_rows(int tokens, const std::vector<std::int32_t>& offsets) {
  std::vector<int> rows = {0, tokens - 1};
  for (const int offset : offsets) {
    if (offset > 0) rows.push_back(offset - 1);
    if (offset < tokens) rows.push_back(offset);
  }
  for (int i = 0; i < 6; ++i) rows.push_back(uniform(0, tokens - 1));
  return rows;
}

bool test_product(bool rows_form) {
  const ElementType type = one_of({ElementType::kBfloat16, ElementType::kFloat16});
  const bool mixed = uniform(0, 2) == 0, on_device = uniform(0, 1);
  const int unit = one_of({1, 1, 8, 24});
  const int hidden = 8 * uniform(1, kLargest / 8);
  const CaseWidths widths(uniform(1, kLargest * 5 / 4 / unit + 1), mixed);
  const int tokens = widths.tokens, full = widths.limit * unit, used = widths.widest() * unit;
  const int in = rows_form ? hidden : (full + 7) / 8 * 8, out_columns = rows_form ? full : hidden;
  const int x_stride = in + 8 * uniform(0, 2);
  const int out_stride = (out_columns + 7) / 8 * 8 + 8 * uniform(0, 2);
  const float deviation = 1.0f / std::sqrt(static_cast<float>(rows_form ? hidden : used + 1));
  Product product = {rows_form,
                     {type, static_cast<std::size_t>(tokens) * x_stride, 0.0f, 1.0f},
                     {type, static_cast<std::size_t>(full) * hidden, 0.0f, deviation},
                     {type, static_cast<std::size_t>(out_columns), 0.0f, 1.0f},
                     x_stride,
                     hidden,
                     unit,
                     rows_form ? one_of({Activation::kNone, Activation::kGelu,
                                         Activation::kGeluTanh, Activation::kRelu})
                               : Activation::kNone};
  // Nothing beyond a prefix, or between the rows, may leak.
  product.weight.poison(std::size_t(used) * hidden, product.weight.host.size());
  product.weight.upload();
  if (rows_form) product.bias.poison(used, full);
  product.bias.upload();
  for (int t = 0; t < tokens; ++t) {
    const int width = widths.width_of_row[t];
    const int valid = width < 0 ? 0 : rows_form ? hidden : width * unit;
    product.x.poison(std::size_t(t) * x_stride + valid, std::size_t(t + 1) * x_stride);
  }
  product.x.upload();
  Tensor out(type, static_cast<std::size_t>(tokens) * out_stride);
  const DeviceInts each(widths.each), offsets(widths.offsets);
  const int batch = static_cast<int>(widths.each.size());
  const int tile_rows = row_tile_rows(tokens, batch);
  const int num_tiles = max_row_tiles(tokens, batch, tile_rows);
  const DeviceInts table(std::vector<std::int32_t>(3 * num_tiles, -1));

  GemmSm80 args = {};
  args.type = type;
  args.activation = product.activation;
  args.x = product.x.device;
  args.weight = product.weight.device;
  args.bias = product.bias.device;
  args.out = out.device;
  args.x_stride = x_stride;
  args.out_stride = out_stride;
  args.tokens = tokens;
  args.hidden_size = hidden;
  args.full_width = full;
  args.width = {on_device || mixed ? widths.limit : widths.each[0],
                on_device && !mixed ? each.device : nullptr, unit};
  if (mixed) {
    auto* const tiles = reinterpret_cast<RowTile*>(table.device);
    args.tiles = tiles;
    args.num_tiles = num_tiles;
    args.tile_rows = tile_rows;
    check(build_row_tiles(offsets.device, batch, each.device, tokens, widths.limit, tile_rows,
                          tiles, nullptr),
          "build_row_tiles");
  }
  const auto gemm = rows_form ? gemm_rows_sm80 : gemm_columns_sm80;
  ++tiles_used[choose_gemm_tile(tokens, out_columns, multiprocessors(), args.tile_rows)];
  check(gemm(args, nullptr), "gemm_sm80");
  check(cudaDeviceSynchronize(), "gemm_sm80");
  out.read_back();

  double worst = 0.0;  // error in units of its bound
  bool untouched = true;
  for (const int t : sample_rows(tokens, widths.offsets)) {
    const int width = widths.width_of_row[t];
    const int columns = width < 0 ? 0 : rows_form ? width * unit : hidden;
    const float* const row = &out.host[std::size_t(t) * out_stride];
    for (int c = 0; c < columns; ++c) {
      double bound;
      const double truth = product.element(t, c, width, &bound);
      const double error = std::fabs(row[c] - truth) / bound;
      if (!(error <= worst)) worst = error;  // keeps a NaN
    }
    for (int c = columns; c < out_stride; ++c) untouched = untouched && std::isnan(row[c]);
  }

  // A row alone, in another tile, has the same bits.
  const int alone = uniform(0, tokens - 1), width = widths.width_of_row[alone];
  bool same = true;
  if (width >= 0) {
    Tensor one(type, out_stride);
    args.x = product.x.at(std::size_t(alone) * x_stride);
    args.out = one.device;
    args.tokens = 1;
    args.width = {width, nullptr, unit};
    args.tiles = nullptr;
    args.num_tiles = args.tile_rows = 0;
    check(gemm(args, nullptr), "gemm_sm80");
    one.read_back();
    same = std::memcmp(one.host.data(), &out.host[std::size_t(alone) * out_stride],
                       (rows_form ? width * unit : hidden) * 4) == 0;
  }
  if (worst <= 1.0 && untouched && same) return true;
  std::printf(
      "%s type %d: tokens %d hidden %d limit %d x %d mixed %d device %d activation %d: error %.3g "
      "of "
      "the bound%s%s\n",
      rows_form ? "rows" : "columns", static_cast<int>(type), tokens, hidden, widths.limit, unit,
      mixed, on_device, static_cast<int>(product.activation), worst,
      untouched ? "" : ", wrote beyond the width", same ? "" : ", a row alone differs");
  return false;
}

// Every row of the sequences is in one tile of its width; what is left of the table is zero.
bool test_row_tiles() {
  const int batch = uniform(2, 700), tile_rows = one_of({64, 128}), limit = uniform(1, 12);
  const std::vector<std::int32_t> starts = random_offsets(batch, one_of({3, 40, 300}));
  std::vector<std::int32_t> widths, expected;
  for (int i = 0; i < batch; ++i) {
    widths.push_back(i > 0 && uniform(0, 3) ? widths.back() : uniform(-1, limit + 1));
    expected.insert(expected.end(), starts[i + 1] - starts[i], std::clamp(widths[i], 0, limit));
  }
  const int tokens = starts.back() + uniform(0, 100);
  const int entries = max_row_tiles(tokens, batch, tile_rows);
  const DeviceInts offsets(starts), each(widths);
  const DeviceInts table(std::vector<std::int32_t>(3 * entries, -1));
  check(build_row_tiles(offsets.device, batch, each.device, tokens, limit, tile_rows,
                        reinterpret_cast<RowTile*>(table.device), nullptr),
        "build_row_tiles");
  std::vector<RowTile> tiles(entries);
  check(cudaMemcpy(tiles.data(), table.device, sizeof(RowTile) * entries, cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  int next = 0;
  bool good = true;
  for (const RowTile& tile : tiles) {
    if (next == starts.back()) {
      good = good && tile.begin == 0 && tile.end == 0 && tile.width == 0;
      continue;
    }
    good = good && tile.begin == next && tile.end > next && tile.end <= starts.back() &&
           tile.end - tile.begin <= tile_rows;
    for (int row = tile.begin; good && row < tile.end; ++row) {
      good = expected[row] == tile.width;
    }
    next = tile.end;
  }
  if (good && next == starts.back()) return true;
  std::printf("row tiles: batch %d tile_rows %d tokens %d\n", batch, tile_rows, tokens);
  return false;
}

bool test_refusals() {
  GemmSm80 args = {};
  args.type = ElementType::kBfloat16;
  args.x_stride = args.out_stride = 64;
  args.tokens = 1;
  args.hidden_size = 64;
  args.full_width = 64;
  args.width = {64, nullptr, 1};
  const auto refuses = [&](auto change) {
    GemmSm80 bad = args;
    change(bad);
    return gemm_rows_sm80(bad, nullptr) == cudaErrorInvalidValue;
  };
  const bool good = refuses([](GemmSm80& bad) { bad.type = ElementType::kFloat32; }) &&
                    refuses([](GemmSm80& bad) { bad.hidden_size = 60; }) &&
                    refuses([](GemmSm80& bad) { bad.x_stride = 66; }) &&
                    refuses([](GemmSm80& bad) { bad.width.count = 65; }) &&
                    refuses([](GemmSm80& bad) { bad.width.unit = 0; }) &&
                    refuses([](GemmSm80& bad) { bad.tile_rows = 64; }) &&
                    refuses([](GemmSm80& bad) { bad.tokens = -1; });
  args.tokens = 0;
  return good && gemm_rows_sm80(args, nullptr) == cudaSuccess;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : std::random_device{}());
  int failures = !test_refusals();
  for (int i = 0; i < cases; ++i) {
    failures += !(i % 5 == 4 ? test_row_tiles() : test_product(i % 2 == 0));
  }
  std::printf("%d cases, %d failed; tiles of 128x128 %d, 64x128 %d, 64x64 %d\n", cases, failures,
              tiles_used[0], tiles_used[1], tiles_used[2]);
  return failures != 0;
}
