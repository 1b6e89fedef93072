// Rows of each group times that group's weight, for processors with AVX512-BF16: see ../native.py.
//
// A weight lies as the checkpoint stores it, out-features first, so the sum over the inputs runs along memory for both
// operands: six rows and four features at a time, in 24 registers, which are summed up at the end. Each number is therefore
// summed in the same order whatever else is computed beside it. Weights are read once, in blocks that stay in the core's own
// cache while all rows are multiplied with them; the next block is fetched in the meantime, which hides the memory.

#if defined(__x86_64__) && defined(__GNUC__)

#include <cstring>
#include <vector>

#include "simd.h"

namespace {

constexpr int kRows = 6, kFeatures = 4;  // of a tile; 24 sums, 4 weights and a row are 29 of 32 registers
constexpr int64_t kBlockBytes = 64 << 10;
constexpr int kMaxBlock = 32;  // features
constexpr int64_t kJobs = 8;   // for each thread, so that one which falls behind has less to do
constexpr int64_t kPartsOfGroup = 4;  // at least: groups may have very different numbers of rows
constexpr int kLine = 64;      // bytes

// The sums of four vectors' elements.
AVX512 INLINE __m128 Sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                    _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

AVX512 INLINE void Store(__m128 sums, float* to) { _mm_storeu_ps(to, sums); }
AVX512 INLINE void Store(__m128 sums, uint16_t* to) {
  const __m128bh rounded = _mm_cvtneps_pbh(sums);
  std::memcpy(to, &rounded, kFeatures * sizeof(*to));
}

// Adds `number` products to each sum, or as many as a vector has.
template <class Type, int rows, class... Number>
AVX512 INLINE void Step(const typename Type::Element* x, const typename Type::Element* weight, int64_t inputs,
                        __m512 (&sums)[rows][kFeatures], Number... number) {
  typename Type::Vector w[kFeatures];
  UNROLL for (int f = 0; f < kFeatures; ++f) w[f] = Type::Load(weight + f * inputs, number...);
  UNROLL for (int r = 0; r < rows; ++r) {
    const auto row = Type::Load(x + r * inputs, number...);
    UNROLL for (int f = 0; f < kFeatures; ++f) sums[r][f] = Type::Add(sums[r][f], row, w[f]);
  }
}

// y[r][f] = sum over the inputs of x[r] * weight[f]; for each vector of inputs it fetches `lines` of memory from `ahead` on.
template <class Type, class Result, int rows>
AVX512 void Tile(const typename Type::Element* x, const typename Type::Element* weight, int64_t inputs, Result* y,
                 int64_t outputs, const char* ahead, int lines) {
  __m512 sums[rows][kFeatures];
  UNROLL for (int r = 0; r < rows; ++r) UNROLL for (int f = 0; f < kFeatures; ++f) sums[r][f] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + Type::kLanes <= inputs; i += Type::kLanes) {
    for (int line = 0; line < lines; ++line, ahead += kLine) _mm_prefetch(ahead, _MM_HINT_T1);
    Step<Type, rows>(x + i, weight + i, inputs, sums);
  }
  if (i < inputs) Step<Type, rows>(x + i, weight + i, inputs, sums, static_cast<int>(inputs - i));
  UNROLL for (int r = 0; r < rows; ++r) Store(Sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3]), y + r * outputs);
}

template <class Type, class Result>
constexpr decltype(&Tile<Type, Result, 1>) kTiles[] = {Tile<Type, Result, 1>, Tile<Type, Result, 2>,
                                                       Tile<Type, Result, 3>, Tile<Type, Result, 4>,
                                                       Tile<Type, Result, 5>, Tile<Type, Result, 6>};

