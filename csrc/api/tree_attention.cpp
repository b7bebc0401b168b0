#include "../cpu/tree_attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernel_dtype.h"
#include "launch.h"
#include "parallel.h"
#include "tree_attention_args.h"

namespace treedecode {
namespace {

// Memory that a thread keeps between calls: an allocation of this size would be mapped and faulted in on every call.
class Workspace {
 public:
  void* get(int64_t bytes) {
    if (bytes > size_) {
      size_ = 0;  // until the allocation has succeeded
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      STD_TORCH_CHECK(memory_ != nullptr, "tree_attention: out of memory for ", bytes, " bytes of scratch");
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

struct Cell {  // one row block of one chunk; its kv heads all cost the same
  int64_t chunk, row_begin, row_end;
  double begin;     // sum of the costs before it
  double per_head;  // cost, in cycles, roughly
};

struct Segment {      // of one row, with the chunks so far
  int64_t token_end;  // of the chunks
  int64_t chunks;
};

struct Position {
  size_t cell;
  int64_t head, row;
};

// Relative costs measured on one core, with vdpbf16ps and with tile registers; only their ratios matter.
double cost_of(const cpu::TreeAttentionParams& p, int64_t tokens, int64_t rows, int64_t element_size) {
  const double width = static_cast<double>(p.head_dim);
  const bool tiled = cpu::active_isa() == cpu::Isa::AmxBf16 && p.dtype == DType::BF16 && p.head_dim % cpu::kGroup == 0;
  const double product = width * (tiled ? 0.03 : element_size == 2 ? 0.08 : 0.16);  // per row and token
  const double read = width * static_cast<double>(element_size) * 0.5;
  const double token = std::max(read, 0.2 * width + product * static_cast<double>(rows));
  return 500.0 + static_cast<double>(tokens) * token + static_cast<double>(rows) * width * 0.2;
}

std::vector<Cell> cells_of(const cpu::TreeAttentionParams& p, int64_t chunk_begin, int64_t chunk_end,
                           int64_t element_size) {
  const int64_t group = p.num_qo_heads / p.num_kv_heads;
  std::vector<Cell> cells;
  cells.reserve(static_cast<size_t>(chunk_end - chunk_begin));
  double cost = 0.0;  // of the cells so far
  for (int64_t c = chunk_begin; c < chunk_end; ++c) {
    const cpu::ChainedChunk& chunk = p.chunks[c];
    const int64_t first_planned = p.row_indptr[chunk.row_begin];
    const int64_t rows = (p.row_indptr[chunk.row_end] - first_planned) * group;
    for (int64_t r = 0; r < rows; r += cpu::kBlockRows) {
      const int64_t end = std::min(rows, r + cpu::kBlockRows);
      int64_t from = chunk.token_end, to = chunk.token_begin, row = chunk.row_begin;
      for (int64_t planned = first_planned + r / group; planned <= first_planned + (end - 1) / group; ++planned) {
        const auto [token, b] = cpu::query_at(p, planned, row);
        const cpu::Visible visible = cpu::visible_keys(p, b, token - p.q_indptr[b]);
        from = std::min(from, visible.begin);
        to = std::max(to, visible.end);
      }
      const int64_t tokens =
          std::max<int64_t>(std::min<int64_t>(to, chunk.token_end) - std::max<int64_t>(from, chunk.token_begin), 0);
      cells.push_back({c, r, end, cost, cost_of(p, tokens, end - r, element_size)});
      cost += cells.back().per_head * static_cast<double>(p.num_kv_heads);
    }
  }
  return cells;
}

// Returns the position at which `share` of the total cost is reached. A cell is cut between rows too, but not into
// pieces of a few rows, because each piece packs the keys again.
Position cut(const std::vector<Cell>& cells, int64_t num_kv_heads, double share) {
  const double total = cells.back().begin + cells.back().per_head * static_cast<double>(num_kv_heads);
  const double target = total * share;
  const auto after =
      std::upper_bound(cells.begin(), cells.end(), target, [](double x, const Cell& c) { return x < c.begin; });
  const size_t i = static_cast<size_t>(after - cells.begin()) - 1;
  const Cell& cell = cells[i];
  const double heads = (target - cell.begin) / cell.per_head;
  const int64_t head = std::min(static_cast<int64_t>(heads), num_kv_heads - 1);
  const int64_t rows = cell.row_end - cell.row_begin;
  constexpr int64_t kMinRows = 12, kStep = 6;
  const double part = heads - static_cast<double>(head);
  int64_t row = static_cast<int64_t>(std::lround(part * static_cast<double>(rows) / kStep)) * kStep;
  if (rows < 2 * kMinRows) {
    row = part < 0.5 ? 0 : rows;
  } else if (row < kMinRows) {
    row = 0;
  } else if (row > rows - kMinRows) {
    row = rows;
  }
  return {i, head, cell.row_begin + row};
}

void run_between(const cpu::TreeAttentionParams& p, const std::vector<Cell>& cells, Position from, Position to) {
  thread_local Workspace workspace;
  thread_local std::vector<cpu::TreeAttentionItem> items;
  items.clear();
  for (size_t i = from.cell; i <= to.cell && i < cells.size(); ++i) {
    const int64_t head_begin = i == from.cell ? from.head : 0;
    const int64_t head_end = i == to.cell ? to.head + 1 : p.num_kv_heads;
    for (int64_t head = head_begin; head < head_end; ++head) {
      const int64_t begin = i == from.cell && head == from.head ? from.row : cells[i].row_begin;
      const int64_t end = i == to.cell && head == to.head ? to.row : cells[i].row_end;
      if (begin < end) items.push_back({cells[i].chunk, head, begin, end});
    }
  }
  void* scratch = workspace.get(cpu::tree_attention_scratch(p.head_dim));
  TD_DISPATCH(tree_attention)(p, items.data(), static_cast<int64_t>(items.size()), scratch);
}

void run_round(const cpu::TreeAttentionParams& p, const std::vector<Cell>& cells) {
  if (cells.empty()) return;
  const double total = cells.back().begin + cells.back().per_head * static_cast<double>(p.num_kv_heads);
  // Waking a thread costs about as much as 20,000 cycles of work.
  const int64_t pieces = std::clamp<int64_t>(static_cast<int64_t>(total / 20000.0), 1, max_pieces());
  const auto position = [&](int64_t i) {
    return i == pieces ? Position{cells.size(), 0, 0}
                       : cut(cells, p.num_kv_heads, static_cast<double>(i) / static_cast<double>(pieces));
  };
  parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_between(p, cells, position(i), position(i + 1));
  });
}

}  // namespace

namespace {

// Checks that the plan's order has every branch once, with its query tokens.
void check_order(const cpu::TreeAttentionParams& p) {
  std::vector<bool> is_seen(static_cast<size_t>(p.num_rows));
  STD_TORCH_CHECK(p.row_indptr[0] == 0, "[ValueError] plan: expected row_indptr from 0, got ", p.row_indptr[0]);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t b = p.order[row];
    STD_TORCH_CHECK(b >= 0 && b < p.num_rows && !is_seen[static_cast<size_t>(b)],
                    "[ValueError] plan: expected every branch once in order, got ", b, " at index ", row);
    is_seen[static_cast<size_t>(b)] = true;
    STD_TORCH_CHECK(int64_t{p.row_indptr[row + 1]} - p.row_indptr[row] == p.q_indptr[b + 1] - p.q_indptr[b],
                    "[ValueError] plan: q_indptr and row_indptr differ in the query tokens of branch ", b);
  }
}

}  // namespace

// Checks the plan and the page ids of its chunks, in one pass.
void check_plan(const cpu::TreeAttentionParams& p, int64_t num_q, int64_t num_pages, int64_t max_pages,
                int64_t max_chunks, const cpu::PlanCounts& counts) {
  const int64_t num_chunks = counts.num_chunks, num_parts = counts.num_parts;
  STD_TORCH_CHECK(counts.num_tiles == 0,
                  "[ValueError] plan: is flat, for a GPU; plan_tree(..., num_workers=0) makes one for the CPU");
  STD_TORCH_CHECK(num_chunks >= 0 && num_chunks <= max_chunks && num_parts >= 0,
                  "[ValueError] plan.counts: expected at most ", max_chunks, " chunks, got ", num_chunks, " and ",
                  num_parts, " parts");
  STD_TORCH_CHECK(p.q_indptr[0] == 0 && p.q_indptr[p.num_rows] <= num_q,
                  "[ValueError] plan: expected q_indptr from 0 to at most the number of query tokens ", num_q, ", got ",
                  p.q_indptr[0], " to ", p.q_indptr[p.num_rows], " (was the plan made for this batch?)");
  STD_TORCH_CHECK(p.part_indptr[0] == 0 && p.part_indptr[p.num_rows] == num_parts,
                  "[ValueError] plan: expected part_indptr from 0 to ", num_parts, ", got ", p.part_indptr[0], " to ",
                  p.part_indptr[p.num_rows]);
  for (int64_t b = 0; b < p.num_rows; ++b) {
    STD_TORCH_CHECK(p.q_indptr[b] <= p.q_indptr[b + 1] && p.part_indptr[b] <= p.part_indptr[b + 1],
                    "[ValueError] plan: q_indptr or part_indptr decreases after row ", b);
  }
  check_order(p);
  int64_t path_tokens = 0;
  for (int64_t b = 0; b < p.num_rows; ++b) path_tokens += p.q_indptr[b] < p.q_indptr[b + 1] ? p.seq_lens[b] : 0;
  STD_TORCH_CHECK(path_tokens == counts.path_tokens,
                  "[ValueError] plan: was made for seq_lens of branches with queries that add up to ",
                  counts.path_tokens, " tokens, got ", path_tokens);
  STD_TORCH_CHECK(p.page_size == counts.page_size, "[ValueError] plan: was made for pages of ", counts.page_size,
                  " tokens, got ", p.page_size);
  std::vector<Segment> segments;
  std::vector<size_t> first_segment;  // of each row
  for (int64_t b = 0; b < p.num_rows; ++b) {
    first_segment.push_back(segments.size());
    const int64_t q_len = p.q_indptr[b + 1] - p.q_indptr[b], seq_len = p.seq_lens[b];
    if (q_len == 0) continue;
    STD_TORCH_CHECK(seq_len >= 0 && seq_len <= max_pages * p.page_size, "[ValueError] seq_lens: expected 0 to ",
                    max_pages * p.page_size, ", got ", seq_len);
    const int64_t parts = (seq_len + cpu::kSegment - 1) / cpu::kSegment;
    STD_TORCH_CHECK(p.part_indptr[b + 1] - p.part_indptr[b] == q_len * parts, "[ValueError] plan: expected ", parts,
                    " parts per query token of row ", b, ", got ", p.part_indptr[b + 1] - p.part_indptr[b], " for ",
                    q_len);
    for (int64_t i = 0; i < parts; ++i) segments.push_back({i * cpu::kSegment, 0});
  }
  for (int64_t c = 0; c < num_chunks; ++c) {
    const cpu::ChainedChunk& chunk = p.chunks[c];
    const bool ok = 0 <= chunk.row_begin && chunk.row_begin < chunk.row_end && chunk.row_end <= p.num_rows &&
                    0 <= chunk.token_begin && chunk.token_begin < chunk.token_end &&
                    chunk.token_end <= max_pages * p.page_size && chunk.segment == chunk.token_begin / cpu::kSegment &&
                    chunk.segment == (chunk.token_end - 1) / cpu::kSegment &&
                    (c ? p.chunks[c - 1].round <= chunk.round : chunk.round == 0);
    STD_TORCH_CHECK(ok, "[ValueError] plan: chunk ", c, " covers rows [", chunk.row_begin, ", ", chunk.row_end,
                    ") and tokens [", chunk.token_begin, ", ", chunk.token_end, ") of segment ", chunk.segment,
                    " in round ", chunk.round, ", which does not fit this batch of ", p.num_rows, " rows and ",
                    max_pages * p.page_size, " tokens");
    const int64_t first_page = chunk.token_begin / p.page_size, first = p.order[chunk.row_begin];
    for (int64_t row = chunk.row_begin; row < chunk.row_end; ++row) {
      const int64_t b = p.order[row];
      if (p.q_indptr[b] == p.q_indptr[b + 1]) continue;
      STD_TORCH_CHECK(chunk.segment < cpu::num_parts(p, b), "[ValueError] plan: chunk ", c, " is in segment ",
                      chunk.segment, " of row ", b, ", which has ", cpu::num_parts(p, b));
      Segment& segment = segments[first_segment[static_cast<size_t>(b)] + static_cast<size_t>(chunk.segment)];
      STD_TORCH_CHECK(
          chunk.token_begin == segment.token_end && chunk.token_begin < p.seq_lens[b] && chunk.round == segment.chunks,
          "[ValueError] plan: chunk ", c, " does not go on where the one before of row ", b, " ends");
      segment = {chunk.token_end, segment.chunks + 1};
      const int64_t last_page = (std::min(chunk.token_end, p.seq_lens[b]) - 1) / p.page_size;
      for (const int64_t page : {first_page, last_page}) {
        const int32_t* column = p.page_table + page;
        STD_TORCH_CHECK(column[b * p.page_table_stride] == column[first * p.page_table_stride],
                        "[ValueError] plan: was made for another page_table: rows ", first, " and ", b,
                        " do not share the page at ", page);
      }
    }
    const int32_t* pages = p.page_table + first * p.page_table_stride;
    // A kernel may go back to the group of keys that the chunk begins in.
    for (int64_t i = chunk.token_begin / cpu::kGroup * cpu::kGroup / p.page_size; i * p.page_size < chunk.token_end;
         ++i) {
      STD_TORCH_CHECK(pages[i] >= 0 && pages[i] < num_pages, "[ValueError] page_table: expected page ids below ",
                      num_pages, ", got ", pages[i], " at [", first, ", ", i, "]");
    }
  }
  for (int64_t b = 0; b < p.num_rows; ++b) {
    const int64_t parts = cpu::num_parts(p, b), seq_len = p.seq_lens[b];
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t token_end = segments[first_segment[static_cast<size_t>(b)] + static_cast<size_t>(i)].token_end;
      STD_TORCH_CHECK(token_end >= std::min(seq_len, (i + 1) * cpu::kSegment),
                      "[ValueError] plan: its chunks end at token ", token_end, " of row ", b, ", which has ", seq_len);
    }
  }
}

