// `remora.comm._C.Client`: see `comm/native_dispatch.py`, its only user.
#include "python.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "client.h"
#include "step_experts.h"

namespace remora {
namespace {

struct ClientObject {
  PyObject_HEAD
  Client client;
  std::vector<PyObject*> free_lists;  // `Peer._free` of each shard, or null
  RemoraStepExperts step_experts;     // layers of a step, asked without Python
  int64_t asked_layers, asked_ns_max;  // of those, since `take_asked`
};

Client& client_of(PyObject* self) { return reinterpret_cast<ClientObject*>(self)->client; }

int answer(void* object, const RemoraLayerRows* rows);

PyObject* client_new(PyTypeObject* type, PyObject*, PyObject*) {
  auto* self = reinterpret_cast<ClientObject*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  new (&self->client) Client();
  new (&self->free_lists) std::vector<PyObject*>();
  self->step_experts = {self, answer};
  self->asked_layers = self->asked_ns_max = 0;
  return reinterpret_cast<PyObject*>(self);
}

void drop_lists(ClientObject* self) {
  for (PyObject* list : self->free_lists) Py_XDECREF(list);
  self->free_lists.clear();
}

void client_dealloc(PyObject* object) {
  auto* self = reinterpret_cast<ClientObject*>(object);
  drop_lists(self);
  self->free_lists.~vector();
  self->client.~Client();
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// (epoch, presummed, deadline_s, rows_per_call_max, region_bytes, host_S, own_host, usable_S, gain,
//  num_shards, settled, park, wake,
//  [(layer, table_ER, num_experts, num_replicas, load_S, sent_S), ...])
PyObject* configure(PyObject* object, PyObject* const* items, Py_ssize_t count) {
  const Arguments arguments(items, count);
  if (!arguments.expect(14)) return nullptr;
  auto* self = reinterpret_cast<ClientObject*>(object);
  Client& client = self->client;
  client.epoch = arguments.natural(0);
  client.presummed = arguments.integer(1) != 0;
  client.deadline_s = arguments.real(2);
  client.rows_per_call_max = arguments.integer(3);
  client.region_bytes_asked = arguments.integer(4);
  ShardTable shards;
  shards.host_S = arguments.address<const int32_t>(5);
  shards.own_host = static_cast<int32_t>(arguments.integer(6));
  shards.usable_S = arguments.address<const uint8_t>(7);
  shards.gain = arguments.address<const int64_t>(8);
  const int64_t num_shards = shards.num_shards = arguments.integer(9);
  client.settled = arguments.address<const uint64_t>(10);
  client.park = reinterpret_cast<void (*)()>(arguments.address<void>(11));
  client.wake = reinterpret_cast<void (*)()>(arguments.address<void>(12));
  if (PyErr_Occurred()) return nullptr;
  client.shards = shards;
  client.close();
  drop_lists(self);
  self->free_lists.assign(num_shards, nullptr);
  client.links.assign(num_shards, Link{});
  client.tables.clear();
  PyObject* tables = arguments.object(13);
  if (!PyList_Check(tables)) return PyErr_Format(PyExc_TypeError, "tables must be a list");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tables); ++i) {
    int layer;
    unsigned long long address, load, sent;
    long long num_experts, num_replicas;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(tables, i), "iKLLKK", &layer, &address,
                          &num_experts, &num_replicas, &load, &sent))
      return nullptr;
    client.tables[layer] = {reinterpret_cast<const int16_t*>(static_cast<uintptr_t>(address)),
                            num_experts, num_replicas,
                            reinterpret_cast<int64_t*>(static_cast<uintptr_t>(load)),
                            reinterpret_cast<int64_t*>(static_cast<uintptr_t>(sent))};
  }
  Py_RETURN_NONE;
}

