// `remora.comm._C`: the data plane's hot paths. No torch here: it compiles in seconds.
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

PyMethodDef methods[] = {{"crc32", crc32_of, METH_O, "zlib.crc32 of a buffer"},
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