// All rows of a group times the features [first, last) of its weight, while what follows these is fetched if it is wanted.
template <class Type, class Result>
void Block(const typename Type::Element* x, int64_t rows, const typename Type::Element* weight, int64_t inputs, Result* y,
           int64_t outputs, int64_t first, int64_t last, bool fetch_next) {
  const int64_t num_tiles = (rows + kRows - 1) / kRows;
  const int lines = fetch_next ? static_cast<int>((kFeatures + num_tiles - 1) / num_tiles) : 0;
  const int64_t tile_bytes = lines * (inputs / Type::kLanes) * kLine;
  const char* ahead = reinterpret_cast<const char*>(weight + last * inputs);
  const char* const end = ahead + (last - first) * inputs * sizeof(*weight);
  for (int64_t tile = num_tiles; tile > 0; --tile) {
    const int64_t number = (rows + tile - 1) / tile;
    for (int64_t f = first; f < last; f += kFeatures) {
      const int64_t feature = std::min(f, outputs - kFeatures);  // the last tile may do some features again
      kTiles<Type, Result>[number - 1](x, weight + feature * inputs, inputs, y + feature, outputs, ahead,
                                       ahead < end ? lines : 0);
      ahead += tile_bytes;
    }
    x += number * inputs;
    y += number * outputs;
    rows -= number;
  }
}

template <class Type, class Result>
void Multiply(ffi::ThreadPool& pool, const typename Type::Element* x, int64_t num_rows,
              const typename Type::Element* weights, ffi::AnyBuffer::Dimensions shape, const int32_t* sizes, Result* y) {
  const int64_t outputs = shape[1], inputs = shape[2];
  struct Group {
    int64_t index, first, rows;
  };
  std::vector<Group> groups;
  for (int64_t index = 0, first = 0; index < shape[0] && first < num_rows; first += sizes[index++]) {
    const int64_t rows = std::min<int64_t>(sizes[index], num_rows - first);
    if (rows > 0) groups.push_back({index, first, rows});
  }
  if (groups.empty()) return;
  const int64_t feature_bytes = kFeatures * inputs * sizeof(*weights);
  const int64_t block = std::clamp<int64_t>(kBlockBytes / feature_bytes * kFeatures, kFeatures, kMaxBlock);
  const int64_t num_blocks = (outputs + block - 1) / block, num_groups = groups.size();
  const int64_t wanted = std::max(kPartsOfGroup, (pool.num_threads() * kJobs + num_groups - 1) / num_groups);
  const int64_t part = (num_blocks + wanted - 1) / wanted * block;  // features of a job
  const int64_t num_parts = (outputs + part - 1) / part;
  ForEach(pool, num_groups * num_parts, [=, &groups](int64_t job) {
    const Group group = groups[job / num_parts];
    const int64_t begin = job % num_parts * part, end = std::min(outputs, begin + part);
    for (int64_t first = begin; first < end; first += block) {
      const int64_t last = std::min(end, first + block);
      Block<Type, Result>(x + group.first * inputs, group.rows, weights + group.index * outputs * inputs, inputs,
                          y + group.first * outputs, outputs, first, last, last < end);
    }
  });
}

ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::Buffer<ffi::S32> sizes,
                   ffi::Result<ffi::AnyBuffer> y) {
  const auto type = x.element_type(), result = y->element_type();
  const auto rows = x.dimensions(), shape = weights.dimensions();
  if (rows.size() != 2 || shape.size() != 3 || rows[1] != shape[2] || shape[1] < kFeatures || weights.element_type() != type ||
      static_cast<int64_t>(sizes.element_count()) != shape[0]) {
    return ffi::Error::InvalidArgument("rows [R, C], weights [E, O, C] of the same type with O >= 4, and sizes [E] are wanted");
  }
  const auto multiply = [&](auto of, auto* to) {
    using Type = decltype(of);
    using Element = typename Type::Element;
    Multiply<Type>(pool, static_cast<const Element*>(x.untyped_data()), rows[0],
                   static_cast<const Element*>(weights.untyped_data()), shape, sizes.typed_data(), to);
    return ffi::Error::Success();
  };
  if (type == ffi::F32 && result == ffi::F32) return multiply(Float32(), static_cast<float*>(y->untyped_data()));
  if (type == ffi::BF16 && result == ffi::F32) return multiply(BFloat16(), static_cast<float*>(y->untyped_data()));
  if (type == ffi::BF16 && result == ffi::BF16) return multiply(BFloat16(), static_cast<uint16_t*>(y->untyped_data()));
  return ffi::Error::InvalidArgument("float32, or bfloat16 to float32 or bfloat16, are wanted");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

extern "C" int IsSupported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

#else

extern "C" int IsSupported() { return 0; }

#endif