// (shard, fd, cell, counters, memory, region_bytes, frame_bytes_max, arena_bytes_min, incarnation,
//  arena, checked, free regions); a shard that is not linked is never chosen
PyObject* link(PyObject* object, PyObject* const* items, Py_ssize_t count) {
  const Arguments arguments(items, count);
  if (!arguments.expect(12)) return nullptr;
  auto* self = reinterpret_cast<ClientObject*>(object);
  const int64_t shard = arguments.integer(0);
  if (shard < 0 || shard >= static_cast<int64_t>(self->client.links.size()) ||
      !PyList_Check(arguments.object(11)))
    return PyErr_Format(PyExc_ValueError, "shard %lld of %zu", static_cast<long long>(shard),
                        self->client.links.size());
  Link link;
  link.fd = static_cast<int>(arguments.integer(1));
  link.cell = arguments.address<PeerCell>(2);
  link.counters = arguments.address<Counters>(3);
  link.memory = arguments.address<char>(4);
  link.region_bytes = arguments.natural(5);
  link.frame_bytes_max = arguments.natural(6);
  link.arena_bytes_min = arguments.natural(7);
  link.incarnation = arguments.natural(8);
  link.arena = arguments.integer(9) != 0;
  link.checked = arguments.integer(10) != 0;
  if (PyErr_Occurred()) return nullptr;
  Py_INCREF(arguments.object(11));
  Py_XSETREF(self->free_lists[shard], arguments.object(11));
  self->client.links[shard] = std::move(link);
  Py_RETURN_NONE;
}

PyObject* unlink(PyObject* object, PyObject* argument) {
  auto* self = reinterpret_cast<ClientObject*>(object);
  const size_t shard = PyLong_AsSize_t(argument);
  if (PyErr_Occurred()) return nullptr;
  if (shard >= self->client.links.size()) return PyErr_Format(PyExc_ValueError, "no such shard");
  self->client.links[shard] = Link{};
  Py_CLEAR(self->free_lists[shard]);
  Py_RETURN_NONE;
}

// Which regions are free is read anew each time: Python may have taken one.
bool read_free_regions(ClientObject* self) {
  for (size_t s = 0; s < self->free_lists.size(); ++s) {
    std::vector<int32_t>& free = self->client.links[s].free_regions;
    PyObject* list = self->free_lists[s];
    if (!list) continue;
    free.resize(PyList_GET_SIZE(list));
    for (size_t i = 0; i < free.size(); ++i)
      free[i] = static_cast<int32_t>(PyLong_AsLong(PyList_GET_ITEM(list, i)));
  }
  return !PyErr_Occurred();
}

bool in_range(const LayerInput& input) {
  return input.num_tokens >= 0 && input.num_tokens <= input.num_rows && input.top_k <= kTopKMax &&
         item_bytes(input.dtype);
}

// (layer, num_tokens, num_rows, top_k, width, dtype, weight_bfloat16, hidden, index, weight)
bool read_input(const Arguments& arguments, LayerInput& input) {
  input.layer = static_cast<int32_t>(arguments.integer(0));
  input.num_tokens = arguments.integer(1);
  input.num_rows = arguments.integer(2);
  input.top_k = arguments.integer(3);
  input.width = arguments.integer(4);
  input.dtype = static_cast<uint8_t>(arguments.integer(5));
  input.weight_bfloat16 = arguments.integer(6) != 0;
  input.hidden = arguments.address<const char>(7);
  input.index_TK = arguments.address<const int64_t>(8);
  input.weight_TK = arguments.address<const void>(9);
  if (PyErr_Occurred()) return false;
  if (!in_range(input)) {
    PyErr_SetString(PyExc_ValueError, "tokens, top-k or dtype out of range");
    return false;
  }
  return true;
}

PyObject* as_int(Status status) { return PyLong_FromLong(static_cast<long>(status)); }

PyObject* begin(PyObject* object, PyObject* const* items, Py_ssize_t count) {
  const Arguments arguments(items, count);
  LayerInput input;
  auto* self = reinterpret_cast<ClientObject*>(object);
  if (!arguments.expect(10) || !read_input(arguments, input) || !read_free_regions(self))
    return nullptr;
  return as_int(self->client.begin(input));
}

PyObject* finish(PyObject* object, PyObject* argument) {
  Client& client = client_of(object);
  char* out = reinterpret_cast<char*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(argument)));
  if (PyErr_Occurred()) return nullptr;
  if (!client.is_open()) return PyErr_Format(PyExc_RuntimeError, "no layer is under way");
  Status status;
  Py_BEGIN_ALLOW_THREADS;
  status = client.finish(out);
  Py_END_ALLOW_THREADS;
  return as_int(status);
}

