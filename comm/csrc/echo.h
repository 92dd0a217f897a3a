#pragma once

#include "expert_call.h"

// A RemoraExpertsFn; `shard` is the number of bytes of a row.
extern "C" int remora_echo(void* shard, int32_t layer, const struct RemoraExpertCall* calls,
                           int32_t num_calls);
