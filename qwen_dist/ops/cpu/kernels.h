// What the builds of the kernels have in common: their arguments, and a table of them for each build.
//
// The kernels are written once, over the vectors of simd.h, and compiled once for each set of instructions. handlers.cc
// checks the arguments that XLA passes and calls the build that its attribute names. See ../native.py.

#pragma once

#include <cstdint>
#include <functional>

enum class Float { kFloat32, kBFloat16 };
enum class ScaleType { kFloat32, kBFloat16, kFloat16 };
enum class Encoding { kInt8, kInt4 };

// XLA's thread pool.
struct Pool {
  void* pool;
  int64_t num_threads;
  void (*schedule)(void* pool, std::function<void()> task);
};

// A matrix in XLA's scratch memory, with rows `stride` elements apart; none if data is null.
struct Scratch {
  void* data;
  int64_t stride;
};

struct GroupedMatmulArguments {  // see grouped_matmul.h
  Float dtype, result;
  int64_t num_rows, num_groups, num_features, num_inputs;  // R, E, O, C
  const void *x, *weights;
  const int32_t* sizes;
  void* y;
  Scratch rows;
};

struct QuantizedMatmulArguments {  // see quantized_matmul.h
  Float dtype, result;
  Encoding encoding;
  ScaleType scale;
  int64_t num_rows, num_groups, num_features, num_inputs, group_size;  // R, E, O, C
  const void *x, *values, *scales;
  const int8_t* zero_points;  // null for none
  const int32_t* sizes;
  void* y;
  Scratch rows;
};

struct ExpertsArguments {  // see experts.h
  Float dtype;
  int64_t num_tokens, top_k, num_experts, embed, mlp;  // T, K, E, D, F
  const void *x, *gate_up, *down;
  const int32_t* chosen;
  const float* scores;
  void *mixed, *outputs;
  Scratch hidden, rows, hidden_rows;
};

struct SwiGluArguments {  // see elementwise.h
  Float dtype;
  int64_t count;
  const void *gate, *up;
  void* hidden;
};

struct RotateArguments {  // see elementwise.h
  Float dtype;
  int64_t num_tokens, num_heads, head_dim;
  const void* x;
  const float *cos, *sin;
  void* y;
};

struct ShortConvolutionArguments {  // see elementwise.h
  Float dtype;
  int64_t num_rows, num_tokens, num_taps, num_channels;
  const void *x, *before, *weight;
  void* y;
};

struct PagedAttentionArguments {  // see attention.h
  Float dtype;
  int64_t num_rows, num_tokens, num_key_heads, group_size, head_dim, num_pages, num_entries;
  const void *q, *keys, *values;
  const uint16_t *key_scales, *value_scales;  // of pages in int8: bits of bfloat16, one for kScaled values; else null
  const int32_t *positions, *rows, *pages, *starts;
  float scale;
  int64_t window;  // 0 for none
  void* out;
};

struct DeltaRuleArguments {  // see delta_rule.h
  Float dtype;
  int64_t num_rows, num_tokens, key_heads, group_size, key_dim, value_dim, num_slots;  // B, T, G, R, K, V, M
  const void *q, *k, *v;
  const float *gates, *betas;
  const int32_t *slots, *written_slots;  // of the state before and after each row; out of range: none
  const bool *is_start, *continues;
  float *outputs, *states, *prepared;
};

struct Kernels {
  // Whether rows of 16-bit floats are widened to float32, or packed into tiles, to be multiplied: they are then in Scratch,
  // see PrepareRows.
  bool widens, packs;
  void (*grouped_matmul)(const Pool&, const GroupedMatmulArguments&);
  void (*quantized_matmul)(const Pool&, const QuantizedMatmulArguments&);
  void (*experts)(const Pool&, const ExpertsArguments&);
  void (*swiglu)(const Pool&, const SwiGluArguments&);
  void (*rotate)(const Pool&, const RotateArguments&);
  void (*short_convolution)(const Pool&, const ShortConvolutionArguments&);
  void (*paged_attention)(const Pool&, const PagedAttentionArguments&);
  void (*delta_rule)(const Pool&, const DeltaRuleArguments&);
};

#if defined(__x86_64__) && defined(__GNUC__)
extern const Kernels kAvx512Bf16, kAvx512, kAvx2;
// Compilers know AMX since GCC 11 and Clang 12.
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX_COMPILER
extern const Kernels kAmxBf16;
#endif
#elif defined(__aarch64__) && defined(__GNUC__)
extern const Kernels kNeon;
#endif

bool IsIntel();  // whether the processor is one of Intel's: see processor.cc

// The least out-features of a matmul.
constexpr int kTileFeatures = 4;
constexpr int kRun = 32;  // inputs of a run of a quantised weight
constexpr int kMaxTaps = 8;    // of the short convolution
constexpr int kPageSize = 64;  // positions of a page of keys and values
constexpr int kHeadMultiple = 16;  // the head_dim of attention is a multiple of it
constexpr int kScaled = 16;  // keys and values in int8 with one scale
// The most bfloat16 rows, on average over the groups, for which a quantised product scales sums. Where rows are packed, the
// product of dequantised elements is the faster one for more.
constexpr int64_t FewRows(bool packs) { return packs ? 3 : 8; }
// Rows of a quantised product in bfloat16 have this many bytes of scratch memory for each 128 inputs.
constexpr int kStepInputs = 128, kStepInputsBytes = 512;
// Rows of a widened or packed matrix are padded with zeros to a multiple of this many elements.
constexpr int kWideMultiple = 32;
// Whether the packed form of these rows of a group is the rows themselves.
constexpr bool IsPackedForm(int64_t num_rows, int64_t num_inputs) { return num_rows == 1 && num_inputs % kWideMultiple == 0; }
// Numbers per key of `prepared` of the delta rule, for keys of `size` channels.
constexpr int64_t PreparedStride(int64_t size) { return 2 * size + 2; }
