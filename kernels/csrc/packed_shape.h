// Sizes of packed weights; panel.h says how they lie.
#pragma once

#include <algorithm>
#include <cstdint>

#include "panel.h"

namespace remora {

// Weights [O, K] of one packed linear.
struct PackedShape {
  int64_t num_inputs;
  int64_t num_outputs;
  WeightFormat format;

  // Of the rows.
  bool bfloat16() const { return format != WeightFormat::kFloat32; }
  int64_t element_size() const { return bfloat16() ? 2 : 4; }

  int64_t inputs_per_step() const {
    constexpr int64_t kInputs[] = {1, 2, 4, 8};
    return kInputs[static_cast<int>(format)];
  }
  int64_t num_steps() const { return (num_inputs + inputs_per_step() - 1) / inputs_per_step(); }
  int64_t padded_inputs() const { return num_steps() * inputs_per_step(); }
  int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
  int64_t num_groups() const { return (num_panels() + kGroupPanels - 1) / kGroupPanels; }

  // Bytes of the weights of a group of so many panels, then of all there is of it.
  int64_t step_bytes(int64_t panels) const { return num_steps() * panels * kLineBytes; }
  int64_t group_nbytes(int64_t panels) const {
    switch (format) {
      case WeightFormat::kInt8:
        return step_bytes(panels) + panels * kPanel * static_cast<int64_t>(sizeof(float));
      case WeightFormat::kInt4:
        return step_bytes(panels) + (num_steps() + kInt4BlockSteps - 1) / kInt4BlockSteps * kLineBytes;
      default:
        return step_bytes(panels);
    }
  }
  int64_t packed_nbytes() const {
    const int64_t left = num_panels() % kGroupPanels;
    return num_panels() / kGroupPanels * group_nbytes(kGroupPanels) + (left == 0 ? 0 : group_nbytes(left));
  }

  // Where the weights of a group begin.
  int64_t group_offset(int64_t group) const { return group * group_nbytes(kGroupPanels); }

  // The weights' part of a call for one group; rows and where they go are the caller's.
  PanelCall group_call(int64_t group, const char* weights, const char* bias) const {
    const int64_t column = group * kGroup;
    PanelCall call{};
    call.num_panels = static_cast<int>(std::min(kGroupPanels, num_panels() - group * kGroupPanels));
    const char* first = weights + group_offset(group);
    call.weights = first;
    call.weight_bytes = group_nbytes(call.num_panels);
    call.num_steps = num_steps();
    call.bias = bias == nullptr ? nullptr : bias + column * element_size();
    if (format == WeightFormat::kInt8) {
      call.scale = reinterpret_cast<const float*>(first + step_bytes(call.num_panels));
    }
    call.num_columns = static_cast<int>(std::min(kGroup, num_outputs - column));
    return call;
  }
};

}  // namespace remora
