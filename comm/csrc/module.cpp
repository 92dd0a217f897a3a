// `remora.comm._C`: the data plane's hot paths. No torch here: it compiles in seconds.
#include <vector>

#include "choice.h"
#include "echo.h"
#include "frame.h"
#include "python.h"
#include "source_hash_comm.h"

namespace {

PyObject* crc32_of(PyObject*, PyObject* argument) {
  Py_buffer data;
  if (PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE) < 0) return nullptr;
  const uint32_t crc = remora::crc32(0, data.buf, static_cast<size_t>(data.len));
  PyBuffer_Release(&data);
  return PyLong_FromUnsignedLong(crc);
}

// (index_TK, num_tokens, top_k, table_ER, num_experts, num_replicas, host_S, own_host, usable_S,
//  gain, num_shards, load_S, shard_TK) -> whether every expert has a usable replica
PyObject* choose(PyObject*, PyObject* const* items, Py_ssize_t count) {
  const remora::Arguments arguments(items, count);
  if (!arguments.expect(13)) return nullptr;
  remora::Routing routing{};
  routing.index_TK = arguments.address<const int64_t>(0);
  routing.num_tokens = arguments.integer(1);
  routing.top_k = arguments.integer(2);
  remora::ReplicaTable table;
  table.shard_ER = arguments.address<const int16_t>(3);
  table.num_experts = arguments.integer(4);
  table.num_replicas = arguments.integer(5);
  table.load_S = arguments.address<int64_t>(11);
  remora::ShardTable shards;
  shards.host_S = arguments.address<const int32_t>(6);
  shards.own_host = static_cast<int32_t>(arguments.integer(7));
  shards.usable_S = arguments.address<const uint8_t>(8);
  shards.gain = arguments.address<const int64_t>(9);
  shards.num_shards = arguments.integer(10);
  auto* shard_TK = arguments.address<int32_t>(12);
  if (PyErr_Occurred()) return nullptr;
  if (routing.top_k > remora::kTopKMax)
    return PyErr_Format(PyExc_ValueError, "top-k %lld", static_cast<long long>(routing.top_k));
  static thread_local remora::Chooser chooser;
  static thread_local std::vector<int32_t> call_TK;
  call_TK.resize(routing.num_tokens * routing.top_k);
  const bool found = chooser.choose(routing, table, shards, shard_TK, call_TK.data());
  if (found) chooser.settle(routing, table, shards, shard_TK, call_TK.data());
  return PyBool_FromLong(found);
}

PyMethodDef methods[] = {{"choose", remora::fastcall(choose), METH_FASTCALL,
                          "replica choice of one layer, as a dispatch makes it"},
                         {"crc32", crc32_of, METH_O, "zlib.crc32 of a buffer"},
                         {nullptr, nullptr, 0, nullptr}};

int execute(PyObject* module) {
  if (remora::add_client(module) < 0 || remora::add_pump(module) < 0) return -1;
  if (PyModule_AddIntConstant(module, "COUNTERS_BYTES", sizeof(remora::Counters)) < 0 ||
      PyModule_AddStringConstant(module, "SOURCE_HASH", REMORA_COMM_SOURCE_HASH) < 0)
    return -1;
  PyObject* echo = PyLong_FromVoidPtr(reinterpret_cast<void*>(&remora_echo));
  const int result = PyModule_AddObjectRef(module, "ECHO_ENTRY", echo);
  Py_XDECREF(echo);
  return result;
}

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(execute)}, {0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", "Native data plane.", 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&definition); }
