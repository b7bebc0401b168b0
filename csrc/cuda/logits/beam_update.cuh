#pragma once

#include <cmath>

#include "../common/collectives.cuh"
#include "beam_update.h"

namespace treedecode::cuda {

inline constexpr int kBeamUpdateThreads = 128;

struct BeamGroup {
  // Added to the score and never assigned: the order of such beams after rounding is part of the semantics.
  static constexpr float kBanned = -1.0e9f;

  const BeamUpdateParams& p;
  int64_t group;
  int64_t row_begin, row_end, beam_begin;
  int num_beams;

  const float* scores;    // [num_candidates]
  const int32_t* parent;  // [num_candidates]
  const int32_t* token;   // [num_candidates]
  int32_t* open;          // [num_open] ranks of the candidates that go on
  int32_t* ended;         // [num_ended] ranks of those that hit an end
  int32_t* pool_ranks;    // [num_new] ranks in the pool of those that enter it
  int limit;              // candidates that count
  int num_open = 0, num_ended = 0;

  __device__ BeamGroup(const BeamUpdateParams& params, int64_t index) : p(params), group(index) {
    row_begin = p.row_indptr[group];
    row_end = p.row_indptr[group + 1];
    beam_begin = p.beam_indptr[group];
    num_beams = static_cast<int>(p.beam_indptr[group + 1] - beam_begin);
    scores = p.scores + group * p.num_candidates;
    parent = p.parent + group * p.num_candidates;
    token = p.token + group * p.num_candidates;
    open = p.lists + 3 * group * p.num_candidates;
    ended = open + p.num_candidates;
    pool_ranks = ended + p.num_candidates;
    const int64_t need = (p.num_eos < 1 ? 2 : 1 + p.num_eos) * num_beams;
    limit = need <= p.num_candidates ? static_cast<int>(need) : -1;
  }

  __device__ bool owns_beams() const {
    return p.beam_indptr[0] == 0 && p.beam_indptr[p.num_groups] == p.num_beams && beam_begin >= 0 && num_beams > 0 &&
           beam_begin + num_beams <= p.num_beams;
  }
  __device__ bool owns_rows() const { return p.row_indptr[0] == 0 && row_begin >= 0 && row_begin < row_end; }

  // True if the candidates are such as beam_prune returns. The whole block calls it.
  __device__ bool candidates_fit() const {
    if (limit < 0 || p.gen_lens[group] < 0 || p.gen_lens[group] >= p.max_new_tokens[group]) return false;
    bool bad = false;
    for (int i = ptx::thread(); i < limit; i += kBeamUpdateThreads) {
      bad |= i == 0 ? scores[i] != scores[i] : !(scores[i - 1] >= scores[i]);
      bad |= parent[i] != -1 && (parent[i] < row_begin || parent[i] >= row_end);
      bad |= i > 0 && parent[i - 1] < 0 && parent[i] >= 0;
    }
    return !ptx::sync_threads_or(bad);
  }

  __device__ bool is_hit(int rank) const {
    if (p.gen_lens[group] + 1 >= p.max_new_tokens[group]) return true;
    bool hit = p.stop && p.stop[group * p.num_candidates + rank];
    for (int64_t i = 0; i < p.num_eos; ++i) hit |= token[rank] == p.eos_ids[i];
    return hit;
  }

  __device__ void fill_running(float score, int64_t first_parent, int32_t tok) const {
    for (int i = ptx::thread(); i < num_beams; i += kBeamUpdateThreads) {
      const int64_t row = first_parent < 0 ? -1 : row_begin + i < row_end ? row_begin + i : row_begin;
      p.running_scores[beam_begin + i] = score;
      p.running_parent[beam_begin + i] = static_cast<int32_t>(row);
      p.running_token[beam_begin + i] = tok;
    }
  }

  __device__ void list_candidates() {
    for (int begin = 0; begin < limit; begin += kBeamUpdateThreads) {
      const int rank = begin + ptx::thread();
      const bool present = rank < limit && parent[rank] >= 0, hit = present && is_hit(rank);
      const BlockScan<int> opens = block_scan<int>(present && !hit), ends = block_scan<int>(hit);
      if (present) (hit ? ended[num_ended + ends.before] : open[num_open + opens.before]) = rank;
      num_open += opens.total;
      num_ended += ends.total;
    }
    ptx::sync_threads();
  }

  // Returns how many of the first n numbers satisfy `before`, which holds for a leading part of them.
  template <typename Before>
  __device__ static int count_leading(int n, const Before& before) {
    int low = 0;
    while (low < n) {
      const int middle = low + (n - low) / 2;
      if (before(middle)) low = middle + 1;
      else n = middle;
    }
    return low;
  }