void check_sinks(const float* sinks, int64_t num_qo_heads, const char* name) {
  for (int64_t h = 0; h < num_qo_heads; ++h) {
    check_value(sinks[h] < std::numeric_limits<float>::infinity(), name, "numbers below +inf", sinks[h]);
  }
}

void launch(cpu::TreeAttentionParams p, const cpu::PlanCounts& counts, int64_t num_q) {
  const int64_t num_chunks = counts.num_chunks, num_parts = counts.num_parts;
  const int64_t element_size = p.dtype == DType::F32 ? 4 : 2;
  bool merge = false;
  for (int64_t b = 0; b < p.num_rows; ++b) merge |= p.q_indptr[b] < p.q_indptr[b + 1] && cpu::num_parts(p, b) != 1;
  const bool has_rounds = num_chunks && p.chunks[num_chunks - 1].round > 0;
  if (merge || has_rounds) {
    thread_local Workspace parts;
    p.parts = static_cast<float*>(parts.get(num_parts * p.num_qo_heads * cpu::part_stride(p.head_dim) * 4));
  }
  for (int64_t begin = 0, end; begin < num_chunks; begin = end) {
    for (end = begin + 1; end < num_chunks && p.chunks[end].round == p.chunks[begin].round;) ++end;
    run_round(p, cells_of(p, begin, end, element_size));
  }
  if (merge) {
    parallel_for(0, p.num_rows, std::max<int64_t>(1, 65536 / (p.num_qo_heads * p.head_dim)),
                 [&](int64_t begin, int64_t end) { TD_DISPATCH(tree_attention_merge)(p, begin, end); });
  }
  // Tokens that belong to no branch get zeros and -inf.
  const int64_t first_idle = p.q_indptr[p.num_rows] * p.num_qo_heads;
  const int64_t row_bytes = p.head_dim * element_size;
  std::fill_n(static_cast<char*>(p.out) + first_idle * row_bytes, (num_q * p.num_qo_heads - first_idle) * row_bytes,
              '\0');
  if (p.lse) std::fill(p.lse + first_idle, p.lse + num_q * p.num_qo_heads, -std::numeric_limits<float>::infinity());
}

