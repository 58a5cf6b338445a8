// Orchestrator and CompletionQueue for Python. Calls that wait drop the GIL, calls that
// only take a short lock keep it.
#include "thor/orchestrator.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace thor {
namespace {

using Seconds = std::chrono::duration<double>;

std::chrono::nanoseconds to_ns(double seconds) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Seconds(seconds));
}

const char* name(Status status) {
  switch (status) {
    case Status::kOk: return "ok";
    case Status::kError: return "error";
    case Status::kTimeout: return "timeout";
    case Status::kMemory: return "memory";
    case Status::kOutput: return "output";
    case Status::kKilled: return "killed";
    case Status::kInfra: return "infra";
  }
  return "infra";
}

// (ticket, status, stdout, stderr, exit_code, signal, wall_s, cpu_s, peak_bytes, truncated, error)
py::tuple to_python(const Completion& done) {
  const Result& r = done.result;
  return py::make_tuple(done.ticket, name(r.status), py::bytes(r.stdout_data),
                        py::bytes(r.stderr_data), r.exit_code, r.signal, Seconds(r.wall).count(),
                        Seconds(r.cpu).count(), r.peak_memory_bytes, r.truncated, r.error);
}

py::list to_python(const std::vector<Completion>& completions) {
  py::list out;
  for (const Completion& done : completions) out.append(to_python(done));
  return out;
}

std::uint64_t submit(Orchestrator& self, const std::shared_ptr<CompletionQueue>& sink,
                     std::string payload, std::string stdin_data, double timeout_s, double cpu_s,
                     std::uint64_t memory_bytes, std::uint64_t max_output_bytes,
                     std::uint32_t max_processes) {
  Request request{.payload = std::move(payload),
                  .stdin_data = std::move(stdin_data),
                  .limits = {.timeout = to_ns(timeout_s),
                             .cpu = to_ns(cpu_s),
                             .memory_bytes = memory_bytes,
                             .max_output_bytes = max_output_bytes,
                             .max_processes = max_processes}};
  // Does not wait, so keeps the GIL: getting it back from a busy thread can take milliseconds.
  return self.submit(std::move(request), sink);
}

py::dict stats(const Orchestrator& self) {
  const OrchestratorStats s = self.stats();
  py::dict out;
  out["submitted"] = s.submitted;
  out["completed"] = s.completed;
  out["queued"] = s.queued;
  out["running"] = s.running;
  out["zygote_starts"] = s.zygote_starts;
  return out;
}

}  // namespace

void register_orchestrator(py::module_& m) {
  py::register_exception<StartError>(m, "StartError", PyExc_RuntimeError);
  py::register_exception<QueueFull>(m, "QueueFullError", PyExc_RuntimeError);

  py::class_<CompletionQueue, std::shared_ptr<CompletionQueue>>(m, "CompletionQueue")
      .def(py::init<>())
      .def("event_fd", &CompletionQueue::event_fd)
      .def("drain", [](CompletionQueue& self) { return to_python(self.drain()); })
      .def(
          "wait",
          [](CompletionQueue& self, int timeout_ms) {
            std::vector<Completion> done;
            {
              const py::gil_scoped_release unlocked;
              done = self.wait(std::chrono::milliseconds(timeout_ms));
            }
            return to_python(done);
          },
          py::arg("timeout_ms"));

  py::class_<Orchestrator>(m, "Orchestrator")
      .def(py::init([](std::vector<std::string> argv, std::vector<std::string> env,
                       std::uint32_t slots, std::size_t queue_capacity, double startup_timeout_s) {
             const py::gil_scoped_release unlocked;
             return std::make_unique<Orchestrator>(OrchestratorConfig{
                 .argv = std::move(argv),
                 .env = std::move(env),
                 .slots = slots,
                 .queue_capacity = queue_capacity,
                 .startup_timeout = std::chrono::duration_cast<std::chrono::milliseconds>(
                     Seconds(startup_timeout_s))});
           }),
           py::kw_only(), py::arg("argv"), py::arg("env"), py::arg("slots"),
           py::arg("queue_capacity"), py::arg("startup_timeout_s"))
      .def("submit", &submit, py::arg("sink"), py::kw_only(), py::arg("payload"),
           py::arg("stdin_data"), py::arg("timeout_s"), py::arg("cpu_s"), py::arg("memory_bytes"),
           py::arg("max_output_bytes"), py::arg("max_processes"))
      .def("cancel", &Orchestrator::cancel, py::arg("ticket"))
      .def("stats", &stats)
      .def("close", &Orchestrator::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace thor
