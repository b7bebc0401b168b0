#include "plan_tree.h"

#include <cstring>
#include <limits>
#include <vector>

namespace treedecode::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A run of pages that the rows [row_begin, row_end) share, and no others. A leaf has the pages that only one row has,
// maybe none.
struct Node {
  int32_t row_begin, row_end;
  int32_t page_begin, page_end;
  int32_t parent = -1, first_child = -1, last_child = -1, next_sibling = -1;
  bool is_leaf;
  bool is_folded = false;
  int32_t round = 0;        // of its last chunk, or of the last chunk above it
  int32_t num_parts = 0;    // on the path down to its end
  int32_t level = 0;        // number of nodes with tokens above it
  int32_t first_fork = 0;   // the first row of its second child
  int64_t num_queries = 0;  // query tokens of its rows
  int64_t max_seq_len = 0;  // of its rows that have queries
};

// A chunk, before the chunks are sorted.
struct Cut {
  int32_t round;
  int64_t cost;
  int32_t row_begin, row_end, token_begin, token_end;
  int32_t number;  // segment or part
  int64_t num_tiles = 0;
};

class Planner {
 public:
  explicit Planner(const PlanTreeParams& p) : p_(p) {
    const auto n = static_cast<size_t>(p.num_rows);
    nodes_.reserve(2 * n + 1);
    preorder_.reserve(2 * n);
    chunks_.reserve(2 * n);
  }

  // Builds the tree of longest-common-prefix intervals of the rows, in one sweep with a stack of open intervals. A node
  // gets its parent when its interval closes; everything below it is complete by then.
  void build_tree(const int32_t* shared) {
    const auto num_rows = static_cast<int32_t>(p_.num_rows);
    std::vector<int32_t> open{add_node(0, 0, /*is_leaf=*/false)};
    for (int32_t row = 0; row <= num_rows; ++row) {
      const int32_t depth = row < num_rows ? even_pages(shared[row]) : 0;
      // A leaf always closes: if it ends where the next interval does, the two are siblings.
      while (nodes_[open.back()].is_leaf || nodes_[open.back()].page_end > depth) {
        const int32_t closed = open.back();
        open.pop_back();
        if (nodes_[open.back()].page_end < depth) {
          open.push_back(add_node(nodes_[closed].row_begin, depth, false));
          nodes_[open.back()].first_fork = row;
        }
        adopt(open.back(), closed);
      }
      if (row < num_rows) open.push_back(add_leaf(row));
    }
  }

  // Folds nodes into their children, from the roots down: where the partial results of a node cost more than each
  // child's reading the pages of the node again, its pages go to the children.
  void fold() {
    for (int32_t i = next_in_preorder(0); i >= 0; i = next_in_preorder(i)) {
      Node& v = nodes_[i];
      const Node& parent = nodes_[v.parent];
      v.page_begin = parent.is_folded ? parent.page_begin : parent.page_end;
      v.level = parent.level + (v.parent != 0 && !parent.is_folded);
      if (v.num_queries == 0) continue;
      preorder_.push_back(i);
      if (v.is_leaf) continue;
      int64_t num_children = 0, continuing = 0;
      for (int32_t c = v.first_child; c >= 0; c = nodes_[c].next_sibling) {
        const Node& child = nodes_[c];
        if (child.num_queries == 0) continue;
        ++num_children;
        if (child.page_end > v.page_end) continuing += child.num_queries;
      }
      v.is_folded = kReadRows * (num_children - 1) * num_tokens(v) <= kPartTokens * p_.group_size * continuing ||
                    (p_.workers > 0 && v.level == kMaxLevels);
    }
  }

  // Cuts every node at the borders of segments. A chunk that begins inside a segment continues the last chunk above it,
  // so it comes one round later.
  void cut_chained() {
    for (int32_t i : preorder_) {
      Node& v = nodes_[i];
      const Node& parent = nodes_[v.parent];
      v.round = parent.round;
      int64_t begin = v.page_begin * p_.page_size;
      const int64_t end = token_at(v, v.page_end);
      if (v.is_folded || begin >= end) continue;
      const int64_t queries = p_.group_size * v.num_queries;
      for (int64_t next; begin < end; begin = next) {
        next = std::min(end, (begin / kSegment + 1) * kSegment);
        v.round = begin % kSegment ? v.round + 1 : 0;
        // A row that ends in the page in which a segment ends has no part in the next segment.
        for (int32_t row = v.row_begin, last; row < v.row_end; row = last) {
          last = row + 1;
          if (seq_len(row) <= begin) continue;
          while (last < v.row_end && seq_len(last) > begin) ++last;
          chunks_.push_back({v.round, (next - begin) * (kReadRows + queries), row, last, static_cast<int32_t>(begin),
                             static_cast<int32_t>(next), static_cast<int32_t>(begin / kSegment)});
        }
      }
    }
    std::stable_sort(chunks_.begin(), chunks_.end(), [](const Cut& a, const Cut& b) {
      return a.round != b.round ? a.round < b.round : a.cost > b.cost;
    });
  }