// `begin` and `finish`, which waits without the interpreter. Holds it before and after.
Status whole_layer(Client& client, const LayerInput& input, char* out) {
  Status status = client.begin(input);
  if (status != Status::kDone) return status;
  Py_BEGIN_ALLOW_THREADS;
  status = client.finish(out);
  Py_END_ALLOW_THREADS;
  return status;
}

// `begin` and `finish`: as begin, and the address of the output
PyObject* layer(PyObject* object, PyObject* const* items, Py_ssize_t count) {
  const Arguments arguments(items, count);
  LayerInput input;
  auto* self = reinterpret_cast<ClientObject*>(object);
  if (!arguments.expect(11) || !read_input(arguments, input) || !read_free_regions(self))
    return nullptr;
  char* out = arguments.address<char>(10);
  if (PyErr_Occurred()) return nullptr;
  return as_int(whole_layer(self->client, input, out));
}

// A layer of a step whose thread may hold the interpreter or not. Where a layer is handed over, it stays
// open: `NativeLayers.layer` is asked next, with the same rows, and finds it.
int answer(void* object, const RemoraLayerRows* rows) {
  auto* self = static_cast<ClientObject*>(object);
  const LayerInput input{rows->layer, rows->num_tokens, rows->num_rows, rows->top_k, rows->width,
                         static_cast<uint8_t>(rows->is_bfloat16 ? kBfloat16 : kFloat32),
                         rows->weight_bfloat16 != 0, static_cast<const char*>(rows->hidden),
                         rows->index, rows->weights};
  if (!in_range(input)) return static_cast<int>(Status::kNotNative);
  const PyGILState_STATE held = PyGILState_Ensure();
  const int64_t begun_ns = now_ns();
  Status status = Status::kNotNative;
  if (!read_free_regions(self)) {
    PyErr_Clear();  // Python reads them next, and raises it there
  } else {
    status = whole_layer(self->client, input, static_cast<char*>(rows->out));
  }
  if (status == Status::kDone) {
    self->asked_layers += 1;
    self->asked_ns_max = std::max(self->asked_ns_max, now_ns() - begun_ns);
  }
  PyGILState_Release(held);
  return static_cast<int>(status);
}

PyObject* step_experts(PyObject* object, PyObject*) {
  return PyLong_FromVoidPtr(&reinterpret_cast<ClientObject*>(object)->step_experts);
}

PyObject* take_asked(PyObject* object, PyObject*) {
  auto* self = reinterpret_cast<ClientObject*>(object);
  const auto layers = std::exchange(self->asked_layers, 0);
  const auto slowest_ns = std::exchange(self->asked_ns_max, 0);
  return Py_BuildValue("(Ld)", static_cast<long long>(layers), slowest_ns * 1e-9);
}

// (call_TK, row_TK, pos_TK): copies the layout of the real tokens there
PyObject* plan(PyObject* object, PyObject* const* items, Py_ssize_t count) {
  const Arguments arguments(items, count);
  if (!arguments.expect(3)) return nullptr;
  const Layout& layout = client_of(object).layout();
  const std::vector<int32_t>* columns[] = {&layout.call_TK, &layout.row_TK, &layout.pos_TK};
  for (int i = 0; i < 3; ++i) {
    auto* target = arguments.address<int32_t>(i);
    if (PyErr_Occurred()) return nullptr;
    if (!columns[i]->empty()) std::memcpy(target, columns[i]->data(), 4 * columns[i]->size());
  }
  Py_RETURN_NONE;
}

PyObject* calls(PyObject* object, PyObject*) {
  const Client& client = client_of(object);
  PyObject* list = PyList_New(0);
  if (!list) return nullptr;
  for (const LayerCall& call : client.calls()) {
    PyObject* row = Py_BuildValue(
        "(iIIiKKKiKKiKi)", call.shard, call.num_rows, call.num_pairs, call.region,
        static_cast<unsigned long long>(call.body_bytes),
        static_cast<unsigned long long>(call.reply_bytes),
        static_cast<unsigned long long>(call.sequence), int{call.shared},
        static_cast<unsigned long long>(call.frame_bytes),
        static_cast<unsigned long long>(call.sent), int{call.counted},
        static_cast<unsigned long long>(call.received), int{call.answered});
    if (!row || PyList_Append(list, row) < 0) {
      Py_XDECREF(row);
      Py_DECREF(list);
      return nullptr;
    }
    Py_DECREF(row);
  }
  return list;
}

