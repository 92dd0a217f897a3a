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
  bool bfloat16;      // the rows, and the weights unless
  bool int8 = false;  // these are of one byte

  int64_t element_size() const { return bfloat16 ? 2 : 4; }
  int64_t weight_size() const { return int8 ? 1 : element_size(); }
  int64_t inputs_per_step() const { return int8 ? 4 : bfloat16 ? 2 : 1; }
  int64_t num_steps() const { return (num_inputs + inputs_per_step() - 1) / inputs_per_step(); }
  int64_t padded_inputs() const { return num_steps() * inputs_per_step(); }
  int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
  int64_t num_groups() const { return (num_panels() + kGroupPanels - 1) / kGroupPanels; }
  int64_t packed_numel() const { return num_panels() * kPanel * padded_inputs(); }
  int64_t packed_nbytes() const { return packed_numel() * weight_size(); }

  // The weights' part of a call for one group; rows and where they go are the caller's.
  PanelCall group_call(int64_t group, const char* weights, const char* bias,
                       const float* scale) const {
    const int64_t column = group * kGroup;
    PanelCall call{};
    call.weights = weights + column * padded_inputs() * weight_size();
    call.num_steps = num_steps();
    call.num_panels = static_cast<int>(std::min(kGroupPanels, num_panels() - group * kGroupPanels));
    call.bias = bias == nullptr ? nullptr : bias + column * element_size();
    call.scale = scale == nullptr ? nullptr : scale + column;
    call.num_columns = static_cast<int>(std::min(kGroup, num_outputs - column));
    return call;
  }
};

}  // namespace remora
