// plan_tree's last launch: one block finds the tree of shared pages and cuts it into chunks.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/scans.cuh"
#include "compare_pages.cuh"
#include "minima.cuh"

namespace treedecode::cuda {

inline constexpr int kMaxPlanThreads = 768;  // 80 registers each, on every architecture

// The longest-common-prefix intervals of the rows, in arrays. Node 2 * row + 1 is the leaf of a row: the pages that no
// other row has. Node 2 * row, where it exists, is the interval whose first fork comes before `row`. Chunks of one
// class of cost come in the order of their nodes, as on the CPU.
class TreePlanner {
 public:
  __device__ TreePlanner(const PlanTreeParams& p, int* words)
      : p_(p), num_rows_(static_cast<int>(p.num_rows)), num_nodes_(2 * num_rows_) {
    int width = 1;
    while (width < num_rows_ + 1) width *= 2;
    const auto take = [&](int count) {
      int* array = words;
      words += count;
      return array;
    };
    shared_ = {take(2 * width), width};
    lengths_ = take(2 * width);
    queries_ = take(num_rows_ + 1);
    fork_ = take(num_rows_ + 1);
    row_begin_ = take(num_rows_);
    row_end_ = take(num_rows_);
    children_ = take(num_rows_);
    continuing_ = take(num_rows_);
    parent_ = take(num_nodes_);
    page_begin_ = take(num_nodes_);
    token_end_ = take(num_nodes_);
    kept_above_ = take(num_nodes_);
    level_ = take(num_nodes_);
    generation_ = take(num_nodes_);
    step_ = take(num_nodes_);
  }

  __device__ void run() {
    read_rows();
    find_intervals();
    link_nodes();
    fold();
    cut();
    write_chunks();
    write_rows();
  }

 private:
  template <typename F>
  __device__ static void for_each(int n, F f) {
    for (int i = ptx::thread(); i < n; i += ptx::num_threads()) f(i);
  }

  // The part of [0, n) that a thread scans. Parts are in the order of threads, so the sum over the threads before is
  // the sum over the elements before.
  struct Range {
    int begin, end;
  };
  __device__ static Range thread_range(int n) {
    const int thread = ptx::opaque(ptx::thread());  // computed again where it is needed, not kept in a register
    const int each = (n + ptx::num_threads() - 1) / ptx::num_threads(), begin = std::min(n, thread * each);
    return {begin, std::min(n, begin + each)};
  }

  __device__ int shared(int row) const { return shared_.tree[shared_.width + row]; }
  __device__ int seq_len(int row) const { return seq_len_of(p_, p_.order[row]); }
  __device__ int q_len(int row) const { return q_len_of(p_, p_.order[row]); }

  __device__ void read_rows() {
    bool is_missing = false;
    for_each(num_rows_, [&](int row) { is_missing |= p_.order[row] < 0; });
    if (ptx::sync_threads_or(is_missing)) {  // the order is none: take the branches as they come, and share nothing
      for_each(num_rows_, [&](int row) { p_.order[row] = row; });
      ptx::sync_threads();
      is_missing = true;
    }
    const int64_t segments = num_page_segments(p_.max_pages);
    for_each(shared_.width, [&](int row) {
      int common = row <= num_rows_ ? 0 : std::numeric_limits<int>::max();
      if (row > 0 && row < num_rows_) {
        const int both = pages_in_both(p_, row);
        common = both;
        for (int64_t s = 0; s * kPageSegment < both; ++s) {
          const int match = p_.scratch[row * segments + s];
          if (match < std::min(both, static_cast<int>((s + 1) * kPageSegment))) {
            common = match;
            break;
          }
        }
        // An even number of tokens, as on the CPU.
        common = is_missing ? 0 : common - static_cast<int>(common * p_.page_size % 2);
      }
      shared_.tree[shared_.width + row] = common;
      lengths_[shared_.width + row] = row < num_rows_ && q_len(row) > 0 ? seq_len(row) : 0;
    });
    for_each(num_rows_, [&](int row) { children_[row] = continuing_[row] = 0; });
    ptx::sync_threads();
    for (int n = shared_.width / 2; n > 0; n /= 2) {
      for_each(n, [&](int i) {
        const int node = n + i;
        shared_.tree[node] = std::min(shared_.tree[2 * node], shared_.tree[2 * node + 1]);
        lengths_[node] = std::max(lengths_[2 * node], lengths_[2 * node + 1]);
      });
      ptx::sync_threads();
    }
    const Range range = thread_range(num_rows_);
    const auto queries_of = [&](int row) { return lengths_[shared_.width + row] > 0 ? q_len(row) : 0; };
    int sum = 0;
    for (int row = range.begin; row < range.end; ++row) sum += queries_of(row);
    const BlockScan<int> scan = block_scan(sum);
    int before = scan.before;
    for (int row = range.begin; row < range.end; ++row) {
      queries_[row] = before;
      before += queries_of(row);
    }
    if (ptx::thread() == 0) queries_[num_rows_] = scan.total;
  }

