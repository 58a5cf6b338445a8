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
#include "core/cgroup.h"
#include "core/layers.h"

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

py::dict to_python(const std::map<std::string, std::string>& files) {
  py::dict out;
  for (const auto& [path, content] : files) out[py::str(path)] = py::bytes(content);
  return out;
}

// (ticket, status, stdout, stderr, exit_code, signal, wall_s, cpu_s, peak_bytes, truncated, files,
// reply, error)
py::tuple to_python(const Completion& done) {
  const Result& r = done.result;
  return py::make_tuple(done.ticket, name(r.status), py::bytes(r.stdout_data),
                        py::bytes(r.stderr_data), r.exit_code, r.signal, Seconds(r.wall).count(),
                        Seconds(r.cpu).count(), r.peak_memory_bytes, r.truncated,
                        to_python(r.files), py::bytes(r.reply), r.error);
}

py::list to_python(const std::vector<Completion>& completions) {
  py::list out;
  for (const Completion& done : completions) out.append(to_python(done));
  return out;
}

Limits limits(double timeout_s, double cpu_s, std::uint64_t memory_bytes,
              std::uint64_t max_output_bytes, std::uint32_t max_processes) {
  return {.timeout = to_ns(timeout_s),
          .cpu = to_ns(cpu_s),
          .memory_bytes = memory_bytes,
          .max_output_bytes = max_output_bytes,
          .max_processes = max_processes};
}

Request request(std::string payload, std::string stdin_data, const Limits& limits,
                std::uint32_t tier, std::int32_t priority, std::vector<std::string> collect,
                bool accumulate, double life_s) {
  return {.payload = std::move(payload),
          .stdin_data = std::move(stdin_data),
          .limits = limits,
          .tier = tier,
          .priority = priority,
          .collect = std::move(collect),
          .accumulate = accumulate,
          .life = to_ns(life_s)};
}

py::dict stats(const Orchestrator& self) {
  const OrchestratorStats s = self.stats();
  py::dict out;
  out["submitted"] = s.submitted;
  out["completed"] = s.completed;
  out["queued"] = s.queued;
  out["running"] = s.counts.running;
  out["dialogues"] = s.dialogues;
  out["jails"] = s.counts.jails;
  out["jails_made"] = s.counts.jails_made;
  out["jails_discarded"] = s.counts.jails_discarded;
  out["template_starts"] = s.counts.template_starts;
  return out;
}

std::unique_ptr<Orchestrator> make_orchestrator(
    const std::vector<std::pair<std::string, std::vector<std::string>>>& tiers,
    std::vector<std::string> env, std::vector<int> cpus, std::uint32_t slots,
    std::uint32_t max_dialogues, std::size_t queue_capacity, double startup_timeout_s,
    std::shared_ptr<CgroupPool> cgroups) {
  OrchestratorConfig config{
      .tiers = {},
      .env = std::move(env),
      .cpus = std::move(cpus),
      .slots = slots,
      .max_dialogues = max_dialogues,
      .queue_capacity = queue_capacity,
      .startup_timeout =
          std::chrono::duration_cast<std::chrono::milliseconds>(Seconds(startup_timeout_s)),
      .cgroups = std::move(cgroups)};
  for (const auto& [name, argv] : tiers) config.tiers.push_back({name, argv});
  const py::gil_scoped_release unlocked;
  return std::make_unique<Orchestrator>(std::move(config));
}

// Calls that queue do not wait, so keep the GIL: getting it back from a busy thread can take
// milliseconds.
void define_orchestrator(py::module_& m) {
  py::class_<Limits>(m, "Limits")
      .def(py::init(&limits), py::kw_only(), py::arg("timeout_s"), py::arg("cpu_s"),
           py::arg("memory_bytes"), py::arg("max_output_bytes"), py::arg("max_processes"));
  py::class_<Request>(m, "Request")
      .def(py::init(&request), py::kw_only(), py::arg("payload"), py::arg("stdin_data"),
           py::arg("limits"), py::arg("tier"), py::arg("priority"), py::arg("collect"),
           py::arg("accumulate"), py::arg("life_s"));
  py::class_<CgroupPool, std::shared_ptr<CgroupPool>>(m, "CgroupPool")
      .def(py::init<>())
      .def_property_readonly(
          "granted", [](const CgroupPool& self) { return self.version() != CgroupVersion::kNone; })
      .def_property_readonly("path", &CgroupPool::path)
      .def_property_readonly("reason", &CgroupPool::reason);
  py::class_<Orchestrator>(m, "Orchestrator")
      .def(py::init(&make_orchestrator), py::kw_only(), py::arg("tiers"), py::arg("env"),
           py::arg("cpus"), py::arg("slots"), py::arg("max_dialogues"), py::arg("queue_capacity"),
           py::arg("startup_timeout_s"), py::arg("cgroups"))
      .def("submit", &Orchestrator::submit, py::arg("request"), py::arg("sink"))
      .def("open_dialogue", &Orchestrator::open_dialogue, py::arg("opening"))
      .def("step", &Orchestrator::step, py::arg("dialogue"), py::arg("data"), py::arg("limits"),
           py::arg("tier"), py::arg("sink"))
      .def("close_dialogue", &Orchestrator::close_dialogue, py::arg("dialogue"))
      .def("cancel", &Orchestrator::cancel, py::arg("ticket"))
      .def("stats", &stats)
      .def("layers",
           [](const Orchestrator& self) { return layer_names(self.stats().counts.layers); })
      .def("close", &Orchestrator::close, py::call_guard<py::gil_scoped_release>());
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

  define_orchestrator(m);
}

}  // namespace thor
