// Each kernel of a build against a plain loop in double, over sizes that are odd, tiny, empty and larger than every block,
// at addresses that are not aligned. Prints what differs. Without XLA, so it also runs in an emulator of another processor.
//
//   kernel_properties BUILD ROUNDS

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../qwen_dist/ops/cpu/kernels.h"

extern "C" int ProcessorBuilds();  // also asks Linux for the registers of AMX

namespace {

int failures = 0;
std::mt19937 generator(0);

void Expect(bool holds, const std::string& what) {
  if (!holds && ++failures <= 20) std::printf("differs: %s\n", what.c_str());
}

std::atomic<int> running{0};
const Pool kPool{nullptr, 3, [](void*, std::function<void()> task) {
                   ++running;
                   std::thread([task = std::move(task)] {
                     task();
                     --running;
                   }).detach();
                 }};

int64_t Random(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }
int64_t OneOf(std::initializer_list<int64_t> values) { return values.begin()[Random(0, values.size() - 1)]; }
double Normal() { return std::normal_distribution<double>()(generator); }

uint16_t ToBits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float FromBits(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// Floats of a type at an address that is a multiple of the element's size only, with others before and after them that
// must not change.
struct Array {
  static constexpr int64_t kGuard = 67;
  Float dtype;
  int64_t size;
  std::vector<unsigned char> bytes;

  Array(Float dtype, int64_t size) : dtype(dtype), size(size), bytes((size + 2 * kGuard) * Width(), 0xa5) {}
  int64_t Width() const { return dtype == Float::kFloat32 ? 4 : 2; }
  void* Data() { return &bytes[kGuard * Width()]; }
  float* Floats() { return reinterpret_cast<float*>(Data()); }
  double operator[](int64_t i) const {
    const unsigned char* from = &bytes[(kGuard + i) * Width()];
    if (dtype == Float::kFloat32) return *reinterpret_cast<const float*>(from);
    return FromBits(*reinterpret_cast<const uint16_t*>(from));
  }
  void Set(int64_t i, double x) {
    unsigned char* to = &bytes[(kGuard + i) * Width()];
    if (dtype == Float::kFloat32) {
      *reinterpret_cast<float*>(to) = static_cast<float>(x);
    } else {
      *reinterpret_cast<uint16_t*>(to) = ToBits(static_cast<float>(x));
    }
  }
  Array& Fill(double scale = 1) {
    for (int64_t i = 0; i < size; ++i) Set(i, scale * Normal());
    return *this;
  }
  void ExpectGuards(const std::string& what) const {
    for (int64_t i = 0; i < kGuard * Width(); ++i) {
      if (bytes[i] != 0xa5 || bytes[bytes.size() - 1 - i] != 0xa5) return Expect(false, what + ": wrote outside");
    }
  }
  // Whether a number is x, give or take `error` and half a unit in the last place of the type.
  bool IsNear(int64_t i, double x, double error) const {
    const double unit = dtype == Float::kFloat32 ? 0x1p-23 : 0x1p-8;
    return std::abs((*this)[i] - x) <= error + unit * std::abs(x);
  }
  bool SameBits(int64_t i, const Array& other, int64_t j, int64_t count) const {
    return std::memcmp(&bytes[(kGuard + i) * Width()], &other.bytes[(kGuard + j) * Width()], count * Width()) == 0;
  }
};

double Rounded(Float dtype, double x) { return dtype == Float::kFloat32 ? x : FromBits(ToBits(static_cast<float>(x))); }
double Silu(double x) { return x / (1 + std::exp(-x)); }
std::string Name(const char* kernel, Float dtype) { return std::string(kernel) + (dtype == Float::kFloat32 ? " float32" : " bfloat16"); }
Float RandomType() { return Random(0, 1) ? Float::kFloat32 : Float::kBFloat16; }

// The scratch that ../native.py gives to a product.
struct Rows {
  std::vector<float> memory;
  Scratch scratch{nullptr, 0};
  Rows(const Kernels& kernels, Float dtype, int64_t rows, int64_t inputs, bool is_quantized = false) {
    const int64_t multiple = is_quantized ? kStepInputs : kWideMultiple;
    const int64_t of_multiple = is_quantized ? kStepInputsBytes / (dtype == Float::kFloat32 ? 4 : 2) : multiple;
    scratch.stride = (inputs + multiple - 1) / multiple * of_multiple + 16;
    const bool is_packed = kernels.packs && !IsPackedForm(rows, inputs);
    if (!((kernels.widens || is_packed || is_quantized) && dtype == Float::kBFloat16) && Random(0, 1)) return;
    memory.assign(rows * scratch.stride + 1, std::nanf(""));
    scratch.data = memory.data();
  }
};

void CheckGroupedMatmul(const Kernels& kernels) {
  const Float dtype = RandomType(), result = dtype == Float::kFloat32 ? dtype : RandomType();
  const int64_t groups = Random(1, 3), inputs = OneOf({1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 896, 1025, 2100});
  const int64_t features = OneOf({4, 5, 6, 7, 8, 13, 66, 70});
  std::vector<int32_t> sizes(groups);
  int64_t rows = Random(0, 2);  // of no group
  for (int32_t& size : sizes) rows += size = static_cast<int32_t>(OneOf({0, 1, 2, 3, 4, 6, 7, 11, 12, 47, 50, 100}));
  if (rows * features * inputs > 4000000 || rows == 0) return;
  const std::string name = Name("grouped_matmul", dtype);
  Array x(dtype, rows * inputs), weights(dtype, groups * features * inputs), y(result, rows * features);
  x.Fill(), weights.Fill(1 / std::sqrt(inputs));
  const Rows scratch(kernels, dtype, rows, inputs);
  GroupedMatmulArguments a{dtype,    result,         rows,         groups,   features,       inputs,
                           x.Data(), weights.Data(), sizes.data(), y.Data(), scratch.scratch};
  kernels.grouped_matmul(kPool, a);
  y.ExpectGuards(name);
  for (int64_t group = 0, row = 0; group < groups; row += sizes[group++]) {
    for (int64_t r = row; r < row + sizes[group]; ++r) {
      for (int64_t f = 0; f < features; ++f) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < inputs; ++i) {
          const double product = x[r * inputs + i] * weights[(group * features + f) * inputs + i];
          sum += product, size += std::abs(product);
        }
        Expect(y.IsNear(r * features + f, sum, 1e-6 * size), name + " " + std::to_string(inputs) + " inputs");
      }
    }
    if (sizes[group] == 0) continue;
    const int64_t r = row + Random(0, sizes[group] - 1);
    Array one(dtype, inputs), alone(result, features);
    for (int64_t i = 0; i < inputs; ++i) one.Set(i, x[r * inputs + i]);
    const Rows for_one(kernels, dtype, 1, inputs);
    int32_t size = 1;
    Array weight(dtype, features * inputs);
    for (int64_t i = 0; i < weight.size; ++i) weight.Set(i, weights[group * weight.size + i]);
    kernels.grouped_matmul(kPool, {dtype, result, 1, 1, features, inputs, one.Data(), weight.Data(), &size, alone.Data(),
                                   for_one.scratch});
    Expect(alone.SameBits(0, y, r * features, features), name + ": a row alone");
  }
}

