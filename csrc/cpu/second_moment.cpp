// second_moment_ on the CPU: gram += keys^T diag(mask) keys on and below the diagonal.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <torch/library.h>

#include "../triangle.h"

namespace lightedit {
namespace {

constexpr int64_t kTokens = 4096;  // keys that are packed or converted at one time; bounds the memory that takes

// bfloat16 keys where the processor has matrix units for them (AMX): tiles of the triangle, each a chain of products of
// one shape. Products of bfloat16 are exact, sums are float32. What lies beyond the edges is zero and never stored.
constexpr int64_t kRows = 128, kColumns = 64;  // of a tile; its float32 sums stay in the first-level cache
constexpr int64_t kDepth = 512;                // keys of one product: its operands stay in the second-level cache
constexpr int64_t kPair = 2;                   // consecutive keys that lie together in `columns`

struct Packed {
  at::Tensor rows;     // keys^T, [columns of keys padded to kRows, stride]: sums run along memory
  at::Tensor columns;  // [blocks of kColumns, depth / kPair, kColumns, kPair]
  int64_t depth;       // number of keys, padded to kDepth
  int64_t stride;      // of a row of `rows`
};

// The chosen rows of keys [n, d]; `chosen` is empty where all are.
Packed pack(const at::Tensor& keys, const std::vector<int64_t>& chosen, int64_t start, int64_t count) {
  const int64_t d = keys.size(1), step = keys.stride(1);
  const int64_t depth = (count + kDepth - 1) / kDepth * kDepth;
  const int64_t blocks = (d + kRows - 1) / kRows * (kRows / kColumns);
  const int64_t stride = depth + 32;  // no power of two, so that the rows of a tile do not share one cache set
  Packed packed{at::empty({blocks * kColumns, stride}, keys.options()),
                at::empty({blocks, depth, kColumns}, keys.options()), depth, stride};
  const auto* first = keys.const_data_ptr<at::BFloat16>();
  auto* rows = packed.rows.data_ptr<at::BFloat16>();
  auto* columns = packed.columns.data_ptr<at::BFloat16>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t left = block * kColumns, width = std::clamp<int64_t>(d - left, 0, kColumns);
      at::BFloat16* pairs = columns + block * depth * kColumns;
      at::BFloat16* transposed = rows + left * stride;
      for (int64_t k = 0; k < depth; k += kPair, pairs += kPair * kColumns) {
        at::BFloat16 pair[kPair][kColumns] = {};
        for (int64_t i = 0; i < kPair && k + i < count; ++i) {
          const int64_t at = start + k + i;
          const at::BFloat16* key = first + (chosen.empty() ? at : chosen[at]) * keys.stride(0) + left * step;
          if (step == 1) {
            for (int64_t c = 0; c < width; ++c) pair[i][c] = key[c];
          } else {
            for (int64_t c = 0; c < width; ++c) pair[i][c] = key[c * step];
          }
        }
        for (int64_t c = 0; c < kColumns; ++c) {
          for (int64_t i = 0; i < kPair; ++i) pairs[kPair * c + i] = pair[i][c];
        }
        for (int64_t c = 0; c < kColumns; ++c) {
          std::memcpy(transposed + c * stride + k, pairs + kPair * c, kPair * sizeof(at::BFloat16));
        }
      }
    }
  });
  return packed;
}

template <typename gram_t>
void add_tiles(const at::Tensor& gram, const Packed& packed) {
  const int64_t d = gram.size(0), row_step = gram.stride(0), column_step = gram.stride(1);
  const int64_t bands = (d + kRows - 1) / kRows;
  auto* out = gram.data_ptr<gram_t>();
  const auto* rows = packed.rows.const_data_ptr<at::BFloat16>();
  const auto* columns = packed.columns.const_data_ptr<at::BFloat16>();
  const auto add_band = [&](int64_t band) {
    alignas(64) float tile[kRows * kColumns];
    const int64_t top = band * kRows, bottom = std::min(top + kRows, d);
    for (int64_t left = 0; left < bottom; left += kColumns) {
      for (int64_t k = 0; k < packed.depth; k += kDepth) {
        at::native::cpublas::brgemm(kRows, kColumns, kDepth, packed.stride, kColumns, kColumns, /*add_C=*/k > 0,
                                    rows + top * packed.stride + k, columns + left * packed.depth + k * kColumns, tile);
      }
      for (int64_t r = top; r < bottom; ++r) {
        const int64_t stop = std::min(left + kColumns, r + 1);
        const float* sums = tile + (r - top) * kColumns;
        gram_t* target = out + r * row_step + left * column_step;
        for (int64_t c = 0; c < stop - left; ++c) target[c * column_step] += sums[c];
      }
    }
  };
  // A band has as many tiles as there are up to the diagonal: a short band and a long one together are even work
  at::parallel_for(0, (bands + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      add_band(i);
      if (bands - 1 - i != i) add_band(bands - 1 - i);
    }
    at::native::cpublas::brgemm_release();
  });
}

bool has_matrix_units() {
  static const bool has = at::native::cpublas::could_pack(at::kBFloat16);
  return has && at::globalContext().userEnabledMkldnn();
}

void second_moment_(const at::Tensor& gram, const at::Tensor& keys, const std::optional<at::Tensor>& mask) {
  check_second_moment(gram, keys, mask);
  const auto index = mask ? mask->nonzero().squeeze(1).contiguous() : at::Tensor();
  const int64_t count = mask ? index.size(0) : keys.size(0);
  if (count == 0 || keys.size(1) == 0) return;
  if (keys.scalar_type() == at::kBFloat16 && has_matrix_units()) {
    std::vector<int64_t> chosen;
    if (mask) chosen.assign(index.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>() + count);
    for (int64_t start = 0; start < count; start += kTokens) {
      const auto packed = pack(keys, chosen, start, std::min(kTokens, count - start));
      if (gram.scalar_type() == at::kDouble) {
        add_tiles<double>(gram, packed);
      } else {
        add_tiles<float>(gram, packed);
      }
    }
    return;
  }
  const bool both = keys.scalar_type() == at::kDouble && gram.scalar_type() == at::kDouble;
  for (int64_t start = 0; start < count; start += kTokens) {
    const int64_t size = std::min(kTokens, count - start);
    const auto rows = mask ? keys.index_select(0, index.narrow(0, start, size)) : keys.narrow(0, start, size);
    add_products(gram, rows.to(both ? at::kDouble : at::kFloat), /*leaf=*/256);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(lightedit, CPU, m) { m.impl("second_moment_", second_moment_); }

}  // namespace lightedit
