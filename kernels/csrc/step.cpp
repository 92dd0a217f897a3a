// What compiled layers ask for by their engine's number: attention and experts of the step that the
// engine runs, without Python. See kernels/step.py, and actors/step_context.py for who fills it in.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "attend.h"
#include "step_experts.h"

namespace remora_step {
namespace {

// An engine's layers, in all of its steps: listing them anew for each takes a tenth of a millisecond.
struct StepLayers : torch::CustomClassHolder {
  std::vector<at::Tensor> k_pages, v_pages;  // of each layer
  std::vector<double> rules;                 // scale, window (0: none), soft cap (0: none); of each layer

  StepLayers(std::vector<at::Tensor> k, std::vector<at::Tensor> v, std::vector<double> numbers)
      : k_pages(std::move(k)), v_pages(std::move(v)), rules(std::move(numbers)) {
    TORCH_CHECK_VALUE(k_pages.size() == v_pages.size() && rules.size() == 3 * k_pages.size(),
                      "pages of ", k_pages.size(), " and ", v_pages.size(), " layers, ", rules.size(),
                      " numbers: 3 a layer");
  }
};

struct Step {
  c10::intrusive_ptr<StepLayers> layers;
  at::Tensor plan;
  int64_t isa_max;
  const int64_t* layer;  // the one that runs now: whoever runs the layers moves it
  int64_t num_tokens;    // rows that are real
  RemoraStepExperts* experts;  // null: Python is asked; the step's own thread changes it
  RemoraRoutingNotes* notes;   // null: nothing is noted
};

std::mutex steps_mutex;
std::unordered_map<int64_t, std::shared_ptr<Step>> steps;

template <class T>
T* at_address(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

void step_enter(int64_t engine, const c10::intrusive_ptr<StepLayers>& layers, const at::Tensor& plan,
                int64_t isa_max, int64_t layer, int64_t num_tokens, int64_t experts, int64_t notes) {
  auto step = std::make_shared<Step>(Step{layers, plan, isa_max, at_address<const int64_t>(layer),
                                          num_tokens, at_address<RemoraStepExperts>(experts),
                                          at_address<RemoraRoutingNotes>(notes)});
  const std::lock_guard<std::mutex> lock(steps_mutex);
  steps[engine] = std::move(step);
}

void step_leave(int64_t engine) {
  const std::lock_guard<std::mutex> lock(steps_mutex);
  steps.erase(engine);
}

std::shared_ptr<Step> step_of(int64_t engine) {
  const std::lock_guard<std::mutex> lock(steps_mutex);
  const auto found = steps.find(engine);
  return found == steps.end() ? nullptr : found->second;
}

at::Tensor step_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& sinks, int64_t engine) {
  const std::shared_ptr<Step> step = step_of(engine);
  TORCH_CHECK(step, "engine ", engine, " is in no step");
  const int64_t layer = *step->layer;
  const StepLayers& layers = *step->layers;
  TORCH_CHECK(layer >= 0 && layer < static_cast<int64_t>(layers.k_pages.size()), "layer ", layer, " of ",
              layers.k_pages.size());
  const double* rules = layers.rules.data() + 3 * layer;
  return remora_attention::attend(q, k, v, layers.k_pages[layer], layers.v_pages[layer], step->plan,
                                  rules[0], static_cast<int64_t>(rules[1]), 0, rules[2], sinks,
                                  step->isa_max);
}

void note_routing(RemoraRoutingNotes* notes, int64_t layer, const void* index) {
  if (!notes || !notes->base || layer >= notes->num_layers || notes->index[layer] < 0) return;
  void* place = at_address<void>(notes->base + notes->index[layer] * notes->pitch);
  std::memcpy(place, index, static_cast<size_t>(notes->num_bytes));
  notes->layers_seen += 1;
}

bool is_plain(const at::Tensor& hidden, const at::Tensor& index, const at::Tensor& weights) {
  const auto narrow = [](const at::Tensor& x) { return x.scalar_type() == at::kBFloat16; };
  const auto float_or_narrow = [&](const at::Tensor& x) { return narrow(x) || x.scalar_type() == at::kFloat; };
  return float_or_narrow(hidden) && float_or_narrow(weights) && index.scalar_type() == at::kLong &&
         hidden.dim() == 2 && index.dim() == 2 && hidden.size(0) == index.size(0) &&
         weights.sizes() == index.sizes() && hidden.is_contiguous() && index.is_contiguous() &&
         weights.is_contiguous();
}

// The answer of whoever moves rows, or nothing: Python is to be asked.
std::optional<at::Tensor> answered(Step& step, const at::Tensor& hidden, const at::Tensor& index,
                                   const at::Tensor& weights) {
  if (!step.experts || !is_plain(hidden, index, weights)) return std::nullopt;
  at::Tensor out = at::empty_like(hidden);
  RemoraLayerRows rows{};
  rows.layer = static_cast<int32_t>(*step.layer);
  rows.is_bfloat16 = hidden.scalar_type() == at::kBFloat16;
  rows.weight_bfloat16 = weights.scalar_type() == at::kBFloat16;
  rows.num_tokens = step.num_tokens;
  rows.num_rows = hidden.size(0);
  rows.top_k = index.size(1);
  rows.width = hidden.size(1);
  rows.hidden = hidden.const_data_ptr();
  rows.index = index.const_data_ptr<int64_t>();
  rows.weights = weights.const_data_ptr();
  rows.out = out.data_ptr();
  if (step.experts->answer(step.experts->self, &rows) != 0) {
    step.experts = nullptr;  // what stands against it concerns the layers that follow too
    return std::nullopt;
  }
  note_routing(step.notes, rows.layer, rows.index);
  return out;
}

at::Tensor step_experts(const at::Tensor& hidden, const at::Tensor& index, const at::Tensor& weights,
                        int64_t engine) {
  if (const std::shared_ptr<Step> step = step_of(engine)) {
    if (std::optional<at::Tensor> out = answered(*step, hidden, index, weights)) return *out;
  }
  static const auto python =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("remora_rt::experts", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t)>();
  return python.call(hidden, index, weights, engine);
}

}  // namespace
}  // namespace remora_step

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.class_<remora_step::StepLayers>("StepLayers")
      .def(torch::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<double>>());
  m.def(
      "step_enter(int engine, __torch__.torch.classes.remora.StepLayers layers, Tensor plan, "
      "int isa_max, int layer_address, int num_tokens, int experts, int notes) -> ()");
  m.def("step_leave(int engine) -> ()", &remora_step::step_leave);
  m.def("step_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, int engine) -> Tensor");
  m.def("step_experts(Tensor hidden, Tensor index, Tensor weights, int engine) -> Tensor");
}

TORCH_LIBRARY_IMPL(remora, CPU, m) {
  m.impl("step_enter", &remora_step::step_enter);
  m.impl("step_attention", &remora_step::step_attention);
  m.impl("step_experts", &remora_step::step_experts);
}