  // Cuts every node into chunks of comparable cost, each with its own partial results, so that all can run at once.
  void cut_flat() {
    struct Whole {
      int64_t begin, length, rows, num_tiles;
    };
    std::vector<Whole> wholes(nodes_.size());
    int64_t total = 0;
    for (int32_t i : preorder_) {
      const Node& v = nodes_[i];
      const int64_t rows = p_.group_size * v.num_queries;
      const int64_t length = v.is_folded ? 0 : std::max<int64_t>(0, num_tokens(v));
      wholes[i] = {v.page_begin * p_.page_size, length, rows, ceil_div(rows, kTileRows)};
      total += wholes[i].num_tiles * length;
    }
    const int64_t target = std::max<int64_t>(1, ceil_div(total, kTilesPerWorker * p_.workers));
    struct Sorted {
      int64_t cost_class, order;
      int32_t node;
      int64_t step;
    };
    std::vector<Sorted> sorted;
    for (int32_t i : preorder_) {
      Node& v = nodes_[i];
      const Whole& whole = wholes[i];
      v.num_parts = nodes_[v.parent].num_parts;
      if (whole.length == 0) continue;
      const int64_t count = ceil_div(whole.length, chunk_tokens(whole.rows, target));
      const int64_t step = ceil_div(ceil_div(whole.length, count), kChunkStep) * kChunkStep;
      sorted.push_back({size_class(std::min(step, whole.length), target),
                        v.is_leaf ? 2 * v.row_begin + 1 : 2 * v.first_fork, i, step});
      v.num_parts += static_cast<int32_t>(ceil_div(whole.length, step));
    }
    std::sort(sorted.begin(), sorted.end(), [](const Sorted& a, const Sorted& b) {
      return a.cost_class != b.cost_class ? a.cost_class < b.cost_class : a.order < b.order;
    });
    for (const Sorted& s : sorted) {
      const Node& v = nodes_[s.node];
      const Whole& whole = wholes[s.node];
      int32_t part = nodes_[v.parent].num_parts;
      for (int64_t offset = 0; offset < whole.length; offset += s.step) {
        chunks_.push_back({0, 0, v.row_begin, v.row_end, static_cast<int32_t>(whole.begin + offset),
                           static_cast<int32_t>(whole.begin + std::min(offset + s.step, whole.length)), part++,
                           whole.num_tiles});
      }
    }
  }

  bool write() const {
    int64_t num_queries = 0, num_parts = 0, unique_tokens = 0, path_tokens = 0, num_tiles = 0;
    p_.q_indptr[0] = p_.part_indptr[0] = p_.row_indptr[0] = 0;
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    std::vector<int32_t> parts_per_query(static_cast<size_t>(p_.num_rows));  // of each branch
    for (int64_t row = 0; row < p_.num_rows; ++row) {
      const size_t branch = p_.order[row];
      parts_per_query[branch] =
          p_.workers ? nodes_[leaves_[row]].num_parts : static_cast<int32_t>(ceil_div(seq_len(row), kSegment));
      num_queries += q_len(row);
      if (q_len(row) > 0) path_tokens += seq_len(row);
      if (num_queries > kMax || path_tokens > kMax) return false;
      p_.row_indptr[row + 1] = static_cast<int32_t>(num_queries);
    }
    for (int64_t branch = 0, queries = 0; branch < p_.num_rows; ++branch) {
      const int64_t q_len = q_len_of(branch);
      queries += q_len;
      num_parts += q_len * parts_per_query[branch];
      if (num_parts > kMax) return false;
      p_.q_indptr[branch + 1] = static_cast<int32_t>(queries);
      p_.part_indptr[branch + 1] = static_cast<int32_t>(num_parts);
    }
    int32_t* out = p_.chunks;
    for (const Cut& c : chunks_) {
      if (p_.workers) {
        write_chunk(out, FlatChunk{c.row_begin, c.row_end, c.token_begin, c.token_end, c.number,
                                   static_cast<int32_t>(num_tiles)});
      } else {
        write_chunk(out, ChainedChunk{c.row_begin, c.row_end, c.token_begin, c.token_end, c.number, c.round});
      }
      out += kChunkColumns;
      unique_tokens += c.token_end - c.token_begin;
      num_tiles += c.num_tiles;
      if (num_tiles > kMax) return false;
    }
    *p_.counts = {
        .num_chunks = static_cast<int32_t>(chunks_.size()),
        .num_parts = static_cast<int32_t>(num_parts),
        .unique_tokens = static_cast<int32_t>(unique_tokens),  // <= path_tokens
        .path_tokens = static_cast<int32_t>(path_tokens),
        .page_size = static_cast<int32_t>(p_.page_size),
        .num_tiles = static_cast<int32_t>(num_tiles),
    };
    return true;
  }

