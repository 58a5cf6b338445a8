// The guest's entry into the native zygote: Python's fork protocol and the call into _guest.run.
#include "thor/zygote.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace thor {
namespace {

// Exit code of a snippet whose bootstrap, not its code, raised: cannot happen unless _guest.py is
// broken, and then must not look like success.
constexpr int kBootstrapFailed = 70;

int run_guest(void* context, const std::string& payload, volatile bool* out_of_memory) {
  const auto& run = *static_cast<py::function*>(context);
  const py::cpp_function report_out_of_memory([out_of_memory] { *out_of_memory = true; });
  try {
    return run(py::bytes(payload), report_out_of_memory).cast<int>();
  } catch (py::error_already_set& e) {
    e.restore();
    PyErr_Print();
    return kBootstrapFailed;
  }
}

// Called with the GIL held and never gives it up: the process has one thread.
[[noreturn]] void serve(int control_fd, std::vector<std::string> readonly_paths, py::function run) {
  const GuestHooks hooks{
      .context = &run,
      .before_fork = [](void* /*context*/) { PyOS_BeforeFork(); },
      .after_fork_parent = [](void* /*context*/) { PyOS_AfterFork_Parent(); },
      .after_fork_child = [](void* /*context*/) { PyOS_AfterFork_Child(); },
      .run = &run_guest,
  };
  serve_zygote(control_fd, JailSpec{.readonly_paths = std::move(readonly_paths)}, hooks);
}

}  // namespace

void register_zygote(py::module_& m) {
  m.def("serve_zygote", &serve, py::arg("control_fd"), py::arg("readonly_paths"), py::arg("run"));
}

}  // namespace thor
