// `remora.comm._C.Pump`: see `comm/native_pump.py`, its only user.
#include <new>

#include "pump.h"
#include "python.h"

namespace remora {
namespace {

struct PumpObject {
  PyObject_HEAD
  Pump pump;
};

Pump& pump_of(PyObject* self) { return reinterpret_cast<PumpObject*>(self)->pump; }

// (entry, shard, width, dtype, incarnation, skips_max, merge_rows_max, park)
PyObject* pump_new(PyTypeObject* type, PyObject* args, PyObject*) {
  unsigned long long entry, shard, incarnation, merge_rows_max, park;
  unsigned int width, dtype, skips_max;
  if (!PyArg_ParseTuple(args, "KKIIKIKK", &entry, &shard, &width, &dtype, &incarnation,
                        &skips_max, &merge_rows_max, &park))
    return nullptr;
  if (!entry || !width || !item_bytes(static_cast<uint8_t>(dtype)))
    return PyErr_Format(PyExc_ValueError, "entry %llu, width %u, dtype %u", entry, width, dtype);
  auto* self = reinterpret_cast<PumpObject*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  Pump& pump = *new (&self->pump) Pump();
  pump.entry = reinterpret_cast<RemoraExpertsFn>(static_cast<uintptr_t>(entry));
  pump.shard = reinterpret_cast<void*>(static_cast<uintptr_t>(shard));
  pump.width = width;
  pump.dtype = static_cast<uint8_t>(dtype);
  pump.incarnation = incarnation;
  pump.skips_max = skips_max;
  pump.merge_rows_max = merge_rows_max;
  pump.park = reinterpret_cast<void (*)()>(static_cast<uintptr_t>(park));
  return reinterpret_cast<PyObject*>(self);
}

void pump_dealloc(PyObject* object) {
  reinterpret_cast<PumpObject*>(object)->pump.~Pump();
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// (fd, rx, rx_bytes, arena, num_regions, region_bytes, frame_bytes_max, last_call, counters)
PyObject* give(PyObject* object, PyObject* const* items, Py_ssize_t count) {
  const Arguments arguments(items, count);
  if (!arguments.expect(9)) return nullptr;
  PumpLink link;
  link.fd = static_cast<int>(arguments.integer(0));
  link.rx = arguments.address<char>(1);
  link.rx_bytes = arguments.natural(2);
  link.arena = arguments.address<char>(3);
  link.num_regions = arguments.natural(4);
  link.region_bytes = arguments.natural(5);
  link.frame_bytes_max = arguments.natural(6);
  link.last_call = arguments.natural(7);
  link.counters = arguments.address<Counters>(8);
  if (PyErr_Occurred()) return nullptr;
  pump_of(object).give(link);
  Py_RETURN_NONE;
}

PyObject* handed(const PumpEvent& event) {
  return Py_BuildValue("(KKy#)", static_cast<unsigned long long>(event.rx_end),
                       static_cast<unsigned long long>(event.last_call), event.unsent.data(),
                       static_cast<Py_ssize_t>(event.unsent.size()));
}

PyObject* take(PyObject* object, PyObject* argument) {
  const long fd = PyLong_AsLong(argument);
  if (fd == -1 && PyErr_Occurred()) return nullptr;
  PumpEvent event;
  if (!pump_of(object).take(static_cast<int>(fd), event)) Py_RETURN_NONE;
  return handed(event);
}

// (epoll_fd, timeout_s; < 0: none)
PyObject* poll(PyObject* object, PyObject* const* items, Py_ssize_t count) {
  const Arguments arguments(items, count);
  if (!arguments.expect(2)) return nullptr;
  const int epoll_fd = static_cast<int>(arguments.integer(0));
  const double timeout_s = arguments.real(1);
  if (PyErr_Occurred()) return nullptr;
  std::vector<PumpEvent> events;
  Py_BEGIN_ALLOW_THREADS;
  events = pump_of(object).poll(epoll_fd, timeout_s);
  Py_END_ALLOW_THREADS;
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(events.size()));
  if (!list) return nullptr;
  for (size_t i = 0; i < events.size(); ++i) {
    PyObject* state = events[i].handed ? handed(events[i]) : Py_NewRef(Py_None);
    PyObject* row = state ? Py_BuildValue("(iIN)", events[i].fd, events[i].events, state) : nullptr;
    if (!row) {
      Py_DECREF(list);
      return nullptr;
    }
    PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), row);
  }
  return list;
}

PyObject* totals(PyObject* object, PyObject*) {
  const Pump& pump = pump_of(object);
  return Py_BuildValue("(LLL)", static_cast<long long>(pump.calls_served.load()),
                       static_cast<long long>(pump.batches.load()),
                       static_cast<long long>(pump.compute_ns.load()));
}

PyObject* set_epoch(PyObject* object, PyObject* argument) {
  const uint64_t epoch = PyLong_AsUnsignedLongLong(argument);
  if (PyErr_Occurred()) return nullptr;
  pump_of(object).epoch = epoch;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"give", fastcall(give), METH_FASTCALL, "the pump owns this connection from here on"},
    {"take", take, METH_O, "takes a connection back: (rx_end, last_call, b''), or None"},
    {"poll", fastcall(poll), METH_FASTCALL, "serves; [(fd, events, handed over or None)]"},
    {"totals", totals, METH_NOARGS, "calls served, batches, nanoseconds of compute"},
    {"set_epoch", set_epoch, METH_O, "epoch of the answers"},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(pump_new)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(pump_dealloc)},
                       {Py_tp_methods, methods},
                       {0, nullptr}};
PyType_Spec spec = {"remora.comm._C.Pump", sizeof(PumpObject), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

int add_pump(PyObject* module) {
  PyObject* type = PyType_FromSpec(&spec);
  if (!type) return -1;
  const int result = PyModule_AddObjectRef(module, "Pump", type);
  Py_DECREF(type);
  return result;
}

}  // namespace remora
