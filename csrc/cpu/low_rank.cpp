// add_low_rank_ and rowwise_low_rank on the CPU: float32 copies are made of a part at a time, never of a whole operand.
#include <algorithm>
#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

namespace lightedit {
namespace {

constexpr int64_t kElements = 1 << 18;  // of the sums of one part: they are rounded while they are in the cache

void add_low_rank_(const at::Tensor& weight, const at::Tensor& left, const at::Tensor& right,
                   const std::optional<at::Tensor>& total) {
  const auto dtype = c10::promoteTypes(weight.scalar_type(), at::kFloat);
  // contiguous, because a BLAS may sum in another order for factors of another memory layout
  const auto l = left.to(dtype).contiguous();
  const auto r = right.to(dtype).contiguous().t();
  if (weight.scalar_type() == dtype) {
    weight.addmm_(l, r);
    return;
  }
  const int64_t rows = weight.size(0), part = std::max<int64_t>(64, kElements / std::max<int64_t>(1, weight.size(1)));
  for (int64_t start = 0; start < rows; start += part) {
    const int64_t size = std::min(part, rows - start);
    const auto target = weight.narrow(0, start, size);
    const auto sums = total ? total->narrow(0, start, size) : target.to(dtype);
    sums.addmm_(l.narrow(0, start, size), r);
    target.copy_(sums);
  }
}

at::Tensor rowwise_low_rank(const at::Tensor& x, const at::Tensor& left, const at::Tensor& right) {
  const auto dtype = c10::promoteTypes(x.scalar_type(), at::kFloat);
  if (x.scalar_type() == dtype && left.scalar_type() == dtype && right.scalar_type() == dtype) {
    return at::bmm(at::bmm(x, right), left.mT()).contiguous();
  }
  auto out = at::empty({x.size(0), x.size(1), left.size(1)}, x.options());
  for (int64_t b = 0; b < x.size(0); ++b) {
    const auto inner = at::mm(x.select(0, b).to(dtype), right.select(0, b).to(dtype));
    out.select(0, b).copy_(at::mm(inner, left.select(0, b).to(dtype).t()));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(lightedit, CPU, m) {
  m.impl("add_low_rank_", add_low_rank_);
  m.impl("rowwise_low_rank", rowwise_low_rank);
}

}  // namespace lightedit