  // Longest seq_len of the rows [begin, end) that have queries.
  __device__ int max_length(int begin, int end) const {
    int longest = 0;
    for (begin += shared_.width, end += shared_.width; begin < end; begin /= 2, end /= 2) {
      if (begin % 2) longest = std::max(longest, lengths_[begin++]);
      if (end % 2) longest = std::max(longest, lengths_[--end]);
    }
    return longest;
  }

  // Sets fork_[row] to the first fork of the interval around the border between row - 1 and row; 0 for none. A fork is
  // numbered by the row after it.
  __device__ void find_intervals() {
    for_each(num_rows_ + 1, [&](int row) {
      const int pages = shared(row);
      fork_[row] = 0;
      if (pages == 0) return;
      const int begin = shared_.last(row - 1, pages - 1);
      fork_[row] = shared_.first(begin + 1, pages);
      if (fork_[row] != row) return;
      row_begin_[row] = begin;
      row_end_[row] = shared_.first(row + 1, pages - 1);
    });
    ptx::sync_threads();
  }

  __device__ bool is_leaf(int node) const { return node % 2; }
  __device__ bool is_node(int node) const { return is_leaf(node) || (node > 0 && fork_[node / 2] == node / 2); }
  __device__ int first_row(int node) const { return is_leaf(node) ? node / 2 : row_begin_[node / 2]; }
  __device__ int last_row(int node) const { return is_leaf(node) ? node / 2 + 1 : row_end_[node / 2]; }
  __device__ int num_queries(int node) const { return queries_[last_row(node)] - queries_[first_row(node)]; }
  __device__ int page_end(int node) const {
    if (!is_leaf(node)) return shared(node / 2);
    return num_pages_of(p_, p_.order[node / 2]);
  }
  __device__ int64_t token_begin(int node) const { return page_begin_[node] * p_.page_size; }
  __device__ int64_t num_tokens(int node) const { return token_end_[node] - token_begin(node); }

  // Finds the parent of each node. Nodes without queries are left out.
  __device__ void link_nodes() {
    for_each(num_nodes_, [&](int node) {
      parent_[node] = -1;
      generation_[node] = -1;
      step_[node] = 0;
      if (!is_node(node) || num_queries(node) == 0) return;
      generation_[node] = 0;
      const int before = first_row(node), after = last_row(node), end = page_end(node);
      token_end_[node] =
          static_cast<int>(std::min(end * p_.page_size, static_cast<int64_t>(max_length(before, after))));
      const int border = shared(before) >= shared(after) ? before : after;
      if (shared(border) == 0) return;
      const int parent = 2 * fork_[border];
      parent_[node] = parent;
      ptx::atomic_add(&children_[parent / 2], 1);
      if (end > shared(border)) ptx::atomic_add(&continuing_[parent / 2], num_queries(node));
    });
    ptx::sync_threads();
  }

  // Folds nodes into their children where reading their pages once costs more than it saves, from the roots down, one
  // generation at a time.
  __device__ void fold() {
    for_each(num_nodes_, [&](int node) {
      if (generation_[node] < 0) return;
      for (int above = parent_[node]; above >= 0; above = parent_[above]) ++generation_[node];
    });
    bool more = true;
    for (int generation = 0; more; ++generation) {
      more = false;
      for_each(num_nodes_, [&](int node) {
        if (generation_[node] == generation) fold_or_keep(node, parent_[node]);
        more |= generation_[node] > generation;
      });
      more = ptx::sync_threads_or(more);
    }
  }

  __device__ bool is_folded(int node) const { return level_[node] < 0; }
  __device__ int level(int node) const { return is_folded(node) ? ~level_[node] : level_[node]; }

  __device__ void fold_or_keep(int node, int parent) {
    const bool parent_folded = parent >= 0 && is_folded(parent);
    page_begin_[node] = parent < 0 ? 0 : parent_folded ? page_begin_[parent] : page_end(parent);
    kept_above_[node] = parent < 0 || !parent_folded ? parent : kept_above_[parent];
    level_[node] = parent < 0 ? 0 : level(parent) + !parent_folded;
    if (is_leaf(node)) return;
    const int64_t saved = cpu::kReadRows * (children_[node / 2] - 1) * num_tokens(node);
    const int64_t paid = cpu::kPartTokens * p_.group_size * continuing_[node / 2];
    if (saved <= paid || level_[node] == cpu::kMaxLevels) level_[node] = ~level_[node];
  }

