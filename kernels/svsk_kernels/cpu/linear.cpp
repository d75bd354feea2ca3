// SPDX-License-Identifier: Apache-2.0
// A whole SVSK layer on an x86 CPU: torch.ops.svsk.cpu_linear. build.py compiles this file and the
// paths that it chooses from, cpu_kernel.py prepares the run-time tensors and describes the index.

#include "linear.h"

#include <torch/library.h>

namespace {

Sidecar read_sidecar(const at::Tensor& u, const at::Tensor& v, const at::Tensor& gain,
                     const at::Tensor& index) {
  Sidecar s;
  s.u = reinterpret_cast<const uint16_t*>(u.const_data_ptr<c10::BFloat16>());
  s.v = reinterpret_cast<const uint16_t*>(v.const_data_ptr<c10::BFloat16>());
  s.gain = gain.const_data_ptr<float>();
  const int32_t* words = index.const_data_ptr<int32_t>();
  s.v_blocks = words[0];
  s.width = words[1];
  const int64_t n_blocks = words[2];
  s.v_entries = words + 3;
  s.positions = s.v_entries + 3 * s.v_blocks;
  s.u_starts = s.positions + kLanes * s.v_blocks;
  s.u_entries = s.u_starts + n_blocks + 1;
  return s;
}

// The path of that name; an error where the processor lacks its instructions.
svsk::Linear* path(c10::string_view instructions) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (instructions == "avx2" && avx2) return svsk::linear_avx2;
  if (instructions == "avx512" && avx512) return svsk::linear_avx512;
  if (instructions == "avx512_bf16" && avx512 && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni"))
    return svsk::linear_avx512_bf16;
  TORCH_CHECK(false, "svsk::cpu_linear: the processor lacks ", instructions,
              ", or there is no path of that name");
}

at::Tensor cpu_linear(const at::Tensor& x_any, const at::Tensor& codes, const at::Tensor& scale,
                      const std::optional<at::Tensor>& row_scale,
                      const std::optional<at::Tensor>& bias_any, const std::optional<at::Tensor>& u,
                      const std::optional<at::Tensor>& v, const std::optional<at::Tensor>& gain,
                      const std::optional<at::Tensor>& index, int64_t n, int64_t group_size,
                      int64_t code_bits, bool quad8, c10::string_view instructions, bool int8,
                      bool invariant) {
  TORCH_CHECK(x_any.dim() == 2, "svsk::cpu_linear: x has ", x_any.dim(), " dimensions, expected 2");
  const auto scale_type = (row_scale ? *row_scale : scale).scalar_type();
  TORCH_CHECK(scale_type == x_any.scalar_type(), "svsk::cpu_linear: x is ", x_any.scalar_type(),
              ", the scales are ", scale_type, ": cast x to the layer's dtype");
  const int64_t blocks = (n + kLanes - 1) / kLanes, k = x_any.size(1);
  TORCH_CHECK(codes.numel() * 8 == blocks * kLanes * k * code_bits &&
                  scale.numel() * group_size == blocks * kLanes * k,
              "svsk::cpu_linear: x has ", k, " columns, which does not fit ", codes.numel(),
              " bytes of codes for ", n, " outputs");
  TORCH_CHECK(!row_scale || row_scale->numel() == blocks * kLanes, "svsk::cpu_linear: ",
              row_scale ? row_scale->numel() : 0, " row scales for ", n, " outputs");
  TORCH_CHECK(code_bits == 4 || (code_bits == 8 && !row_scale), "svsk::cpu_linear: codes of ",
              code_bits, " bits", row_scale ? " with row scales" : "");
  svsk::Linear* const linear = path(instructions);
  TORCH_CHECK(!int8 || code_bits == 4, "svsk::cpu_linear: codes of ", code_bits,
              " bits with int8 activations");
  const auto dtype = x_any.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kHalf ||
                  (dtype == at::kFloat && linear != svsk::linear_avx512_bf16),
              "svsk::cpu_linear: x is ", dtype, ", which ", instructions, " does not take");
  const at::Tensor x = x_any.contiguous();
  const std::optional<at::Tensor> bias =
      bias_any ? std::optional<at::Tensor>(bias_any->to(dtype).contiguous()) : std::nullopt;
  const Base base{codes.const_data_ptr<uint8_t>(), scale, row_scale, k, group_size, code_bits,
                  quad8,                           int8,  invariant};
  return linear(x, base, bias, u ? read_sidecar(*u, *v, *gain, *index) : Sidecar(), n);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(svsk, m) {
  m.def(
      "cpu_linear(Tensor x, Tensor codes, Tensor scale, Tensor? row_scale, Tensor? bias, "
      "Tensor? u, Tensor? v, Tensor? gain, Tensor? index, int n, int group_size, int code_bits, "
      "bool quad8, str instructions, bool int8, bool invariant) -> Tensor");
}

TORCH_LIBRARY_IMPL(svsk, CPU, m) { m.impl("cpu_linear", &cpu_linear); }
