// The softmax of a row whose scores arrive page by page (arXiv:2205.14135).

#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int kPageVectors = kPageSize / kFloatLanes;

// A row's running softmax: the highest score so far, and the sum of the weights relative to it, by lane.
struct RunningSoftmax {
  float highest;
  float total[kFloatLanes];
};

// Add the scores of a page to a row's softmax, and store their weights. Returns what earlier weights are multiplied with.
template <class Row>
SIMD INLINE float AddScores(const Floats (&scores)[kPageVectors], RunningSoftmax* softmax, Row* weights) {
  Floats largest = scores[0];
  UNROLL for (int v = 1; v < kPageVectors; ++v) largest = Max(largest, scores[v]);
  const float highest = std::max(softmax->highest, Largest(largest));
  const Floats rescaled = Exp(Set(softmax->highest - highest));
  Floats total = Load(softmax->total) * rescaled;
  UNROLL for (int v = 0; v < kPageVectors; ++v) {
    const Floats weight = Exp(scores[v] - Set(highest));
    total = total + weight;
    Store(weight, weights + v * kFloatLanes);
  }
  softmax->highest = highest;
  Store(total, softmax->total);
  return First(rescaled);
}

}  // namespace