  // Tokens that become chunks of the node.
  __device__ int64_t own_tokens(int node) const {
    if (generation_[node] < 0 || is_folded(node)) return 0;
    return std::max(int64_t{0}, num_tokens(node));
  }
  __device__ int64_t packed_rows(int node) const { return p_.group_size * num_queries(node); }
  __device__ int64_t num_tiles(int node) const { return ceil_quotient(packed_rows(node), cpu::kTileRows); }
  __device__ int num_chunks(int node) const {
    return step_[node] ? static_cast<int>(ceil_quotient(own_tokens(node), step_[node])) : 0;
  }

  __device__ void cut() {
    enum { kCost, kTokens, kNum };
    int64_t sums[kNum] = {};
    for_each(num_nodes_, [&](int node) {
      const int64_t tokens = own_tokens(node);
      if (tokens == 0) return;
      sums[kCost] += num_tiles(node) * tokens;
      sums[kTokens] += tokens;
    });
    const int64_t* totals = block_scans(sums);
    target_ = std::max(int64_t{1}, ceil_quotient(totals[kCost], cpu::kTilesPerWorker * p_.workers));
    if (ptx::thread() == 0) p_.counts->unique_tokens = static_cast<int32_t>(totals[kTokens]);
    for_each(num_nodes_, [&](int node) {
      const int64_t tokens = own_tokens(node);
      if (tokens == 0) return;
      const int64_t count = ceil_quotient(tokens, cpu::chunk_tokens(packed_rows(node), target_));
      step_[node] = static_cast<int>(ceil_quotient(ceil_quotient(tokens, count), cpu::kChunkStep) * cpu::kChunkStep);
    });
    ptx::sync_threads();
  }

  __device__ int size_class(int node) const {
    return cpu::size_class(std::min(static_cast<int64_t>(step_[node]), own_tokens(node)), target_);
  }

  // Number of parts on the path before the node.
  __device__ int parts_before(int node) const {
    int parts = 0;
    for (int above = kept_above_[node]; above >= 0; above = kept_above_[above]) parts += num_chunks(above);
    return parts;
  }

  // Writes the chunks by a counting sort by class of cost.
  __device__ void write_chunks() {
    constexpr int kNum = cpu::kNumClasses;
    const Range range = thread_range(num_nodes_);
    uint64_t sums[kNum + 1] = {};  // tiles and chunks of each class, tiles of all
    // Chunks are in the lower half. Tiles that do not fit the upper half are too many in any case.
    const auto both = [&](int node) {
      return static_cast<uint64_t>(num_chunks(node) * num_tiles(node)) << 32 | static_cast<uint32_t>(num_chunks(node));
    };
    for (int node = range.begin; node < range.end; ++node) {
      if (step_[node] == 0) continue;
      const int node_class = size_class(node);
      const uint64_t count = both(node);
#pragma unroll
      for (int c = 0; c < kNum; ++c) sums[c] += c == node_class ? count : 0;
      sums[kNum] += num_chunks(node) * num_tiles(node);
    }
    const uint64_t* totals = block_scans(sums);
    uint64_t done = 0;
#pragma unroll
    for (int c = 0; c < kNum; ++c) {
      sums[c] += done;
      done += totals[c];
    }
    for (int node = range.begin; node < range.end; ++node) {
      if (step_[node] == 0) continue;
      const int node_class = size_class(node);
      const uint64_t count = both(node);
      uint64_t before = 0;
#pragma unroll
      for (int c = 0; c < kNum; ++c) {
        before = c == node_class ? sums[c] : before;
        sums[c] += c == node_class ? count : 0;
      }
      write_node(node, static_cast<uint32_t>(before), static_cast<int64_t>(before >> 32));
    }
    fits_ = totals[kNum] <= std::numeric_limits<int32_t>::max();
    if (ptx::thread() != 0) return;
    p_.counts->num_chunks = static_cast<int32_t>(done);
    p_.counts->page_size = static_cast<int32_t>(p_.page_size);
    p_.counts->num_tiles = static_cast<int32_t>(totals[kNum]);
  }

