// Runs the CPU kernels on all threads, with checked arguments. Used by ops of one kernel and by decoder_forward.
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

// Computes num_q query tokens. Sets `parts` of p.
void launch(cpu::TreeAttentionParams p, const cpu::PlanCounts& counts, int64_t num_q);

// Raise an error for a bad name or bad values.
cpu::Gate gate_of(const std::string& name);
void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots);
void check_sinks(const float* sinks, int64_t num_qo_heads, const char* name);
// Checks everything that tree_attention uses as an address.
void check_plan(const cpu::TreeAttentionParams& p, int64_t num_q, int64_t num_pages, int64_t max_pages,
                int64_t max_chunks, const cpu::PlanCounts& counts);

}  // namespace treedecode
