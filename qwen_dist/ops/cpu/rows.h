// The rows of a product, and which of them belong to which weight.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kCopyRowsPerJob = 16;
constexpr int kCacheLine = 64;  // bytes

// With few rows most divisors are 1, and the division would take longer than the branch.
constexpr int64_t CeilDivide(int64_t x, int64_t y) { return y == 1 ? x : (x + y - 1) / y; }
constexpr int64_t RoundUp(int64_t x, int64_t multiple) { return CeilDivide(x, multiple) * multiple; }

// Rows of a matrix, `stride` elements apart; with `index`, row r is the matrix's row index[r].
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;
  const int32_t* index = nullptr;

  Element* operator[](int64_t row) const { return data + (index == nullptr ? row : index[row]) * stride; }
  Rows From(int64_t row) const {
    return index == nullptr ? Rows{data + row * stride, stride} : Rows{data, stride, index + row};
  }
};

// Consecutive rows that are multiplied with the same weight, number `index`.
struct Group {
  int64_t index, first_row, num_rows;
};

// The groups that have rows, those with the most rows first. There are `num_rows` rows in all.
inline std::vector<Group> NonEmptyGroups(const int32_t* sizes, int64_t num_groups, int64_t num_rows) {
  std::vector<Group> groups;
  for (int64_t index = 0, first = 0; index < num_groups && first < num_rows; first += sizes[index++]) {
    const int64_t rows = std::min<int64_t>(sizes[index], num_rows - first);
    if (rows > 0) groups.push_back({index, first, rows});
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.num_rows > b.num_rows; });
  return groups;
}

}  // namespace
