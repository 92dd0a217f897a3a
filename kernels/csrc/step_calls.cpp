// The calls of a step's generated code, one behind the other, without Python between them. See
// kernels/step_calls.py.
#include <Python.h>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace remora_step {
namespace {

using torch::aot_inductor::new_tensor_handle;
using torch::aot_inductor::tensor_handle_to_tensor_pointer;

// What Inductor makes of a graph: takes the inputs over, gives the outputs away, and gives the
// interpreter's lock back meanwhile.
using Entry = void (*)(AtenTensorHandle* inputs, AtenTensorHandle* outputs);

struct Lock {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Lock() { PyGILState_Release(state); }
};

struct Call {
  Entry entry;
  std::vector<at::Tensor> inputs;  // undefined where the step fills in
  std::vector<int64_t> rows_at;    // inputs that are the number of rows
  std::vector<int64_t> values_at;  // (input, value) pairs
  std::vector<int64_t> outputs;    // values that they become
  int64_t layer;                   // that runs; negative: none
};

struct StepCalls : torch::CustomClassHolder {
  std::vector<Call> calls;
  int64_t num_values = 0;

  void add(int64_t entry, int64_t num_inputs, const std::vector<at::Tensor>& constants,
           const std::vector<int64_t>& constants_at, std::vector<int64_t> rows_at,
           std::vector<int64_t> values_at, std::vector<int64_t> outputs, int64_t layer) {
    TORCH_CHECK_VALUE(entry != 0 && constants.size() == constants_at.size() && values_at.size() % 2 == 0,
                      "a call at ", entry, " with ", constants.size(), " constants at ",
                      constants_at.size(), " places, and ", values_at.size(), " numbers in pairs");
    Call call{reinterpret_cast<Entry>(static_cast<uintptr_t>(entry)), {}, std::move(rows_at),
              std::move(values_at), std::move(outputs), layer};
    call.inputs.resize(num_inputs);
    std::vector<bool> filled(num_inputs, false);
    const auto fill = [&](int64_t at) {
      TORCH_CHECK_VALUE(at >= 0 && at < num_inputs && !filled[at], "input ", at, " of ", num_inputs,
                        " is none, or filled twice");
      filled[at] = true;
    };
    for (size_t i = 0; i < constants.size(); ++i) {
      fill(constants_at[i]);
      call.inputs[constants_at[i]] = constants[i];
    }
    for (const int64_t at : call.rows_at) fill(at);
    for (size_t i = 0; i < call.values_at.size(); i += 2) {
      fill(call.values_at[i]);
      note_value(call.values_at[i + 1]);
    }
    for (const int64_t value : call.outputs) note_value(value);
    for (int64_t at = 0; at < num_inputs; ++at) {
      TORCH_CHECK_VALUE(filled[at], "nothing fills input ", at, " of ", num_inputs);
    }
    calls.push_back(std::move(call));
  }

  void note_value(int64_t value) {
    TORCH_CHECK_VALUE(value >= 0, "value ", value, " is none");
    num_values = std::max(num_values, value + 1);
  }

  at::Tensor run(std::vector<at::Tensor> values, const at::Tensor& rows, int64_t cursor) const {
    TORCH_CHECK_VALUE(!calls.empty() && !values.empty(), "a step of ", calls.size(), " calls with ",
                      values.size(), " values");
    values.resize(std::max<int64_t>(num_values, values.size()));
    auto* running = reinterpret_cast<int64_t*>(static_cast<uintptr_t>(cursor));
    const Lock lock;
    std::vector<AtenTensorHandle> inputs, outputs;
    for (const Call& call : calls) {
      if (call.layer >= 0) *running = call.layer;
      inputs.assign(call.inputs.size(), nullptr);
      outputs.assign(call.outputs.size(), nullptr);
      std::vector<at::Tensor> given = call.inputs;
      for (const int64_t at : call.rows_at) given[at] = rows;
      for (size_t i = 0; i < call.values_at.size(); i += 2) {
        given[call.values_at[i]] = values[call.values_at[i + 1]];
      }
      for (size_t i = 0; i < given.size(); ++i) inputs[i] = new_tensor_handle(std::move(given[i]));
      call.entry(inputs.data(), outputs.data());
      if (PyErr_Occurred()) {
        PyErr_Clear();  // who raised it has kept it (actors/attention_op.py)
        TORCH_CHECK(false, "an operator of the step failed");
      }
      for (size_t i = 0; i < outputs.size(); ++i) {
        const std::unique_ptr<at::Tensor> made(tensor_handle_to_tensor_pointer(outputs[i]));
        values[call.outputs[i]] = std::move(*made);
      }
    }
    return values[0];
  }
};

}  // namespace
}  // namespace remora_step

TORCH_LIBRARY_FRAGMENT(remora, m) {
  m.class_<remora_step::StepCalls>("StepCalls")
      .def(torch::init<>())
      .def("add", &remora_step::StepCalls::add)
      .def("run", &remora_step::StepCalls::run);
}