PyObject* head(PyObject* object, PyObject* argument) {
  const Client& client = client_of(object);
  const size_t c = PyLong_AsSize_t(argument);
  if (PyErr_Occurred()) return nullptr;
  if (c >= client.calls().size()) return PyErr_Format(PyExc_ValueError, "no such call");
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&client.calls()[c].head),
                                   kHeaderBytes);
}

// shard -> (bytes of an answer that was not taken, its body is damaged)
PyObject* unread(PyObject* object, PyObject* argument) {
  const Client& client = client_of(object);
  const size_t shard = PyLong_AsSize_t(argument);
  if (PyErr_Occurred()) return nullptr;
  if (shard >= client.links.size()) return PyErr_Format(PyExc_ValueError, "no such shard");
  const std::string bytes = client.unread(static_cast<int32_t>(shard));
  return Py_BuildValue("(y#i)", bytes.data(), static_cast<Py_ssize_t>(bytes.size()),
                       int{client.links[shard].damaged});
}

PyObject* close_layer(PyObject* object, PyObject*) {
  client_of(object).close();
  Py_RETURN_NONE;
}

PyObject* phases(PyObject* object, PyObject*) {
  const Phases& p = client_of(object).phases;
  return Py_BuildValue("(LLLLL)", static_cast<long long>(p.layers),
                       static_cast<long long>(p.pack_ns), static_cast<long long>(p.wait_ns),
                       static_cast<long long>(p.combine_ns),
                       static_cast<long long>(p.experts_compute_ns));
}

PyObject* until_s(PyObject* object, void*) {
  return PyFloat_FromDouble(static_cast<double>(client_of(object).until_ns()) * 1e-9);
}

PyObject* is_open(PyObject* object, void*) { return PyBool_FromLong(client_of(object).is_open()); }

PyMethodDef methods[] = {
    {"configure", fastcall(configure), METH_FASTCALL, "what stays the same for a view"},
    {"link", fastcall(link), METH_FASTCALL, "describes the connection to a shard"},
    {"unlink", unlink, METH_O, "forgets the connection to a shard"},
    {"begin", fastcall(begin), METH_FASTCALL, "chooses, packs and sends; a Status"},
    {"finish", finish, METH_O, "waits and sums; a Status"},
    {"layer", fastcall(layer), METH_FASTCALL, "begin and finish; a Status"},
    {"step_experts", step_experts, METH_NOARGS, "address of a RemoraStepExperts, of this client's life"},
    {"take_asked", take_asked, METH_NOARGS, "layers answered through it since, and the slowest's seconds"},
    {"plan", fastcall(plan), METH_FASTCALL, "copies the layout of the layer"},
    {"calls", calls, METH_NOARGS, "how far each call of the layer came"},
    {"head", head, METH_O, "header of the answer of a call"},
    {"unread", unread, METH_O, "what came from a shard and was not taken"},
    {"close", close_layer, METH_NOARGS, "the layer is Python's from here on"},
    {"phases", phases, METH_NOARGS, "layers; pack, wait, combine and experts' nanoseconds"},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef properties[] = {
    {"until_s", until_s, nullptr, "when the layer's deadline ends, on the monotonic clock",
     nullptr},
    {"is_open", is_open, nullptr, "a layer was begun that is neither done nor Python's", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(client_new)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(client_dealloc)},
                       {Py_tp_methods, methods},
                       {Py_tp_getset, properties},
                       {0, nullptr}};
PyType_Spec spec = {"remora.comm._C.Client", sizeof(ClientObject), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

int add_client(PyObject* module) {
  PyObject* type = PyType_FromSpec(&spec);
  if (!type) return -1;
  const int result = PyModule_AddObjectRef(module, "Client", type);
  Py_DECREF(type);
  return result;
}

}  // namespace remora
