// SPDX-License-Identifier: Apache-2.0
// The path of torch.ops.svsk.cpu_linear for processors with AVX512-BF16.
//
// Everything is built on VDPBF16PS: 16 outputs times 2 inputs per instruction, products of bfloat16
// pairs added up in float32. Levels of both codebooks, sidecar factors and bfloat16 activations are
// exact bfloat16 numbers; a float16 activation is the sum of two of them ("terms"), so that float16
// costs twice the products and loses nothing.

#include "int8_rows.h"
#include "linear.h"

#include <immintrin.h>

#include <cstring>

namespace {

// Rows of activations that are multiplied together: their accumulators and results, and a weight,
// fit the 32 vector registers.
constexpr int kTileRows = 12;

using Vec = __m512;
using bits16 = uint16_t;

__m512bh as_pairs(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// The two inputs x[0], x[1] in every lane.
__m512bh broadcast_pair(const bits16* x) {
  int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return as_pairs(_mm512_set1_epi32(pair));
}

// Levels as bfloat16, twice over: the table's index has five bits.
__m512i level_table(bool quad8) {
  alignas(64) bits16 table[32];
  for (int64_t i = 0; i < 32; ++i) table[i] = c10::BFloat16(level(i & 15, quad8)).x;
  return _mm512_load_si512(table);
}

// 16 bytes, each with two nibbles of one output, to 32 bfloat16 levels: the low nibble's in the
// even lane.
__m512bh decode(const uint8_t* codes, __m512i table) {
  const __m512i wide =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return as_pairs(
      _mm512_permutexvar_epi16(_mm512_or_si512(wide, _mm512_slli_epi32(wide, 12)), table));
}

// 32 bytes, codes of 8 bits of 16 outputs and two inputs, to 32 bfloat16 levels: those of the first
// input in the even lanes. Such a level has 8 significant bits, so that the upper half of the float
// is all of it.
__m512bh decode_bytes(const uint8_t* codes) {
  const auto level = [](const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
  };
  return as_pairs(
      _mm512_or_si512(_mm512_srli_epi32(level(codes), 16), level(codes + kLanes)));
}

Vec load16(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
}

// Activations (or z) in tiles of the rows that are multiplied together, see by_rows: a tile's pairs
// follow each other, first those of one column pair, of all rows and terms. Rows in their own order
// would lie 4096 bytes apart for many K and push each other out of the cache.
struct Tiles {
  const bits16* data;
  int64_t columns;
};

// Element of a tile of M rows with T terms each, counted from the tile's start at (first row * T *
// columns).
template <int M, int T>
int64_t place(int64_t column, int m, int t) {
  return ((column / 2 * M + m) * T + t) * 2 + column % 2;
}

// Accumulator of M rows with C chains each; several chains hide the latency when there are few
// rows.
template <int M, int C>
struct Sums {
  Vec part[M][C];
  void clear() {
    for (auto& row : part)
      for (auto& v : row) v = _mm512_setzero_ps();
  }
  Vec total(int m) const {
    Vec sum = part[m][0];
    for (int c = 1; c < C; ++c) sum = _mm512_add_ps(sum, part[m][c]);
    return sum;
  }
};

// acc[m] += sum over the pairs [0, pairs) of weights(p) * x[m0 + m][column + 2p, column + 2p + 1].
// column is even, pairs a multiple of C.
template <int M, int C, int T, typename Weights>
void multiply(Sums<M, C>& acc, const Tiles& x, int64_t m0, int64_t column, int64_t pairs,
              const Weights& weights) {
  const bits16* tile = x.data + m0 * T * x.columns + place<M, T>(column, 0, 0);
  for (int64_t p = 0; p < pairs; p += C) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m512bh w = weights(p + c);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t)
          acc.part[m][c] = _mm512_dpbf16_ps(acc.part[m][c], w,
                                            broadcast_pair(tile + place<M, T>(2 * (p + c), m, t)));
      }
    }
  }
}

// Chains of M rows: at least four sums are under way, since an instruction can start each cycle but
// takes several.
template <int M>
constexpr int chains() {
  return M >= 4 ? 1 : 4 / M;
}

// A number as T bfloat16 terms in a tile of M rows.
template <int M, int T>
void store_terms(bits16* tile, int64_t column, int m, float value) {
  for (int t = 0; t < T; ++t) {
    const c10::BFloat16 term(value);
    tile[place<M, T>(column, m, t)] = term.x;
    value -= static_cast<float>(term);
  }
}