  __device__ void write_node(int node, int64_t chunk, int64_t tile) const {
    const int64_t begin = token_begin(node), end = token_end_[node], tiles = num_tiles(node);
    int part = parts_before(node);
    for (int64_t token = begin; token < end; token += step_[node], ++chunk, tile += tiles) {
      cpu::FlatChunk& out = p_.chunks[chunk];  // field by field: a whole struct takes registers that would spill
      out.row_begin = first_row(node);
      out.row_end = last_row(node);
      out.token_begin = static_cast<int32_t>(token);
      out.token_end = static_cast<int32_t>(std::min(token + step_[node], end));
      out.part = part++;
      out.tile_begin = static_cast<int32_t>(tile);
    }
  }

  __device__ void write_row_indptr() {
    const Range range = thread_range(num_rows_);
    uint32_t sum = 0;  // may wrap around; there is no plan then
    for (int row = range.begin; row < range.end; ++row) sum += static_cast<uint32_t>(q_len(row));
    sum = block_scan(sum).before;
    for (int row = range.begin; row < range.end; ++row) {
      p_.row_indptr[row] = static_cast<int32_t>(sum);
      sum += static_cast<uint32_t>(q_len(row));
    }
  }

  __device__ void write_rows() {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    int* parts = children_;  // of each query token of a branch
    for_each(num_rows_, [&](int row) {
      const int leaf = 2 * row + 1;
      parts[p_.order[row]] = num_queries(leaf) == 0 ? 0 : parts_before(leaf) + num_chunks(leaf);
    });
    ptx::sync_threads();
    write_row_indptr();
    const Range range = thread_range(num_rows_);
    enum { kQueries, kParts, kPathTokens, kNum };
    int64_t sums[kNum] = {};
    for (int i = range.begin; i < range.end; ++i) {
      const int queries = q_len_of(p_, i);
      sums[kQueries] += queries;
      sums[kParts] += static_cast<int64_t>(queries) * parts[i];
      if (queries > 0) sums[kPathTokens] += seq_len_of(p_, i);
    }
    const int64_t* totals = block_scans(sums);
    int64_t query = sums[kQueries], part = sums[kParts];
    for (int i = range.begin; i < range.end; ++i) {
      const int queries = q_len_of(p_, i);
      p_.q_indptr[i] = static_cast<int32_t>(query);
      p_.part_indptr[i] = static_cast<int32_t>(part);
      query += queries;
      part += static_cast<int64_t>(queries) * parts[i];
    }
    if (ptx::thread() != 0) return;
    p_.row_indptr[num_rows_] = p_.q_indptr[num_rows_] = static_cast<int32_t>(totals[kQueries]);
    p_.part_indptr[num_rows_] = p_.counts->num_parts = static_cast<int32_t>(totals[kParts]);
    p_.counts->path_tokens = static_cast<int32_t>(totals[kPathTokens]);
    if (!fits_ || totals[kQueries] > kMax || totals[kParts] > kMax || totals[kPathTokens] > kMax) {
      p_.counts->num_chunks = -1;
    }
  }

  const PlanTreeParams& p_;
  int num_rows_, num_nodes_;
  Minima shared_;    // numbers of pages that a row shares with the row before; 0 for row 0 and for row num_rows
  int* lengths_;     // [2 * width] maxima of the seq_lens of rows that have queries
  int* queries_;     // [num_rows + 1] query tokens of the rows before
  int* fork_;        // [num_rows + 1]
  int* row_begin_;   // [num_rows] of node 2 * row
  int* row_end_;     // [num_rows]
  int* children_;    // [num_rows] of node 2 * row
  int* continuing_;  // [num_rows] query tokens of children that have pages of their own
  int* parent_;      // [num_nodes], -1: a root
  int* page_begin_;  // [num_nodes]
  int* token_end_;   // [num_nodes]
  int* kept_above_;  // [num_nodes] nearest node above that keeps its pages, -1: none
  int* level_;  // [num_nodes] number of nodes above that keep their pages; complemented if the node itself is folded
  int* generation_;     // [num_nodes] number of nodes above; -1: left out
  int* step_;           // [num_nodes] tokens of a chunk, 0: none
  int64_t target_ = 0;  // cost of a tile
  bool fits_ = true;
};

__global__ void __launch_bounds__(kMaxPlanThreads) _plan_tree_kernel(const __grid_constant__ PlanTreeParams p) {
  ptx::wait_for_previous_kernel();
  int* words =
      p.num_rows > kSharedRows ? p.scratch + p.num_rows * num_page_segments(p.max_pages) : ptx::dynamic_shared<int>();
  TreePlanner(p, words).run();
}

}  // namespace treedecode::cuda
