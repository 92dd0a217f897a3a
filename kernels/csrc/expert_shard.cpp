// The experts of one shard as the native caller sees them: layers in slots, behind a handle.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <map>
#include <optional>
#include <vector>

#include "expert_call.h"
#include "expert_ffn.h"
#include "weight_format.h"

namespace remora {
namespace {

struct HeldLayer {
  ExpertLayer layer;
  std::vector<at::Tensor> tensors;  // what `layer` points into
};

struct Shard {
  std::map<int64_t, HeldLayer> layers;
  ExpertScratch scratch;
};

Shard& shard_of(int64_t handle) {
  TORCH_CHECK(handle != 0, "a shard's handle is not 0");
  return *reinterpret_cast<Shard*>(handle);
}

int64_t expert_shard_new() { return reinterpret_cast<int64_t>(new Shard); }

void expert_shard_free(int64_t handle) { delete &shard_of(handle); }

SlotWeights slot_weights(const PackedShape& shape, const at::Tensor& packed,
                         const std::optional<at::Tensor>& bias, const char* name) {
  TORCH_CHECK(fits(packed, shape, packed.size(0)), name, " of ", packed.sizes(), " ", packed.scalar_type(),
              " is not packed [S, ...] of ", shape.num_outputs, " x ", shape.num_inputs);
  TORCH_CHECK(!bias.has_value() || (bias->is_contiguous() &&
                                    bias->scalar_type() == (shape.bfloat16() ? at::kBFloat16 : at::kFloat) &&
                                    bias->numel() == packed.size(0) * shape.num_outputs),
              "the bias of ", name, " must be contiguous [S, ", shape.num_outputs, "]");
  return {shape, static_cast<const char*>(packed.const_data_ptr()),
          bias.has_value() ? static_cast<const char*>(bias->const_data_ptr()) : nullptr};
}

void expert_shard_layer(int64_t handle, int64_t layer, const at::Tensor& up,
                        const std::optional<at::Tensor>& up_bias, const at::Tensor& down,
                        const std::optional<at::Tensor>& down_bias,
                        const at::Tensor& slot_of_expert, int64_t hidden_size, int64_t width,
                        int64_t activation, int64_t layout, at::ArrayRef<double> numbers,
                        std::optional<std::string_view> quantized) {
  const WeightFormat format =
      weight_format(quantized.has_value() ? at::kBFloat16 : up.scalar_type(), quantized);
  TORCH_CHECK(slot_of_expert.scalar_type() == at::kLong && slot_of_expert.is_contiguous(),
              "slot_of_expert must be contiguous int64 [E]");
  TORCH_CHECK(up.size(0) == down.size(0), "up has ", up.size(0), " slots, down ", down.size(0));
  const Gate gate = gate_of(activation, layout, numbers);
  HeldLayer held;
  const PackedShape up_shape{hidden_size, gate.columns() * width, format};
  const PackedShape down_shape{width, hidden_size, format};
  TORCH_CHECK(up_shape.padded_inputs() == hidden_size, "rows of ", hidden_size, " need padding");
  held.layer.up = slot_weights(up_shape, up, up_bias, "up");
  held.layer.down = slot_weights(down_shape, down, down_bias, "down");
  held.layer.gate = gate;
  held.layer.num_slots = up.size(0);
  held.layer.num_experts = slot_of_expert.numel();
  held.layer.slot_of_expert = slot_of_expert.const_data_ptr<int64_t>();
  held.tensors = {up, down, slot_of_expert};
  for (const auto& tensor : {up_bias, down_bias}) {
    if (tensor.has_value()) held.tensors.push_back(*tensor);
  }
  shard_of(handle).layers[layer] = std::move(held);
}

int entry(void* shard, int32_t layer, const RemoraExpertCall* calls, int32_t num_calls) {
  Shard& self = *static_cast<Shard*>(shard);
  const auto found = self.layers.find(layer);
  if (found == self.layers.end()) return REMORA_EXPERTS_UNKNOWN_LAYER;
  return run_experts(found->second.layer, self.scratch, calls, num_calls);
}

int64_t expert_entry() {
  const RemoraExpertsFn function = entry;
  return reinterpret_cast<int64_t>(function);
}

at::Tensor expert_shard_call(int64_t handle, int64_t layer, const at::Tensor& rows,
                             const at::Tensor& pair_row, const at::Tensor& pair_expert,
                             const at::Tensor& pair_weight, bool presummed) {
  Shard& self = shard_of(handle);
  const auto found = self.layers.find(layer);
  TORCH_CHECK(found != self.layers.end(), "layer ", layer, " is not held");
  const PackedShape& up = found->second.layer.up.shape;
  TORCH_CHECK(rows.dim() == 2 && rows.size(1) == up.num_inputs &&
                  rows.scalar_type() == (up.bfloat16() ? at::kBFloat16 : at::kFloat),
              "rows must be [M, ", up.num_inputs, "] in the dtype of the weights, got ", rows.sizes(),
              " ", rows.scalar_type());
  const int64_t num_pairs = pair_row.numel();
  TORCH_CHECK(pair_expert.numel() == num_pairs && pair_weight.numel() == num_pairs,
              "pair_row, pair_expert and pair_weight must all be [N]");
  const at::Tensor x = rows.contiguous();
  const at::Tensor row = pair_row.to(at::kInt).contiguous();
  const at::Tensor expert = pair_expert.to(at::kInt).contiguous();
  const at::Tensor weight = pair_weight.to(at::kFloat).contiguous();
  at::Tensor out = at::empty({presummed ? x.size(0) : num_pairs, x.size(1)}, x.options());
  const RemoraExpertCall call{x.const_data_ptr(),
                              x.size(0),
                              row.const_data_ptr<int32_t>(),
                              expert.const_data_ptr<int32_t>(),
                              weight.const_data_ptr<float>(),
                              num_pairs,
                              out.mutable_data_ptr(),
                              presummed ? 1 : 0};
  const int verdict = run_experts(found->second.layer, self.scratch, &call, 1);
  TORCH_CHECK_INDEX(verdict != REMORA_EXPERTS_BAD_CALL, "a pair's row is out of range");
  TORCH_CHECK_INDEX(verdict != REMORA_EXPERTS_NOT_HELD, "an expert of layer ", layer, " is not held");
  TORCH_CHECK(verdict == REMORA_EXPERTS_DONE, "no memory for ", num_pairs, " pairs");
  return out;
}

}  // namespace
}  // namespace remora

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.def("expert_shard_new() -> int", &remora::expert_shard_new);
  m.def("expert_shard_free(int handle) -> ()", &remora::expert_shard_free);
  m.def("expert_entry() -> int", &remora::expert_entry);
  m.def("expert_shard_layer(int handle, int layer, Tensor up, Tensor? up_bias, Tensor down,"
        " Tensor? down_bias, Tensor slot_of_expert, int hidden_size, int width, int activation,"
        " int layout, float[] numbers, str? quantized=None) -> ()");
  m.def("expert_shard_call(int handle, int layer, Tensor rows, Tensor pair_row, Tensor pair_expert,"
        " Tensor pair_weight, bool presummed) -> Tensor");
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("expert_shard_layer", &remora::expert_shard_layer);
  m.impl("expert_shard_call", &remora::expert_shard_call);
}
