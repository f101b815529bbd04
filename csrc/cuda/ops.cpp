// The ops on CUDA devices: what the kernels take is laid out for them here, and what they leave to the vendor's libraries
// is called here.
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/matmul.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "../triangle.h"
#include "kernels.h"

namespace lightedit {
namespace {

void check(cudaError_t error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, op, " could not run on this GPU: ", cudaGetErrorString(error),
              "; work within lightedit.ops.use('reference')");
}

void second_moment_(const at::Tensor& gram, const at::Tensor& keys, const std::optional<at::Tensor>& mask) {
  check_second_moment(gram, keys, mask);
  const int64_t n = keys.size(0), d = keys.size(1);
  if (n == 0 || d == 0) return;
  const c10::cuda::CUDAGuard guard(keys.device());
  const bool bfloat16 = keys.scalar_type() == at::kBFloat16;
  if (!bfloat16 && keys.scalar_type() != at::kHalf) {
    const bool both = keys.scalar_type() == at::kDouble && gram.scalar_type() == at::kDouble;
    const auto wide = keys.to(both ? at::kDouble : at::kFloat);
    // Not multiplied by the mask, for a key that does not count may be NaN; and not selected, for its size would have
    // to be waited for
    const at::NoTF32Guard whole;  // products of float32 stay such, whatever precision the model's may have
    add_products(gram, mask ? wide.masked_fill(mask->logical_not().unsqueeze(1), 0) : wide, /*leaf=*/512);
    return;
  }
  auto rows = keys;
  if (d % 8) rows = at::constant_pad_nd(keys, {0, 8 - d % 8});
  if (rows.stride(1) != 1 || rows.stride(0) % 8 || reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16) {
    rows = rows.clone(at::MemoryFormat::Contiguous);
  }
  const auto chosen = mask ? mask->contiguous() : at::Tensor();
  check(second_moment(gram.data_ptr(), gram.scalar_type() == at::kDouble, gram.stride(0), gram.stride(1),
                      rows.const_data_ptr(), bfloat16 ? Half::kBFloat16 : Half::kFloat16, rows.stride(0), rows.size(1),
                      mask ? chosen.const_data_ptr<bool>() : nullptr, n, d, c10::cuda::getCurrentCUDAStream()),
        "second_moment_");
}

void add_low_rank_(const at::Tensor& weight, const at::Tensor& left, const at::Tensor& right,
                   const std::optional<at::Tensor>& total) {
  TORCH_CHECK(weight.dim() == 2 && left.dim() == 2 && right.dim() == 2 && left.size(0) == weight.size(0) &&
                  right.size(0) == weight.size(1) && left.size(1) == right.size(1),
              "expected weight [d_out, d_in], left [d_out, B] and right [d_in, B]");
  TORCH_CHECK(!total || (total->sizes() == weight.sizes() && total->scalar_type() == at::kFloat),
              "expected a float32 total [d_out, d_in]");
  const c10::cuda::CUDAGuard guard(weight.device());
  if (weight.scalar_type() == at::kDouble) {
    // contiguous, because a BLAS may sum in another order for factors of another memory layout
    weight.addmm_(left.to(at::kDouble).contiguous(), right.to(at::kDouble).contiguous().t());
    return;
  }
  const auto type = weight.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "no weight of ", type, " on CUDA");
  // A weight that is stored transposed is written along its memory too
  const bool transposed = weight.stride(0) == 1 && weight.stride(1) != 1;
  const auto into = transposed ? weight.t() : weight;
  const auto kept = !total ? at::Tensor() : transposed ? total->t() : *total;
  const auto rows = (transposed ? right : left).to(at::kFloat).contiguous();
  const auto columns = (transposed ? left : right).to(at::kFloat).contiguous();
  check(add_low_rank(into.data_ptr(),
                     type == at::kFloat  ? Real::kFloat32
                     : type == at::kHalf ? Real::kFloat16
                                         : Real::kBFloat16,
                     into.stride(0), into.stride(1), rows.const_data_ptr<float>(), columns.const_data_ptr<float>(),
                     total ? kept.data_ptr<float>() : nullptr, total ? kept.stride(0) : 0, total ? kept.stride(1) : 0,
                     into.size(0), into.size(1), rows.size(1), c10::cuda::getCurrentCUDAStream()),
        "add_low_rank_");
}

std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor& keys, const at::Tensor& solved, double gamma) {
  TORCH_CHECK(keys.dim() >= 2 && keys.sizes() == solved.sizes() && keys.scalar_type() == solved.scalar_type(),
              "expected keys and solved [..., d, B] of one dtype");
  TORCH_CHECK(keys.scalar_type() == at::kFloat || keys.scalar_type() == at::kDouble, "float32 or float64 is expected");
  const c10::cuda::CUDAGuard guard(keys.device());
  const at::NoTF32Guard whole;  // as in second_moment_
  const int64_t d = keys.size(-2), size = keys.size(-1);
  auto shape = keys.sizes().vec();
  shape.erase(shape.end() - 2);
  at::Tensor right, pivots, bad;
  if (size <= kLargestSystem) {
    pivots = at::empty(shape, keys.options());
    shape.push_back(size);
    auto inverse = at::empty(shape, keys.options());
    if (const int64_t systems = size ? pivots.numel() / size : 0) {
      const auto k = keys.contiguous(), x = solved.contiguous();
      auto space = at::empty({systems, factor_parts(systems, d), size, size}, keys.options().dtype(at::kDouble));
      check(factor(k.const_data_ptr(), x.const_data_ptr(), keys.scalar_type() == at::kDouble, gamma,
                   inverse.data_ptr(), pivots.data_ptr(), space.data_ptr<double>(), systems, d, size,
                   c10::cuda::getCurrentCUDAStream()),
            "preservation_memorization_solve");
    }
    right = at::matmul(at::matmul(solved, inverse.mT()), inverse);
    bad = pivots.eq(0).any(-1);
  } else {  // larger systems are work for the vendor's libraries
    auto system = at::matmul(keys.mT(), solved);
    system.diagonal(0, -2, -1).add_(gamma);
    const auto [factor, info] = at::linalg_cholesky_ex(system);
    pivots = factor.diagonal(0, -2, -1).square().div_(system.diagonal(0, -2, -1));
    const auto half = at::linalg_solve_triangular(factor.mT(), solved, /*upper=*/true, /*left=*/false);
    right = at::linalg_solve_triangular(factor, half, /*upper=*/false, /*left=*/false);
    bad = info.ne(0).logical_or_(pivots.isfinite().all(-1).logical_not_());
  }
  bad = bad.logical_or(right.isfinite().flatten(-2).all(-1).logical_not_());
  right.masked_fill_(bad.unsqueeze(-1).unsqueeze(-1), std::numeric_limits<double>::quiet_NaN());
  pivots.masked_fill_(bad.unsqueeze(-1), 0);
  return {right.contiguous(), pivots};
}

}  // namespace

TORCH_LIBRARY_IMPL(lightedit, CUDA, m) {
  m.impl("second_moment_", second_moment_);
  m.impl("add_low_rank_", add_low_rank_);
  m.impl("preservation_memorization_solve", solve);
}

}  // namespace lightedit
