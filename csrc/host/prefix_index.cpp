#include "prefix_index.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace treedecode::host {

struct PrefixIndex::Node {
  Node* parent = nullptr;
  Node* newer = nullptr;  // recency list
  Node* older = nullptr;
  std::vector<int32_t> tokens;  // [pages.size() * page_size]
  std::vector<int32_t> pages;
  std::unordered_multimap<uint64_t, Node*> children;  // by the hash of the child's first page of tokens
};

PrefixIndex::PrefixIndex(int64_t page_size) : page_size_(page_size), root_(std::make_unique<Node>()) {
  if (page_size < 1) throw std::invalid_argument("page_size: expected at least 1, got " + std::to_string(page_size));
  root_->newer = root_->older = root_.get();
}

PrefixIndex::~PrefixIndex() { clear(); }

uint64_t PrefixIndex::hash_page(const int32_t* tokens) const {
  uint64_t h = 0;
  for (int64_t i = 0; i < page_size_; ++i) {
    h = (h ^ static_cast<uint32_t>(tokens[i])) * 0x9e3779b97f4a7c15ULL;
    h ^= h >> 29;
  }
  return h;
}

PrefixIndex::Node* PrefixIndex::find_child(const Node* node, const int32_t* tokens) const {
  auto same = [&](const Node* child) { return std::equal(tokens, tokens + page_size_, child->tokens.begin()); };
  if (node->children.size() <= 1) {  // the common case: no hash needed
    for (auto& [hash, child] : node->children) {
      if (same(child)) return child;
    }
    return nullptr;
  }
  auto [begin, end] = node->children.equal_range(hash_page(tokens));
  for (; begin != end; ++begin) {
    if (same(begin->second)) return begin->second;
  }
  return nullptr;
}

void PrefixIndex::add_child(Node* parent, Node* child) {
  child->parent = parent;
  parent->children.emplace(hash_page(child->tokens.data()), child);
}

void PrefixIndex::remove_child(Node* parent, Node* child) {
  auto [begin, end] = parent->children.equal_range(hash_page(child->tokens.data()));
  parent->children.erase(std::find_if(begin, end, [&](auto& entry) { return entry.second == child; }));
}

void PrefixIndex::unlink(Node* node) {
  node->newer->older = node->older;
  node->older->newer = node->newer;
}

void PrefixIndex::link_after(Node* newer, Node* node) {
  node->newer = newer;
  node->older = newer->older;
  newer->older->newer = node;
  newer->older = node;
}

void PrefixIndex::touch(Node* node) {
  for (; node != root_.get(); node = node->parent) {
    unlink(node);
    link_after(root_.get(), node);
  }
}

bool PrefixIndex::is_held(int32_t page) const {
  const auto block = held_.find(page / kHeldBlock);
  return block != held_.end() && block->second[page % kHeldBlock];
}

void PrefixIndex::set_held(int32_t page, bool held) {
  held_[page / kHeldBlock][page % kHeldBlock] = held;
  num_pages_ += held ? 1 : -1;
}

// Cuts `node` after `num_pages` pages (at least one stays on each side) and returns the upper part.
PrefixIndex::Node* PrefixIndex::split(Node* node, int64_t num_pages) {
  auto upper = std::make_unique<Node>();
  const auto num_tokens = num_pages * page_size_;
  upper->tokens.assign(node->tokens.begin(), node->tokens.begin() + num_tokens);
  upper->pages.assign(node->pages.begin(), node->pages.begin() + num_pages);
  Node* parent = node->parent;
  remove_child(parent, node);
  node->tokens.erase(node->tokens.begin(), node->tokens.begin() + num_tokens);
  node->pages.erase(node->pages.begin(), node->pages.begin() + num_pages);
  add_child(parent, upper.get());
  add_child(upper.get(), node);
  link_after(node->newer, upper.get());
  return upper.release();
}

// Follows `tokens` down, splits the node in which the matched prefix ends, and touches the path.
PrefixIndex::Path PrefixIndex::walk(const int32_t* tokens, int64_t num_pages) {
  Node* node = root_.get();
  int64_t num_matched = 0;
  while (num_matched < num_pages) {
    const int32_t* next = tokens + num_matched * page_size_;
    Node* child = find_child(node, next);
    if (!child) break;
    const auto length = static_cast<int64_t>(child->pages.size());
    const int64_t limit = std::min(length, num_pages - num_matched) * page_size_;
    const auto differ = std::mismatch(next, next + limit, child->tokens.begin()).first - next;
    const int64_t same = differ / page_size_;
    node = same < length ? split(child, same) : child;
    num_matched += same;
    if (same < length) break;
  }
  touch(node);
  return {node, num_matched};
}

int64_t PrefixIndex::num_pages() {
  std::lock_guard lock(mutex_);
  return num_pages_;
}

std::vector<int32_t> PrefixIndex::match(const int32_t* tokens, int64_t num_tokens) {
  std::lock_guard lock(mutex_);
  const Path path = walk(tokens, num_tokens / page_size_);
  std::vector<int32_t> pages(path.num_matched);
  auto end = pages.end();
  for (const Node* node = path.node; node != root_.get(); node = node->parent) {
    end = std::copy_backward(node->pages.begin(), node->pages.end(), end);
  }
  return pages;
}