// One V panel: z = gain * (V x) of the rows [m_begin, m_end), as bfloat16 terms at the places where
// U panels want it.
template <int T>
void project_panel(const Sidecar& s, const Tiles& x, int64_t block, int64_t m_begin, int64_t m_end,
                   bits16* z) {
  const int32_t* entry = s.v_entries + 3 * block;
  const bits16* panel = s.v + int64_t{entry[0]} * 2 * kLanes;
  const int32_t* positions = s.positions + kLanes * block;
  const Vec gain = _mm512_loadu_ps(s.gain + kLanes * block);
  const auto weights = [&](int64_t p) {
    return as_pairs(_mm512_loadu_si512(panel + 2 * kLanes * p));
  };
  by_rows<kTileRows>(m_begin, m_end, [&](auto rows, int64_t m0) {
    constexpr int M = decltype(rows)::value, C = chains<M>();
    Sums<M, C> acc;
    acc.clear();
    // V x: whole turns of C chains, and the pairs that are left
    const int64_t even = entry[2] / C * C;
    multiply<M, C, T>(acc, x, m0, entry[1], even, weights);
    Sums<M, 1> rest;
    rest.clear();
    multiply<M, 1, T>(rest, x, m0, entry[1] + 2 * even, entry[2] - even,
                      [&](int64_t p) { return weights(p + even); });
    // times gain, to the places in z that the index says; -1 is padding
    for (int m = 0; m < M; ++m) {
      alignas(64) float sums[kLanes];
      _mm512_store_ps(sums, _mm512_mul_ps(_mm512_add_ps(acc.total(m), rest.total(m)), gain));
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (positions[lane] < 0) continue;
        store_terms<M, T>(z + m0 * T * s.width, positions[lane], m, sums[lane]);
      }
    }
  });
}

