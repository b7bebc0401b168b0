// Finds nearest smaller values with a tree of minima.
#pragma once

#include "../common/ptx.cuh"

namespace treedecode::cuda {

// A complete binary tree of minima. The leaves are values[0, width), width a power of two; tree[1] is the root.
struct Minima {
  int* tree;  // [2 * width]
  int width;

  // Returns the first position at or after `from` with a value of at most x, which must exist.
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
  // Returns the last position at or before `from` with a value of at most x, which must exist.
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
