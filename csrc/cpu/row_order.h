// The order in which plan_tree takes the rows of a page table: rows that share pages are neighbours.
#pragma once

#include "plan_tree.h"

namespace treedecode::cpu {

// Sets shared[i] to the number of leading pages that the rows order[i - 1] and order[i] share, for i in
// [begin, end); shared[0] = 0. Entries are independent, so that ranges may be computed in parallel.
void common_pages(const PlanTreeParams& p, int32_t* shared /* [num_rows] */, int64_t begin, int64_t end);

// Returns whether any two rows share no more pages than all rows between them do: no order would find more.
bool is_depth_first(const PlanTreeParams& p, const int32_t* shared /* [num_rows] */);

// Orders the rows by their page ids, lexicographically; of equal ones the first comes first.
void sort_rows(const PlanTreeParams& p);

}  // namespace treedecode::cpu
