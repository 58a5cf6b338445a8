#include "core/layers.h"

#include <array>
#include <stdexcept>
#include <utility>

namespace thor {
namespace {

constexpr std::array<std::pair<Layer, const char*>, 7> kNames{{
    {Layer::kNetwork, "network_namespace"},
    {Layer::kIpc, "ipc_namespace"},
    {Layer::kUts, "uts_namespace"},
    {Layer::kCgroup, "cgroup_namespace"},
    {Layer::kTime, "time_namespace"},
    {Layer::kSeccomp, "seccomp"},
    {Layer::kLandlock, "landlock"},
}};

}  // namespace

Layer layer_of(const std::string& name) {
  for (const auto& [layer, its_name] : kNames) {
    if (name == its_name) return layer;
  }
  throw std::invalid_argument("layer is '" + name + "', expected one of network_namespace, " +
                              "ipc_namespace, uts_namespace, cgroup_namespace, time_namespace, " +
                              "seccomp, landlock");
}

std::vector<std::string> layer_names(std::uint32_t bits) {
  std::vector<std::string> out;
  for (const auto& [layer, name] : kNames) {
    if ((bits & bit(layer)) != 0) out.emplace_back(name);
  }
  return out;
}

}  // namespace thor