// The number of the bits of a scale, and a random scale's bits.
double ScaleOf(ScaleType type, const void* scales, int64_t i) {
  if (type == ScaleType::kFloat32) return static_cast<const float*>(scales)[i];
  const uint16_t bits = static_cast<const uint16_t*>(scales)[i];
  if (type == ScaleType::kBFloat16) return FromBits(bits);
  return std::ldexp(1024 + (bits & 1023), (bits >> 10) - 25);  // normal and positive
}
// The nearest number of a type of scales; of float16 above its least normal one or a multiple of 2^-24.
double RoundedTo(ScaleType type, double x) {
  if (type == ScaleType::kFloat32) return static_cast<float>(x);
  if (type == ScaleType::kBFloat16) return FromBits(ToBits(static_cast<float>(x)));
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent - 11, -24));
  return std::nearbyint(x / unit) * unit;
}

void CheckQuantizedMatmul(const Kernels& kernels) {
  const Float dtype = RandomType(), result = dtype == Float::kFloat32 ? dtype : RandomType();
  const Encoding encoding = Random(0, 1) ? Encoding::kInt4 : Encoding::kInt8;
  const auto scale_type = static_cast<ScaleType>(Random(0, 2));
  const int64_t experts = Random(1, 3), group_runs = OneOf({1, 2, 3, 4, 8}), groups = OneOf({1, 2, 3, 7});
  const int64_t inputs = groups * group_runs * kRun, features = OneOf({4, 5, 6, 7, 8, 13, 66, 70});
  std::vector<int32_t> sizes(experts);
  int64_t rows = Random(0, 2);  // of no group
  for (int32_t& size : sizes) rows += size = static_cast<int32_t>(OneOf({0, 1, 2, 3, 4, 5, 7, 12, 50}));
  if (rows == 0) return;
  const std::string name = Name(encoding == Encoding::kInt4 ? "quantized_matmul int4" : "quantized_matmul int8", dtype);
  const int half = encoding == Encoding::kInt4 ? 8 : 128;
  const bool has_zero = Random(0, 1);
  const int64_t num_weights = experts * features * inputs, num_scales = experts * features * groups;
  std::vector<int> weights(num_weights);
  for (int& w : weights) w = static_cast<int>(Random(-half, half - 1));
  std::vector<uint8_t> values(encoding == Encoding::kInt4 ? num_weights / 2 : num_weights);
  for (int64_t i = 0; i < num_weights; ++i) {
    if (encoding == Encoding::kInt8) {
      values[i] = static_cast<uint8_t>(weights[i]);
    } else {
      const int64_t run = i / kRun, place = i % kRun;
      values[run * kRun / 2 + place % (kRun / 2)] |= (weights[i] + 8) << (place < kRun / 2 ? 0 : 4);
    }
  }
  std::vector<uint32_t> scales(num_scales);  // more than enough memory
  for (int64_t i = 0; i < num_scales; ++i) {
    if (scale_type == ScaleType::kFloat32) {
      reinterpret_cast<float*>(scales.data())[i] = static_cast<float>(Random(1, 1 << 20)) * 0x1p-24f;
    } else {
      const auto bits = scale_type == ScaleType::kBFloat16 ? ToBits(static_cast<float>(Random(1, 255)) * 0x1p-12f)
                                                           : static_cast<uint16_t>(Random(1 << 10, 9 << 10));
      reinterpret_cast<uint16_t*>(scales.data())[i] = bits;
    }
  }
  std::vector<int8_t> zero_points(num_scales);
  for (int8_t& zero : zero_points) zero = static_cast<int8_t>(has_zero ? Random(-half, half - 1) : 0);
  Array x(dtype, rows * inputs), y(result, rows * features), plain(result, rows * features), wide(dtype, num_weights);
  x.Fill();
  if (dtype == Float::kBFloat16) {  // multiples of 1 / 32, which the builds that add integers represent exactly
    for (int64_t i = 0; i < rows * inputs; ++i) x.Set(i, std::round(x[i] * 32) / 32);
  }
  for (int64_t i = 0; i < num_weights; ++i) {
    const int64_t group = i / (group_runs * kRun);
    const double exact = (weights[i] - zero_points[group]) * ScaleOf(scale_type, scales.data(), group);
    wide.Set(i, RoundedTo(scale_type, exact));
  }
  const Rows scratch(kernels, dtype, rows, inputs, true);
  kernels.quantized_matmul(kPool, {dtype, result, encoding, scale_type, rows, experts, features, inputs, group_runs * kRun,
                                   x.Data(), values.data(), scales.data(), has_zero ? zero_points.data() : nullptr,
                                   sizes.data(), y.Data(), scratch.scratch});
  y.ExpectGuards(name);
  if (dtype == Float::kBFloat16 && rows <= FewRows(kernels.packs) * experts) {
    for (int64_t expert = 0, row = 0; expert < experts; row += sizes[expert++]) {
      for (int64_t r = row; r < row + sizes[expert]; ++r) {
        for (int64_t f = 0; f < features; ++f) {
          double sum = 0, size = 0;
          for (int64_t i = 0; i < inputs; ++i) {
            const int64_t at = (expert * features + f) * inputs + i, group = at / (group_runs * kRun);
            const double scaled = x[r * inputs + i] * ScaleOf(scale_type, scales.data(), group);
            sum += scaled * (weights[at] - zero_points[group]);
            size += std::abs(scaled) * (std::abs(weights[at]) + std::abs(zero_points[group]));
          }
          Expect(y.IsNear(r * features + f, sum, 1e-6 * size), name + ": sums of few rows are scaled");
        }
      }
    }
    return;
  }
  kernels.grouped_matmul(kPool, {dtype, result, rows, experts, features, inputs, x.Data(), wide.Data(), sizes.data(),
                                 plain.Data(), scratch.scratch});
  int64_t num_used = 0;
  for (int32_t size : sizes) num_used += size;
  Expect(y.SameBits(0, plain, 0, num_used * features), name + ": the bits of the dequantised weight's product");
}