 private:
  template <typename Chunk>
  static void write_chunk(int32_t* out /* [kChunkColumns] */, const Chunk& chunk) {
    std::memcpy(out, &chunk, sizeof chunk);
  }

  int64_t q_len_of(int64_t branch) const { return p_.q_lens ? p_.q_lens[branch] : 1; }
  int64_t q_len(int64_t row) const { return q_len_of(p_.order[row]); }
  int64_t seq_len(int64_t row) const { return p_.seq_lens[p_.order[row]]; }

  // An even number of tokens, so that no pair of bf16 values that is multiplied at once is split between two chunks.
  int32_t even_pages(int32_t pages) const { return pages - static_cast<int32_t>(pages * p_.page_size % 2); }

  int32_t add_node(int32_t row, int32_t page_end, bool is_leaf) {
    Node v{};
    v.row_begin = row;
    v.row_end = row + 1;
    v.page_end = page_end;
    v.is_leaf = is_leaf;
    v.parent = v.first_child = v.last_child = v.next_sibling = -1;
    nodes_.push_back(v);
    return static_cast<int32_t>(nodes_.size()) - 1;
  }

  int32_t add_leaf(int32_t row) {
    const int64_t num_tokens = seq_len(row);
    const int32_t leaf = add_node(row, static_cast<int32_t>(ceil_div(num_tokens, p_.page_size)), true);
    leaves_.push_back(leaf);
    if (num_tokens > 0 && q_len(row) > 0) {
      nodes_[leaf].num_queries = q_len(row);
      nodes_[leaf].max_seq_len = num_tokens;
    }
    return leaf;
  }

  void adopt(int32_t parent, int32_t child) {
    Node& u = nodes_[parent];
    Node& c = nodes_[child];
    c.parent = parent;
    u.row_end = c.row_end;
    u.num_queries += c.num_queries;
    u.max_seq_len = std::max(u.max_seq_len, c.max_seq_len);
    (u.first_child < 0 ? u.first_child : nodes_[u.last_child].next_sibling) = child;
    u.last_child = child;
  }

  int32_t next_in_preorder(int32_t i) const {
    if (nodes_[i].first_child >= 0) return nodes_[i].first_child;
    while (i >= 0 && nodes_[i].next_sibling < 0) i = nodes_[i].parent;
    return i < 0 ? -1 : nodes_[i].next_sibling;
  }

  int64_t token_at(const Node& v, int64_t page) const { return std::min(page * p_.page_size, v.max_seq_len); }

  int64_t num_tokens(const Node& v) const { return token_at(v, v.page_end) - v.page_begin * p_.page_size; }

  const PlanTreeParams& p_;
  std::vector<Node> nodes_;        // nodes_[0] is the parent of the roots and has no pages
  std::vector<int32_t> leaves_;    // of the rows
  std::vector<int32_t> preorder_;  // nodes that have queries, parents before children
  std::vector<Cut> chunks_;
};

}  // namespace

bool plan_tree(const PlanTreeParams& p, const int32_t* shared) {
  Planner planner(p);
  planner.build_tree(shared);
  planner.fold();
  p.workers ? planner.cut_flat() : planner.cut_chained();
  return planner.write();
}

}  // namespace treedecode::cpu