std::vector<int32_t> PrefixIndex::insert(const int32_t* tokens, const int32_t* pages, int64_t num_pages) {
  std::lock_guard lock(mutex_);
  const Path path = walk(tokens, num_pages);
  if (path.num_matched == num_pages) return {};
  std::vector<int32_t> taken(pages + path.num_matched, pages + num_pages);
  std::vector<int32_t> sorted = taken;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < sorted.size(); ++i) {
    const int32_t page = sorted[i];
    if (page < 0 || is_held(page) || (i && sorted[i - 1] == page)) {
      throw std::invalid_argument("pages: expected pages the index does not hold yet, each once, got " +
                                  std::to_string(page));
    }
  }
  const int32_t* new_begin = tokens + path.num_matched * page_size_;
  const int32_t* new_end = tokens + num_pages * page_size_;
  Node* node = path.node;
  if (node != root_.get() && node->children.empty()) {  // the most recent leaf: the new pages are added to it
    node->tokens.insert(node->tokens.end(), new_begin, new_end);
    node->pages.insert(node->pages.end(), taken.begin(), taken.end());
  } else {
    auto leaf = std::make_unique<Node>();
    leaf->tokens.assign(new_begin, new_end);
    leaf->pages = taken;
    add_child(node, leaf.get());
    link_after(node, leaf.get());
    leaf.release();
  }
  for (int32_t page : taken) set_held(page, true);
  return taken;
}

std::vector<int32_t> PrefixIndex::evict(int64_t max_pages, const int32_t* refcount, int64_t num_refcounts) {
  std::lock_guard lock(mutex_);
  std::vector<int32_t> freed;
  auto idle = [&](int32_t page) { return page < num_refcounts && refcount[page] == 1; };
  Node* node = root_->newer;  // the end of the list: least recent
  while (node != root_.get() && static_cast<int64_t>(freed.size()) < max_pages) {
    Node* next = node->newer;
    if (node->children.empty()) {
      while (!node->pages.empty() && static_cast<int64_t>(freed.size()) < max_pages && idle(node->pages.back())) {
        freed.push_back(node->pages.back());
        set_held(node->pages.back(), false);
        // The parent's map finds the node by the tokens of its first page: they are erased last, with the node.
        node->pages.pop_back();
        if (!node->pages.empty()) node->tokens.resize(node->pages.size() * page_size_);
      }
      if (node->pages.empty()) {
        remove_child(node->parent, node);
        unlink(node);
        delete node;
      }
    }
    node = next;
  }
  return freed;
}

std::vector<int32_t> PrefixIndex::pages() {
  std::lock_guard lock(mutex_);
  std::vector<int32_t> pages;
  pages.reserve(num_pages_);
  for (const auto& [block, held] : held_) {
    for (int32_t i = 0; i < kHeldBlock; ++i) {
      if (held[i]) pages.push_back(block * kHeldBlock + i);
    }
  }
  return pages;
}

std::vector<int32_t> PrefixIndex::clear() {
  std::lock_guard lock(mutex_);
  std::vector<int32_t> pages;
  pages.reserve(num_pages_);
  for (Node* node = root_->older; node != root_.get();) {
    Node* next = node->older;
    pages.insert(pages.end(), node->pages.begin(), node->pages.end());
    delete node;
    node = next;
  }
  root_->newer = root_->older = root_.get();
  root_->children.clear();
  held_.clear();
  num_pages_ = 0;
  return pages;
}

void PrefixIndex::check_integrity() {
  std::lock_guard lock(mutex_);
  auto require = [](bool ok, const char* what) {
    if (!ok) throw std::logic_error(std::string("PrefixIndex: ") + what);
  };
  std::unordered_map<const Node*, int64_t> rank;  // position in the recency list
  int64_t num_pages = 0, num_edges = 0;
  rank[root_.get()] = 0;
  for (const Node* node = root_->older; node != root_.get(); node = node->older) {
    require(node->newer->older == node && node->older->newer == node, "recency list is broken");
    require(!node->pages.empty(), "a node without pages");
    require(node->tokens.size() == node->pages.size() * page_size_, "tokens and pages of a node differ in length");
    require(rank.count(node->parent) == 1, "a node is more recent than its parent");
    require(find_child(node->parent, node->tokens.data()) == node, "a node is not found below its parent");
    rank.emplace(node, static_cast<int64_t>(rank.size()));
    for (int32_t page : node->pages) require(is_held(page), "a page of the tree is not marked as held");
    num_pages += static_cast<int64_t>(node->pages.size());
  }
  for (const auto& [node, position] : rank) num_edges += static_cast<int64_t>(node->children.size());
  require(num_edges + 1 == static_cast<int64_t>(rank.size()), "a child is missing from the recency list");
  require(num_pages == num_pages_, "the page count is wrong");
  int64_t num_held = 0;
  for (const auto& [block, held] : held_) num_held += static_cast<int64_t>(held.count());
  require(num_pages == num_held, "a page is held twice or by no node");
}

}  // namespace treedecode::host