void CheckExperts(const Kernels& kernels) {
  const Float dtype = RandomType();
  const int64_t tokens = Random(1, 30), top_k = Random(1, 3), experts = Random(1, 5);
  const int64_t embed = 4 * Random(1, 20), mlp = 4 * Random(1, 40), choices = tokens * top_k;
  const std::string name = Name("experts", dtype);
  Array x(dtype, tokens * embed), gate_up(dtype, experts * 2 * mlp * embed), down(dtype, experts * embed * mlp);
  Array mixed(dtype, tokens * embed), outputs(dtype, choices * embed), hidden(dtype, choices * mlp);
  x.Fill(), gate_up.Fill(1 / std::sqrt(embed)), down.Fill(1 / std::sqrt(mlp));
  std::vector<int32_t> chosen(choices);
  std::vector<float> scores(choices);
  for (int32_t& expert : chosen) expert = static_cast<int32_t>(Random(0, experts));  // the last is none
  for (float& score : scores) score = static_cast<float>(Normal());
  const int64_t num_rows = kernels.packs && dtype == Float::kBFloat16 ? choices : tokens;
  const Rows rows(kernels, dtype, num_rows, embed), hidden_rows(kernels, dtype, choices, mlp);
  kernels.experts(kPool, {dtype, tokens, top_k, experts, embed, mlp, x.Data(), gate_up.Data(), down.Data(), chosen.data(),
                          scores.data(), mixed.Data(), outputs.Data(), {hidden.Data(), mlp}, rows.scratch,
                          hidden_rows.scratch});
  for (const Array* array : {&mixed, &outputs, &hidden}) array->ExpectGuards(name);
  const double error = dtype == Float::kFloat32 ? 1e-5 : 0.05;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> sum(embed);
    for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k) {
      const bool is_none = chosen[k] == experts;
      std::vector<double> inner(is_none ? 0 : mlp);
      for (int64_t f = 0; !is_none && f < mlp; ++f) {
        double gate = 0, up = 0;
        for (int64_t i = 0; i < embed; ++i) {
          gate += x[t * embed + i] * gate_up[((chosen[k] * 2 * mlp) + f) * embed + i];
          up += x[t * embed + i] * gate_up[((chosen[k] * 2 + 1) * mlp + f) * embed + i];
        }
        inner[f] = Rounded(dtype, Rounded(dtype, Silu(Rounded(dtype, gate))) * Rounded(dtype, up));
      }
      for (int64_t i = 0; i < embed; ++i) {
        double out = 0;
        for (size_t f = 0; f < inner.size(); ++f) out += inner[f] * down[(chosen[k] * embed + i) * mlp + f];
        Expect(outputs.IsNear(k * embed + i, out, is_none ? 0 : error), name + ": an expert");
        sum[i] += scores[k] * out;
      }
    }
    for (int64_t i = 0; i < embed; ++i) Expect(mixed.IsNear(t * embed + i, sum[i], 4 * error), name + ": the sum");
  }
}

