// SPDX-License-Identifier: Apache-2.0
// The quantiser's inner loop on a CPU: torch.ops.svsk.round_block. build.py compiles this file.
//
// Columns of a block are rounded one after the other, each error made up for by the later columns
// (GPTQ), or each code moved to its best value (coordinate descent); see
// svsk_offline/quantizers/error_feedback.py, whose loop in PyTorch gives the same up to rounding.
// In PyTorch a column costs a dozen calls, however few rows there are; here a thread takes some rows
// through all columns of the block while they lie in its first-level cache.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

// The same operations in the same order, compiled for wider vectors. build.py forbids the compiler
// to fuse a product with a sum, so that all of them give the same bits.
#if defined(__x86_64__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

namespace {

constexpr int64_t kRows = 64;  // of a task: with 128 columns 32 KiB
// 1.5 * 2^23: added to a small float, it leaves no bits for a fraction; halves go to the even one.
constexpr float kMagic = 12582912.0f;

struct Block {
  int64_t columns, rows;   // B, and rows of this task, at most kRows
  const float* coupling;   // [B, B]
  const float* pivots;     // [B]
  const float* scale;      // column i at i * scale_column
  int64_t scale_column;
  const float* values;     // column i at i * n; null for error feedback
  int64_t n;
  float low, high;
  bool quad8;
  float* levels;           // as values
  float* errors;
};

// work: [B, kRows], each column as it is adjusted so far, or its gradient.
FOR_EACH_PROCESSOR
void round_rows(const Block& block, float* work) {
  for (int64_t i = 0; i < block.columns; ++i) {
    const float pivot = block.pivots[i];
    const float* scale = block.scale + i * block.scale_column;
    const float* values = block.values ? block.values + i * block.n : nullptr;
    float* levels = block.levels + i * block.n;
    float* errors = block.errors + i * block.n;
    float* now = work + i * kRows;
    float error[kRows] = {};
    for (int64_t r = 0; r < block.rows; ++r) {
      // Coordinate descent: a step of Newton's method, exact for a quadratic form.
      const float target = values ? values[r] + now[r] / pivot : now[r];
      const float step = scale[r];
      const float ratio = step == 0 ? 0.0f : target / step;
      float code = ratio;
      if (block.quad8) {
        // The boundary between the levels of q and q + 1 goes to q + 1/2.
        code = std::copysign(std::sqrt(std::abs(ratio) * 8 + 15.75f) - 4.0f, ratio);
      }
      code = code < block.low ? block.low : code;
      code = code > block.high ? block.high : code;
      code = (code + kMagic) - kMagic;
      // NaN stays NaN.
      const float level = block.quad8 ? code * (8 + std::abs(code)) * 0.125f : code;
      const float value = level * step;
      levels[r] = level;
      error[r] = values ? value - values[r] : (target - value) / pivot;
      errors[r] = error[r];
    }
    const float* coupling = block.coupling + i * block.columns;
    for (int64_t j = i + 1; j < block.columns; ++j) {
      const float share = coupling[j];
      float* later = work + j * kRows;
      for (int64_t r = 0; r < kRows; ++r) later[r] -= share * error[r];
    }
  }
}

std::tuple<at::Tensor, at::Tensor> round_block(
    const at::Tensor& work, const at::Tensor& coupling_any, const at::Tensor& pivots_any,
    const at::Tensor& scale_any, const std::optional<at::Tensor>& values_any, double low,
    double high, bool quad8) {
  TORCH_CHECK(work.dim() == 3, "svsk::round_block: work has ", work.dim(),
              " dimensions, expected 3");
  const int64_t count = work.size(0), columns = work.size(1), n = work.size(2);
  TORCH_CHECK(coupling_any.sizes() == at::IntArrayRef({count, columns, columns}) &&
                  pivots_any.sizes() == at::IntArrayRef({count, columns}) &&
                  scale_any.sizes() == work.sizes() &&
                  (!values_any || values_any->sizes() == work.sizes()),
              "svsk::round_block: shapes do not fit work ", work.sizes(), ": coupling ",
              coupling_any.sizes(), ", pivots ", pivots_any.sizes(), ", scale ",
              scale_any.sizes());
  for (const at::Tensor* each : {&work, &coupling_any, &pivots_any, &scale_any}) {
    TORCH_CHECK(each->scalar_type() == at::kFloat, "svsk::round_block: ", each->scalar_type(),
                ", expected float32");
  }
  const at::Tensor coupling = coupling_any.contiguous(), pivots = pivots_any.contiguous();
  const at::Tensor given = work.stride(2) == 1 ? work : work.contiguous();
  const at::Tensor scale = scale_any.stride(2) == 1 ? scale_any : scale_any.contiguous();
  const std::optional<at::Tensor> values =
      values_any ? std::optional<at::Tensor>(values_any->contiguous()) : std::nullopt;
  at::Tensor levels = at::empty({count, columns, n}, work.options());
  at::Tensor errors = at::empty_like(levels);
  const int64_t tasks = (n + kRows - 1) / kRows;
  at::parallel_for(0, count * tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(columns * kRows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t a = task / tasks, first = task % tasks * kRows, at = a * columns * n + first;
      const Block block{columns,
                        std::min(kRows, n - first),
                        coupling.const_data_ptr<float>() + a * columns * columns,
                        pivots.const_data_ptr<float>() + a * columns,
                        scale.const_data_ptr<float>() + a * scale.stride(0) + first,
                        scale.stride(1),
                        values ? values->const_data_ptr<float>() + at : nullptr,
                        n,
                        static_cast<float>(low),
                        static_cast<float>(high),
                        quad8,
                        levels.data_ptr<float>() + at,
                        errors.data_ptr<float>() + at};
      const float* source = given.const_data_ptr<float>() + a * given.stride(0) + first;
      for (int64_t i = 0; i < columns; ++i) {
        for (int64_t r = 0; r < block.rows; ++r) {
          buffer[i * kRows + r] = source[i * given.stride(1) + r];
        }
      }
      round_rows(block, buffer.data());
    }
  });
  return {levels, errors};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svsk, m) {
  m.def(
      "round_block(Tensor work, Tensor coupling, Tensor pivots, Tensor scale, Tensor? values, "
      "float low, float high, bool quad8) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(svsk, CPU, m) { m.impl("round_block", &round_block); }
