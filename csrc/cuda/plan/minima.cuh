// Nearest smaller values, by a tree of minima.
#pragma once

#include "../common/ptx.cuh"

namespace treedecode::cuda {

// Positions of small values. Its leaves are values[0, width), width a power of two; tree[1] is the root.
struct Minima {
  int* tree;  // [2 * width]
  int width;

  // First position at or after `from` with a value of at most x; there is one.
  __device__ int first(int from, int x) const {
    int node = from + width;
    while (tree[node] > x) {
      while (node % 2) node /= 2;
      ++node;
    }
    while (node < width) {
      node *= 2;
      if (tree[node] > x) ++node;
    }
    return node - width;
  }
  // Last one at or before `from`.
  __device__ int last(int from, int x) const {
    int node = from + width;
    while (tree[node] > x) {
      while (node % 2 == 0) node /= 2;
      --node;
    }
    while (node < width) {
      node = 2 * node + 1;
      if (tree[node] > x) --node;
    }
    return node - width;
  }
};

}  // namespace treedecode::cuda
