// The guest's entry into the native template: Python's fork protocol and the calls into
// thor_fast/sandbox/guest/bootstrap.py.
#include "thor/zygote.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "core/heap.h"
#include "core/layers.h"

namespace py = pybind11;

namespace thor {
namespace {

// Exit code of a snippet whose bootstrap, not its code, raised: cannot happen unless that is
// broken, and then must not look like success.
constexpr int kBootstrapFailed = 70;

struct Guest {
  py::function refresh;
  py::function run;
};

// What escapes the guest's own code is our mistake, and must not look like success.
template <typename Call>
int guarded(const Call& call) {
  try {
    return call();
  } catch (py::error_already_set& e) {
    e.restore();
    PyErr_Print();
    return kBootstrapFailed;
  }
}

void refresh_guest(void* context, std::uint64_t seed) {
  const auto& guest = *static_cast<Guest*>(context);
  const int failed = guarded([&guest, seed] {
    guest.refresh(seed);
    return 0;
  });
  if (failed != 0) ::_exit(failed);
}

// Where the snippet of this process may say that it died of an allocation failure.
volatile bool* out_of_memory = nullptr;

int run_guest(void* context, const GuestJob& job) {
  const auto& guest = *static_cast<Guest*>(context);
  out_of_memory = job.out_of_memory;
  return guarded([&] { return guest.run(py::bytes(job.payload), job.has_dialogue).cast<int>(); });
}

// A snippet gets the usual ones again: it would not fill a huge page, but might be charged for it.
PyObjectArenaAllocator usual_arenas;

void use_own_arenas() {
  PyObject_GetArenaAllocator(&usual_arenas);
  PyObjectArenaAllocator ours = usual_arenas;
  ours.alloc = [](void* context, std::size_t size) {
    void* arena = new_arena(size);
    return arena == nullptr ? usual_arenas.alloc(context, size) : arena;
  };
  PyObject_SetArenaAllocator(&ours);
}

std::uint32_t layer_bits(const std::vector<std::string>& names) {
  std::uint32_t bits = 0;
  for (const std::string& name : names) bits |= bit(layer_of(name));
  return bits;
}

// Called with the GIL held and never gives it up: the process has one thread.
[[noreturn]] void serve(int control_fd, const py::dict& jail, py::function refresh,
                        py::function run) {
  Guest guest{std::move(refresh), std::move(run)};
  const GuestHooks hooks{
      .context = &guest,
      .before_fork = [](void* /*context*/) { PyOS_BeforeFork(); },
      .after_fork_parent = [](void* /*context*/) { PyOS_AfterFork_Parent(); },
      .after_fork_child = [](void* /*context*/) { PyOS_AfterFork_Child(); },
      .refresh = &refresh_guest,
      .run = &run_guest,
  };
  const JailSpec spec{
      .readonly_paths = jail["readonly"].cast<std::vector<std::string>>(),
      .required_layers = layer_bits(jail["required"].cast<std::vector<std::string>>()),
      .memory_cgroup = jail["memory_cgroup"].cast<bool>(),
      .cgroup_path = jail["cgroup_path"].cast<std::string>(),
  };
  serve_template(control_fd, spec, hooks);
}

}  // namespace

void register_zygote(py::module_& m) {
  m.def("serve_template", &serve, py::arg("control_fd"), py::arg("jail"), py::arg("refresh"),
        py::arg("run"));
  m.def("report_out_of_memory", [] {
    if (out_of_memory != nullptr) *out_of_memory = true;
  });
  m.def("use_own_arenas", &use_own_arenas);
  m.def("fill_free_memory", &fill_free_chunks);
  m.def("lay_out_memory", [] {
    PyObject_SetArenaAllocator(&usual_arenas);
    join_file_mappings();
    const std::size_t moved =
        move_code_to_huge_pages(reinterpret_cast<const void*>(&PyEval_EvalCode));
    return moved + collapse_heap();
  });
}

}  // namespace thor