void CheckSwiGlu(const Kernels& kernels) {
  const Float dtype = RandomType();
  const int64_t count = OneOf({0, 1, 3, 7, 8, 9, 15, 16, 17, 33, 100, 40000});
  Array gate(dtype, count), up(dtype, count), hidden(dtype, count);
  gate.Fill(10), up.Fill();
  kernels.swiglu(kPool, {dtype, count, gate.Data(), up.Data(), hidden.Data()});
  hidden.ExpectGuards(Name("swiglu", dtype));
  const double unit = dtype == Float::kFloat32 ? 0x1p-22 : 0x1p-8;
  for (int64_t i = 0; i < count; ++i) {
    const double silu = Silu(gate[i]);
    Expect(hidden.IsNear(i, silu * up[i], 1e-30 + unit * std::abs(silu * up[i])), Name("swiglu", dtype));
  }
}

void CheckRotate(const Kernels& kernels) {
  const Float dtype = RandomType();
  const int64_t tokens = Random(0, 40), heads = Random(1, 5), half = Random(1, 40), size = 2 * half;
  Array x(dtype, tokens * heads * size), y(dtype, x.size);
  Array cos(Float::kFloat32, tokens * half), sin(Float::kFloat32, tokens * half);
  x.Fill(), cos.Fill(), sin.Fill();
  kernels.rotate(kPool, {dtype, tokens, heads, size, x.Data(), cos.Floats(), sin.Floats(), y.Data()});
  y.ExpectGuards(Name("rotate", dtype));
  for (int64_t index = 0; index < tokens * heads; ++index) {
    for (int64_t i = 0; i < half; ++i) {
      const double a = x[index * size + i], b = x[index * size + i + half], angle = index / heads * half + i;
      const double c = cos[angle], s = sin[angle];
      Expect(y.IsNear(index * size + i, a * c - b * s, 1e-6 * (std::abs(a * c) + std::abs(b * s))), Name("rotate", dtype));
      Expect(y.IsNear(index * size + i + half, b * c + a * s, 1e-6 * (std::abs(b * c) + std::abs(a * s))),
             Name("rotate", dtype));
    }
  }
}

