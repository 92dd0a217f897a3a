/* How the expert layers of a step are answered without Python in between: plain C.
 *
 * `step.cpp` asks; `comm/csrc/client_type.cpp` answers (`remora.comm._C.Client.step_experts()` is the
 * address of a RemoraStepExperts). The thread that runs the step calls. */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Rows of one layer; arrays are contiguous. */
struct RemoraLayerRows {
  int32_t layer;       /* decoder layer */
  int32_t is_bfloat16; /* `hidden` and `out`; else float32 */
  int32_t weight_bfloat16;
  int64_t num_tokens; /* rows that are real; the others come back as zeros */
  int64_t num_rows, top_k, width;
  const void* hidden;   /* [num_rows, width] */
  const int64_t* index; /* [num_rows, top_k] logical experts; negative: none */
  const void* weights;  /* [num_rows, top_k] */
  void* out;            /* [num_rows, width] */
};

struct RemoraStepExperts {
  void* self;
  /* 0: `out` is written. Anything else: whoever asks goes on in Python, with these rows and with the
   * layers behind them. */
  int (*answer)(void* self, const struct RemoraLayerRows* rows);
};

/* Where a step's routing is noted; `actors/routing_tap.py` lays it out for each step. */
struct RemoraRoutingNotes {
  int64_t base;           /* address for the first MoE layer; 0: nothing is to be noted */
  int64_t pitch;          /* bytes from one MoE layer to the next */
  int64_t num_bytes;      /* of a layer */
  const int32_t* index;   /* [number of decoder layers]: which MoE layer each is; -1: none */
  int64_t num_layers;     /* decoder layers that `index` has */
  int64_t layers_seen;    /* grows by one with each layer noted */
};

#ifdef __cplusplus
}
#endif