namespace {

void tree_attention_cpu(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, Tensor q_indptr,
                        Tensor part_indptr, Tensor chunks, Tensor counts, Tensor order, Tensor row_indptr, Tensor out,
                        std::optional<Tensor> lse, double sm_scale, int64_t window_left, double logits_soft_cap,
                        std::optional<Tensor> sinks, bool checks_plan) {
  check_tree_attention(q, k_pages, v_pages, page_table, seq_lens, q_indptr, part_indptr, chunks, counts, order,
                       row_indptr, out, lse, sm_scale, window_left, logits_soft_cap, sinks);
  choose_threads(Threads::Torch);
  const int64_t num_q = q.size(0), num_qo_heads = q.size(1), head_dim = q.size(2), num_kv_heads = k_pages.size(2);
  const int64_t num_rows = page_table.size(0);
  if (sinks) check_sinks(sinks->const_data_ptr<float>(), num_qo_heads, "sinks");
  const cpu::TreeAttentionParams p{
      .q = q.const_data_ptr(),
      .k_pages = k_pages.const_data_ptr(),
      .v_pages = v_pages.const_data_ptr(),
      .page_table = page_table.const_data_ptr<int32_t>(),
      .seq_lens = seq_lens.const_data_ptr<int32_t>(),
      .q_indptr = q_indptr.const_data_ptr<int32_t>(),
      .part_indptr = part_indptr.const_data_ptr<int32_t>(),
      .order = order.const_data_ptr<int32_t>(),
      .row_indptr = row_indptr.const_data_ptr<int32_t>(),
      .chunks = rows_of<cpu::ChainedChunk>(chunks),
      .sinks = sinks ? sinks->const_data_ptr<float>() : nullptr,
      .out = out.mutable_data_ptr(),
      .lse = lse ? lse->mutable_data_ptr<float>() : nullptr,
      .parts = nullptr,
      .num_rows = num_rows,
      .num_qo_heads = num_qo_heads,
      .num_kv_heads = num_kv_heads,
      .head_dim = head_dim,
      .page_size = k_pages.size(1),
      .page_table_stride = page_table.stride(0),
      .q_stride = {q.stride(0), q.stride(1)},
      .k_stride = {k_pages.stride(0), k_pages.stride(1), k_pages.stride(2)},
      .v_stride = {v_pages.stride(0), v_pages.stride(1), v_pages.stride(2)},
      .sm_scale = static_cast<float>(sm_scale),
      .soft_cap = static_cast<float>(logits_soft_cap),
      .window_left = window_left,
      .dtype = kernel_dtype(q),
  };
  const auto& plan_counts = *rows_of<cpu::PlanCounts>(counts);
  if (checks_plan) check_plan(p, num_q, k_pages.size(0), page_table.size(1), chunks.size(0), plan_counts);
  launch(p, plan_counts, num_q);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(treedecode, CPU, m) { m.impl("tree_attention", TORCH_BOX(&tree_attention_cpu)); }

}  // namespace treedecode
