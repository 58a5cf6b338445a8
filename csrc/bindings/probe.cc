#include "thor/probe.h"

#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace thor {

// Keeps the GIL: the children it forks never run Python, and there is no other thread to wait.
void register_probe(py::module_& m) {
  m.def("probe_host", [] {
    py::list out;
    for (const ProbedLayer& layer : probe_host()) {
      out.append(py::make_tuple(layer.name, layer.granted, layer.detail));
    }
    return out;
  });
}

}  // namespace thor
