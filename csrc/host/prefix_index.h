// Prefix index: a radix tree from token ids to the pages that hold their K and V, with LRU eviction.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace treedecode::host {

// The tree works in whole pages: an edge is a run of n * page_size tokens and their n pages, and the children of a node
// differ within their first page. Tokens are always compared; hashes only choose the candidates.
//
// Recency: a match or an insert touches every page on its path, and nodes are split where a path ends, so all pages of
// a node were last touched at the same time. Nodes are in a list, most recent first, parents before their children;
// eviction goes through it from its end and meets leaves in LRU order.
//
// Every public function takes the lock; none calls back into Python.
class PrefixIndex {
 public:
  explicit PrefixIndex(int64_t page_size);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  int64_t page_size() const { return page_size_; }
  int64_t num_pages();

  // Returns the pages of the longest prefix of `tokens` that the index has, in whole pages.
  std::vector<int32_t> match(const int32_t* tokens /* [num_tokens] */, int64_t num_tokens);

  // Inserts the whole pages of `tokens`; returns the pages that the index did not hold before. Where it has the tokens
  // already, it keeps its own pages. Throws std::invalid_argument, with nothing changed, when a new page is negative,
  // appears twice or is held already.
  std::vector<int32_t> insert(const int32_t* tokens /* [num_pages * page_size] */,
                              const int32_t* pages /* [num_pages] */, int64_t num_pages);

  // Evicts up to `max_pages` pages that nothing else refers to (refcount 1), least recently used leaves first.
  std::vector<int32_t> evict(int64_t max_pages, const int32_t* refcount /* [num_refcounts] */, int64_t num_refcounts);

  std::vector<int32_t> pages();
  std::vector<int32_t> clear();

  // Throws std::logic_error naming the broken invariant.
  void check_integrity();

 private:
  struct Node;
  struct Path {
    Node* node;           // in which the matched prefix ends; the root when nothing matches
    int64_t num_matched;  // pages
  };

  Path walk(const int32_t* tokens, int64_t num_pages);
  Node* find_child(const Node* node, const int32_t* tokens) const;
  void add_child(Node* parent, Node* child);
  void remove_child(Node* parent, Node* child);
  Node* split(Node* node, int64_t num_pages);
  void touch(Node* node);
  void unlink(Node* node);
  void link_after(Node* newer, Node* node);
  bool is_held(int32_t page) const;
  void set_held(int32_t page, bool held);
  uint64_t hash_page(const int32_t* tokens) const;

  std::mutex mutex_;
  const int64_t page_size_;
  int64_t num_pages_ = 0;
  // The pages held, in blocks of kHeldBlock ids, because one array for all ids could be of any size.
  static constexpr int32_t kHeldBlock = 4096;
  std::map<int32_t, std::bitset<kHeldBlock>> held_;
  std::unique_ptr<Node> root_;  // empty edge; also the head of the recency list
};

}  // namespace treedecode::host
