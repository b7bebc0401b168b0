#include "beam_update.h"

#include <cmath>
#include <limits>

namespace treedecode::cpu {
namespace {

// Added to the score and never assigned: the order of such beams after rounding is part of the semantics.
constexpr float kBanned = -1.0e9f;

struct Group {
  const float* scores;    // [limit]
  const int32_t* parent;  // [limit]
  const int32_t* token;   // [limit]
  const bool* stop;       // [limit] or null
  int64_t limit;          // candidates that count
  bool last_step;
};

bool is_hit(const BeamUpdateParams& p, const Group& g, int64_t rank) {
  if (g.last_step || (g.stop != nullptr && g.stop[rank])) return true;
  for (int64_t i = 0; i < p.num_eos; ++i) {
    if (g.token[rank] == p.eos_ids[i]) return true;
  }
  return false;
}

// Returns the next rank from `rank` on whose candidate is (or is not) a hit; limit when there is none. Absent ones come
// last.
int64_t next_rank(const BeamUpdateParams& p, const Group& g, int64_t rank, bool hit) {
  while (rank < g.limit && g.parent[rank] >= 0 && is_hit(p, g, rank) != hit) ++rank;
  return rank < g.limit && g.parent[rank] >= 0 ? rank : g.limit;
}

// Merges two descending sequences: candidates that go on, and candidates that hit an end, with kBanned added.
void choose_running(const BeamUpdateParams& p, const Group& g, int64_t row_begin, int64_t beam_begin,
                    int64_t num_beams) {
  int64_t open = next_rank(p, g, 0, false);
  int64_t ended = next_rank(p, g, 0, true);
  for (int64_t i = beam_begin; i < beam_begin + num_beams; ++i) {
    if (open == g.limit && ended == g.limit) {
      p.running_scores[i] = -std::numeric_limits<float>::infinity();
      p.running_parent[i] = static_cast<int32_t>(row_begin);
      p.running_token[i] = 0;
      continue;
    }
    const float open_score = open < g.limit ? g.scores[open] : 0.0f;
    const float ended_score = ended < g.limit ? g.scores[ended] + kBanned : 0.0f;
    const bool take_open =
        ended == g.limit ||
        (open < g.limit && (open_score > ended_score || (open_score == ended_score && open < ended)));
    const int64_t rank = take_open ? open : ended;
    p.running_scores[i] = take_open ? open_score : ended_score;
    p.running_parent[i] = g.parent[rank];
    p.running_token[i] = g.token[rank];
    if (take_open) open = next_rank(p, g, rank + 1, false);
    else ended = next_rank(p, g, rank + 1, true);
  }
}

// Merges the candidates that hit an end into the pool, those among the first num_beams candidates. Both lists are
// descending, and old entries win ties. The merge runs backwards, because the pool is updated in place.
void merge_into_pool(const BeamUpdateParams& p, const Group& g, int64_t row_begin, int64_t beam_begin,
                     int64_t num_beams, int32_t new_len) {
  const float divisor = static_cast<float>(std::pow(static_cast<double>(new_len), p.length_penalty));
  float* scores = p.pool_scores + beam_begin;
  const int64_t num_eligible = g.limit < num_beams ? g.limit : num_beams;

  int64_t num_old = 0;  // of the winners
  int64_t end = 0;      // one past the last rank that wins
  for (int64_t rank = next_rank(p, g, 0, true), num_new = 0; num_old + num_new < num_beams;) {
    if (rank < num_eligible && g.scores[rank] / divisor > scores[num_old]) {
      ++num_new;
      end = rank + 1;
      rank = next_rank(p, g, rank + 1, true);
    } else {
      ++num_old;
    }
  }
  int64_t rank = end - 1;
  for (int64_t i = num_beams - 1; rank >= 0; --i) {
    const float score = g.scores[rank] / divisor;
    const bool take_new = num_old == 0 || score <= scores[num_old - 1];
    const int64_t to = beam_begin + i;
    if (take_new) {
      p.pool_scores[to] = score;
      p.pool_lens[to] = new_len;
      p.pool_parents[to] = g.parent[rank] - static_cast<int32_t>(row_begin);
      p.pool_tokens[to] = g.token[rank];
      do --rank;
      while (rank >= 0 && !is_hit(p, g, rank));
    } else {
      const int64_t from = beam_begin + --num_old;
      p.pool_scores[to] = p.pool_scores[from];
      p.pool_lens[to] = p.pool_lens[from];
      p.pool_parents[to] = p.pool_parents[from];
      p.pool_tokens[to] = p.pool_tokens[from];
    }
  }
}

bool is_final(const BeamUpdateParams& p, const Group& g, int64_t group, int64_t beam_begin, int64_t num_beams,
              int32_t new_len) {
  if (next_rank(p, g, 0, false) == g.limit) return true;  // no beam can go on
  bool full = true;
  for (int64_t i = beam_begin; i < beam_begin + num_beams; ++i) full = full && p.pool_lens[i] > 0;
  if (full && p.early_stopping == 1) return true;
  const bool by_max_len = p.early_stopping == 2 && p.length_penalty > 0.0;
  const double len = by_max_len ? p.max_new_tokens[group] : new_len;
  const float best = p.running_scores[beam_begin] / static_cast<float>(std::pow(len, p.length_penalty));
  const float worst = full ? p.pool_scores[beam_begin + num_beams - 1] : kBanned;
  return !(best > worst);
}

}  // namespace

void beam_update(const BeamUpdateParams& p, int64_t group_begin, int64_t group_end) {
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t row_begin = p.row_indptr[group];
    const int64_t row_end = p.row_indptr[group + 1];
    const int64_t beam_begin = p.beam_indptr[group];
    const int64_t num_beams = p.beam_indptr[group + 1] - beam_begin;
    if (p.done[group]) {
      for (int64_t i = 0; i < num_beams; ++i) {
        p.running_scores[beam_begin + i] = -std::numeric_limits<float>::infinity();
        p.running_parent[beam_begin + i] = static_cast<int32_t>(row_begin + i < row_end ? row_begin + i : row_begin);
        p.running_token[beam_begin + i] = 0;
      }
      continue;
    }
    const int32_t new_len = p.gen_lens[group] + 1;
    const int64_t first = group * p.num_candidates;
    const Group g{p.scores + first,
                  p.parent + first,
                  p.token + first,
                  p.stop != nullptr ? p.stop + first : nullptr,
                  beam_candidates(num_beams, p.num_eos),
                  new_len >= p.max_new_tokens[group]};
    choose_running(p, g, row_begin, beam_begin, num_beams);
    merge_into_pool(p, g, row_begin, beam_begin, num_beams, new_len);
    p.done[group] = is_final(p, g, group, beam_begin, num_beams, new_len);
  }
}

}  // namespace treedecode::cpu
