// The schemas of all ops. Kernels are registered per backend in api/<op>.cpp and api/cuda/<op>.cpp. The CUDA library
// compiles this file too, for the namespace treedecode_cuda. Its ops take tensors of any device and refuse them after
// all other checks, so that the checks are tested without a GPU.
#include <torch/csrc/stable/library.h>

#ifndef TD_LIBRARY
#define TD_LIBRARY treedecode
#endif
#define TD_DEFINE_LIBRARY(name) STABLE_TORCH_LIBRARY(name, m)

TD_DEFINE_LIBRARY(TD_LIBRARY) {
  m.def("append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()");
  m.def(
      "fork_branches(Tensor(a!) refcount, Tensor(b!) free_pages, Tensor(c!) page_table, Tensor(d!) seq_lens, "
      "Tensor(e!) status, Tensor src, Tensor dst, Tensor? lens, int page_size) -> ()");
  m.def(
      "append_slots(Tensor(a!) refcount, Tensor(b!) free_pages, Tensor(c!) page_table, Tensor(d!) seq_lens, "
      "Tensor(e!) status, Tensor(f!) kv, Tensor(g!) slots, Tensor rows, Tensor? q_lens, int page_size) -> ()");
  m.def("hold_pages(Tensor(a!) refcount, Tensor(b!) free_pages, Tensor(c!) status, Tensor pages, bool hold) -> ()");
  m.def(
      "adopt_pages(Tensor(a!) refcount, Tensor(b!) page_table, Tensor(c!) seq_lens, Tensor(d!) status, Tensor pages, "
      "int row, int num_tokens, int page_size) -> ()");
  m.def("copy_pages(Tensor(a!) kv, Tensor src, Tensor dst, Tensor? num_tokens) -> ()");
  m.def(
      "beam_prune(Tensor logits, Tensor cum_logprobs, Tensor group_indptr, int num_candidates, Tensor? token_mask, "
      "bool is_logprobs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor "
      "position, "
      "Tensor? token_mask) -> (Tensor, Tensor, Tensor)");
  m.def("_cpu_isa(int isa) -> (int, int, int)");
  m.def("_cpu_threads(str root) -> (int, int)");
  m.def(
      "plan_tree(Tensor page_table, Tensor seq_lens, Tensor? q_lens, int page_size, int num_qo_heads, int "
      "num_kv_heads, "
      "int head_dim, int num_workers) -> (Tensor q_indptr, Tensor part_indptr, Tensor chunks, Tensor counts, "
      "Tensor order, Tensor row_indptr)");
  m.def("merge_states(Tensor part_out, Tensor part_lse, Tensor merge_indptr) -> (Tensor out, Tensor lse)");
  m.def(
      "beam_update(Tensor scores, Tensor parent, Tensor token, Tensor row_indptr, Tensor beam_indptr, "
      "Tensor(a!) pool_scores, Tensor(b!) pool_lens, Tensor(c!) pool_parents, Tensor(d!) pool_tokens, Tensor(e!) done, "
      "Tensor gen_lens, Tensor max_new_tokens, Tensor eos_ids, float length_penalty, int early_stopping, Tensor? stop) "
      "-> (Tensor running_scores, Tensor running_parent, Tensor running_token)");
  m.def(
      "tree_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor seq_lens, Tensor q_indptr, "
      "Tensor part_indptr, Tensor chunks, Tensor counts, Tensor order, Tensor row_indptr, Tensor(a!) out, "
      "Tensor(b!)? lse, float sm_scale, int window_left, float logits_soft_cap, Tensor? sinks, bool checks_plan) -> "
      "()");
  m.def("packed_linear(Tensor x, Tensor weight, int out_features, Tensor? bias, Tensor? residual, str gate) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool unit_offset) -> Tensor");
  m.def(
      "decoder_forward(Tensor x, Tensor cos, Tensor sin, Tensor(a!) kv, Tensor slots, Tensor page_table, "
      "Tensor seq_lens, Tensor q_indptr, Tensor part_indptr, Tensor chunks, Tensor counts, Tensor order, "
      "Tensor row_indptr, Tensor logit_rows, "
      "Tensor[] weights, float[] sm_scales, float[] soft_caps, int[] windows, float eps, bool unit_offset, str gate, "
      "int num_qo_heads, int intermediate_size, int vocab_size) -> (Tensor logits, Tensor hidden)");
  m.def("rotary_embed(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()");
}