void CheckShortConvolution(const Kernels& kernels) {
  const Float dtype = RandomType();
  const int64_t rows = Random(0, 3), tokens = Random(1, 9), taps = Random(1, kMaxTaps), channels = Random(1, 70);
  Array x(dtype, rows * tokens * channels), before(dtype, rows * (taps - 1) * channels), weight(dtype, taps * channels);
  Array y(dtype, x.size);
  x.Fill(), before.Fill(), weight.Fill();
  kernels.short_convolution(kPool, {dtype, rows, tokens, taps, channels, x.Data(), before.Data(), weight.Data(), y.Data()});
  y.ExpectGuards(Name("short_convolution", dtype));
  const double unit = dtype == Float::kFloat32 ? 1e-6 : 0x1p-7;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0, size = 0;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t token = t + tap - (taps - 1);
          const double value = token < 0 ? before[(row * (taps - 1) + token + taps - 1) * channels + c]
                                         : x[(row * tokens + token) * channels + c];
          sum += value * weight[tap * channels + c], size += std::abs(value * weight[tap * channels + c]);
        }
        Expect(y.IsNear((row * tokens + t) * channels + c, Silu(sum), unit * (size + 1e-3)), Name("short_convolution", dtype));
      }
    }
  }
}

void CheckPagedAttention(const Kernels& kernels) {
  const Float dtype = RandomType();
  const int64_t rows = Random(1, 3), tokens = OneOf({1, 2, 5, 50}), key_heads = Random(1, 2), group = Random(1, 7);
  const int64_t head_dim = kHeadMultiple * Random(1, 9), window = OneOf({0, 0, 1, 20, 70}), heads = key_heads * group;
  const std::string name = Name("paged_attention", dtype);
  std::vector<int64_t> lengths(rows);
  std::vector<int32_t> entry_rows, pages, starts, positions;
  for (int64_t row = 0; row < rows; ++row) {
    lengths[row] = tokens + OneOf({0, 1, 60, 64, 100});
    for (int64_t start = 0; start < lengths[row]; start += kPageSize) {
      entry_rows.push_back(static_cast<int32_t>(row));
      starts.push_back(static_cast<int32_t>(start));
      pages.push_back(static_cast<int32_t>(pages.size()));
    }
    for (int64_t t = 0; t < tokens; ++t) positions.push_back(static_cast<int32_t>(lengths[row] - tokens + t));
  }
  const auto num_entries = static_cast<int64_t>(pages.size());
  for (int64_t i = num_entries - 1; i > 0; --i) {  // pages and entries in any order
    const int64_t j = Random(0, i);
    std::swap(pages[i], pages[j]);
  }
  const int64_t page_size = key_heads * kPageSize * head_dim;
  Array q(dtype, rows * tokens * heads * head_dim), keys(dtype, num_entries * page_size), values(dtype, keys.size);
  Array out(dtype, q.size);
  q.Fill(), keys.Fill(), values.Fill();
  const auto scale = static_cast<float>(1 / std::sqrt(head_dim));
  const auto attend = [&](const void* k, const void* v, const uint16_t* k_scales, const uint16_t* v_scales, Array& to) {
    kernels.paged_attention(kPool, {dtype, rows, tokens, key_heads, group, head_dim, num_entries, num_entries, q.Data(), k, v,
                                    k_scales, v_scales, positions.data(), entry_rows.data(), pages.data(), starts.data(),
                                    scale, window, to.Data()});
    to.ExpectGuards(name);
  };
  std::vector<int8_t> small_keys(keys.size), small_values(keys.size);
  std::vector<uint16_t> key_scales(keys.size / kScaled), value_scales(keys.size / kScaled);
  const auto quantize = [&](std::vector<int8_t>& small, std::vector<uint16_t>& scales, Array& wide) {
    for (uint16_t& x : scales) x = ToBits(static_cast<float>(std::abs(Normal())) / 127);
    for (int64_t i = 0; i < wide.size; ++i) {
      small[i] = static_cast<int8_t>(Random(-127, 127));
      wide.Set(i, static_cast<double>(small[i]) * FromBits(scales[i / kScaled]));
    }
  };
  const bool is_int8 = Random(0, 3) == 0;
  if (is_int8) quantize(small_keys, key_scales, keys), quantize(small_values, value_scales, values);
  attend(keys.Data(), values.Data(), nullptr, nullptr, out);
  if (is_int8) {
    Array same(dtype, q.size);
    attend(small_keys.data(), small_values.data(), key_scales.data(), value_scales.data(), same);
    Expect(same.SameBits(0, out, 0, q.size), name + ": the bits of attention to the dequantised pages");
  }
  const double error = dtype == Float::kFloat32 ? 3e-6 : 1.6e-2;
  for (int64_t row = 0, first_entry = 0; row < rows; first_entry += (lengths[row++] + kPageSize - 1) / kPageSize) {
    for (int64_t index = 0; index < tokens * heads; index += Random(1, 5)) {
      const int64_t t = index / heads, head = index % heads, offset = ((row * tokens + t) * heads + head) * head_dim;
      const int64_t position = positions[row * tokens + t];
      std::vector<double> sum(head_dim);
      double total = 0;
      for (int64_t p = window == 0 ? 0 : std::max<int64_t>(0, position - window + 1); p <= position; ++p) {
        const int64_t page = pages[first_entry + p / kPageSize];
        const int64_t key = ((page * key_heads + head / group) * kPageSize + p % kPageSize) * head_dim;
        double score = 0;
        for (int64_t i = 0; i < head_dim; ++i) score += q[offset + i] * keys[key + i];
        const double weight = std::exp(score * scale);
        total += weight;
        for (int64_t i = 0; i < head_dim; ++i) sum[i] += weight * values[key + i];
      }
      for (int64_t i = 0; i < head_dim; ++i) Expect(out.IsNear(offset + i, sum[i] / total, error), name);
    }
  }
}

