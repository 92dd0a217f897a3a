// What is sorted before experts are computed: which rows each slot gets, and what each sum is of.
#pragma once

#include "expert_ffn.h"

namespace remora {

// REMORA_EXPERTS_DONE where all rows and experts of the calls are such as the layer has.
int check_calls(const ExpertLayer& layer, const RemoraExpertCall* calls, int32_t num_calls);

// Pairs of all calls in slot order: blocks, and where each row comes from. Stable.
void sort_pairs(const ExpertLayer& layer, ExpertScratch& scratch, const RemoraExpertCall* calls,
                int32_t num_calls, int64_t num_pairs);

// The terms of each output row of the presummed calls, in pair order.
void sort_terms(ExpertScratch& scratch, const RemoraExpertCall* calls, int32_t num_calls);

}  // namespace remora
