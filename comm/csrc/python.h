// What the types of this extension share of the CPython API.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

namespace remora {

// Reads integers of a positional argument list; errors are collected in the interpreter.
class Arguments {
 public:
  Arguments(PyObject* const* items, Py_ssize_t count) : items_(items), count_(count) {}

  bool expect(Py_ssize_t count) const {
    if (count_ == count) return true;
    PyErr_Format(PyExc_TypeError, "%zd arguments, %zd expected", count_, count);
    return false;
  }
  int64_t integer(Py_ssize_t i) const { return PyLong_AsLongLong(items_[i]); }
  uint64_t natural(Py_ssize_t i) const { return PyLong_AsUnsignedLongLong(items_[i]); }
  template <class T>
  T* address(Py_ssize_t i) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(items_[i])));
  }
  double real(Py_ssize_t i) const { return PyFloat_AsDouble(items_[i]); }
  PyObject* object(Py_ssize_t i) const { return items_[i]; }

 private:
  PyObject* const* items_;
  Py_ssize_t count_;
};

// Adds the type to the module; -1 with an exception set.
int add_client(PyObject* module);
int add_pump(PyObject* module);

template <class Function>
PyCFunction fastcall(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace remora
