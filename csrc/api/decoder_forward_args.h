// Checks the weights of decoder_forward, and turns them into addresses by layer.
#pragma once

#include <string>
#include <vector>

#include "../check.h"
#include "launch.h"

namespace treedecode {

// Positions of a layer's tensors in its part of `weights`. A tensor that the layer does not have is empty.
enum LayerTensor {
  kInputNorm,
  kQkv,
  kQkvBias,
  kQNorm,
  kKNorm,
  kOProj,
  kOProjBias,
  kOutputNorm,
  kGateUp,
  kGateUpBias,
  kDown,
  kDownBias,
  kSinks,
  kLayerTensors,
};
// Positions of the head's tensors, after those of all layers.
enum HeadTensor { kFinalNorm, kLmHead, kLmHeadBias, kHeadTensors };

inline const char* const kLayerNames[] = {"input_norm", "qkv",         "qkv_bias",    "q_norm",  "k_norm",
                                          "o_proj",     "o_proj_bias", "output_norm", "gate_up", "gate_up_bias",
                                          "down",       "down_bias",   "sinks"};
inline const char* const kHeadNames[] = {"final_norm", "lm_head", "lm_head_bias"};

struct Linear {
  const void* weight;
  const void* bias;  // or null
  int64_t in_features;
  int64_t out_features;
  cpu::Gate gate;
};

struct Layer {
  const void* input_norm;
  Linear qkv;
  const void* q_norm;  // both or none
  const void* k_norm;
  Linear o_proj;
  const void* output_norm;
  Linear gate_up;
  Linear down;
  const float* sinks;  // or null
  double sm_scale, soft_cap;
  int64_t window_left;
};

struct Sizes {
  int64_t num_tokens, hidden_size, num_qo_heads, num_kv_heads, head_dim, intermediate_size;
  ScalarType scalar_type;
  DType dtype;
  int64_t element_size;

  int64_t num_heads() const { return num_qo_heads + 2 * num_kv_heads; }
};

// The tensors of one layer, or of the head, with their names for errors.
class Tensors {
 public:
  Tensors(const std::vector<Tensor>& all, int64_t first, const char* const* names, const char* prefix, ScalarType dtype)
      : all_(all), first_(first), names_(names), prefix_(prefix), dtype_(dtype) {}

  bool has(int i) const { return at(i).numel() > 0; }

  const void* vector(int i, int64_t size) const {
    const std::string name = name_of(i);
    check_shape(at(i), name.c_str(), "[size]", {size});
    check_dtype(at(i), name.c_str(), dtype_);
    check_contiguous(at(i), name.c_str());
    return at(i).const_data_ptr();
  }

  Linear linear(int weight, int bias, int64_t in_features, int64_t out_features,
                cpu::Gate gate = cpu::Gate::None) const {
    const std::string name = name_of(weight);
    check_value(in_features >= 2 && in_features % 2 == 0, name.c_str(), "an even number of in_features, at least 2",
                static_cast<double>(in_features));
    const int64_t panels = (gate == cpu::Gate::None ? 1 : 2) * ((out_features + cpu::kPanel - 1) / cpu::kPanel);
    check_shape(at(weight), name.c_str(), "[num_panels, in_features, 16]", {panels, in_features, cpu::kPanel});
    check_dtype(at(weight), name.c_str(), dtype_);
    check_contiguous(at(weight), name.c_str());
    return {at(weight).const_data_ptr(), has(bias) ? vector(bias, panels * cpu::kPanel) : nullptr, in_features,
            out_features, gate};
  }

  const float* sinks(int i, int64_t num_qo_heads) const {
    if (!has(i)) return nullptr;
    const std::string name = name_of(i);
    check_shape(at(i), name.c_str(), "[num_qo_heads]", {num_qo_heads});
    check_dtype(at(i), name.c_str(), ScalarType::Float);
    check_contiguous(at(i), name.c_str());
    check_sinks(at(i).const_data_ptr<float>(), num_qo_heads, name.c_str());
    return at(i).const_data_ptr<float>();
  }

 private:
  const Tensor& at(int i) const { return all_[static_cast<size_t>(first_ + i)]; }
  std::string name_of(int i) const { return prefix_ + std::string(names_[i]); }

  const std::vector<Tensor>& all_;
  int64_t first_;
  const char* const* names_;
  std::string prefix_;
  ScalarType dtype_;
};

inline Layer layer_of(const Tensors& t, const Sizes& s, cpu::Gate gate, double sm_scale, double soft_cap,
                      int64_t window) {
  const bool has_head_norms = t.has(kQNorm) || t.has(kKNorm);
  return {
      t.vector(kInputNorm, s.hidden_size),
      t.linear(kQkv, kQkvBias, s.hidden_size, s.num_heads() * s.head_dim),
      has_head_norms ? t.vector(kQNorm, s.head_dim) : nullptr,
      has_head_norms ? t.vector(kKNorm, s.head_dim) : nullptr,
      t.linear(kOProj, kOProjBias, s.num_qo_heads * s.head_dim, s.hidden_size),
      t.vector(kOutputNorm, s.hidden_size),
      t.linear(kGateUp, kGateUpBias, s.hidden_size, s.intermediate_size, gate),
      t.linear(kDown, kDownBias, s.intermediate_size, s.hidden_size),
      t.sinks(kSinks, s.num_qo_heads),
      sm_scale,
      soft_cap,
      window,
  };
}

}  // namespace treedecode
