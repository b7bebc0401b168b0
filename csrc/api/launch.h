// The CPU kernels on all threads, for the ops' entry points and for those that run several kernels in a row. Arguments
// are checked by then.
#pragma once

#include <string>

#include "../cpu/append_kv.h"
#include "../cpu/packed_linear.h"
#include "../cpu/rms_norm.h"
#include "../cpu/rotary_embed.h"
#include "../cpu/tree_attention.h"

namespace treedecode {

void launch(const cpu::PackedLinearParams& p);
void launch(const cpu::RmsNormParams& p, int64_t num_rows);
void launch(const cpu::RotaryEmbedParams& p, int64_t num_tokens);
void launch(const cpu::AppendKvParams& p);

// Takes num_q query tokens; `parts` of p is set here.
void launch(cpu::TreeAttentionParams p, const cpu::PlanCounts& counts, int64_t num_q);

// Raises for what a name or values may not be.
cpu::Gate gate_of(const std::string& name);
void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots);
void check_sinks(const float* sinks, int64_t num_qo_heads, const char* name);
// Everything that tree_attention will use as an address.
void check_plan(const cpu::TreeAttentionParams& p, int64_t num_q, int64_t num_pages, int64_t max_pages,
                int64_t max_chunks, const cpu::PlanCounts& counts);

}  // namespace treedecode