void CheckDeltaRule(const Kernels& kernels) {
  const Float dtype = RandomType();
  const int64_t rows = Random(1, 4), tokens = OneOf({1, 1, 2, 9}), key_heads = Random(1, 2), group = Random(1, 3);
  const int64_t key_dim = OneOf({1, 5, 16, 33}), value_dim = OneOf({1, 7, 16, 20, 40, 64, 130}), slots = rows + 1;
  const int64_t heads = key_heads * group;
  const std::string name = Name("delta_rule", dtype);
  Array q(dtype, rows * tokens * key_heads * key_dim), k(dtype, q.size), v(dtype, rows * tokens * heads * value_dim);
  Array gates(Float::kFloat32, rows * tokens * heads), betas(Float::kFloat32, gates.size);
  Array outputs(Float::kFloat32, v.size), states(Float::kFloat32, slots * heads * key_dim * value_dim);
  Array prepared(Float::kFloat32, rows * tokens * key_heads * PreparedStride(key_dim));
  q.Fill(), k.Fill(), v.Fill(), states.Fill();
  for (int64_t i = 0; i < gates.size; ++i) gates.Set(i, -std::abs(Normal())), betas.Set(i, 1 / (1 + std::exp(Normal())));
  std::vector<int32_t> slot(rows), written(rows);
  std::vector<char> is_start(rows), continues(rows);
  for (int64_t row = 0; row < rows; ++row) {
    is_start[row] = static_cast<char>(Random(0, 1));
    slot[row] = static_cast<int32_t>(Random(0, 5) ? row : slots);  // the last is none
    continues[row] = row > 0 && slot[row - 1] < slots && slot[row] < slots && Random(0, 2) == 0;
    written[row] = slot[row];
    // The state between two rows of a sequence may go to no slot.
    if (continues[row] && Random(0, 1)) written[row - 1] = static_cast<int32_t>(slots);
  }
  const Array before = states;
  std::vector<std::vector<double>> after(heads);  // each head's state after the previous row
  kernels.delta_rule(kPool, {dtype, rows, tokens, key_heads, group, key_dim, value_dim, slots, q.Data(), k.Data(), v.Data(),
                             gates.Floats(), betas.Floats(), slot.data(), written.data(),
                             reinterpret_cast<bool*>(is_start.data()), reinterpret_cast<bool*>(continues.data()),
                             outputs.Floats(), states.Floats(), prepared.Floats()});
  for (const Array* array : {&outputs, &states, &prepared}) array->ExpectGuards(name);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const bool has_slot = slot[row] < slots, is_written = written[row] < slots;
      const int64_t size = key_dim * value_dim, at = (row * heads + head) * size;  // row is its slot
      std::vector<double> state(size);
      for (int64_t i = 0; i < size; ++i) state[i] = continues[row] ? after[head][i] : is_start[row] ? 0 : before[at + i];
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t token = row * tokens + t, key = (token * key_heads + head / group) * key_dim;
        double key_squares = 1e-6, query_squares = 1e-6;
        for (int64_t i = 0; i < key_dim; ++i) {
          key_squares += k[key + i] * k[key + i], query_squares += q[key + i] * q[key + i];
        }
        const double decay = std::exp(gates[token * heads + head]), beta = betas[token * heads + head];
        for (int64_t j = 0; j < value_dim; ++j) {
          double product = 0, output = 0;
          for (int64_t i = 0; i < key_dim; ++i) product += decay * state[i * value_dim + j] * k[key + i];
          const int64_t index = (token * heads + head) * value_dim + j;
          const double change = beta * (v[index] - product / std::sqrt(key_squares));
          for (int64_t i = 0; i < key_dim; ++i) {
            double& one = state[i * value_dim + j];
            one = decay * one + k[key + i] / std::sqrt(key_squares) * change;
            output += one * q[key + i];
          }
          output /= std::sqrt(query_squares) * std::sqrt(static_cast<double>(key_dim));
          Expect(outputs.IsNear(index, has_slot ? output : 0, has_slot ? 2e-5 : 0), name);
        }
      }
      for (int64_t i = 0; i < size; ++i) {
        Expect(states.IsNear(at + i, is_written ? state[i] : before[at + i], is_written ? 2e-5 : 0), name + ": the state");
      }
      after[head] = state;
    }
  }
}

const Kernels* Find(const std::string& name) {
#if defined(__x86_64__)
#ifdef HAS_AMX_COMPILER
  if (name == "amx_bf16" && ProcessorBuilds() & 1) return &kAmxBf16;
#endif
  if (name == "avx512_bf16") return &kAvx512Bf16;
  if (name == "avx512") return &kAvx512;
  if (name == "avx2") return &kAvx2;
#else
  if (name == "neon") return &kNeon;
#endif
  return nullptr;
}

}  // namespace

int main(int, char** arguments) {
  const Kernels* kernels = Find(arguments[1]);
  if (kernels == nullptr) return 2;
  for (int round = 0; round < std::atoi(arguments[2]); ++round) {
    for (auto* check : {CheckGroupedMatmul, CheckQuantizedMatmul, CheckExperts, CheckSwiGlu, CheckRotate, CheckShortConvolution,
                        CheckPagedAttention, CheckDeltaRule}) {
      check(*kernels);
    }
  }
  while (running > 0) std::this_thread::yield();
  std::printf("%d differences\n", failures);
  return failures != 0;
}
