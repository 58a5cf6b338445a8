// Index of the extension module: one register function per file.
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native core of thor_fast: the sandbox's orchestrator and zygote.";
  m.attr("__version__") = THOR_VERSION;
  thor::register_orchestrator(m);
  thor::register_paced_output(m);
  thor::register_probe(m);
  thor::register_zygote(m);
}
