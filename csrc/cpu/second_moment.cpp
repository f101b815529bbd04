// second_moment_ on the CPU: gram += keys^T diag(mask) keys on and below the diagonal.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
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

// Tiles of the triangle, each a chain of products of one shape. What lies beyond the edges is zero and never stored.
// Units are float, or bfloat16 where there are matrix units (AMX): products of bfloat16 are exact, sums are float32.
constexpr int64_t kRows = 128, kColumns = 64;  // of a tile; its float32 sums stay in the first-level cache
constexpr int64_t kDepth = 512;                // keys of one product: its operands stay in the second-level cache

template <typename unit_t>
struct Packed {
  static constexpr int64_t kGroup = sizeof(float) / sizeof(unit_t);  // consecutive keys that lie together in `columns`
  at::Tensor rows;     // keys^T, [columns of keys padded to kRows, stride]: sums run along memory
  at::Tensor columns;  // [blocks of kColumns, depth / kGroup, kColumns, kGroup]
  int64_t depth;       // number of keys, padded to kDepth
  int64_t stride;      // of a row of `rows`
};

// The chosen rows of keys [n, d]; `chosen` is empty where all are.
template <typename unit_t, typename key_t>
Packed<unit_t> pack(const at::Tensor& keys, const std::vector<int64_t>& chosen, int64_t start, int64_t count) {
  using P = Packed<unit_t>;
  const int64_t d = keys.size(1), step = keys.stride(1);
  const int64_t depth = (count + kDepth - 1) / kDepth * kDepth;
  const int64_t blocks = (d + kRows - 1) / kRows * (kRows / kColumns);
  const int64_t stride = depth + 32;  // no power of two, so that the rows of a tile do not share one cache set
  const auto options = keys.options().dtype(c10::CppTypeToScalarType<unit_t>::value);
  P packed{at::empty({blocks * kColumns, stride}, options), at::empty({blocks, depth, kColumns}, options), depth,
           stride};
  const auto* first = keys.const_data_ptr<key_t>();
  auto* rows = packed.rows.template data_ptr<unit_t>();
  auto* columns = packed.columns.template data_ptr<unit_t>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t left = block * kColumns, width = std::clamp<int64_t>(d - left, 0, kColumns);
      unit_t* groups = columns + block * depth * kColumns;
      unit_t* transposed = rows + left * stride;
      for (int64_t k = 0; k < depth; k += P::kGroup, groups += P::kGroup * kColumns) {
        unit_t group[P::kGroup][kColumns] = {};
        for (int64_t i = 0; i < P::kGroup && k + i < count; ++i) {
          const int64_t at = start + k + i;
          const key_t* key = first + (chosen.empty() ? at : chosen[at]) * keys.stride(0) + left * step;
          if (step == 1) {
            for (int64_t c = 0; c < width; ++c) group[i][c] = static_cast<unit_t>(key[c]);
          } else {
            for (int64_t c = 0; c < width; ++c) group[i][c] = static_cast<unit_t>(key[c * step]);
          }
        }
        for (int64_t c = 0; c < kColumns; ++c) {
          for (int64_t i = 0; i < P::kGroup; ++i) groups[P::kGroup * c + i] = group[i][c];
        }
        for (int64_t c = 0; c < kColumns; ++c) {
          std::memcpy(transposed + c * stride + k, groups + P::kGroup * c, sizeof(float));
        }
      }
    }
  });
  return packed;
}

template <typename unit_t, typename gram_t>
void add_tiles(const at::Tensor& gram, const Packed<unit_t>& packed) {
  const int64_t d = gram.size(0), row_step = gram.stride(0), column_step = gram.stride(1);
  const int64_t bands = (d + kRows - 1) / kRows;
  constexpr bool grouped = Packed<unit_t>::kGroup > 1;
  auto* out = gram.data_ptr<gram_t>();
  const auto* rows = packed.rows.template const_data_ptr<unit_t>();
  const auto* columns = packed.columns.template const_data_ptr<unit_t>();
  const auto add_band = [&](int64_t band) {
    alignas(64) float tile[kRows * kColumns];
    const int64_t top = band * kRows, bottom = std::min(top + kRows, d);
    for (int64_t left = 0; left < bottom; left += kColumns) {
      for (int64_t k = 0; k < packed.depth; k += kDepth) {
        at::native::cpublas::brgemm(kRows, kColumns, kDepth, packed.stride, kColumns, kColumns, /*add_C=*/k > 0,
                                    rows + top * packed.stride + k, columns + left * packed.depth + k * kColumns, tile,
                                    grouped);
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
    at::native::cpublas::brgemm_release(grouped);
  });
}

template <typename unit_t, typename key_t>
void add_in_tiles(const at::Tensor& gram, const at::Tensor& keys, const std::vector<int64_t>& chosen, int64_t count) {
  for (int64_t start = 0; start < count; start += kTokens) {
    const auto packed = pack<unit_t, key_t>(keys, chosen, start, std::min(kTokens, count - start));
    if (gram.scalar_type() == at::kDouble) {
      add_tiles<unit_t, double>(gram, packed);
    } else {
      add_tiles<unit_t, float>(gram, packed);
    }
  }
}

bool tiles_run() {
  static const bool runs = [] {
    try {
      float a[16 * 16] = {}, b[16 * 16] = {}, c[16 * 16];
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a, b, c, false);
      return true;
    } catch (const c10::Error&) {  // this processor has no such kernel
      return false;
    }
  }();
  return runs && at::globalContext().userEnabledMkldnn();
}

void second_moment_(const at::Tensor& gram, const at::Tensor& keys, const std::optional<at::Tensor>& mask) {
  TORCH_CHECK(keys.dim() == 2 && gram.dim() == 2 && gram.size(0) == keys.size(1) && gram.size(1) == keys.size(1),
              "expected gram [d, d] and keys [n, d]");
  TORCH_CHECK(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, "gram is float32 or float64");
  TORCH_CHECK(!mask || (mask->dim() == 1 && mask->size(0) == keys.size(0) && mask->scalar_type() == at::kBool),
              "expected a bool mask [n]");
  const auto index = mask ? mask->nonzero().squeeze(1).contiguous() : at::Tensor();
  const int64_t count = mask ? index.size(0) : keys.size(0);
  if (count == 0 || keys.size(1) == 0) return;
  const bool both = keys.scalar_type() == at::kDouble && gram.scalar_type() == at::kDouble;
  if (!both && tiles_run()) {
    std::vector<int64_t> chosen;
    if (mask) chosen.assign(index.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>() + count);
    if (keys.scalar_type() == at::kBFloat16 && at::native::cpublas::could_pack(at::kBFloat16)) {
      add_in_tiles<at::BFloat16, at::BFloat16>(gram, keys, chosen, count);
      return;
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, keys.scalar_type(), "second_moment_",
                                    [&] { add_in_tiles<float, scalar_t>(gram, keys, chosen, count); });
    return;
  }
  // float64, and processors without the tiles' kernels
  for (int64_t start = 0; start < count; start += kTokens) {
    const int64_t size = std::min(kTokens, count - start);
    const auto rows = mask ? keys.index_select(0, index.narrow(0, start, size)) : keys.narrow(0, start, size);
    add_products(gram, rows.to(both ? at::kDouble : at::kFloat), /*leaf=*/256);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(lightedit, CPU, m) { m.impl("second_moment_", second_moment_); }

}  // namespace lightedit