template <typename X>
void store(X* y, Vec sum, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (std::is_same_v<X, c10::BFloat16>) {
    _mm256_mask_storeu_epi16(y, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  } else {
    _mm256_mask_storeu_epi16(y, mask,
                             _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

template <typename X>
Vec load_some(const X* p, int64_t count) {
  X padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(X));
  return load16(padded);
}

// What is the same for every block of outputs.
template <typename X>
struct Job {
  const Base& base;
  const Sidecar& sidecar;
  Tiles x, z;
  const X* bias;
  X* y;
  int64_t m, n;
  __m512i table;
  Int8Rows rounded;  // where activations are int8
};

// One block: y = base + bias + U z for the rows [m_begin, m_end). Scales of groups are of the type
// S: X, or int8 with a scale per output; codes have Bits bits.
template <typename X, int T, typename S, int Bits, bool Int8 = false>
void compute_block(const Job<X>& job, int64_t block, int64_t m_begin, int64_t m_end) {
  const Base& base = job.base;
  const Sidecar& s = job.sidecar;
  const int64_t n0 = block * kLanes, count = std::min(kLanes, job.n - n0),
                groups = base.k / base.group;
  constexpr int64_t kPairBytes = kLanes * Bits / 4;
  const uint8_t* codes = base.codes + block * base.k / 2 * kPairBytes;
  const S* scale = base.scale.const_data_ptr<S>() + block * groups * kLanes;
  const Vec start = job.bias ? load_some(job.bias + n0, count) : _mm512_setzero_ps();
  constexpr bool kRowScaled = !std::is_same_v<S, X>;
  Vec row_scale = _mm512_setzero_ps();
  if constexpr (kRowScaled) row_scale = load16(base.row_scale->const_data_ptr<X>() + n0);
  by_rows<kTileRows>(m_begin, m_end, [&](auto rows, int64_t m0) {
    constexpr int M = decltype(rows)::value, C = chains<M>();
    Vec out[M];
    for (int m = 0; m < M; ++m) out[m] = kRowScaled ? _mm512_setzero_ps() : start;
    // the base, group by group: exact products of levels, scaled once per group. A group's pairs
    // are a multiple of 8, so of C
    if constexpr (Int8) {
      multiply_int8<M>(out, job.rounded, base, codes, job.table, m0,
                       [&](int64_t g) { return load16(scale + g * kLanes); });
    } else {
      Sums<M, C> acc;
      for (int64_t g = 0; g < groups; ++g) {
        acc.clear();
        const uint8_t* first = codes + g * base.group / 2 * kPairBytes;
        multiply<M, C, T>(acc, job.x, m0, g * base.group, base.group / 2, [&](int64_t p) {
          if constexpr (Bits == 8)
            return decode_bytes(first + p * kPairBytes);
          else
            return decode(first + p * kPairBytes, job.table);
        });
        const Vec factor = load16(scale + g * kLanes);
        for (int m = 0; m < M; ++m) out[m] = _mm512_fmadd_ps(acc.total(m), factor, out[m]);
      }
    }
    if constexpr (kRowScaled)
      for (int m = 0; m < M; ++m) out[m] = _mm512_fmadd_ps(out[m], row_scale, start);
    // the sidecar: U z for each slot that this block meets
    for (int32_t e = s.u ? s.u_starts[block] : 0, last = s.u ? s.u_starts[block + 1] : 0; e < last;
         ++e) {
      const int32_t* entry = s.u_entries + 3 * e;
      const bits16* panel = s.u + int64_t{entry[0]} * 2 * kLanes;
      Sums<M, 1> add;
      add.clear();
      multiply<M, 1, T>(add, job.z, m0, entry[1], entry[2], [&](int64_t p) {
        return as_pairs(_mm512_loadu_si512(panel + 2 * kLanes * p));
      });
      for (int m = 0; m < M; ++m) out[m] = _mm512_add_ps(out[m], add.total(m));
    }
    // to memory, rounded once; outputs beyond N are masked
    for (int m = 0; m < M; ++m) store(job.y + (m0 + m) * job.n + n0, out[m], count);
  });
}

// 16 activations as terms.
void split_terms(const c10::BFloat16* x, uint32_t (&terms)[1][kLanes / 2]) {
  std::memcpy(terms, x, sizeof terms);
}

void split_terms(const c10::Half* x, uint32_t (&terms)[2][kLanes / 2]) {
  Vec rest = load16(x);
  for (auto& term : terms) {
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(term), rounded);
    rest = _mm512_sub_ps(
        rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
  }
}

// x [m, k] as tiles.
template <typename X, int T>
at::Tensor make_tiles(const at::Tensor& x, int64_t chunk) {
  if (T == 1 && x.size(0) == 1) return x;  // one row is a tile as it is
  const int64_t rows = x.size(0), k = x.size(1);
  at::Tensor tiles = at::empty({rows * T, k}, x.options().dtype(at::kBFloat16));
  const X* from = x.const_data_ptr<X>();
  auto* to = reinterpret_cast<bits16*>(tiles.mutable_data_ptr());
  by_tasks(rows, chunk, 1, k * kLanes, [&](int64_t, int64_t begin, int64_t end) {
    by_rows<kTileRows>(begin, end, [&](auto tile, int64_t m0) {
      constexpr int M = decltype(tile)::value;
      for (int64_t column = 0; column < k; column += kLanes)
        for (int m = 0; m < M; ++m) {
          uint32_t pairs[T][kLanes / 2];
          split_terms(from + (m0 + m) * k + column, pairs);
          for (int64_t p = 0; p < kLanes / 2; ++p)
            for (int t = 0; t < T; ++t)
              std::memcpy(to + m0 * T * k + place<M, T>(column + 2 * p, m, t), &pairs[t][p],
                          sizeof(uint32_t));
        }
    });
  });
  return tiles;
}

template <typename X, int T>
at::Tensor run(const at::Tensor& x, const Base& base, const X* bias, const Sidecar& s, int64_t n) {
  const int64_t m = x.size(0);
  at::Tensor y = at::empty({m, n}, x.options());
  if (m == 0) return y;
  // whole tiles of rows that fit the second-level cache together
  const int64_t row_bytes = base.k * T * static_cast<int64_t>(sizeof(bits16)),
                work = kLanes * base.k * T;
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / row_bytes / kTileRows) * kTileRows;
  // the base takes them too, where activations are not int8
  const at::Tensor tiles = base.int8 && !s.u ? x : make_tiles<X, T>(x, chunk);
  const auto* tile_data = reinterpret_cast<const bits16*>(tiles.const_data_ptr());
  Job<X> job{base, s, Tiles{tile_data, base.k}, Tiles{nullptr, s.width}, bias,
             y.mutable_data_ptr<X>(), m, n,
             base.int8 ? unsigned_levels(base.quad8) : level_table(base.quad8),
             base.int8 ? round_rows<X, kTileRows>(x, base, chunk) : Int8Rows()};
  at::Tensor z;
  if (s.u) {
    // first all of z: every block of outputs may need any of it. Zeros, since pairs may be padded
    z = at::zeros({m * T, s.width}, x.options().dtype(at::kBFloat16));
    auto* z_data = reinterpret_cast<bits16*>(z.mutable_data_ptr());
    job.z.data = z_data;
    by_tasks(m, chunk, s.v_blocks, work, [&](int64_t block, int64_t begin, int64_t end) {
      project_panel<T>(s, job.x, block, begin, end, z_data);
    });
  }
  by_tasks(m, chunk, (n + kLanes - 1) / kLanes, work,
           [&](int64_t block, int64_t begin, int64_t end) {
             if (base.int8 && base.row_scale)
               compute_block<X, T, int8_t, 4, true>(job, block, begin, end);
             else if (base.int8)
               compute_block<X, T, X, 4, true>(job, block, begin, end);
             else if (base.bits == 8)
               compute_block<X, T, X, 8>(job, block, begin, end);
             else if (base.row_scale)
               compute_block<X, T, int8_t, 4>(job, block, begin, end);
             else
               compute_block<X, T, X, 4>(job, block, begin, end);
           });
  return y;
}

}  // namespace

at::Tensor svsk::linear_avx512_bf16(const at::Tensor& x, const Base& base,
                                    const std::optional<at::Tensor>& bias, const Sidecar& sidecar,
                                    int64_t n) {
  return in_large_tiles<kTileRows>(x, base.invariant, [&](const at::Tensor& rows) {
    if (x.scalar_type() == at::kBFloat16)
      return run<c10::BFloat16, 1>(
          rows, base, bias ? bias->const_data_ptr<c10::BFloat16>() : nullptr, sidecar, n);
    return run<c10::Half, 2>(rows, base, bias ? bias->const_data_ptr<c10::Half>() : nullptr,
                             sidecar, n);
  });
}