  // Merges two descending sequences: candidates that go on, and candidates that hit an end, with kBanned added. The
  // rank of a candidate is its rank in its own sequence plus the number of candidates of the other one that come before
  // it.
  __device__ void choose_running() const {
    const auto write = [&](int beam, float score, int64_t row, int32_t tok) {
      if (beam >= num_beams) return;
      p.running_scores[beam_begin + beam] = score;
      p.running_parent[beam_begin + beam] = static_cast<int32_t>(row);
      p.running_token[beam_begin + beam] = tok;
    };
    for (int i = ptx::thread(); i < num_open && i < num_beams; i += kBeamUpdateThreads) {
      const int rank = open[i];
      const float score = scores[rank];
      const int num_before = count_leading(num_ended, [&](int e) {
        const float other = scores[ended[e]] + kBanned;
        return other > score || (other == score && ended[e] < rank);
      });
      write(i + num_before, score, parent[rank], token[rank]);
    }
    for (int i = ptx::thread(); i < num_ended && i < num_beams; i += kBeamUpdateThreads) {
      const int rank = ended[i];
      const float score = scores[rank] + kBanned;
      const int num_before = count_leading(num_open, [&](int o) {
        const float other = scores[open[o]];
        return other > score || (other == score && open[o] < rank);
      });
      write(i + num_before, score, parent[rank], token[rank]);
    }
    for (int i = num_open + num_ended + ptx::thread(); i < num_beams; i += kBeamUpdateThreads) {
      write(i, -INFINITY, row_begin, 0);
    }
  }

  // Merges the candidates that hit an end into the pool, those among the first num_beams candidates. Both lists are
  // descending, and old entries win ties. The pool is updated in place: entries only move down, so parts of it are
  // moved one after another, the last part first.
  __device__ void merge_into_pool(int32_t new_len, float divisor) const {
    float* pool = p.pool_scores + beam_begin;
    const int num_eligible = limit < num_beams ? limit : num_beams;
    const int num_new = count_leading(num_ended, [&](int e) { return ended[e] < num_eligible; });
    for (int i = ptx::thread(); i < num_new; i += kBeamUpdateThreads) {
      const float score = scores[ended[i]] / divisor;
      pool_ranks[i] = i + count_leading(num_beams, [&](int o) { return !(score > pool[o]); });
    }
    for (int tile = (num_beams - 1) / kBeamUpdateThreads; tile >= 0; --tile) {
      const int i = tile * kBeamUpdateThreads + ptx::thread();
      const int64_t from = beam_begin + i;
      int pool_rank = num_beams;
      float score = 0.0f;
      int32_t len = 0, beam = 0, last = 0;
      if (i < num_beams) {
        score = p.pool_scores[from];
        len = p.pool_lens[from];
        beam = p.pool_parents[from];
        last = p.pool_tokens[from];
        pool_rank = i + count_leading(num_new, [&](int e) { return scores[ended[e]] / divisor > score; });
      }
      ptx::sync_threads();  // all threads have read this part and those after it, which entries move to now
      if (pool_rank < num_beams) write_pool(pool_rank, score, len, beam, last);
    }
    for (int i = ptx::thread(); i < num_new; i += kBeamUpdateThreads) {
      const int rank = ended[i];
      if (pool_ranks[i] >= num_beams) continue;
      write_pool(pool_ranks[i], scores[rank] / divisor, new_len, parent[rank] - static_cast<int32_t>(row_begin),
                 token[rank]);
    }
    ptx::sync_threads();
  }
  __device__ void write_pool(int rank, float score, int32_t len, int32_t beam, int32_t last) const {
    p.pool_scores[beam_begin + rank] = score;
    p.pool_lens[beam_begin + rank] = len;
    p.pool_parents[beam_begin + rank] = beam;
    p.pool_tokens[beam_begin + rank] = last;
  }

  __device__ bool is_final(int32_t new_len, float divisor) const {
    bool has_free = false;
    for (int i = ptx::thread(); i < num_beams; i += kBeamUpdateThreads) has_free |= p.pool_lens[beam_begin + i] <= 0;
    const bool full = !ptx::sync_threads_or(has_free);
    if (num_open == 0) return true;  // no beam can go on
    if (full && p.early_stopping == 1) return true;
    if (p.early_stopping == 2 && p.length_penalty > 0.0) {
      divisor = static_cast<float>(pow(static_cast<double>(p.max_new_tokens[group]), p.length_penalty));
    }
    const float worst = full ? p.pool_scores[beam_begin + num_beams - 1] : kBanned;
    return !(p.running_scores[beam_begin] / divisor > worst);
  }
};

__global__ void __launch_bounds__(kBeamUpdateThreads, 4)
    _beam_update_kernel(const __grid_constant__ BeamUpdateParams p) {
  BeamGroup g(p, ptx::block_x());
  if (!g.owns_beams()) return;
  const bool done = p.done[g.group];
  if (!g.owns_rows() || (!done && !g.candidates_fit())) {
    g.fill_running(NAN, -1, -1);
    return;
  }
  if (done) {
    g.fill_running(-INFINITY, g.row_begin, 0);
    return;
  }
  const int32_t new_len = p.gen_lens[g.group] + 1;
  const float divisor = static_cast<float>(pow(static_cast<double>(new_len), p.length_penalty));
  g.list_candidates();
  g.choose_running();
  g.merge_into_pool(new_len, divisor);
  const bool final = g.is_final(new_len, divisor);
  if (ptx::thread() == 0) p.done[g.group] = final;
}

}  // namespace treedecode::cuda
