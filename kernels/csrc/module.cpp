// The Python module `remora.kernels._C`. It is empty: importing it runs the static initialisers of
// the other files, each of which registers its ops with TORCH_LIBRARY_FRAGMENT(remora, m).

#include <Python.h>

extern "C" PyObject* PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
