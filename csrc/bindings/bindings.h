#pragma once

#include <pybind11/pybind11.h>

namespace thor {

void register_orchestrator(pybind11::module_& m);
void register_paced_output(pybind11::module_& m);
void register_probe(pybind11::module_& m);
void register_zygote(pybind11::module_& m);

}  // namespace thor
