// A snippet's sys.stdout: line by line, so that a kill leaves what was printed, but in blocks while
// it pours, since each line costs a system call and several calls between its layers.
#include <pybind11/pybind11.h>

#include <array>

#include "bindings/bindings.h"
#include "core/output_pace.h"

namespace py = pybind11;

namespace thor {
namespace {

constexpr int kBlockBytes = 2'048;  // what a kill may take with it; hardly dearer than 8 KiB

// Of the one sys.stdout of this process.
struct PacedOutput {
  OutputPace pace;
  PyObject* text = nullptr;         // its TextIOWrapper
  PyObject* plain_write = nullptr;  // io.BufferedWriter's own methods
  PyObject* plain_flush = nullptr;
  int flushes_to_come = 0;  // that nobody asked for
};
PacedOutput output;

// False with an exception set, where a signal's handler raised or what waits cannot be written.
bool go_on_by(OutputPace::By by) {
  bool done = true;
  try {
    const py::handle text(output.text);
    text.attr("reconfigure")(py::arg("line_buffering") = by == OutputPace::By::kLine);
  } catch (py::error_already_set& error) {
    done = error.matches(PyExc_ValueError);  // it is closed or detached, and no concern of ours
    if (!done) error.restore();
  }
  return done;
}

// Null with an exception set.
template <typename... Arguments>
py::object call(PyObject* method, Arguments... arguments) {
  const std::array<PyObject*, sizeof...(arguments)> all{arguments...};
  return py::reinterpret_steal<py::object>(
      PyObject_Vectorcall(method, all.data(), all.size(), nullptr));
}

// What the text layer hands down: a line, or a block.
PyObject* write(PyObject* self, PyObject* data) {
  py::object count = call(output.plain_write, self, data);
  if (!count) return nullptr;
  const OutputPace::By before = output.pace.by();
  const OutputPace::By now = output.pace.written(Clock::now());
  if (now != before) {
    output.flushes_to_come = 2;  // the change's own, and that of the line just written
    if (!go_on_by(now)) return nullptr;
  }
  if (before == OutputPace::By::kBlock && !call(output.plain_flush, self)) return nullptr;
  return count.release().ptr();
}

// After each line; while blocks are written, only somebody who means it.
PyObject* flush(PyObject* self, PyObject* /*unused*/) {
  if (output.pace.by() == OutputPace::By::kBlock && output.flushes_to_come-- <= 0) {
    output.pace.flushed();
    if (!go_on_by(OutputPace::By::kLine)) return nullptr;
  }
  return call(output.plain_flush, self).release().ptr();
}

// In C, so that neither tracebacks nor profilers show frames of ours; named as what it passes for.
std::array<PyMethodDef, 3> methods{
    {{"write", &write, METH_O, nullptr}, {"flush", &flush, METH_NOARGS, nullptr}, {}}};
std::array<PyType_Slot, 2> slots{{{Py_tp_methods, methods.data()}, {}}};

// Replaces sys.stdout, which nobody must have kept yet.
void pace_standard_output() {
  const py::module_ io = py::module_::import("io");
  const py::module_ sys = py::module_::import("sys");
  const py::object plain = io.attr("BufferedWriter");
  output.plain_write = py::object(plain.attr("write")).release().ptr();
  output.plain_flush = py::object(plain.attr("flush")).release().ptr();
  PyType_Spec spec{"_io.BufferedWriter", 0, 0, Py_TPFLAGS_DEFAULT, slots.data()};
  const auto kind = py::reinterpret_steal<py::object>(
      PyType_FromSpecWithBases(&spec, py::make_tuple(plain).ptr()));
  if (!kind) throw py::error_already_set();
  const py::object old = sys.attr("stdout");
  const py::object encoding = old.attr("encoding");
  const py::object errors = old.attr("errors");
  const py::object buffer = kind(old.attr("detach")().attr("detach")());
  py::object text = io.attr("TextIOWrapper")(buffer, encoding, errors, "\n", true);
  text.attr("mode") = "w";
  text.attr("_CHUNK_SIZE") = kBlockBytes;
  sys.attr("stdout") = text;
  sys.attr("__stdout__") = text;
  output.text = text.release().ptr();
}

}  // namespace

void register_paced_output(py::module_& m) { m.def("pace_standard_output", &pace_standard_output); }

}  // namespace thor
